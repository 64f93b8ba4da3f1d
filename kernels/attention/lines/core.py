"""Attention along lines, forward and backward, with lines in lanes: no matrix unit, no mask and no padding of short rows.

    s_op = (q_o + r^k) . (k_p + r^q) - r^q . r^k,  P = softmax_p(s),  y_o = sum_p P_op (v_p + r^v)          r of offset p - o
    dP_op = dy_o . (v_p + r^v),  ds = P (dP - sum_p P dP),  dq_o = sum_p ds (k_p + r^q),  dk_p = sum_o ds (q_o + r^k),
    dv_p = sum_o P dy_o,  dr^q = sum ds q_o,  dr^k = sum ds k_p,  dr^v = sum P dy_o  over lines, heads and places of that offset

A line of 7 places and a head of 8 channels fill neither a register nor a systolic array. But lines and heads are many, and to each
happens the same: a register holds one number of 1,024 of them (8 rows of heads by 128 lines), places and channels are axes in front
of it, and all sums are those of whole registers. The tables, which lines and heads share, are scalars in SMEM.

A grid step has one query, or backward one key, of 1,024 lines, whose other places lie in VMEM while the grid goes over it. Backward
is two kernels, for queries and for keys, the second of which makes the logits again, with the first's log sums and sum_p P dP. The
tables' gradients are sums over lanes too, so those are products on the MXU, of all heads with all, of which equal heads count; what
stands at a pair of places is summed by XLA, over blocks and along diagonals. All lines are float32 in VMEM and HBM.
HBM: 2 N d + N d numbers a place forward, 7.5 N d backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.lines.plan import SUMS, LinesPlan
from kernels.body import F32, dot, operand
from kernels.device import LANES, SUBLANES
from kernels.launch import Launch, call


@dataclass(frozen=True, kw_only=True)
class Static:
    """Everything about a call that is no array. dtype: of the op, to which operands of products are rounded."""

    plan: LinesPlan
    length: int
    d: int
    dtype: Any
    launch: Launch

    @property
    def half(self) -> int:
        return self.d // 2


def _summed(terms: list):
    """A sum as a tree, so that no addition waits for all before it."""
    while len(terms) > 1:
        terms = [reduce(jnp.add, terms[i : i + 2]) for i in range(0, len(terms), 2)]
    return terms[0]


def _zeros():
    return jnp.zeros((SUBLANES, LANES), F32)


class _Step:
    """A grid step: what its bodies share. table: in SMEM, of each offset r^q, r^k, r^v. own: r^q . r^k [2L-1, 1, 128]."""

    def __init__(self, static: Static, table, own):
        self.static, self.table, self.own, self.place = static, table, own, pl.program_id(1)
        self.length, self.half, self.d = static.length, static.half, static.d

    def entry(self, offset, channel: int):
        return self.table[(offset + self.length - 1) * 2 * self.d + channel]

    def key(self, k, offset, c: int):
        return k + self.entry(offset, c)

    def query(self, q, offset, c: int):
        return q + self.entry(offset, self.half + c)

    def value(self, v, offset, c: int):
        return v + self.entry(offset, self.d + c)

    def logits(self, q, k, offset):
        """q, k: (channel) -> a register of it."""
        terms = [self.query(q(c), offset, c) * self.key(k(c), offset, c) for c in range(self.half)]
        return _summed(terms) - self.own[offset + self.length - 1]

    def pulls(self, dy, v, offset):
        return _summed([dy(c) * self.value(v(c), offset, c) for c in range(self.d)])

    def over_places(self, body: Callable, carry, turn: int):
        """carry = body(place, carry) for every place."""
        return lax.fori_loop(0, self.length, body, carry, unroll=turn)

    def sums(self, out, channels: int, term: Callable, scale=None) -> None:
        """out[0, c] = sum over places of term(place, c), times scale."""
        size = min(channels, SUMS)
        turn = max(n for n in range(1, max(1, SUMS // size) + 1) if self.length % n == 0)
        for first in range(0, channels, size):
            mine = range(first, min(first + size, channels))

            def body(place, found, mine=mine):
                return tuple(a + term(place, c) for a, c in zip(found, mine, strict=True))

            for c, a in zip(mine, self.over_places(body, (_zeros(),) * len(mine), turn), strict=True):
                out[0, c] = a if scale is None else a * scale

    def of_pairs(self, out, channels, places) -> None:
        """out [1, 1, C, L * 8]: sums over lines and over heads, of equal number, of channels [C, 8, 128] times places [L, 8, 128];
        the sum over the 8 is left to do."""
        a, b = (x.reshape(-1, LANES) for x in (channels, places))
        a, b = (operand(x, self.static.dtype, self.static.launch.device) for x in (a, b))
        found = dot(a, b, self.static.dtype, (1, 1)).reshape(-1, SUBLANES, self.length * SUBLANES)
        row, lane = (lax.broadcasted_iota(jnp.int32, found.shape, axis) for axis in (1, 2))
        out[0, 0] = jnp.where(row == lane % SUBLANES, found, 0.0).sum(1)


def _forward_kernel(step: _Step, q, k, v, y, s):
    def logits(p, top):
        s[p] = step.logits(lambda c: q[0, c], lambda c: k[p, c], p - step.place)
        return jnp.maximum(top, s[p])

    top = step.over_places(logits, _zeros() - jnp.inf, step.static.plan.half_turn)
    norm = step.over_places(lambda p, norm: norm + _exp(s, p, top), _zeros(), step.static.plan.half_turn)
    step.sums(y, step.d, lambda p, c: s[p] * step.value(v[p, c], p - step.place, c), 1.0 / norm)


def _exp(s, p, top):
    s[p] = jnp.exp(s[p] - top)
    return s[p]


def _queries_kernel(step: _Step, q, k, v, dy, dq, stats, of_q, of_v, shares, ds):
    """Backward, for one query. stats [2, 1, 8, 128]: log of the softmax's sums, and sum_p P dP."""
    plan = step.static.plan

    def logits(p, top):
        shares[p] = step.logits(lambda c: q[0, c], lambda c: k[p, c], p - step.place)
        ds[p] = step.pulls(lambda c: dy[0, c], lambda c: v[p, c], p - step.place)
        return jnp.maximum(top, shares[p])

    top = step.over_places(logits, _zeros() - jnp.inf, plan.turn)
    norm = step.over_places(lambda p, norm: norm + _exp(shares, p, top), _zeros(), plan.half_turn)
    inverse = 1.0 / norm

    def weigh(p, total):
        shares[p] *= inverse
        return total + shares[p] * ds[p]

    total = step.over_places(weigh, _zeros(), plan.half_turn)

    def pull(p, none):
        ds[p] = shares[p] * (ds[p] - total)
        return none

    step.over_places(pull, 0, plan.half_turn)
    stats[0, 0], stats[1, 0] = top + jnp.log(norm), total
    step.sums(dq, step.half, lambda p, c: ds[p] * step.key(k[p, c], p - step.place, c))
    step.of_pairs(of_q, q[0], ds[...])
    step.of_pairs(of_v, dy[0], shares[...])


