"""Gradients of the Hopper attention core (`forward.py`), one kernel, from q, k, v and o's gradient g alone.

    p = softmax(q k^T / sqrt(H))    dv = p^T g    dp = g v^T    ds = p (dp - delta)    dq = ds k / sqrt(H)    dk = ds^T q / sqrt(H)
    delta = rowsum(p dp), which is rowsum(o g): o is not read

A head's q, k, v, g lie whole in shared memory (128 KB if 256 x 64), and two warpgroups take it in two passes of 64 rows at a
time. Over queries: logits as in the forward pass, which give p, delta and dq; lse (base 2) and delta stay in shared memory. Over
keys: the transposed logits and dp of `chunk` queries at a time, whose p^T and ds^T are the left operands, from registers, of dv and
dk. So no tile of p or ds goes through shared memory, and nothing is summed across warpgroups, at the price of seven products for
five, nine where rows of more than 256 keys are taken in spans: once for lse and delta, once more for dq. dk and dv leave by the
places of their keys and values, which no one reads any more.

Memory: 4 arrays read and 3 written once, 14 B T N H bytes, 271 MB and 81 us for ViT-B/16 at 128 images. Loads of the next head
wait for the last read of this one: that is what is left to win.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.hopper.parts import (
    COLUMNS,
    LOG2E,
    PARAMS,
    along,
    arrivals,
    buffer,
    fetch,
    from_behind,
    load,
    masked,
    part,
    product,
    store,
    transposed,
    widened,
)
from kernels.attention.hopper.plan import COMPUTE, PROCESSORS, TILE, Plan, plan

LOADER, MULTIPLIER = 24, 240  # registers a thread


def _over_queries(rows, arrays, lse, delta, scale, *, tokens: int, p: Plan):
    """Gradient of 64 queries (without 1 / sqrt(H)), by pieces of the head; their lse and delta into shared memory."""
    q, k, v, g = arrays
    q, g = [a.at[rows] for a in q], [a.at[rows] for a in g]

    def products(first, width, most=None, before=None):
        """(largest logit, exponentials, dp) of a span of keys."""
        keys = pl.ds(first, width)
        s = masked(product(q, [transposed(a.at[keys]) for a in k], width), min(width, tokens - first))
        if most is None:
            most = s.max(axis=1) * scale
            most = most if before is None else jnp.maximum(most, before)
        e = jnp.exp2(s * scale - along(most, s, 0))
        total = e.sum(axis=1)
        # rounded, and so packed, before the next accumulator: both in float32 do not fit the registers
        e = lax.optimization_barrier(e.astype(q[0].dtype))
        dp = product(g, [transposed(a.at[keys]) for a in v], width)
        return most, total, e.astype(jnp.float32), dp

    def gradient(e, dp, d, first, width):
        filled = -(-width // TILE) * TILE
        ds = widened((e * (dp - along(d, dp, 0))).astype(q[0].dtype), filled)
        return [product([ds], [a.at[pl.ds(first, filled)]], a.shape[-1]) for a in k]

    if len(p.spans) == 1:
        largest, total, e, dp = products(*p.spans[0])
        d = (e * dp).sum(axis=1) / total
        dq = gradient(e, dp, d, *p.spans[0])
        lse[rows], delta[rows] = largest + jnp.log(total) * LOG2E, d
        return [a * along(1 / total, a, 0) for a in dq]
    largest: Any = None
    total: Any = None
    d: Any = None
    for span in p.spans:
        most, sums, e, dp = products(*span, before=largest)
        weighed = (e * dp).sum(axis=1)
        less = 0.0 if largest is None else jnp.exp2(largest - most)
        total, d = (sums, weighed) if largest is None else (sums + total * less, weighed + d * less)
        largest = most
    d, lse_rows = d / total, largest + jnp.log(total) * LOG2E
    lse[rows], delta[rows] = lse_rows, d
    dq: Any = None
    for span in p.spans:
        _, _, e, dp = products(*span, most=lse_rows)
        more = gradient(e, dp, d, *span)
        dq = more if dq is None else [a + b for a, b in zip(dq, more, strict=True)]
    return dq


def _over_keys(rows, arrays, lse, delta, scale, *, queries: int, p: Plan):
    """Gradients of 64 keys (without 1 / sqrt(H)) and 64 values, each by pieces of the head."""
    q, k, v, g = arrays
    k, v, dtype = [a.at[rows] for a in k], [a.at[rows] for a in v], q[0].dtype

    def run(*sums):
        dk, dv = sums[: len(q)], sums[len(q) :]
        for start in range(0, queries, p.chunk):
            width = min(p.chunk, queries - start)
            whole = -(-width // TILE) * TILE
            some, filled = pl.ds(start, width), pl.ds(start, whole)
            s = product(k, [transposed(a.at[some]) for a in q], width)
            e = jnp.exp2(s * scale - along(load(lse.at[some], COLUMNS), s, 1))
            e = lax.optimization_barrier(e.astype(dtype))
            dp = product(v, [transposed(a.at[some]) for a in g], width)
            for into, a in zip(dv, g, strict=True):
                plgpu.wgmma(into, widened(e, whole), a.at[filled])
            ds = widened((e.astype(jnp.float32) * (dp - along(load(delta.at[some], COLUMNS), s, 1))).astype(dtype), whole)
            for into, a in zip(dk, q, strict=True):
                plgpu.wgmma(into, ds, a.at[filled])
            plgpu.wgmma_wait(0)
        return [a[...] for a in dk], [a[...] for a in dv]

    return pl.run_scoped(run, *(plgpu.WGMMAAccumulatorRef((TILE, a.shape[-1]), jnp.float32) for a in (*q, *q)))


def _of_keys(d, tile, tokens: int):
    """A tile's gradients, zero where its rows are no keys."""
    row = plgpu.broadcasted_iota(jnp.int32, d.shape, 0, layout=plgpu.Layout.WGMMA) + tile * TILE
    return jnp.where(row < tokens, d, 0.0)


