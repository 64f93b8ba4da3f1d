"""Softmax attention on padded float32 rows in VMEM, for v2 and v3: whole rows of keys, every head of a step unrolled.

An image is R rows, T rounded up to 8, of which the first T are tokens, in any one order; keys are padded once more to whole
columns of lanes. With everything in whole registers there is one mask: the logits of keys that do not exist. A head is multiplied
in the whole 128-lane columns that it touches, and what it contributes is masked to its own lanes (core.py says why).
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import rows as order
from kernels.attention.heads import Head, heads_of, round_up
from kernels.attention.wide import PIECE, product, together
from kernels.device import LANES, SUBLANES, Device
from kernels.launch import Launch, call

F32 = jnp.float32
TEMPORARIES = 8  # float32 [R, S] that the compiler keeps for each unrolled head of the backward pass


def _extend(value, size: int):
    """Zero rows behind value [rows, columns], up to `size` rows."""
    missing = size - value.shape[0]
    return jnp.concatenate([value, jnp.zeros((missing, value.shape[1]), F32)]) if missing else value


class _Columns:
    """Arrays of the column windows of a run, made once for the heads that share a window."""

    def __init__(self, make):
        self.make, self.found = make, {}

    def __getitem__(self, head: Head):
        window = head.lo, head.hi
        if window not in self.found:
            self.found[window] = self.make(slice(*window))
        return self.found[window]


def _own_rows(value, head: Head):
    """value [columns of the head, n] with zeros in the rows that are not the head's own."""
    before, own, after = head.first - head.lo, slice(head.first - head.lo, head.last - head.lo), head.hi - head.last
    rows = [jnp.zeros((before, value.shape[1]), F32), value[own], jnp.zeros((after, value.shape[1]), F32)]
    return jnp.concatenate([part for part in rows if part.shape[0]])


def _gather(found: dict, head: Head, value):
    """Puts the head's own lanes of `value` into the columns it touches; lanes that no head has had yet hold anything."""
    for lo, hi in head.columns():
        part = value[:, lo - head.lo : hi - head.lo]
        if (lo, hi) in found and (head.first > lo or head.last < hi):
            lane = lo + lax.broadcasted_iota(jnp.int32, (1, hi - lo), 1)
            part = jnp.where((lane >= head.first) & (lane < head.last), part, found[lo, hi])
        found[lo, hi] = part


def attend(run: list[Head], q, k, v, *, t: int, factor: float, dtype) -> None:
    """Replaces the queries of a run of heads by what they attend to: q, k [R, K], v [S, K] refs, zeros in v behind R.

    2**(factor q k) are the probabilities before they are divided by their sum.
    """
    keys = v.shape[0]
    turned = _Columns(lambda columns: _extend(k[:, columns], keys).T)
    sums: dict = {}
    for head in run:
        columns = slice(head.lo, head.hi)
        queries, kt = q[:, columns], _own_rows(turned[head], head)
        s = [product(queries, kt[:, c : c + LANES], dtype) for c in range(0, keys, LANES)]
        if t < keys:
            lane = keys - LANES + lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
            s[-1] = jnp.where(lane < t, s[-1], -jnp.inf)
        top = together(jnp.maximum, s).max(1, keepdims=True)
        p = [jnp.exp2((tile - top) * factor) for tile in s]
        norm = together(jnp.add, p).sum(1, keepdims=True)
        o = together(jnp.add, [product(tile, v[c * LANES : (c + 1) * LANES, columns], dtype) for c, tile in enumerate(p)])
        _gather(sums, head, o * (1.0 / norm))
    for (lo, hi), value in sums.items():
        q[:, lo:hi] = value


def _differentiate(run: list[Head], arrays, out, *, t: int, scale: float, dtype) -> None:
    """From q, k, v, do to dq, dk, dv (and o, with a fourth ref in `out`) of a run of heads; refs [R, lanes], do zero behind row T.

    On transposed logits, as in core.py.
    """
    q, k, v, do = arrays
    rows = q.shape[0]
    keys = round_up(rows, LANES)
    whole = t // SUBLANES * SUBLANES
    queries, outputs = (_Columns(lambda c, ref=ref: _extend(ref[:, c], keys)) for ref in (q, do))
    turned_q, turned_do = (_Columns(lambda c, ref=ref: _extend(ref[:, c], keys).T) for ref in (q, do))
    sums: list[dict] = [{} for _ in out]
    for head in run:
        columns = slice(head.lo, head.hi)
        key, value = k[:, columns], v[:, columns]
        s, dp = product(head.mask(key), turned_q[head], dtype), product(head.mask(value), turned_do[head], dtype)
        if whole < rows:
            row = whole + lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)
            last = jnp.where(row < t, s[whole:], -jnp.inf)
            s = jnp.concatenate([s[:whole], last]) if whole else last
        p = jnp.exp2((s - s.max(0, keepdims=True)) * (scale * math.log2(math.e)))
        p = p * (1.0 / p.sum(0, keepdims=True))
        ds = p * (dp - (p * dp).sum(0, keepdims=True))
        dk, dv = product(ds, queries[head], dtype) * scale, product(p, outputs[head], dtype)
        dq = product(_extend(ds, keys).T[:rows], _extend(key, keys), dtype) * scale
        found = [dq, dk, dv]
        if len(out) == 4:
            found.append(product(_extend(p, keys).T[:rows], _extend(value, keys), dtype))
        for total, part in zip(sums, found, strict=True):
            _gather(total, head, part)
    for ref, total in zip(out, sums, strict=True):
        for (lo, hi), value in total.items():
            ref[:, lo:hi] = value


