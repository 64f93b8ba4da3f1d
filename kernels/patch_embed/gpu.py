"""Patch embedding on a GPU: the reference, its product rounded where it is made; `kernels/attention/gpu.py` says why.

Of bytes, on Hopper, one kernel (`hopper.py`), where `hopper_plan.refuses` says nothing.
"""

import jax.numpy as jnp

from kernels.attention.gpu import product
from kernels.patch_embed.hopper_plan import Shape, refuses
from kernels.patch_embed.reference import finished, to_unit


def patch_embed(images, kernel, bias, cls, position, *, dropout=None, dtype=None, rows=None):
    """As `reference.patch_embed`: the same arguments, the same result to rounding."""
    p, _, c, d = kernel.shape
    b, y, x, _ = images.shape
    if images.dtype == jnp.uint8:
        first, patches = int(cls is not None), (y // p) * (x // p)
        t = rows or first + patches
        shape = Shape(batch=b, channels=c, rows=y // p, columns=x // p, patch=p, width=d, tokens=t, first=first)
        if refuses(shape, dtype) is None:
            from kernels.patch_embed import hopper  # Mosaic GPU takes a third of a second to import

            return hopper.patch_embed(images, kernel, bias, cls, position, dropout=dropout, shape=shape)
        images = to_unit(images).astype(dtype)
    acc_dtype = jnp.promote_types(images.dtype, jnp.float32)
    patches = images.reshape(b, y // p, p, x // p, p, c).swapaxes(2, 3).reshape(-1, p * p * c)
    tokens = product(patches, kernel.reshape(-1, d)).reshape(b, -1, d).astype(acc_dtype) + bias
    return finished(tokens, cls, position, dropout, images.dtype, rows)