def _load(heads, place, arrays, loaded, free, p: Plan):
    """What the warpgroup does that loads: of each head of `arrays`, (array, its first head, the buffers it goes into) each."""
    plgpu.set_max_registers(LOADER, action="decrease")

    @pl.loop(0, heads)
    def _head(i):
        pl.when(i >= 1)(lambda: plgpu.barrier_wait(free))
        image, head = place(i)
        for ref, first, buffers in arrays:
            fetch(ref, (image, head + first), buffers, 0, i * 0, p, loaded)


def _kernel(*refs, tokens: int, p: Plan):
    inputs, outputs, buffers, (out, lse_s, delta_s, loaded, both, free) = refs[:4], refs[4:-10], refs[-10:-6], refs[-6:]
    b, t, n, h = inputs[3].shape
    together = len(outputs) == 1  # q, k, v beside each other in one array, and their gradients
    dq_ref, dk_ref, dv_ref = outputs * 3 if together else outputs
    k_first, v_first = (n, 2 * n) if together else (0, 0)
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    scale = h**-0.5 * LOG2E
    heads = (b * n - block + PROCESSORS - 1) // PROCESSORS

    def place(i):
        head = from_behind(block + i * PROCESSORS, b * n)  # the product before wrote the last images last: L2 has them
        return head // n, lax.rem(head, n)

    arrays = [*zip(inputs, (0, k_first, v_first, 0), buffers, strict=True)]
    pl.when(warpgroup == COMPUTE)(lambda: _load(heads, place, arrays, loaded, free, p))

    @pl.when(warpgroup < COMPUTE)
    def _multiply():
        plgpu.set_max_registers(MULTIPLIER, action="increase")

        @pl.loop(0, heads)
        def _head(i):
            image, head = place(i)
            plgpu.barrier_wait(loaded)

            def here(tile):
                # always 0, but not to the compiler: it would take the addresses of all products out of the loops, and spill them
                zero = jnp.where(image + tile > b + p.tiles, 1, 0)
                return [part(a, zero) for a in buffers], lse_s.at[zero], delta_s.at[zero]

            @pl.loop(warpgroup, p.tiles, step=COMPUTE)
            def _queries(tile):
                rows = pl.ds(tile * TILE, TILE)
                dq = _over_queries(rows, *here(tile), scale, tokens=tokens, p=p)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                store([a * h**-0.5 for a in dq], out, (warpgroup,), dq_ref, (image, head), rows, p)

            plgpu.commit_smem()
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)

            @pl.loop(warpgroup, p.tiles, step=COMPUTE)
            def _keys(tile):
                rows = pl.ds(tile * TILE, TILE)
                dk, dv = _over_keys(rows, *here(tile), scale, queries=-(-t // 8) * 8, p=p)
                if tokens < t:  # rows behind T are not stored, those between are no keys
                    dk, dv = ([_of_keys(a, tile, tokens) for a in d] for d in (dk, dv))
                store(dv, buffers[2], (0, rows), dv_ref, (image, head + v_first), rows, p)
                store([a * h**-0.5 for a in dk], buffers[1], (0, rows), dk_ref, (image, head + k_first), rows, p)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(free)

        plgpu.wait_smem_to_gmem(0)


@partial(jax.jit, static_argnums=4)  # see `hopper.forward`
def backward(q, k, v, g, tokens: int):
    """Gradients (dq, dk, dv) of `hopper.forward` for g [B, T, N, H], that of its result; arrays like it.

    Or one of q, k and v beside each other, for them in one array that is given three times.
    """
    p = plan(q.shape[1], tokens, q.shape[3])
    whole = partial(buffer, 1, p.rows, head=p.head, dtype=q.dtype)
    numbers = plgpu.SMEM((1, p.rows), jnp.float32)
    return plgpu.kernel(
        partial(_kernel, tokens=tokens, p=p),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype),) * (3 if q.shape == g.shape else 1),
        scratch_types=[
            *(whole(), whole(), whole(), whole()),
            buffer(COMPUTE, TILE, head=p.head, dtype=q.dtype),
            *(numbers, numbers),
            plgpu.Barrier(num_arrivals=4 * arrivals(p)),
            plgpu.Barrier(num_arrivals=COMPUTE),
            plgpu.Barrier(num_arrivals=COMPUTE),
        ],
        grid=(PROCESSORS,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        kernel_name="attention_hopper_backward",
        compiler_params=PARAMS,
    )(q, k, v, g)
