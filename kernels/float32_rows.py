"""Rows of an image in float32, for v2 and v3, where float32 feeds the MXU without a pause: their order, and both ends of a half
block's backward pass.

A store that packs bfloat16 halts the MXU of these generations, so kernels between x and the result pass float32 rows on. Each image
has R of them, T rounded up to 8, in the order of `unpacked`, which products, LN and softmax do not depend on: [B, R, .] is [B R, .]
without a copy. Attention and the MLP begin and end their backward passes alike:

    z = LN(x),  g = dropout(dy)                                               prepare
    dx = s dy + LN'(dz), with the sums for norm_scale and norm_bias           finish
"""

from functools import partial
from typing import Any, Protocol

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.body import F32, PACKED_ROWS, dropout, from_float32, iota, kept, to_float32, unpacked_row
from kernels.device import SUBLANES
from kernels.launch import Launch, call
from kernels.layer_norm.tpu import normalise, normalise_back
from kernels.vmem import round_up

PIECE = 64  # rows normalised at a time
COLUMNS = 256  # of a weight in one product


def pieces(total: int, size: int) -> list[tuple[int, int]]:
    """(first, count) of consecutive pieces of `size` rows, a multiple of 16, and of the shorter rest, cut again at whole 16."""
    whole = total // PACKED_ROWS * PACKED_ROWS
    found = [(a, min(size, whole - a)) for a in range(0, whole, size)]
    return found + [(whole, total - whole)] * (total > whole)


def _is_packed(count: int, dtype) -> bool:
    """Whether rows of an array are unpacked by integer arithmetic: whole 16 of bfloat16. The rest stays in order."""
    return dtype == jnp.bfloat16 and count % PACKED_ROWS == 0


def unpacked(value):
    """[rows, columns] in float32, each whole 16 rows of bfloat16 as 8 even and 8 odd ones."""
    return to_float32(value, _is_packed(value.shape[0], value.dtype))


def packed(value, dtype):
    """The inverse of `unpacked`: float32 [rows, columns] in `dtype`, in the order of the array."""
    return from_float32(value, dtype, _is_packed(value.shape[0], dtype))


def token(first: int, count: int, dtype):
    """int32 [count, 1]: the tokens in rows first ... of what `unpacked` made of an array of `dtype`."""
    return first + unpacked_row(iota(count, 0), _is_packed(count, dtype))


def token_at(place, t: int, dtype):
    """int32: the tokens at `place` in what `unpacked` made of an image's t rows of `dtype`; behind them the rows themselves."""
    whole = t // PACKED_ROWS * PACKED_ROWS if dtype == jnp.bfloat16 else 0
    return jnp.where(place < whole, unpacked_row(place, True), place)


def column_slices(total: int, size: int = COLUMNS) -> list[slice]:
    """0 .. total in slices of `size` and a shorter last one."""
    return [slice(c, min(c + size, total)) for c in range(0, total, size)]


def drop(value, scalars, row, rate: float, first_column: Any = 0):
    """Dropout of [rows, columns] float32 whose int32 [rows, 1] global rows, less the first, are `row`; its own transpose."""
    if not rate:
        return value
    columns = first_column + iota(value.shape[1], 1)
    return dropout(value, kept(scalars[0], scalars[1] + row, columns, rate), rate)


# ---- both ends of a backward pass


class Half(Protocol):
    """What is read here of a call of a half block: `tokens` of an image that count, None for all; rate of dropout; eps of LN."""

    @property
    def launch(self) -> Launch: ...

    @property
    def rate(self) -> float: ...

    @property
    def residual_scale(self) -> float: ...

    @property
    def eps(self) -> float: ...

    @property
    def tokens(self) -> int | None: ...


def _images(b: int, t: int, d: int, half: Half):
    """`call` for a kernel that takes b images one by one, and block specs of one image of [B, T, D], from image scalars[2] on, of
    [b, R, D] and of a vector [1, D]."""
    cost = pl.CostEstimate(flops=8 * b * t * d, transcendentals=b * t, bytes_accessed=12 * b * t * d)
    return (
        partial(call, launch=half.launch, grid=(b,), semantics=("parallel",), cost=cost, prefetch=1),
        pl.BlockSpec((1, t, d), lambda i, scalars: (scalars[2] + i, 0, 0)),
        pl.BlockSpec((1, round_up(t, SUBLANES), d), lambda i, _: (i, 0, 0)),
        pl.BlockSpec((1, d), lambda i, _: (0, 0)),
    )


def prepare(scalars, x, dy, norm, b: int, half: Half, name: str):
    """z = LN(x) and g = dropout(dy) of b images, both [b, R, D] float32 with zeros behind row T."""
    _, t, d = x.shape
    padded = round_up(t, SUBLANES)
    launch, image, rows, vector = _images(b, t, d, half)

    def kernel(scalars, x, dy, scale, bias, z, g):
        for a, n in pieces(t, PIECE):
            normal, _ = normalise(unpacked(x[0, a : a + n]), half.eps)
            z[0, a : a + n] = normal * scale[...] + bias[...]
            row = pl.program_id(0) * (half.tokens or t) + token(a, n, x.dtype)
            g[0, a : a + n] = drop(unpacked(dy[0, a : a + n]), scalars, row, half.rate)
        if padded > t:
            z[0, t:] = g[0, t:] = jnp.zeros((padded - t, d), F32)

    return launch(
        kernel,
        name=name,
        in_specs=[image, image, vector, vector],
        out_specs=[rows, rows],
        out_shapes=[((b, padded, d), F32)] * 2,
    )(scalars, x, dy, *norm)


def finish(scalars, x, dy, dz, norm_scale, half: Half, name: str):
    """dx in the place of dy [B, T, D], for the images of dz [b, R, D], and those of norm_scale and norm_bias [D] float32."""
    b, (_, t, d) = dz.shape[0], x.shape
    launch, image, rows, vector = _images(b, t, d, half)

    def kernel(_, x, dy, dz, scale, dx, sums):
        of_scale, of_bias = jnp.zeros((1, d), F32), jnp.zeros((1, d), F32)
        for a, n in pieces(t, PIECE):
            normal, inverse = normalise(unpacked(x[0, a : a + n]), half.eps)
            u = dz[0, a : a + n]
            of_scale, of_bias = of_scale + (u * normal).sum(0, keepdims=True), of_bias + u.sum(0, keepdims=True)
            back = normalise_back(u * scale[...], normal, inverse)
            dx[0, a : a + n] = packed(half.residual_scale * unpacked(dy[0, a : a + n]) + back, x.dtype)
        sums[0] = jnp.concatenate([of_scale, of_bias])

    dx, sums = launch(
        kernel,
        name=name,
        in_specs=[image, image, rows, vector],
        out_specs=[image, pl.BlockSpec((1, 2, d), lambda i, _: (i, 0, 0))],
        out_shapes=[(x.shape, x.dtype), ((b, 2, d), F32)],
        aliases={2: 0},
    )(scalars, x, dy, dz, norm_scale)
    return dx, *sums.sum(0)