def _keys_kernel(step: _Step, q, dy, stats, k, v, dk, dv, of_k, shares, ds):
    """Backward, for one key."""

    def pull(o, none):
        offset = step.place - o
        s = step.logits(lambda c: q[o, c], lambda c: k[0, c], offset)
        shares[o] = jnp.exp(s - stats[0, o])
        ds[o] = shares[o] * (step.pulls(lambda c: dy[o, c], lambda c: v[0, c], offset) - stats[1, o])
        return none

    step.over_places(pull, 0, step.static.plan.turn)
    step.sums(dk, step.half, lambda o, c: ds[o] * step.query(q[o, c], step.place - o, c))
    step.sums(dv, step.d, lambda o, c: shares[o] * dy[o, c])
    step.of_pairs(of_k, k[0], ds[...])


# ---- launches


def _call(static: Static, kernel, name: str, relative, arrays, in_specs, out_specs, out_shapes, *, work: int, scratch: int):
    """work: products of a channel at a pair of places. scratch: how many arrays of a number a place."""
    table, own = _tables(relative)
    lines = static.plan.rows * LANES
    size = sum(a.size for a in arrays) + sum(static.length * c * lines for c in (static.d, static.half))
    return call(
        lambda table, own, *refs: kernel(_Step(static, table, own), *refs),
        launch=static.launch.within(static.plan.needs),
        name=f"attention_lines_{name}",
        grid=(static.plan.rows // SUBLANES, static.length),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(own.shape, lambda i, place: (0, 0, 0)), *in_specs],
        out_specs=out_specs,
        out_shapes=[(shape, F32) for shape in out_shapes],
        semantics=("parallel", "parallel"),
        cost=pl.CostEstimate(
            flops=2 * work * lines * static.length**2, transcendentals=lines * static.length**2, bytes_accessed=4 * size
        ),
        scratch=[pltpu.VMEM((static.length, SUBLANES, LANES), F32)] * scratch,
    )(table, own, *arrays)


def _tables(relative):
    """[2d, 2L-1] as the kernels read it: a vector of the 2d entries of each offset, and r^q . r^k [2L-1, 1, 128]."""
    half = len(relative) // 4
    own = (relative[:half] * relative[half : 2 * half]).sum(0)
    return relative.T.reshape(-1), jnp.broadcast_to(own[:, None, None], (len(own), 1, LANES))


def _one(channels: int, at: int = 0) -> pl.BlockSpec:
    """Of the place of a grid step; the channels are the at'th part of their size."""
    return pl.BlockSpec((1, channels, SUBLANES, LANES), lambda i, place: (place, at, i, 0))


def _all(length: int, channels: int, at: int = 0) -> pl.BlockSpec:
    return pl.BlockSpec((length, channels, SUBLANES, LANES), lambda i, place: (0, at, i, 0))


def forward(static: Static, lines, relative):
    """y [L, d, R, 128] of lines [L, 2d, R, 128], q, k and v along the second axis, and the tables [2d, 2L-1]."""
    half, d, length = static.half, static.d, static.length
    return _call(
        static, _forward_kernel, "forward", relative, (lines, lines, lines),
        [_one(half), _all(length, half, 1), _all(length, d, 1)], [_one(d)], [(length, d, *lines.shape[2:])],
        work=2 * half + d, scratch=1,
    )[0]  # fmt: skip


def backward(static: Static, lines, relative, dy):
    """(dlines like lines, gradients of r^q [d/2, L, L], r^k and r^v [d, L, L] at each pair of query and key)."""
    half, d, length = static.half, static.d, static.length
    one, rows = (length, SUBLANES, LANES), lines.shape[2]
    blocks = rows // SUBLANES

    def pairs(channels: int):
        spec = pl.BlockSpec((1, 1, channels, length * SUBLANES), lambda i, place: (i, place, 0, 0))
        return spec, (blocks, length, channels, length * SUBLANES)

    def array(channels: int):
        return length, channels, rows, LANES

    stats_one = pl.BlockSpec((2, 1, SUBLANES, LANES), lambda i, place: (0, place, i, 0))
    stats_all = pl.BlockSpec((2, *one), lambda i, place: (0, 0, i, 0))
    (spec_h, of_half), (spec_d, of_d) = pairs(half), pairs(d)
    dq, stats, of_q, of_v = _call(
        static, _queries_kernel, "queries", relative, (lines, lines, lines, dy),
        [_one(half), _all(length, half, 1), _all(length, d, 1), _one(d)], [_one(half), stats_one, spec_h, spec_d],
        [array(half), (2, length, rows, LANES), of_half, of_d], work=4 * half + 2 * d, scratch=2,
    )  # fmt: skip
    dk, dv, of_k = _call(
        static, _keys_kernel, "keys", relative, (lines, dy, stats, lines, lines),
        [_all(length, half), _all(length, d), stats_all, _one(half, 1), _one(d, 1)], [_one(half), _one(d), spec_h],
        [array(half), array(d), of_half], work=4 * half + 2 * d, scratch=2,
    )  # fmt: skip

    def summed(found):  # [blocks, L, C, L * 8] to [C, L, L]
        return found.reshape(*found.shape[:-1], length, SUBLANES).sum((0, -1)).swapaxes(0, 1)

    of_k = summed(of_k).swapaxes(1, 2)
    return jnp.concatenate([dq, dk, dv], axis=1), summed(of_q), of_k, summed(of_v)
