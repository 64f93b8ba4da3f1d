"""Patch embedding on a GPU: the reference, its product rounded where it is made; `kernels/attention/gpu.py` says why."""

import jax.numpy as jnp

from kernels import dropout as drop
from kernels.attention.gpu import product


def patch_embed(images, kernel, bias, cls, position, *, dropout=None):
    """As `reference.patch_embed`: the same arguments, the same result to rounding."""
    p, _, c, d = kernel.shape
    b, y, x, _ = images.shape
    acc_dtype = jnp.promote_types(images.dtype, jnp.float32)
    patches = images.reshape(b, y // p, p, x // p, p, c).swapaxes(2, 3).reshape(-1, p * p * c)
    tokens = product(patches, kernel.reshape(-1, d)).reshape(b, -1, d).astype(acc_dtype) + bias
    if cls is not None:
        tokens = jnp.concatenate([jnp.broadcast_to(cls.astype(acc_dtype), (b, 1, d)), tokens], axis=1)
    if position is not None:
        tokens = tokens + position
    return drop.apply(tokens, dropout, drop.EMBEDDING).astype(images.dtype)
