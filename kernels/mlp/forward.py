"""The forward kernel of the MLP half; the equations and the plan stand in `tpu.py`.

In a row tile that is not tall the last hidden tile has code of its own: there the sums go from the MXU through dropout and residual
straight to y, beside the product that makes them, instead of to `acc` and back in a pass of their own.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.body import dot, dropout, from_float32, iota, sweep, to_float32
from kernels.device import SUBLANES
from kernels.layer_norm.tpu import normalise
from kernels.mlp.arriving import Arriving
from kernels.mlp.body import Block, block_specs, by_tile, gelu, hidden_columns, hidden_rows, keep
from kernels.mlp.plan import Shape, Tiling

# Twice the code of a taller tile takes minutes to compile (1,664 rows on v5e), and there a pass is a smaller part of the whole.
FUSED_ROWS = 512


def _piece(t: Tiling) -> int:
    """Rows normalised at a time: what divides a row tile into whole register tiles, at most 128."""
    return max(n for n in range(8, min(t.height, 128) + 1, 8) if t.height % n == 0 and (n % 16 == 0 or t.height % 16))


class _Flat:
    """A block [images, stride, D] as [height, D] rows: a view, for Mosaic of the reference, for the interpreter of its value."""

    def __init__(self, ref, t: Tiling, *, interpret: bool):
        self.ref, self.interpret, self.shape = ref, interpret, (t.height, ref.shape[-1])

    def rows(self, first, size):
        if self.interpret:
            return lax.dynamic_slice_in_dim(self.ref[...].reshape(self.shape), first, size)
        return self.ref.reshape(self.shape)[pl.ds(first, size)]

    def store(self, first, value):
        if self.interpret:
            whole = self.ref[...].reshape(self.shape)
            self.ref[...] = lax.dynamic_update_slice_in_dim(whole, value, first, 0).reshape(self.ref.shape)
        else:
            self.ref.reshape(self.shape)[pl.ds(first, value.shape[0])] = value


def _lay_rows(x: _Flat, z, scale, bias, exist, spec, t: Tiling):
    """The normalised rows of a row tile into z. exist: (first, rows) -> which there are, whose others count as zeros; or None."""
    size = _piece(t)

    def begin(first):
        rows = pl.ds(first, size)
        values = to_float32(x.rows(first, size), t.unpack)
        if exist:
            values = jnp.where(exist(first, size), values, 0.0)
        normal, _ = normalise(values, spec.eps)
        z[rows] = by_tile(lambda n: n * scale[...] + bias[...], normal).astype(z.dtype)

    sweep(t.height, size, lambda first, _: begin(first))


def kernel(scalars, x, scale, bias, w_in, b_in, w_out, b_out, y, *rest, spec, t: Tiling, view, hidden_tiles: int):
    """One row tile times one hidden tile. x, y [images, stride, D]; z [height, D] the normalised rows, acc [height, D] float32 the
    sum over hidden tiles; scale, bias, b_out, b_in [8, K] eight equal rows; kept [1, height, hidden] the hidden values before GELU,
    if they are asked for."""
    i, j = pl.program_id(0), pl.program_id(1)
    weights = None
    if t.roomy:
        memory = rest[2 + t.keep :]
        weights = Arriving((w_in, w_out), memory, t, i, j)
        w_in, w_out = memory[:2]
        weights.begin()
    *kept, z, acc = rest[: 2 + t.keep]
    d = acc.shape[1]
    block = Block(t, i, *view)
    flat_x, flat_y = (_Flat(ref, t, interpret=bool(spec.launch.interpret)) for ref in (x, y))
    size = _piece(t)

    # what the backward kernel reads of rows that do not exist must be finite: it multiplies it by zero
    exist = block.exist if kept and not (t.roomy and t.whole(*view[:2])) else None
    pl.when(j == 0)(lambda: _lay_rows(flat_x, z, scale, bias, exist, spec, t))

    if weights:
        weights.ready()

    def product():
        hidden = j * t.hidden if t.resident else 0
        a = by_tile(lambda a: a + b_in[0], dot(z[...], hidden_columns(w_in, hidden, t.hidden), x.dtype))
        if kept:
            kept[0][0] = from_float32(a, kept[0].dtype, t.unpack)
        h: Any = gelu(a, spec.gelu)[0]
        if spec.rate:
            columns = scalars[3] + j * t.hidden + iota(t.hidden, 1)
            h = dropout(h, keep(scalars, 0, block.all_global_rows(t.height, 0), columns, spec.rate), spec.rate)
        return dot(h.astype(z.dtype), hidden_rows(w_out, hidden, t.hidden), x.dtype)

    def finish(first, out):
        n = out.shape[0]
        out = by_tile(lambda a: a + spec.residual_scale * b_out[...], out)
        if spec.rate:
            out = dropout(out, keep(scalars, 1, block.all_global_rows(n, 0, first), iota(d, 1), spec.rate), spec.rate)
        flat_y.store(
            first, from_float32(spec.residual_scale * to_float32(flat_x.rows(first, n), t.unpack) + out, y.dtype, t.unpack)
        )

    last = j + 1 == hidden_tiles
    if t.height > FUSED_ROWS:
        acc[...] = jnp.where(j == 0, 0.0, acc[...]) + product()
        pl.when(last)(lambda: sweep(t.height, size, lambda first, n: finish(first, acc[pl.ds(first, n)])))
        return

    @pl.when(jnp.logical_not(last))
    def _():
        acc[...] = jnp.where(j == 0, 0.0, acc[...]) + product()

    @pl.when(last)
    def _():
        finish(0, jnp.where(j == 0, 0.0, acc[...]) + product())


def specs(t: Tiling, shape: Shape):
    """(input specs, output specs)."""
    rows, vector, w_in, w_out = block_specs(t, shape, t.stride)
    b_in = pl.BlockSpec((1, SUBLANES, t.hidden), lambda i, j, _: (j, 0, 0))
    kept = pl.BlockSpec((1, t.height, t.hidden), lambda i, j, _: (i, 0, j))
    return (rows, vector, vector, w_in, b_in, w_out, vector), [rows, kept] if t.keep else [rows]


def scratch(t: Tiling, d: int, operand) -> list:
    return [pltpu.VMEM((t.height, d), operand), pltpu.VMEM((t.height, d), jnp.float32)]
