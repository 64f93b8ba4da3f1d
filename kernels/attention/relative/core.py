"""Softmax attention with relative positions as Pallas TPU kernels, forward and backward; `reference.py` is the specification.

    logits = (q k^T + skew(q r^T)) / sqrt(H);  o = softmax(logits) v,        skew(m)[t, s] = m[t, s - t]

head by head, on the packed projections [3, B, T, K] that the core without positions takes (`general/forward.py` has the layout). r
is one more matrix beside k: 2T rows where k has T, so the core has twice the plain one's products forward (4 of 2) and backward (11
of 7). The logits by offset m [T, 2T] never leave VMEM, where the path of XLA writes them, skewed and not, to HBM.

The skew rotates row t by t lanes. A roll with a stride does that on v5e and later; Mosaic has none before, and none to the left:
there the rotation is one of a block of 8 rows, plus those by 1, 2 and 4 of the rows whose number in the block has that bit. All are
exact. The table comes transposed, [K, L], an offset d at column `anchor` + d, zeros around: a tile of queries needs a window of it,
and its product is natural. The pairs with the class token have an entry of their own, outside the table: a product and a sum on
the VPU.

Backward recomputes the probabilities from q, k and the table:

    dv^T = do^T p,  ds = p * (do v^T - sum_s(p * do v^T)),  dm = unskew(ds),  dq = ds k + dm r,  dk^T = q^T ds,  dr^T = q^T dm

with ds, dq and dr divided by sqrt(H), and without the pairs with the class token in dm. dr is summed over the images in VMEM, which
are the inner dimension of the grid.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.general.core import Sums
from kernels.attention.relative.plan import Window, window
from kernels.attention.tiling import Head, RelativeTiles, heads_of
from kernels.body import F32, cast_dot, iota, operand, sweep
from kernels.device import LANES, SUBLANES, Device
from kernels.launch import Launch, call
from kernels.vmem import round_up

# ---- the skew


def _by_bits(value, far: Callable, *, left: bool = False):
    """Rows rotated right, or left, by far(row's number in its block of 8) lanes, which is at most 7."""
    place = iota(value.shape[0], 0) & (SUBLANES - 1)
    for bit in (1, 2, 4):
        value = jnp.where((far(place) & bit) != 0, pltpu.roll(value, value.shape[1] - bit if left else bit, 1), value)
    return value


def _by_blocks(value, far: Callable[[int], int]):
    """Each block of 8 rows rotated right by far(its first row) lanes."""
    rows, lanes = value.shape
    blocks = [value[a : min(a + SUBLANES, rows)] for a in range(0, rows, SUBLANES)]
    return jnp.concatenate([pltpu.roll(block, far(SUBLANES * a) % lanes, 1) for a, block in enumerate(blocks)])


def skew(value, reach: int, tokens: int, device: Device):
    """[rows, T] of [rows, W] float32, row u rotated right by u - reach."""
    if device.strided_roll:
        return pltpu.roll(value, -reach % value.shape[1], 1, stride=1, stride_axis=0)[:, :tokens]
    # the blocks first, of which only the lanes that are wanted and 7 more go on
    value = _by_blocks(value, lambda first: first + SUBLANES - 1 - reach)[:, : round_up(tokens + SUBLANES - 1, LANES)]
    return _by_bits(value, lambda place: SUBLANES - 1 - place, left=True)[:, :tokens]


def unskew(value, reach: int, lanes: int):
    """The transpose of `skew`, from [rows, T] to `lanes` lanes: row u rotated left by u - reach, zeros around it."""
    value = _widen(value, round_up(value.shape[1] + SUBLANES - 1, LANES))
    value = _by_bits(value, lambda place: SUBLANES - 1 - place)
    return _by_blocks(_widen(value, lanes), lambda first: reach - first - (SUBLANES - 1))


def _widen(value, lanes: int):
    """Zero lanes behind value, up to `lanes`."""
    missing = lanes - value.shape[1]
    return jnp.concatenate([value, jnp.zeros((value.shape[0], missing), F32)], axis=1) if missing else value


# ---- what both passes share


class _Keys:
    """Keys and values [T, columns] of a column of heads. Where they are cast, they are cast and transposed once for all of them."""

    def __init__(self, k, v, device: Device):
        self.device, self.once = device, not device.bf16_matmul and k.shape[0] >= SUBLANES
        self.k, self.v = (k.astype(F32), v.astype(F32)) if self.once else (k, v)
        self.turned: dict[str, jax.Array] = {}

    def against(self, queries, which: str):
        """queries [rows, columns] times k^T or v^T."""
        if not self.once:
            return cast_dot(queries, getattr(self, which), self.device, contract=(1, 1))
        if which not in self.turned:
            self.turned[which] = getattr(self, which).T
        return cast_dot(queries, self.turned[which], self.device)


class _Core:
    """A grid step: refs q, k, v, o or do [images, T, lanes], the table [lanes, L], and [1, lanes] of the class token, or None."""

    def __init__(self, q, k, v, table, own, tiles: RelativeTiles, h: int, scale: float, dtype, device: Device):
        self.q, self.k, self.v, self.table, self.own = q, k, v, table, own
        self.images, self.total, self.lanes = q.shape
        self.tiles, self.h, self.scale, self.dtype, self.device = tiles, h, scale, dtype, device
        self.factor = scale * math.log2(math.e)

    def run(self, tile):
        """tile(image, run of heads, first query, queries) for all of them."""

        def image(i, _):
            for run in heads_of(self.lanes, self.h):
                sweep(self.total, self.tiles.queries, partial(tile, i, run))

        sweep(self.images, 1, image)

    def rows(self, ref, i, head: Head, start, size):
        """Rows of a head as an operand, zero outside its lanes."""
        return operand(head.mask(ref[i, pl.ds(start, size), head.lo : head.hi]), self.dtype, self.device)

    def keys(self, i, head: Head, shared: dict):
        """k and v in the columns of a head as `_Keys`, one for the heads that touch the same."""
        if (head.lo, head.hi) not in shared:
            columns = slice(head.lo, head.hi)
            shared[head.lo, head.hi] = _Keys(self.k[i, :, columns], self.v[i, :, columns], self.device)
        return shared[head.lo, head.hi]

    def window(self, start, size: int) -> Window:
        return window(self.total, self.tiles.queries, start, size)

    def positions(self, head: Head, w: Window):
        """The window of the table in the columns of a head [columns, W]."""
        return self.table[head.lo : head.hi, pl.ds(w.first, w.lanes)]

    def of_class(self, start, size: int):
        """bool [size, T]: the pairs with the class token."""
        return (start + iota(size, 0) == 0) | (iota(self.total, 1) == 0)

    def own_row(self, head: Head):
        return self.own[:, head.lo : head.hi].astype(F32)

    def probabilities(self, head: Head, q, keys: _Keys, start):
        """(2^(logits - max), their sum) of a tile of queries with all keys."""
        size = q.shape[0]
        w = self.window(start, size)
        far = skew(cast_dot(q, self.positions(head, w), self.device), w.reach, self.total, self.device)
        if self.own is not None:
            own = (q.astype(F32) * self.own_row(head)).sum(1, keepdims=True)
            far = jnp.where(self.of_class(start, size), own, far)
        s = keys.against(q, "k") + far
        p = jnp.exp2((s - s.max(1, keepdims=True)) * self.factor)
        return p, p.sum(1, keepdims=True)


def _cost(b: int, t: int, k: int, heads: int, itemsize: int, entries: int, *, backward: bool) -> pl.CostEstimate:
    """FLOPs of the products with T keys and with the entries of the table, exponentials, HBM bytes."""
    of_keys, of_table, arrays = (6, 3, 8) if backward else (2, 1, 4)
    return pl.CostEstimate(
        flops=2 * b * t * k * (of_keys * t + of_table * entries),
        transcendentals=b * heads * t * t,
        bytes_accessed=arrays * b * t * k * itemsize + of_table * k * entries * 4,
    )


def _specs(tiles: RelativeTiles, t: int, length: int, class_token: bool):
    """Block specs of the three sections of qkv, and of the table and the class token's entry."""
    section = [pl.BlockSpec((1, tiles.images, t, tiles.lanes), lambda g, i, c=c: (c, i, 0, g)) for c in range(3)]
    positions = [pl.BlockSpec((tiles.lanes, length), lambda g, i: (g, 0))]
    return section, positions + [pl.BlockSpec((1, tiles.lanes), lambda g, i: (0, g))] * class_token


# ---- forward


def forward(tiles: RelativeTiles, qkv, table, own, *, num_heads: int, launch: Launch):
    """o [B, T, K] of qkv [3, B, T, K]; table [K, L] and own [1, K], or None without a class token, as operands."""
    _, b, t, k = qkv.shape
    h, device = k // num_heads, launch.device
    section, positions = _specs(tiles, t, table.shape[1], own is not None)

    def kernel(q, k_ref, v, table_ref, *rest):
        *own_ref, o = rest
        core = _Core(
            q.at[0], k_ref.at[0], v.at[0], table_ref, own_ref[0] if own_ref else None, tiles, h, h**-0.5, qkv.dtype, device
        )

        def tile(i, run, start, size):
            sums, shared = Sums(), {}
            for head in run:
                keys = core.keys(i, head, shared)
                p, norm = core.probabilities(head, core.rows(core.q, i, head, start, size), keys, start)
                found = cast_dot(operand(p, qkv.dtype, device), keys.v, device) * (1.0 / norm)
                sums.add(head, head.mask(found))
            sums.store(o, (i, pl.ds(start, size)), qkv.dtype)

        core.run(tile)

    return call(
        kernel,
        launch=launch.within(tiles.needs),
        name="attention_relative_core_forward",
        grid=(k // tiles.lanes, b // tiles.images),
        in_specs=[*section, *positions],
        out_specs=[pl.BlockSpec((tiles.images, t, tiles.lanes), lambda g, i: (i, 0, g))],
        out_shapes=[((b, t, k), qkv.dtype)],
        semantics=("parallel", "parallel"),
        cost=_cost(b, t, k, num_heads, qkv.dtype.itemsize, table.shape[1], backward=False),
    )(qkv, qkv, qkv, table, *([] if own is None else [own]))[0]


# ---- backward


class _Turned(dict):
    """Sums over heads of transposed gradients [columns, T], one a column of lanes: transposed once for the heads of a column."""

    def add(self, head: Head, value):
        for lo, hi in head.columns():
            part = value[lo - head.lo : hi - head.lo]
            self[lo, hi] = self[lo, hi] + part if (lo, hi) in self else part

    def sums(self) -> Sums:
        return Sums({at: value.T for at, value in self.items()})


class _Backward(_Core):
    """Of a grid step of the backward pass. outputs: dq, dk, dv and o (None: not wanted) [images, T, lanes], and float32 sums over
    the images of the table's gradient and the class token's; scratch: float32 sums of dk and dv, where there are several tiles."""

    def __init__(self, inputs, outputs, scratch, *shared):
        q, k, v, self.do, table, self.natural, own = inputs
        self.dq, self.dk, self.dv, self.o, self.dtable, self.down = outputs
        self.scratch = scratch
        super().__init__(q, k, v, table, own, *shared)

    def tile(self, i, run, start, size):
        dqs, dks, dvs, os, shared = Sums(), _Turned(), _Turned(), Sums(), {}
        for head in run:
            keys = self.keys(i, head, shared)
            q, do = self.rows(self.q, i, head, start, size), self.rows(self.do, i, head, start, size)
            p, norm = self.probabilities(head, q, keys, start)
            p = p * (1.0 / norm)
            dp = keys.against(do, "v")
            ds = p * (dp - (p * dp).sum(1, keepdims=True))
            rounded, dlogits = operand(p, self.dtype, self.device), operand(ds, self.dtype, self.device)
            turned = self.turned(q)
            dq = cast_dot(dlogits, keys.k, self.device) + self.of_positions(head, q, turned, ds, start)
            dqs.add(head, head.mask(dq * self.scale))
            dks.add(head, cast_dot(turned, dlogits, self.device) * self.scale)
            dvs.add(head, cast_dot(self.turned(do), rounded, self.device))
            if self.o is not None:
                os.add(head, head.mask(cast_dot(rounded, keys.v, self.device)))
        dqs.store(self.dq, (i, pl.ds(start, size)), self.dtype)
        if self.o is not None:
            os.store(self.o, (i, pl.ds(start, size)), self.dtype)
        self.of_keys(i, run, start, dks, dvs)

    def turned(self, rows):
        """rows [size, columns] transposed, an operand."""
        return operand(rows.astype(F32).T, self.dtype, self.device)

    def of_keys(self, i, run, start, dks, dvs):
        """dk and dv: stored, or added up over the tiles of queries."""
        dks, dvs = dks.sums(), dvs.sums()
        if not self.scratch:
            dks.store(self.dk, (i, slice(None)), self.dtype)
            dvs.store(self.dv, (i, slice(None)), self.dtype)
            return
        columns = slice(run[0].lo, run[-1].hi)
        for ref, out, sums in zip(self.scratch, (self.dk, self.dv), (dks, dvs), strict=True):
            for (lo, hi), value in sums.items():
                ref[:, lo:hi] = jnp.where(start == 0, 0.0, ref[:, lo:hi]) + value  # the first meets uninitialised memory
            out[i, :, columns] = ref[:, columns].astype(self.dtype)

    def of_positions(self, head: Head, q, turned, ds, start):
        """What the table adds to dq [size, columns], not yet scaled; and its own gradient is added to."""
        size = q.shape[0]
        w, dq = self.window(start, size), 0.0
        if self.own is not None:
            first = start + iota(size, 0) == 0
            down = jnp.where(first, ds.sum(1, keepdims=True), ds[:, :1])
            dq = down * self.own_row(head)
            self.down[:, head.lo : head.hi] += (down * q.astype(F32)).sum(0, keepdims=True) * self.scale
            ds = jnp.where(self.of_class(start, size), 0.0, ds)
        dm = operand(unskew(ds, w.reach, w.lanes), self.dtype, self.device)
        found = cast_dot(turned, dm, self.device) * self.scale
        aligned = head.first % SUBLANES == 0 and head.last % SUBLANES == 0  # else the rows of its neighbours, which are zero
        rows = slice(head.first, head.last) if aligned else slice(head.lo, head.hi)
        self.dtable[rows, pl.ds(w.first, w.lanes)] += found[rows.start - head.lo : rows.stop - head.lo]
        return cast_dot(dm, self.natural[pl.ds(w.first, w.lanes), head.lo : head.hi], self.device) + dq


def backward(tiles: RelativeTiles, qkv, table, own, do, *, num_heads: int, launch: Launch, with_o: bool):
    """(dqkv [3, B, T, K], o [B, T, K] or None, float32 gradients of table and own) of `forward`'s arguments and do [B, T, K]."""
    _, b, t, k = qkv.shape
    h, length, class_token = k // num_heads, table.shape[1], own is not None
    section, positions = _specs(tiles, t, length, class_token)
    rows = pl.BlockSpec((tiles.images, t, tiles.lanes), lambda g, i: (i, 0, g))
    packed = pl.BlockSpec((3, tiles.images, t, tiles.lanes), lambda g, i: (0, i, 0, g))

    def kernel(q, k_ref, v, do_ref, table_ref, natural, *rest):
        rest = list(rest)
        own_ref = rest.pop(0) if class_token else None
        dqkv, o = rest.pop(0), rest.pop(0) if with_o else None
        dtable, down = rest.pop(0), rest.pop(0) if class_token else None

        @pl.when(pl.program_id(1) == 0)
        def _():
            for ref in (dtable, down):
                if ref is not None:
                    ref[...] = jnp.zeros_like(ref)

        inputs = q.at[0], k_ref.at[0], v.at[0], do_ref, table_ref, natural, own_ref
        outputs = dqkv.at[0], dqkv.at[1], dqkv.at[2], o, dtable, down
        core = _Backward(inputs, outputs, rest, tiles, h, h**-0.5, qkv.dtype, launch.device)
        core.run(core.tile)

    dqkv, *found = call(
        kernel,
        launch=launch.within(tiles.needs),
        name="attention_relative_core_backward",
        grid=(k // tiles.lanes, b // tiles.images),
        in_specs=[*section, rows, positions[0], pl.BlockSpec((length, tiles.lanes), lambda g, i: (0, g)), *positions[1:]],
        out_specs=[packed, *([rows] * with_o), *positions],
        out_shapes=[
            (qkv.shape, qkv.dtype),
            *([(do.shape, qkv.dtype)] * with_o),
            ((k, length), F32),
            *([((1, k), F32)] * class_token),
        ],
        semantics=("parallel", "arbitrary"),
        cost=_cost(b, t, k, num_heads, qkv.dtype.itemsize, length, backward=True),
        scratch=[pltpu.VMEM((t, tiles.lanes), F32)] * (2 * (tiles.queries < t)),
    )(qkv, qkv, qkv, do, table, table.T, *([own] if class_token else []))
    o = found.pop(0) if with_o else None
    return dqkv, o, found[0], found[1] if class_token else None
