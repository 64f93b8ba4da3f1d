"""The backward kernel of the MLP half; the equations and the plan stand in `tpu.py`.

It works on transposes, hidden values along the rows and tokens along the lanes: z and g are transposed once a row tile, dz back
once, and the five products a hidden tile needs take their operands as they lie or as the MXU's transposed load takes them:

    a' = W1' z',  dh' = W2 g',  dz' += W1 da',  dW1 += z' da,  dW2 += h' g

Under z' stand rows of ones: their part of the product with da is db1, without a reduction over lanes.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.body import dot, dropout, from_float32, iota, sweep, to_float32
from kernels.device import LANES
from kernels.layer_norm.tpu import normalise, normalise_back
from kernels.mlp.body import (
    PIECE,
    Block,
    at,
    by_tile,
    for_pieces,
    gelu,
    gelu_slope,
    hidden_columns,
    hidden_rows,
    keep,
    sum_by_tile,
)
from kernels.mlp.plan import Tiling
from kernels.vmem import round_up

ONES = 16  # rows of ones under z': one bfloat16 tile
_SPAN = 128  # hidden values recomputed at a time, for all rows: what registers can carry from the two products to the GELU


def z_rows(d: int) -> int:
    """Rows of the scratch that holds z' and the ones."""
    return round_up(d, ONES) + ONES


_SLOTS = 3  # of the streamed sums: one is written back, one worked on, one fetched


class Sums:
    """The float32 sums dW1 and dW2, a hidden tile at a time.

    Resident: slot j is hidden tile j, written to HBM during the last row tile. Streamed: three slots take turns; while a step works
    on one, the sum of the step before is written back from the second and that of the step after fetched into the third. All waits
    stand at the start of a step: what follows is one stretch of code.
    """

    def __init__(self, hbm, slots, semaphores, t: Tiling, i, j):
        self.hbm, self.slots, self.t, self.i, self.j = hbm, slots, t, i, j
        self.loads, self.stores = semaphores.at[0], semaphores.at[1]
        self.rows, self.tiles = pl.num_programs(0), pl.num_programs(1)
        self.step = i * self.tiles + j
        self.slot = j if t.resident else lax.rem(self.step, _SLOTS)

    def _copies(self, step, *, load):
        slot, j = lax.rem(step, _SLOTS), lax.rem(step, self.tiles)
        if self.t.resident:
            slot, j = step, step
        into_in, into_out = self.hbm
        if self.t.hidden < into_in.shape[1]:
            part = pl.ds(pl.multiple_of(j * self.t.hidden, self.t.hidden), self.t.hidden)
            into_in, into_out = into_in.at[:, part], into_out.at[part]
        pairs = ((self.slots[0].at[slot], into_in), (self.slots[1].at[slot], into_out))
        for k, (vmem, hbm) in enumerate(pairs):
            semaphore = (self.loads if load else self.stores).at[0 if self.t.resident else slot, k]
            yield pltpu.make_async_copy(hbm, vmem, semaphore) if load else pltpu.make_async_copy(vmem, hbm, semaphore)

    def ready(self):
        """The two slots of this step, holding the sums over the row tiles before this one; at i = 0, anything at all."""
        if not self.t.resident:

            @pl.when(self.step >= 2)
            def _():
                for copy in self._copies(self.step - 2, load=False):
                    copy.wait()

            # a hidden tile's earlier sum is in HBM by now: there being three tiles or more, its wait has been
            @pl.when((self.step + 1 >= self.tiles) & (self.step + 1 < self.rows * self.tiles))
            def _():
                for copy in self._copies(self.step + 1, load=True):
                    copy.start()

            @pl.when(self.i > 0)
            def _():
                for copy in self._copies(self.step, load=True):
                    copy.wait()

        return self.slots[0].at[self.slot], self.slots[1].at[self.slot]

    def send(self):
        """Sends the sums to HBM where they are due, and at the end of the grid waits for the last of them."""
        last = self.i + 1 == self.rows

        @pl.when(last if self.t.resident else True)
        def _():
            for copy in self._copies(self.j if self.t.resident else self.step, load=False):
                copy.start()

        @pl.when(last & (self.j + 1 == self.tiles))
        def _():
            tiles = self.slots[0].shape[0] if self.t.resident else None
            for step in range(tiles) if tiles else (self.step - 1, self.step):
                for copy in self._copies(step, load=False):
                    copy.wait()


