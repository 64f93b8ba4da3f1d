"""Softmax attention of many small images in one product, forward and backward: the core of a half block of few tokens.

    o = softmax(q k^T / sqrt(H)) v;  dv = p^T do,  ds = p (do v^T - rowsum(p do v^T)),  dq = ds k / sqrt(H),  dk = ds^T q / sqrt(H)

An image of 5 tokens fills no register: with an image a grid step, or batched by XLA, its rows are padded to 8 or 16, and the copies
of q, k and v to heads cost more than the products. Here a grid step takes G images, R = T G rows, and multiplies all of them with
all, a head at a time; of the logits those between two images are masked. T / R of the products is of use, which is nothing beside a
systolic array that would be idle otherwise.

Layout. The arrays are [3, T, B, K] and [T, B, K], K = N * H: the token before the image. So XLA lays out [B, T, D] of few tokens by
itself, since B rows fill whole tiles and T do not, and the rows of a block [T, G, K], G whole registers, are [T G, K] as they lie.
Row r is of image r mod G: the mask is one pattern of G rows for all tokens. A head is multiplied in the whole 128-lane columns that
it touches, with zeros in the other heads' place of the transposed keys.

Backward recomputes p, with the keys in rows: sums and maxima over a query's keys are then those of whole registers, and p and ds
are the left operands of dv and dk as they are; only dq wants ds transposed. Images of a block that the batch does not have are
zeros in VMEM. Rows are float32 in VMEM; where the MXU takes bfloat16, operands are cast. HBM: 4 arrays of B T K, backward 7.
Paper: Eq. 2 and appendix A.
"""

import math
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.attention.float32.forward import ByColumns, gather, own_rows, pad_rows
from kernels.attention.general.core import core_cost
from kernels.attention.packed.tiles import PackedCore
from kernels.attention.tiling import heads_of
from kernels.body import F32, dot, operand
from kernels.device import LANES
from kernels.launch import Launch, call
from kernels.settings import own
from kernels.vmem import round_up


@dataclass(frozen=True, kw_only=True)
class Static:
    """Everything about a call that is no array. dtype: of the op, to which operands are rounded."""

    tiles: PackedCore
    num_heads: int
    tokens: int  # of the T rows of an image, the first ones; the others are no keys
    dtype: Any
    launch: Launch


class _Step:
    """A grid step: what its bodies share. refs: of blocks [3, T, G, K] or [T, G, K]; b: images of the batch."""

    def __init__(self, static: Static, qkv, b: int):
        _, t, self.images, self.lanes = qkv.shape
        self.static, self.qkv, self.b = static, qkv, b
        self.rows, self.keys = t * self.images, static.tokens * self.images
        self.padded = round_up(self.rows, LANES)
        self.tiles = [slice(c, c + LANES) for c in range(0, self.padded, LANES)]
        self.width = self.lanes // static.num_heads
        self.scale = self.width**-0.5
        self.factor = self.scale * math.log2(math.e)  # exp(x / sqrt(H)) = 2**(factor x), one multiplication either way

    def read(self, ref, columns: slice):
        """Rows [T G, columns] of [T, G, K], float32; zeros for images that the batch does not have."""
        value = ref[:, :, columns].astype(F32)
        if self.b % self.images:
            image = pl.program_id(0) * self.images + lax.broadcasted_iota(jnp.int32, value.shape, 1)
            value = jnp.where(image < self.b, value, 0.0)
        return value.reshape(self.rows, value.shape[2])

    def write(self, ref, found: dict):
        for (lo, hi), value in found.items():
            ref[:, :, lo:hi] = value[: self.rows].reshape(-1, self.images, hi - lo).astype(ref.dtype)

    def by_columns(self, ref, *, pad: bool = False, turn: bool = False) -> ByColumns:
        """`read`, for the columns of a head. pad: with zero rows up to whole columns of lanes. turn: transposed."""

        def make(columns: slice):
            value = self.read(ref, columns)
            value = pad_rows(value, self.padded) if pad else value
            return value.T if turn else value

        return ByColumns(make)

    def own(self, value, first: int, keys: int | None = None):
        """Logits [R, 128], those of pairs in two images -inf. first: what lane 0 stands for. keys: how many lanes are keys."""
        row = lax.broadcasted_iota(jnp.int32, (self.images, LANES), 0)
        lane = first + lax.broadcasted_iota(jnp.int32, (self.images, LANES), 1)
        same = lax.rem(lane, self.images) == row
        if keys is not None and keys < first + LANES:
            same &= lane < keys
        return jnp.where(same, value.reshape(-1, self.images, LANES), -jnp.inf).reshape(value.shape)

    def product(self, a, b):
        """a @ b of float32 values, rounded as the op's operands are."""
        a, b = (operand(value, self.static.dtype, self.static.launch.device) for value in (a, b))
        return dot(a, b, self.static.dtype)

    def over_tiles(self, values, right):
        """The sum of tile @ rows of the tile, over the tiles of lanes of a [R, S] given as `values`; right [S, columns]."""
        return reduce(jnp.add, [self.product(value, right[at]) for value, at in zip(values, self.tiles, strict=True)])


