"""The backward kernel of the MLP half; the equations and the plan stand in `tpu.py`.

It works on transposes, hidden values along the rows and tokens along the lanes: z and g are transposed once a row tile, dz back
once, and the five products a hidden tile needs take their operands as they lie or as the MXU's transposed load takes them:

    a' = W1' z',  dh' = W2 g',  dz' += W1 da',  dW1 += z' da,  dW2 += h' g

Where the forward kernel kept a, `kept.py` stands in this kernel's place.

Under z' stand rows of ones: their part of the product with da is db1, without a reduction over lanes.
"""

from typing import Any, NamedTuple

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
    in_spans,
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


SLOTS = 3  # of the streamed sums: one is written back, one worked on, one fetched


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
        self.slot = j if t.resident else lax.rem(self.step, SLOTS)

    def _copies(self, step, *, load):
        slot, j = lax.rem(step, SLOTS), lax.rem(step, self.tiles)
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


class Refs(NamedTuple):
    """The kernel's arrays, in its order.

    scale, bias are eight equal rows. dw_in [D, F] and dw_out [F, D] are in HBM; db_in [F/hidden, 1, hidden], db_out, dscale,
    dbias [8, D] gather over the grid, the last three by row modulo 8. zt [D+, columns] is z' with ones below, gt [D, columns] is
    g', dzt the float32 sum of dz'; ht, dat [hidden, columns] h' and da'. nat [columns, D] float32 lays images out at their stride
    before a transpose; None where every piece is a whole square.
    """

    scalars: Any
    x: Any
    dy: Any
    scale: Any
    bias: Any
    w_in: Any
    b_in: Any
    w_out: Any
    dx: Any
    dw_in: Any
    dw_out: Any
    db_in: Any
    db_out: Any
    dscale: Any
    dbias: Any
    zt: Any
    gt: Any
    dzt: Any
    ht: Any
    dat: Any
    slots_in: Any
    slots_out: Any
    semaphores: Any
    nat: Any = None


def kernel(*arrays, spec, t: Tiling, view: tuple[int, int, int, int]):
    """One row tile times one hidden tile of the arrays that `Refs` names."""
    refs = Refs(*arrays)
    i, j = pl.program_id(0), pl.program_id(1)
    block = Block(t, i, *view)
    sums = Sums((refs.dw_in, refs.dw_out), (refs.slots_in, refs.slots_out), refs.semaphores, t, i, j)

    @pl.when((i == 0) & (j == 0))
    def _():
        _clear(refs)

    @pl.when(j == 0)
    def _():
        _lay_rows(refs, spec, t, block)

    first = j * t.hidden if t.resident else 0
    span = t.hidden // t.spans if t.spans > 1 else _SPAN if t.hidden % _SPAN == 0 else t.hidden
    zt, gt, ht, dat, dtype = refs.zt, refs.gt, refs.ht, refs.dat, refs.x.dtype

    def hidden(k):
        """A span of the hidden tile: recompute a and h, and from dh the gradient of a."""
        a = dot(hidden_columns(refs.w_in, first + k, span), zt[: refs.dzt.shape[0]], dtype, (0, 0)) + refs.b_in[0, pl.ds(k, span)]
        h, p = gelu(a, spec.gelu)
        da = dot(hidden_rows(refs.w_out, first + k, span), gt[...], dtype) * gelu_slope(a, h, p, spec.gelu)
        if spec.rate:
            columns = refs.scalars[3] + j * t.hidden + k + iota(span, 0)
            mask = keep(refs.scalars, 0, block.all_global_rows(t.columns, 1), columns, spec.rate)
            h, da = dropout(h, mask, spec.rate), dropout(da, mask, spec.rate)
        ht[pl.ds(k, span)], dat[pl.ds(k, span)] = h.astype(ht.dtype), da.astype(dat.dtype)

    def products(n):
        """What the n-th of the tile's spans adds to dz' and to the sums."""
        part = t.hidden // t.spans
        rows = pl.ds(n * part, part)
        refs.dzt[...] += dot(hidden_columns(refs.w_in, first + n * part, part), dat[rows], dtype)
        # One product each, not bands of them in a loop: v3 takes 6 % more cycles with bands of 256 rows.
        of_w_in = dot(zt[...], dat[rows], dtype, (1, 1))
        into_in[:, rows] = jnp.where(i == 0, 0.0, into_in[:, rows]) + of_w_in[: refs.dzt.shape[0]]
        refs.db_in[j, :, rows] += of_w_in[zt.shape[0] - 1 :]
        into_out[rows] = jnp.where(i == 0, 0.0, into_out[rows]) + dot(ht[rows], gt[...], dtype, (1, 1))

    into_in, into_out = sums.ready()
    in_spans(t, span, hidden, products)
    sums.send()

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        _finish_rows(refs, spec, t, block)


def _clear(refs: Refs):
    """What gathers over the grid is zero at its start, and the ones stand under z'."""
    for ref in (refs.db_in, refs.db_out, refs.dscale, refs.dbias):
        ref[...] = jnp.zeros_like(ref)
    d = refs.dzt.shape[0]
    refs.zt[d:] = jnp.ones_like(refs.zt[d:])
    if refs.nat is not None:  # the padding between images stays zero: nothing but dz', zero there too, is ever written to it
        refs.nat[...] = jnp.zeros_like(refs.nat)


def normal_rows(refs, spec, t: Tiling, block: Block, b, r, n):
    """n rows of image b from row r on, normalised, those behind its last token zero; and 1/deviation."""
    return normalise(_existing(refs.x, t, block, b, r, n), spec.eps)


