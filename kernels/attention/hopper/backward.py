"""Gradients of the Hopper attention core (`forward.py`), one kernel, from q, k, v and o's gradient g alone.

    p = softmax(q k^T / sqrt(H))    dv = p^T g    dp = g v^T    ds = p (dp - delta)    dq = ds k / sqrt(H)    dk = ds^T q / sqrt(H)
    delta = rowsum(p dp), which is rowsum(o g): o is not read

A head's q, k, v, g lie whole in shared memory (128 KB), and two warpgroups take it in two passes of 64 rows at a time. Over
queries: logits as in the forward pass, which give p, delta and dq; lse (base 2) and delta stay in shared memory. Over keys: the
transposed logits and dp of `chunk` queries at a time, whose p^T and ds^T are the left operands, from registers, of dv and dk. So
no tile of p or ds goes through shared memory, and nothing is summed across warpgroups, at the price of seven products for five.

Memory: 4 arrays read and 3 written once, 14 B T N H bytes, 271 MB and 81 us for ViT-B/16 at 128 images. Loads of the next head
wait for the last read of this one: that is what is left to win.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.hopper.parts import COLUMNS, LOG2E, PARAMS, along, buffer, load, masked, product, transposed, widened
from kernels.attention.hopper.plan import COMPUTE, TILE, Plan, plan

PROCESSORS = 132
LOADER, MULTIPLIER = 24, 240  # registers a thread


def _over_queries(rows, arrays, lse, delta, scale, *, tokens: int, p: Plan):
    """Gradient of 64 queries (without 1 / sqrt(H)); their lse and delta into shared memory."""
    q, k, v, g = arrays
    keys = pl.ds(0, p.keys)
    s = masked(product(q.at[rows], transposed(k.at[keys]), p.keys), tokens)
    largest = s.max(axis=1) * scale
    e = jnp.exp2(s * scale - along(largest, s, 0))
    total = e.sum(axis=1)
    # rounded, and so packed, before the next accumulator: both in float32 do not fit the registers
    e = lax.optimization_barrier(e.astype(q.dtype))
    dp = product(g.at[rows], transposed(v.at[keys]), p.keys)
    e = e.astype(jnp.float32)
    d = (e * dp).sum(axis=1) / total
    dq = product(widened((e * (dp - along(d, dp, 0))).astype(q.dtype), p.rows), k, q.shape[-1])
    lse[rows] = largest + jnp.log(total) * LOG2E
    delta[rows] = d
    return dq * along(1 / total, dq, 0)


def _over_keys(rows, arrays, lse, delta, scale, *, queries: int, p: Plan):
    """Gradients of 64 keys (without 1 / sqrt(H)) and 64 values."""
    q, k, v, g = arrays

    def run(dk, dv):
        for start in range(0, queries, p.chunk):
            width = min(p.chunk, queries - start)
            whole = -(-width // TILE) * TILE
            part, filled = pl.ds(start, width), pl.ds(start, whole)
            s = product(k.at[rows], transposed(q.at[part]), width)
            e = jnp.exp2(s * scale - along(load(lse.at[part], COLUMNS), s, 1))
            e = lax.optimization_barrier(e.astype(q.dtype))
            dp = product(v.at[rows], transposed(g.at[part]), width)
            plgpu.wgmma(dv, widened(e, whole), g.at[filled])
            ds = e.astype(jnp.float32) * (dp - along(load(delta.at[part], COLUMNS), s, 1))
            plgpu.wgmma(dk, widened(ds.astype(q.dtype), whole), q.at[filled])
            plgpu.wgmma_wait(0)
        return dk[...], dv[...]

    accumulator = plgpu.WGMMAAccumulatorRef((TILE, q.shape[-1]), jnp.float32)
    return pl.run_scoped(run, accumulator, accumulator)


def _kernel(*refs, tokens: int, p: Plan):
    inputs, outputs, buffers, (out, lse_s, delta_s, loaded, both, free) = refs[:4], refs[4:-10], refs[-10:-6], refs[-6:]
    b, t, n, h = inputs[3].shape
    together = len(outputs) == 1  # q, k, v beside each other in one array, and their gradients
    dq_ref, dk_ref, dv_ref = outputs * 3 if together else outputs
    k_first, v_first = (n, 2 * n) if together else (0, 0)
    dtype = inputs[0].dtype
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    heads = (b * n - block + PROCESSORS - 1) // PROCESSORS
    scale = h**-0.5 * LOG2E

    def place(i):
        head = block + i * PROCESSORS
        return head // n, lax.rem(head, n)

    @pl.when(warpgroup == COMPUTE)
    def _load():
        plgpu.set_max_registers(LOADER, action="decrease")

        @pl.loop(0, heads)
        def _head(i):
            pl.when(i >= 1)(lambda: plgpu.barrier_wait(free))
            image, head = place(i)
            for ref, first, (flat, _) in zip(inputs, (0, k_first, v_first, 0), buffers, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[image, pl.ds(i * 0, p.rows), head + first], flat.at[0], loaded)

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
                return [tiled.at[zero] for _, tiled in buffers], lse_s.at[zero], delta_s.at[zero]

            def store(x, ref, rows, slot, first=0):
                flat, tiled = out
                tiled.at[warpgroup, slot][...] = x.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(flat.at[warpgroup, slot], ref.at[image, rows, head + first])

            @pl.loop(warpgroup, p.tiles, step=COMPUTE)
            def _queries(tile):
                rows = pl.ds(tile * TILE, TILE)
                dq = _over_queries(rows, *here(tile), scale, tokens=tokens, p=p)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                store(dq * h**-0.5, dq_ref, rows, 0)

            plgpu.commit_smem()
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)

            @pl.loop(warpgroup, p.tiles, step=COMPUTE)
            def _keys(tile):
                rows = pl.ds(tile * TILE, TILE)
                dk, dv = _over_keys(rows, *here(tile), scale, queries=-(-t // 8) * 8, p=p)
                if tokens < t:  # rows behind T are not stored, those between are no keys
                    row = plgpu.broadcasted_iota(jnp.int32, dk.shape, 0, layout=plgpu.Layout.WGMMA) + tile * TILE
                    dk, dv = (jnp.where(row < tokens, d, 0.0) for d in (dk, dv))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                store(dv, dv_ref, rows, 0, v_first)
                store(dk * h**-0.5, dk_ref, rows, 1, k_first)

            plgpu.barrier_arrive(free)

        plgpu.wait_smem_to_gmem(0)


@partial(jax.jit, static_argnums=4)  # see `hopper.forward`
def backward(q, k, v, g, tokens: int):
    """Gradients (dq, dk, dv) of `hopper.forward` for g [B, T, N, 64], that of its result; arrays like it.

    Or one of q, k and v beside each other, for them in one array that is given three times.
    """
    p = plan(q.shape[1], tokens)
    whole = partial(buffer, 1, p.rows, dtype=q.dtype)
    numbers = plgpu.SMEM((1, p.rows), jnp.float32)
    return plgpu.kernel(
        partial(_kernel, tokens=tokens, p=p),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype),) * (3 if q.shape == g.shape else 1),
        scratch_types=[
            *(whole(), whole(), whole(), whole()),
            buffer(COMPUTE, 2, TILE, dtype=q.dtype),
            *(numbers, numbers),
            plgpu.Barrier(num_arrivals=4),
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
