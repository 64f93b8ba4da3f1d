"""The backward pass of softmax attention; core.py says how and why.

Without `streamed` tiles a grid step holds whole images. With them, for tokens too many for that, the tiles of queries are the
innermost dimension of the grid, and a group of heads' keys, values and their gradients stay in VMEM while it runs.
"""

import math
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.heads import CoreTiles, Sums, heads_of, narrow, sweep
from kernels.device import Device
from kernels.launch import Launch, call, dot, vmem_limit


def _kernel(
    q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref, o_ref, scratch, *, t: CoreTiles, h: int, scale: float, device: Device
):  # fmt: skip
    """Refs [images, rows, lanes]; rows of the queries' (q, do, dq, o) are one tile where tiles are streamed. o_ref may be None."""
    images, total, lanes = k_ref.shape
    factor = scale * math.log2(math.e)
    dtype = do_ref.dtype
    several = bool(scratch)  # several tiles of queries or chunks of keys: dk and dv are summed in scratch

    def products(i, head, q, do, start, size, wide):
        """Transposed logits and their gradient before the softmax [S, Tq] of one chunk of keys, the keys and the values."""
        keys = pl.ds(start, size)
        k, v = k_ref[i, keys, head.lo : head.hi], v_ref[i, keys, head.lo : head.hi]
        if not device.bf16_matmul and size == total:  # widened once for the heads of a column
            k, v = wide.setdefault((head.lo, head.hi), (k.astype(jnp.float32), v.astype(jnp.float32)))
        return dot(k, q, device, contract=(1, 1)), dot(v, do, device, contract=(1, 1)), k, v

    def gradients(p, dp, delta, q, do, k, v):
        """dk, dv [S, columns], and dq, o [Tq, columns] of one chunk of keys."""
        ds, p = narrow(p * (dp - delta), dtype, device), narrow(p, dtype, device)
        dq = dot(ds, k, device, contract=(0, 0)) * scale
        o = dq if o_ref is None else dot(p, v, device, contract=(0, 0))
        return dot(ds, q, device) * scale, dot(p, do, device), dq, o

    def whole(i, head, q, do, emit, wide):
        s, dp, k, v = products(i, head, q, do, 0, total, wide)
        p = jnp.exp2((s - s.max(0, keepdims=True)) * factor)
        p = p * (1.0 / p.sum(0, keepdims=True))
        dk, dv, dq, o = gradients(p, dp, (p * dp).sum(0, keepdims=True), q, do, k, v)
        emit(head, 0, total, dk, dv)
        return dq, o

    def online(i, head, q, do, emit, wide):
        """Twice over the keys: first the softmax's maximum, sum and delta of each query, then the gradients."""

        def loop(chunk, carry):
            full = total // t.keys
            carry = lax.fori_loop(0, full, lambda c, carry: chunk(pl.multiple_of(c * t.keys, t.keys), t.keys, carry), carry)
            return chunk(full * t.keys, total % t.keys, carry) if total % t.keys else carry

        def measure(start, size, carry):
            m, norm, delta = carry
            s, dp, _, _ = products(i, head, q, do, start, size, wide)
            new = jnp.maximum(m, s.max(0, keepdims=True))
            p, shrink = jnp.exp2((s - new) * factor), jnp.exp2((m - new) * factor)
            return new, norm * shrink + p.sum(0, keepdims=True), delta * shrink + (p * dp).sum(0, keepdims=True)

        zeros = jnp.zeros((1, q.shape[0]), jnp.float32)
        m, norm, delta = loop(measure, (zeros - jnp.inf, zeros, zeros))
        inverse = 1.0 / norm

        def differentiate(start, size, carry):
            s, dp, k, v = products(i, head, q, do, start, size, wide)
            dk, dv, dq, o = gradients(jnp.exp2((s - m) * factor) * inverse, dp, delta * inverse, q, do, k, v)
            emit(head, start, size, dk, dv)
            return carry[0] + dq, carry[1] + o

        return loop(differentiate, (jnp.zeros(q.shape, jnp.float32),) * 2)

    def existing(value):
        """Queries of a streamed tile, zero behind the last token: what they add to dk and dv is then zero."""
        if not t.streamed or total % t.queries == 0:
            return value
        row = pl.program_id(2) * t.queries + lax.broadcasted_iota(jnp.int32, (t.queries, 1), 0)
        return jnp.where(row < total, value, 0.0)

    def tile(i, run, emit, start, size):
        dqs, os, wide, rows = Sums(), Sums(), {}, pl.ds(start, size)
        for head in run:
            columns = slice(head.lo, head.hi)
            q = narrow(existing(head.mask(q_ref[i, rows, columns])), dtype, device)
            do = narrow(existing(head.mask(do_ref[i, rows, columns])), dtype, device)
            dq, o = (whole if t.keys == total else online)(i, head, q, do, emit, wide)
            dqs.add(head, head.mask(dq))
            os.add(head, head.mask(o))
        for ref, sums in ((dq_ref, dqs), (o_ref, os)):
            if ref is not None:
                sums.store(ref, (i, rows), dtype)

    def image(i):
        begins = (pl.program_id(2) == 0) if t.streamed else True
        ends = (pl.program_id(2) == pl.num_programs(2) - 1) if t.streamed else True

        @pl.when(begins)
        def _():
            for ref in scratch:
                ref[...] = jnp.zeros_like(ref)

        for run in heads_of(lanes, h):
            dks, dvs = Sums(), Sums()

            def emit(head, start, size, dk, dv, dks=dks, dvs=dvs):
                if several:
                    scratch[0][pl.ds(start, size), head.lo : head.hi] += dk
                    scratch[1][pl.ds(start, size), head.lo : head.hi] += dv
                else:
                    dks.add(head, dk)
                    dvs.add(head, dv)

            if t.streamed:
                tile(i, run, emit, 0, t.queries)
            else:
                sweep(total, t.queries, partial(tile, i, run, emit))
            for ref, sums in ((dk_ref, dks), (dv_ref, dvs)):
                sums.store(ref, (i, slice(None)), dtype)

        @pl.when(ends)
        def _():
            for ref, source in zip((dk_ref, dv_ref), scratch, strict=False):
                ref[i] = source[...].astype(dtype)

    sweep(images, 1, lambda i, _: image(i))