def _existing(ref, t: Tiling, block: Block, b, r, n):
    """n rows of image b of a block from row r on, float32, those behind its last token zero."""
    if t.roomy and t.whole(block.images, block.rows):
        return to_float32(ref[b, pl.ds(r, n)], t.unpack)
    return jnp.where(block.valid(b, r, n), to_float32(ref[b, pl.ds(r, n)], t.unpack), 0.0)


def gradient_rows(refs, spec, t: Tiling, block: Block, b, r, n):
    """g of the same rows, the gradient of the output product's result, its dropout done; and their part of db2."""
    g = _existing(refs.dy, t, block, b, r, n)
    if spec.rate:
        g = dropout(g, keep(refs.scalars, 1, block.global_rows(b, r, n), iota(refs.x.shape[-1], 1), spec.rate), spec.rate)
    refs.db_out[...] += spec.residual_scale * sum_by_tile(g)
    return g


def finish_rows(refs, spec, t: Tiling, block: Block, b, r, n, read, normals=None):
    """dx of the same rows, and their part of the layer norm's gradients. read: a slice of the row tile -> its dz; normals: -> what
    `normal_rows` returned, made again without."""
    normal, rsd = normals(pl.ds(at(t, b, r), n)) if normals else normal_rows(refs, spec, t, block, b, r, n)
    dz = read(pl.ds(at(t, b, r), n))
    refs.dscale[...] += sum_by_tile(dz * normal)
    refs.dbias[...] += sum_by_tile(dz)
    found = spec.residual_scale * to_float32(refs.dy[b, pl.ds(r, n)], t.unpack)
    found = found + normalise_back(by_tile(lambda v: v * refs.scale[...], dz), normal, rsd)
    into = refs.dy if t.shared else refs.dx
    into[b, pl.ds(r, n)] = from_float32(found, refs.dx.dtype, t.unpack)


def send_rows(refs, t: Tiling, i):
    """Copies dx of the flat row tile i to HBM from where dy was, if it shares its block."""
    if not t.shared:
        return
    rows = refs.dx.shape[1]
    last = (rows - 1) // t.rows

    def send(n: int):
        into = refs.dx.at[:, pl.ds(pl.multiple_of(i * t.rows, t.rows), n)]
        copy = pltpu.make_async_copy(refs.dy.at[:, pl.ds(0, n)], into, refs.semaphores.at[0, SLOTS, 0])
        copy.start()
        copy.wait()

    if rest := rows % t.rows:
        pl.when(i < last)(lambda: send(t.rows))
        pl.when(i == last)(lambda: send(rest))
    else:
        send(t.rows)


def _lay_rows(refs: Refs, spec, t: Tiling, block: Block):
    """A row tile's z' and g', and their part of db2; the sum of dz' begins."""
    nat, d = refs.nat, refs.dzt.shape[0]

    def lay(target, b, r, n, value):
        if nat is None:
            target[:d, pl.ds(at(t, b, r), n)] = value.T.astype(target.dtype)
        else:
            nat[pl.ds(at(t, b, r), n)] = value

    def transpose_into(target):
        if nat is not None:

            def square(c, _):
                target[:d, pl.ds(c, PIECE)] = nat[pl.ds(c, PIECE)].T.astype(target.dtype)

            sweep(t.columns, PIECE, square)

    def lay_z(b, r, n):
        normal, _ = normal_rows(refs, spec, t, block, b, r, n)
        lay(refs.zt, b, r, n, by_tile(lambda v: v * refs.scale[...] + refs.bias[...], normal))

    def lay_g(b, r, n):
        g = gradient_rows(refs, spec, t, block, b, r, n)
        lay(refs.gt, b, r, n, g)

    for_pieces(t, lay_z)
    transpose_into(refs.zt)
    for_pieces(t, lay_g)
    transpose_into(refs.gt)
    refs.dzt[...] = jnp.zeros_like(refs.dzt)


def _finish_rows(refs: Refs, spec, t: Tiling, block: Block):
    """dx of a row tile from its whole dz', and its part of the layer norm's gradients."""
    nat, dzt = refs.nat, refs.dzt
    if nat is not None:

        def square(c, _):
            nat[pl.ds(c, PIECE)] = dzt[:, pl.ds(c, PIECE)].T

        sweep(t.columns, PIECE, square)

    def read(rows):
        return dzt[:, rows].T if nat is None else nat[rows]

    for_pieces(t, lambda b, r, n: finish_rows(refs, spec, t, block, b, r, n, read))
    send_rows(refs, t, block.tile)


def scratch(t: Tiling, d: int, tiles_f: int, operand) -> list:
    """The scratch buffers, in the kernel's order."""
    slots = tiles_f if t.resident else SLOTS
    buffers = [
        pltpu.VMEM((z_rows(d), t.columns), operand),
        pltpu.VMEM((d, t.columns), operand),
        pltpu.VMEM((d, t.columns), jnp.float32),
        pltpu.VMEM((t.hidden, t.columns), operand),
        pltpu.VMEM((t.hidden, t.columns), operand),
        pltpu.VMEM((slots, d, t.hidden), jnp.float32),
        pltpu.VMEM((slots, t.hidden, d), jnp.float32),
        pltpu.SemaphoreType.DMA((2, SLOTS + 1, 2)),
    ]
    return buffers if t.stride % LANES == 0 else [*buffers, pltpu.VMEM((t.columns, d), jnp.float32)]
