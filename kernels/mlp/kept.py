"""The backward kernel of the MLP half where the forward kernel kept the hidden values; the equations stand in `tpu.py`.

Without the product that makes a again, nothing wants z as it lies, and only the two sums over rows want a transpose: of z, once a
row tile, and of h, a hidden tile at a time, which the transpose unit does beside the MXU. Everything else stays in the order of x:

    dh = g W2',  dz += da W1',  dW1 += z' da,  dW2 += h' g
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.body import dot, dropout, iota, sweep, to_float32
from kernels.device import LANES
from kernels.mlp.arriving import Arriving
from kernels.mlp.backward import SLOTS, Sums, finish_rows, gradient_rows, normal_rows, send_rows
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


class Refs(NamedTuple):
    """The kernel's arrays, in its order.

    scale, bias are eight equal rows; kept [1, height, hidden] is a of the tile. dw_in [D, F] and dw_out [F, D] are in HBM; db_in
    [F/hidden, 8, hidden], db_out, dscale, dbias [8, D] gather over the grid, by row modulo 8. zt [D, columns] is z', g [columns, D]
    the masked dy, dz [columns, D] its float32 sum; ht [hidden, columns] h', da [columns, hidden]. Of roomy tiles: normal
    [columns, D] and rsd [columns, 1] are what `normal_rows` returned; w_in and w_out, in HBM, come to near_in and near_out, by way
    of tile_in and tile_out where they are rounded.
    """

    scalars: Any
    x: Any
    dy: Any
    scale: Any
    bias: Any
    w_in: Any
    kept: Any
    w_out: Any
    dx: Any
    dw_in: Any
    dw_out: Any
    db_in: Any
    db_out: Any
    dscale: Any
    dbias: Any
    zt: Any
    g: Any
    dz: Any
    ht: Any
    da: Any
    slots_in: Any
    slots_out: Any
    semaphores: Any
    normal: Any = None
    rsd: Any = None
    near_in: Any = None
    near_out: Any = None
    arrivals: Any = None
    tile_in: Any = None
    tile_out: Any = None


def kernel(*arrays, spec, t: Tiling, view: tuple[int, int, int, int]):
    """One row tile times one hidden tile of the arrays that `Refs` names."""
    refs = Refs(*arrays)
    i, j = pl.program_id(0), pl.program_id(1)
    block = Block(t, i, *view)
    sums = Sums((refs.dw_in, refs.dw_out), (refs.slots_in, refs.slots_out), refs.semaphores, t, i, j)
    weights = None
    if t.roomy:
        memory = [ref for ref in (refs.near_in, refs.near_out, refs.arrivals, refs.tile_in, refs.tile_out) if ref is not None]
        weights = Arriving((refs.w_in, refs.w_out), memory, t, i, j)
        weights.begin()
        refs = refs._replace(w_in=refs.near_in, w_out=refs.near_out)

    @pl.when((i == 0) & (j == 0))
    def _():
        for ref in (refs.db_in, refs.db_out, refs.dscale, refs.dbias):
            ref[...] = jnp.zeros_like(ref)
        if t.columns > t.rows:  # places of no row stay zero in g; what stands beside them in z and h is finite
            refs.g[...] = jnp.zeros_like(refs.g)

    @pl.when(j == 0)
    def _():
        _lay_rows(refs, spec, t, block)

    first = j * t.hidden if t.resident else 0
    span = t.hidden // t.spans if t.spans > 1 else math.gcd(t.hidden, spec.launch.device.mxu)  # as wide as an array
    g, ht, da, dtype = refs.g, refs.ht, refs.da, refs.x.dtype

    def hidden(k):
        """A span of the hidden tile: h and, from dh, the gradient of a."""
        a = to_float32(refs.kept[0, :, pl.ds(k, span)], t.unpack)
        if t.columns > t.height:
            a = jnp.concatenate([a, jnp.zeros((t.columns - t.height, span), jnp.float32)])
        h, p = gelu(a, spec.gelu)
        back = dot(g[...], hidden_rows(refs.w_out, first + k, span), dtype, (1, 1)) * gelu_slope(a, h, p, spec.gelu)
        if spec.rate:
            columns = refs.scalars[3] + j * t.hidden + k + iota(span, 1)
            mask = keep(refs.scalars, 0, block.all_global_rows(t.columns, 0), columns, spec.rate)
            h, back = dropout(h, mask, spec.rate), dropout(back, mask, spec.rate)
        refs.db_in[j, :, pl.ds(k, span)] += sum_by_tile(back)
        ht[pl.ds(k, span)], da[:, pl.ds(k, span)] = h.T.astype(ht.dtype), back.astype(da.dtype)

    def products(n):
        """What the n-th of the tile's spans adds to dz and to the sums."""
        part = t.hidden // t.spans
        columns = pl.ds(n * part, part)
        w_in, back = hidden_columns(refs.w_in, first + n * part, part), da[:, columns]
        refs.dz[...] = (refs.dz[...] if n else jnp.where(j == 0, 0.0, refs.dz[...])) + dot(back, w_in, dtype, (1, 1))
        into_in[:, columns] = jnp.where(i == 0, 0.0, into_in[:, columns]) + dot(refs.zt[...], back, dtype)
        into_out[columns] = jnp.where(i == 0, 0.0, into_out[columns]) + dot(ht[columns], g[...], dtype)

    into_in, into_out = sums.ready()
    if weights:
        weights.ready()
    in_spans(t, span, hidden, products)
    sums.send()

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        _finish_rows(refs, spec, t, block)


