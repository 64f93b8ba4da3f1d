"""The attention core on Hopper GPUs for short rows, in Pallas Mosaic GPU: a head's keys and values lie whole in shared memory.

    o = softmax(q k^T / sqrt(H)) v      q, k, v, o [B, T, N, H] bfloat16; logits, softmax and sums in float32

A block of threads stays on its multiprocessor and takes one head of one image after the other: a warpgroup loads q, k, v of the
next head (TMA) while others multiply. Each of those takes 64 queries at a time against all keys: logits [64, keys] are one wgmma's
accumulator, their exponentials go from its registers into the next product, and the result takes its queries' place in shared
memory on the way out. Rows of more than 256 keys are taken in spans, and what is summed is rescaled (Milakov and Gimelshein,
arXiv:1805.02867). Where two heads do not fit shared memory, loads wait for the last head's products.

Memory: q, k, v read once, o written once, 8 B T N H bytes: 155 MB for ViT-B/16 at 128 images, 46 us at an H100's 3.35 TB/s. That
is what bounds it: without softmax, and without any product, it takes the same time (LOG.md).

The backward pass (`backward.py`) needs q, k, v and o's gradient, no statistics. T is at most what `plan.longest` says; keys from
`tokens` on are padding, masked inside.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.hopper.backward import backward
from kernels.attention.hopper.parts import (
    LOG2E,
    PARAMS,
    along,
    arrivals,
    buffer,
    fetch,
    from_behind,
    masked,
    part,
    product,
    store,
    transposed,
    widened,
)
from kernels.attention.hopper.plan import HEADS, PROCESSORS, TILE, Plan, longest, plan
from kernels.launch import vary_alike
from kernels.settings import own

LOADER, MULTIPLIER = {2: 40, 3: 32}, {2: 232, 3: 160}  # registers a thread, by the warpgroups that multiply: 65,536 in all


def _attend(q, k, v, scale, arrived, *, tokens: int, p: Plan) -> list:
    """The result of 64 queries, by pieces of the head. arrived(): waits for v."""
    largest: Any = None
    total: Any = None
    less: Any = None
    o: Any = None
    for first, width in p.spans:
        s = product(q, [transposed(a.at[pl.ds(first, width)]) for a in k], width)
        s = masked(s, min(width, tokens - first))
        most = s.max(axis=1) * scale
        if o is not None:
            most = jnp.maximum(most, largest)
            less = jnp.exp2(largest - most)
        e = jnp.exp2(s * scale - along(most, s, 0))
        total = e.sum(axis=1) if o is None else e.sum(axis=1) + total * less
        filled = -(-width // TILE) * TILE
        e = widened(e.astype(q[0].dtype), filled)
        if o is None:
            arrived()
        parts = [product([e], [a.at[pl.ds(first, filled)]], a.shape[-1]) for a in v]
        o = parts if o is None else [b + a * along(less, a, 0) for a, b in zip(o, parts, strict=True)]
        largest = most
    return [a * along(1 / total, a, 0) for a in o]


def _forward_kernel(q_ref, k_ref, v_ref, o_ref, q_s, k_s, v_s, logits_ready, v_ready, free, *, tokens: int, p: Plan):
    b, _, n, h = o_ref.shape
    k_first, v_first = (n, 2 * n) if q_ref.shape[2] > n else (0, 0)  # the three of them beside each other in one array
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    heads = (b * n - block + PROCESSORS - 1) // PROCESSORS  # that this block takes
    scale = h**-0.5 * LOG2E

    def place(i):
        head = from_behind(block + i * PROCESSORS, b * n)  # the product before wrote the last images last: L2 has them
        return head // n, lax.rem(head, n)

    @pl.when(warpgroup == p.warpgroups)
    def _load():
        plgpu.set_max_registers(LOADER[p.warpgroups], action="decrease")

        @pl.loop(0, heads)
        def _head(i):
            slot = lax.rem(i, p.stages)
            pl.when(i >= p.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            image, head = place(i)
            fetch(q_ref, (image, head), q_s, slot, i * 0, p, logits_ready.at[slot])
            fetch(k_ref, (image, head + k_first), k_s, slot, i * 0, p, logits_ready.at[slot])
            fetch(v_ref, (image, head + v_first), v_s, slot, i * 0, p, v_ready.at[slot])

    @pl.when(warpgroup < p.warpgroups)
    def _multiply():
        plgpu.set_max_registers(MULTIPLIER[p.warpgroups], action="increase")

        @pl.loop(0, heads)
        def _head(i):
            slot = lax.rem(i, p.stages)
            image, head = place(i)
            plgpu.barrier_wait(logits_ready.at[slot])
            # the tiles of all heads are one sequence, dealt in turn: four tiles keep three warpgroups busy
            first = lax.rem(warpgroup + p.warpgroups * p.tiles - lax.rem(i * p.tiles, p.warpgroups), p.warpgroups)

            @pl.loop(first, p.tiles, step=p.warpgroups)
            def _tile(tile):
                rows = pl.ds(tile * TILE, TILE)
                # v is there once for a head: a warpgroup waits with its first tile
                arrived = partial(pl.when(tile < p.warpgroups), lambda: plgpu.barrier_wait(v_ready.at[slot]))
                o = _attend(part(q_s, slot, rows), part(k_s, slot), part(v_s, slot), scale, arrived, tokens=tokens, p=p)
                store(o, q_s, (slot, rows), o_ref, (image, head), rows, p)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(free.at[slot])


@partial(jax.jit, static_argnums=(3, 4))
def forward(q, k, v, tokens: int, n: int):
    """o [B, T, N, H] of q, k, v like it, of whose T rows the first `tokens` are keys.

    Or of one array [B, T, 3 N, H] that holds q, k and v, given three times. n: N. A jit of its own: then the layers of a model
    share one module, which is compiled once, and not once a layer.
    """
    p = plan(q.shape[1], tokens, q.shape[3])
    ring = partial(buffer, p.stages, p.rows, head=p.head, dtype=q.dtype)
    return plgpu.kernel(
        partial(_forward_kernel, tokens=tokens, p=p),
        out_type=jax.ShapeDtypeStruct((*q.shape[:2], n, p.head), q.dtype),
        scratch_types=[
            *(ring(), ring(), ring()),
            plgpu.Barrier(num_arrivals=2 * arrivals(p), num_barriers=p.stages),
            plgpu.Barrier(num_arrivals=arrivals(p), num_barriers=p.stages),
            plgpu.Barrier(num_arrivals=p.warpgroups, num_barriers=p.stages),
        ],
        grid=(PROCESSORS,),
        grid_names=("block",),
        num_threads=p.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="attention_hopper_forward",
        compiler_params=PARAMS,
    )(q, k, v)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q, k, v, tokens):
    return vary_alike(forward(q, k, v, tokens, q.shape[2]), q)[0]


def _attention_backward(tokens, kept, g):
    grads = backward(*kept, g, tokens)
    return tuple(vary_alike(d, a)[0] for d, a in zip(grads, kept, strict=True))


_attention.defvjp(own(lambda q, k, v, tokens: (_attention(q, k, v, tokens), (q, k, v))), own(_attention_backward))


def attention(q, k, v, *, tokens=None):
    """softmax(q k^T / sqrt(H)) v for q, k, v [B, T, N, H] in bfloat16, H of `plan.HEADS`, T at most `plan.longest(H)`; o like q.

    tokens: the keys from this row on are padding: no query sees them and their gradients are zero. ValueError for other shapes and
    dtypes. What `refuses` (`plan.py`) says no to does not run here.
    """
    _, t, _, h = q.shape
    tokens = t if tokens is None else tokens
    if not (q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype == jnp.bfloat16):
        raise ValueError(f"q, k, v are {q.dtype}{q.shape}, {k.dtype}{k.shape}, {v.dtype}{v.shape}: one bfloat16 shape is required")
    if h not in HEADS or not 1 <= tokens <= t <= longest(h):
        most = f"keys <= T <= {longest(h)}" if h in HEADS else f"keys <= T and H of {HEADS}"
        raise ValueError(f"q is [B, T, N, H] = {q.shape} with {tokens} keys: 1 <= {most} is required")
    return _attention(*vary_alike(q, k, v), tokens)
