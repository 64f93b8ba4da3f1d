"""Patch embedding, paper Eq. 1: the specification of the op, and the path without kernels."""

import jax.numpy as jnp

from kernels import dropout as drop


def to_unit(images):
    """uint8 0..255 to float32 in [-1, 1]: what the host would make of them, to 1.2e-7 (a device may fuse the two roundings)."""
    return jnp.clip(images.astype(jnp.float32) * jnp.float32(2 / 255) - 1, -1, 1)


def padded(tokens, rows: int):
    """Tokens [B, T, D] with rows of zeros behind, [B, rows, D]."""
    return jnp.pad(tokens, ((0, 0), (0, rows - tokens.shape[1]), (0, 0)))


def finished(tokens, cls, position, dropout, dtype, rows: int | None):
    """[B, T, D] in `dtype`, [B, rows, D] with `rows`, of embedded patches [B, N, D] with their bias, in the dtype of sums."""
    if cls is not None:
        first = jnp.broadcast_to(cls.astype(tokens.dtype), (tokens.shape[0], 1, tokens.shape[2]))
        tokens = jnp.concatenate([first, tokens], axis=1)
    if position is not None:
        tokens = tokens + position
    tokens = drop.apply(tokens, dropout, drop.EMBEDDING).astype(dtype)
    return tokens if rows is None else padded(tokens, rows)


def patch_embed(images, kernel, bias, cls, position, *, dropout=None, dtype=None, rows=None):
    """dropout([cls; patches @ kernel + bias] + position): images to tokens.

    images [B, Y, X, C], floats, or uint8 0..255 that stand for [-1, 1], of which tokens of `dtype` are made; kernel [P, P, C, D];
    bias [D]; cls [D], or None for a model without class token; position [T, D] or None, T = (Y/P) * (X/P) + (0 or 1), patches in
    row-major order. float32 or bfloat16, as `images`; accumulates in float32. Returns [B, T, D] in the dtype of `images`, or in
    `dtype` where those are bytes; with `rows`, [B, rows, D], the rows behind T being padding.
    """
    images = to_unit(images).astype(dtype) if images.dtype == jnp.uint8 else images
    p, _, c, d = kernel.shape
    b, y, x, _ = images.shape
    acc_dtype = jnp.promote_types(images.dtype, jnp.float32)
    patches = images.reshape(b, y // p, p, x // p, p, c)
    tokens = jnp.einsum("byixjc,ijcd->byxd", patches, kernel.astype(images.dtype), preferred_element_type=acc_dtype) + bias
    return finished(tokens.reshape(b, -1, d), cls, position, dropout, images.dtype, rows)