def _lay_rows(refs: Refs, spec, t: Tiling, block: Block):
    """A row tile's z' and g, and their part of db2."""
    whole = t.stride % LANES == 0

    def lay(b, r, n):
        normal, rsd = normal_rows(refs, spec, t, block, b, r, n)
        if refs.normal is not None:
            refs.normal[pl.ds(at(t, b, r), n)], refs.rsd[pl.ds(at(t, b, r), n)] = normal, rsd
        z = by_tile(lambda v: v * refs.scale[...] + refs.bias[...], normal)
        if whole:
            refs.zt[:, pl.ds(at(t, b, r), n)] = z.T.astype(refs.zt.dtype)
        else:  # squares do not end where images do: the sum of dz is not begun yet, and its memory holds z
            refs.dz[pl.ds(at(t, b, r), n)] = z

    def lay_g(b, r, n):
        g = gradient_rows(refs, spec, t, block, b, r, n)
        refs.g[pl.ds(at(t, b, r), n)] = g.astype(refs.g.dtype)

    def square(c, n):
        refs.zt[:, pl.ds(c, n)] = refs.dz[pl.ds(c, n)].T.astype(refs.zt.dtype)

    if not whole:
        refs.dz[...] = jnp.zeros_like(refs.dz)
    for_pieces(t, lay)
    for_pieces(t, lay_g)
    if not whole:
        sweep(t.columns, PIECE, square)


def _finish_rows(refs: Refs, spec, t: Tiling, block: Block):
    """dx of a row tile from its whole dz, and its part of the layer norm's gradients."""
    normals = None if refs.normal is None else lambda rows: (refs.normal[rows], refs.rsd[rows])
    for_pieces(t, lambda b, r, n: finish_rows(refs, spec, t, block, b, r, n, lambda rows: refs.dz[rows], normals))
    send_rows(refs, t, block.tile)


def scratch(t: Tiling, d: int, tiles_f: int, operand) -> list:
    """The scratch buffers, in the kernel's order."""
    slots = tiles_f if t.resident else SLOTS
    normals = [pltpu.VMEM((t.columns, d), jnp.float32), pltpu.VMEM((t.columns, 1), jnp.float32)] if t.roomy else []
    return [
        pltpu.VMEM((d, t.columns), operand),
        pltpu.VMEM((t.columns, d), operand),
        pltpu.VMEM((t.columns, d), jnp.float32),
        pltpu.VMEM((t.hidden, t.columns), operand),
        pltpu.VMEM((t.columns, t.hidden), operand),
        pltpu.VMEM((slots, d, t.hidden), jnp.float32),
        pltpu.VMEM((slots, t.hidden, d), jnp.float32),
        pltpu.SemaphoreType.DMA((2, SLOTS + 1, 2)),
        *normals,
    ]