def _values(step: _Step, columns: slice):
    """v, with zeros for what is not finite, which no image but its own may be given: 0 times NaN is NaN."""
    v = pad_rows(step.read(step.qkv.at[2], columns), step.padded)
    return jnp.where(v - v == 0.0, v, 0.0)


def _keys(step: _Step, columns: slice):
    """k transposed, NaN where v is not finite: what a head of that image attends to is then NaN."""
    k, v = (step.read(step.qkv.at[section], columns) for section in (1, 2))
    return pad_rows(k + (v - v), step.padded).T


def _forward_kernel(step: _Step, out):
    """Queries in rows, keys in lanes."""
    for run in heads_of(step.lanes, step.width):
        q, kt, v = step.by_columns(step.qkv.at[0]), ByColumns(partial(_keys, step)), ByColumns(partial(_values, step))
        found: dict = {}
        for head in run:
            queries, keys = q[head], own_rows(kt[head], head)
            s = [step.own(step.product(queries, keys[:, at]), at.start, step.keys) for at in step.tiles]
            top = reduce(jnp.maximum, s).max(1, keepdims=True)
            p = [jnp.exp2((tile - top) * step.factor) for tile in s]
            norm = reduce(jnp.add, p).sum(1, keepdims=True)
            gather(found, head, step.over_tiles(p, v[head]) * (1.0 / norm))
        step.write(out, found)


def _backward_kernel(step: _Step, do_ref, out):
    """Keys in rows, queries in lanes; lanes behind the queries are of zeros, and what comes of them is multiplied by zeros."""
    refs = [step.qkv.at[section] for section in range(3)]
    existing = lax.broadcasted_iota(jnp.int32, (step.rows, 1), 0) < step.keys
    for run in heads_of(step.lanes, step.width):
        q, do = (step.by_columns(ref, pad=True) for ref in (refs[0], do_ref))
        k, v = (step.by_columns(ref) for ref in refs[1:])
        qt, turned = (step.by_columns(ref, pad=True, turn=True) for ref in (refs[0], do_ref))
        sums: tuple[dict, dict, dict] = {}, {}, {}
        for head in run:
            queries, pulls = own_rows(qt[head], head), own_rows(turned[head], head)
            p, ds, back = [], [], []
            for at in step.tiles:
                s = step.own(step.product(k[head], queries[:, at]), at.start)
                s = s if step.keys == step.rows else jnp.where(existing, s, -jnp.inf)
                e = jnp.exp2((s - s.max(0, keepdims=True)) * step.factor)
                tile = e * (1.0 / e.sum(0, keepdims=True))
                dp = step.product(v[head], pulls[:, at])
                of_s = tile * (dp - (tile * dp).sum(0, keepdims=True))
                p.append(tile)
                ds.append(of_s)
                back.append(step.product(pad_rows(of_s, step.padded).T, pad_rows(k[head], step.padded)))
            gather(sums[0], head, jnp.concatenate(back) * step.scale)
            gather(sums[1], head, step.over_tiles(ds, q[head]) * step.scale)
            gather(sums[2], head, step.over_tiles(p, do[head]))
        for section, found in enumerate(sums):
            step.write(out.at[section], found)


def _call(static: Static, qkv, do=None):
    """o [T, B, K] of qkv [3, T, B, K]; or, given do like o, dqkv. In the dtype of qkv."""
    _, t, b, k = qkv.shape
    section = pl.BlockSpec((3, t, static.tiles.images, k), lambda i: (0, 0, i, 0))
    single = pl.BlockSpec((t, static.tiles.images, k), lambda i: (0, i, 0))

    def forward(qkv, out):
        _forward_kernel(_Step(static, qkv, b), out)

    def backward(qkv, do, out):
        _backward_kernel(_Step(static, qkv, b), do, out)

    return call(
        forward if do is None else backward,
        launch=static.launch.within(static.tiles.needs or None),
        name=f"attention_packed_{'forward' if do is None else 'backward'}",
        grid=(pl.cdiv(b, static.tiles.images),),
        in_specs=[section] if do is None else [section, single],
        out_specs=[single] if do is None else [section],
        out_shapes=[(qkv.shape[1:] if do is None else qkv.shape, qkv.dtype)],
        semantics=("parallel",),
        cost=core_cost(b, t, k, static.num_heads, qkv.dtype.itemsize, backward=do is not None),
    )(*([qkv] if do is None else [qkv, do]))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def core(static: Static, qkv) -> Any:
    """o [T, B, K] of qkv [3, T, B, K], float32 or the dtype of the op; differentiable."""
    return _call(static, qkv)


core.defvjp(own(lambda static, qkv: (_call(static, qkv), qkv)), own(lambda static, qkv, do: (_call(static, qkv, do),)))