def backward(
    qkv, do, *, tiles: CoreTiles, num_heads: int, launch: Launch, width: int | None, with_o: bool, cost: pl.CostEstimate
):  # fmt: skip
    """dqkv [3, B, T, K] (and with_o: o) of qkv [3, B, T, K] and do [B, T, K]; width: of a head, if its lanes are padded."""
    _, b, total, k = qkv.shape
    t, h = tiles, k // num_heads
    several = (t.queries, t.keys) != (total, total)
    queries, once = (t.queries, pl.Buffered(1)) if t.streamed else (total, None)

    def tile(i, g, j=0):
        return i, j, g

    rows = pl.BlockSpec((t.images, queries, t.lanes), tile)
    of_q = pl.BlockSpec((1, t.images, queries, t.lanes), lambda *at: (0, *tile(*at)))
    of_k, of_v = (
        pl.BlockSpec((1, t.images, total, t.lanes), lambda i, g, *_, c=c: (c, i, 0, g), pipeline_mode=once) for c in (1, 2)
    )
    both = pl.BlockSpec((2, t.images, total, t.lanes), lambda i, g, *_: (0, i, 0, g))
    packed = pl.BlockSpec((3, t.images, total, t.lanes), lambda i, g: (0, i, 0, g))

    def kernel(q, k, v, do, *rest):
        dq, dk, dv = (rest[0], rest[1].at[0], rest[1].at[1]) if t.streamed else (rest[0].at[c] for c in range(3))
        o, scratch = (rest[1 + t.streamed], rest[2 + t.streamed :]) if with_o else (None, rest[1 + t.streamed :])
        arrays = q.at[0], k.at[0], v.at[0], do
        _kernel(*arrays, dq, dk, dv, o, scratch, t=t, h=h, scale=(width or h) ** -0.5, device=launch.device)

    one = (do.shape, qkv.dtype)
    out_specs, out_shapes = (
        ([rows, both], [one, ((2, *do.shape), qkv.dtype)]) if t.streamed else ([packed], [(qkv.shape, qkv.dtype)])
    )
    found = call(
        kernel,
        launch=launch,
        name="attention_core_backward",
        grid=(b // t.images, k // t.lanes, *([pl.cdiv(total, t.queries)] * t.streamed)),
        in_specs=[of_q, of_k, of_v, rows],
        out_specs=[*out_specs, *([rows] * with_o)],
        out_shapes=[*out_shapes, *([one] * with_o)],
        semantics=("parallel", "parallel", *(["arbitrary"] * t.streamed)),
        cost=cost,
        scratch=[pltpu.VMEM((total, t.lanes), jnp.float32)] * (2 * several),
        vmem_bytes=vmem_limit(launch.device, t.needs),
    )(qkv, qkv, qkv, do)
    if not t.streamed:
        return found
    dq, dkdv, *o = found
    return jnp.concatenate([dq[None], dkdv]), *o