def kernel(
    scalars, x, dy, scale, bias, w_in, b_in, w_out, dx, dw_in, dw_out, db_in, db_out, dscale, dbias,
    zt, gt, dzt, ht, dat, slots_in, slots_out, semaphores, nat=None, *, spec, t: Tiling, view: tuple[int, int],
):  # fmt: skip
    """One row tile times one hidden tile.

    dw_in [D, F] and dw_out [F, D] are in HBM; db_in [F/hidden, 1, hidden], db_out, dscale, dbias [8, D] gather over the
    grid, the last three by row modulo 8; scale, bias are eight equal rows.
    zt [D+, columns] is z' with ones below, gt [D, columns] is g', dzt the float32 sum of dz'; ht, dat [hidden, columns] h' and da'.
    nat [columns, D] float32 lays images out at their stride before a transpose; None where every piece is a whole square.
    """
    i, j = pl.program_id(0), pl.program_id(1)
    d = dzt.shape[0]
    block = Block(t, i, *view)
    sums = Sums((dw_in, dw_out), (slots_in, slots_out), semaphores, t, i, j)

    def natural(b, r, n):
        return normalise(jnp.where(block.valid(b, r, n), to_float32(x[b, pl.ds(r, n)], t.unpack), 0.0), spec.eps)

    def lay(target, b, r, n, value):
        if nat is None:
            target[:d, pl.ds(at(t, b, r), n)] = value.T.astype(target.dtype)
        else:
            nat[pl.ds(at(t, b, r), n)] = value

    def turn(target):
        if nat is not None:

            def square(c, _, nat=nat):
                target[:d, pl.ds(c, PIECE)] = nat[pl.ds(c, PIECE)].T.astype(target.dtype)

            sweep(t.columns, PIECE, square)

    @pl.when((i == 0) & (j == 0))
    def _():
        for ref in (db_in, db_out, dscale, dbias):
            ref[...] = jnp.zeros_like(ref)
        zt[d:] = jnp.ones_like(zt[d:])
        if nat is not None:  # the padding between images stays zero: nothing but dz', zero there too, is ever written to it
            nat[...] = jnp.zeros_like(nat)

    @pl.when(j == 0)
    def _():
        def lay_z(b, r, n):
            normal, _ = natural(b, r, n)
            lay(zt, b, r, n, by_tile(lambda v: v * scale[...] + bias[...], normal))

        def lay_g(b, r, n):
            g = jnp.where(block.valid(b, r, n), to_float32(dy[b, pl.ds(r, n)], t.unpack), 0.0)
            if spec.rate:
                g = dropout(g, keep(scalars, 1, block.global_rows(b, r, n), iota(d, 1), spec.rate), spec.rate)
            db_out[...] += spec.residual_scale * sum_by_tile(g)
            lay(gt, b, r, n, g)

        for_pieces(t, lay_z)
        turn(zt)
        for_pieces(t, lay_g)
        turn(gt)
        dzt[...] = jnp.zeros_like(dzt)

    first, span = (j * t.hidden if t.resident else 0), (_SPAN if t.hidden % _SPAN == 0 else t.hidden)

    def hidden(k):
        """A span of the hidden tile: recompute a and h, and from dh the gradient of a."""
        a = dot(hidden_columns(w_in, first + k, span), zt[:d], x.dtype, (0, 0)) + b_in[0, pl.ds(k, span)]
        h, p = gelu(a, spec.gelu)
        da = dot(hidden_rows(w_out, first + k, span), gt[...], x.dtype) * gelu_slope(a, h, p, spec.gelu)
        if spec.rate:
            columns = scalars[3] + j * t.hidden + k + iota(span, 0)
            mask = keep(scalars, 0, block.all_global_rows(t.columns, 1), columns, spec.rate)
            h, da = dropout(h, mask, spec.rate), dropout(da, mask, spec.rate)
        ht[pl.ds(k, span)], dat[pl.ds(k, span)] = h.astype(ht.dtype), da.astype(dat.dtype)

    into_in, into_out = sums.ready()
    sweep(t.hidden, span, lambda k, _: hidden(k))
    dzt[...] += dot(hidden_columns(w_in, first, t.hidden), dat[...], x.dtype)
    # One product each, not bands of them in a loop: v3 takes 6 % more cycles with bands of 256 rows.
    of_w_in = dot(zt[...], dat[...], x.dtype, (1, 1))
    into_in[...] = jnp.where(i == 0, 0.0, into_in[...]) + of_w_in[:d]
    db_in[j] += of_w_in[zt.shape[0] - 1 :]
    into_out[...] = jnp.where(i == 0, 0.0, into_out[...]) + dot(ht[...], gt[...], x.dtype, (1, 1))
    sums.send()

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        if nat is not None:

            def square(c, _, nat=nat):
                nat[pl.ds(c, PIECE)] = dzt[:, pl.ds(c, PIECE)].T

            sweep(t.columns, PIECE, square)

        def finish(b, r, n):
            normal, rsd = natural(b, r, n)
            rows = pl.ds(at(t, b, r), n)
            dz = dzt[:, rows].T if nat is None else nat[rows]
            dscale[...] += sum_by_tile(dz * normal)
            dbias[...] += sum_by_tile(dz)
            found = spec.residual_scale * to_float32(dy[b, pl.ds(r, n)], t.unpack)
            found = found + normalise_back(by_tile(lambda v: v * scale[...], dz), normal, rsd)
            dx[b, pl.ds(r, n)] = from_float32(found, dx.dtype, t.unpack)

        for_pieces(t, finish)


def scratch(t: Tiling, d: int, tiles_f: int, operand) -> list:
    """The scratch buffers, in the kernel's order."""
    slots = tiles_f if t.resident else _SLOTS
    buffers = [
        pltpu.VMEM((z_rows(d), t.columns), operand),
        pltpu.VMEM((d, t.columns), operand),
        pltpu.VMEM((d, t.columns), jnp.float32),
        pltpu.VMEM((t.hidden, t.columns), operand),
        pltpu.VMEM((t.hidden, t.columns), operand),
        pltpu.VMEM((slots, d, t.hidden), jnp.float32),
        pltpu.VMEM((slots, t.hidden, d), jnp.float32),
        pltpu.SemaphoreType.DMA((2, _SLOTS, 2)),
    ]
    return buffers if t.stride % LANES == 0 else [*buffers, pltpu.VMEM((t.columns, d), jnp.float32)]