def lanes_of(t: int, num_heads: int, h: int, device: Device) -> int | None:
    """How many lanes, whole heads, a step of the backward pass takes; None where no group of heads fits VMEM."""
    k = num_heads * h
    group = math.lcm(h, LANES) if k % math.lcm(h, LANES) == 0 else k
    rows, keys = round_up(t, SUBLANES), round_up(t, LANES)
    for lanes in range(k, 0, -group):
        blocks = 2 * 8 * rows * round_up(lanes, LANES) * 4
        heads = lanes // h * (TEMPORARIES * rows * keys * 4)
        if k % lanes == 0 and blocks + heads <= 0.94 * device.vmem_bytes:
            return lanes
    return None


def takes(t: int, num_heads: int, h: int, device: Device) -> bool:
    """Whether these kernels are for the device, and t tokens of heads of width h fit it."""
    return not device.bf16_matmul and h % SUBLANES == 0 and lanes_of(t, num_heads, h, device) is not None


def backward(q, k, v, do, *, t: int, num_heads: int, width: int, dtype, launch: Launch):
    """dq, dk, dv and o of q, k, v and do, all [B, R, K] float32; the first t rows are tokens, and do is zero behind them."""
    b, padded, lanes_in_all = q.shape
    h = lanes_in_all // num_heads
    lanes = lanes_of(t, num_heads, h, launch.device)
    assert lanes is not None

    def kernel(*refs):
        arrays, out = [ref.at[0] for ref in refs[:4]], [ref.at[0] for ref in refs[4:]]
        for run in heads_of(lanes, h):
            _differentiate(run, arrays, out, t=t, scale=width**-0.5, dtype=dtype)

    rows = pl.BlockSpec((1, padded, lanes), lambda i, g: (i, 0, g))
    flops, exponentials = 12 * b * t * t * lanes_in_all, b * num_heads * t * t
    return call(
        kernel,
        launch=launch,
        name="attention_core_backward",
        grid=(b, lanes_in_all // lanes),
        in_specs=[rows] * 4,
        out_specs=[rows] * 4,
        out_shapes=[(q.shape, F32)] * 4,
        semantics=("parallel", "parallel"),
        cost=pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=32 * b * padded * lanes_in_all),
    )(q, k, v, do)


def _widen(ref, target, t: int) -> None:
    """Rows [T, lanes] of an array into float32 scratch, zeros behind them."""
    for a, n in order.pieces(t, PIECE):
        target[a : a + n] = order.widen(ref[a : a + n])
    if t < target.shape[0]:
        target[t:] = jnp.zeros((target.shape[0] - t, target.shape[1]), F32)


def _narrow(ref, source, t: int) -> None:
    for a, n in order.pieces(t, PIECE):
        ref[a : a + n] = order.narrow(source[a : a + n], ref.dtype)


def packed(qkv, do=None, *, num_heads: int, width: int, launch: Launch, cost: pl.CostEstimate):
    """Attention by itself: o [B, T, K] of qkv [3, B, T, K]; with `do`, dqkv. Arrays of any float dtype, float32 in VMEM."""
    _, b, t, k = qkv.shape
    h, backward, dtype = k // num_heads, do is not None, qkv.dtype
    lanes = lanes_of(t, num_heads, h, launch.device)
    assert lanes is not None
    padded, keys, scale = round_up(t, SUBLANES), round_up(t, LANES), width**-0.5

    def forward_kernel(q_ref, k_ref, v_ref, out, q, k, v):
        for ref, target in ((q_ref, q), (k_ref, k), (v_ref, v)):
            _widen(ref.at[0, 0], target, t)
        for run in heads_of(lanes, h):
            attend(run, q, k, v, t=t, factor=scale * math.log2(math.e), dtype=dtype)
        _narrow(out.at[0], q, t)

    def backward_kernel(q_ref, k_ref, v_ref, do_ref, out, *scratch):
        arrays, found = scratch[:4], scratch[4:]
        for ref, target in zip((q_ref.at[0, 0], k_ref.at[0, 0], v_ref.at[0, 0], do_ref.at[0]), arrays, strict=True):
            _widen(ref, target, t)
        for run in heads_of(lanes, h):
            _differentiate(run, arrays, found, t=t, scale=scale, dtype=dtype)
        for c, source in enumerate(found):
            _narrow(out.at[c, 0], source, t)

    section = [pl.BlockSpec((1, 1, t, lanes), lambda i, g, c=c: (c, i, 0, g)) for c in range(3)]
    one = pl.BlockSpec((1, t, lanes), lambda i, g: (i, 0, g))
    three = pl.BlockSpec((3, 1, t, lanes), lambda i, g: (0, i, 0, g))
    return call(
        backward_kernel if backward else forward_kernel,
        launch=launch,
        name=f"attention_core_{'backward' if backward else 'forward'}",
        grid=(b, k // lanes),
        in_specs=[*section, *([one] * backward)],
        out_specs=[three if backward else one],
        out_shapes=[(qkv.shape if backward else (b, t, k), dtype)],
        semantics=("parallel", "parallel"),
        cost=cost,
        scratch=[pltpu.VMEM((r, lanes), F32) for r in ([padded] * 7 if backward else [padded, padded, keys])],
    )(qkv, qkv, qkv, *([do] if backward else []))[0]
