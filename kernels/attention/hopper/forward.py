"""The attention core on Hopper GPUs for short rows, in Pallas Mosaic GPU: whole rows of keys, plain softmax, nothing rescaled.

    o = softmax(q k^T / sqrt(H)) v      q, k, v, o [B, T, N, 64] bfloat16; logits, softmax and sums in float32

A block of threads stays on its multiprocessor and takes one head of one image after the other: a warpgroup loads q, k, v of the
next head (TMA) while others multiply. Each of those takes 64 queries at a time against all keys: logits [64, keys] are one wgmma's
accumulator, their exponentials go from its registers into the next product, and the result takes its queries' place in shared
memory on the way out.

Memory: q, k, v read once, o written once, 8 B T N H bytes: 155 MB for ViT-B/16 at 128 images, 46 us at an H100's 3.35 TB/s. That
is what bounds it: without softmax, and without any product, it takes the same time (LOG.md).

The backward pass (`backward.py`) needs q, k, v and o's gradient, no statistics. Any T up to MOST; keys from `tokens` on are
padding, masked inside.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.hopper.backward import backward
from kernels.attention.hopper.parts import LOG2E, PARAMS, along, buffer, masked, product, transposed, widened
from kernels.attention.hopper.plan import HEAD, MOST, TILE, Plan, plan
from kernels.launch import vary_alike
from kernels.settings import own

PROCESSORS = 132  # of an H100 or H200 (SXM); a card with fewer runs the rest of the blocks after the first

LOADER, MULTIPLIER = {2: 40, 3: 32}, {2: 232, 3: 160}  # registers a thread, by the warpgroups that multiply: 65,536 in all


def _forward_kernel(q_ref, k_ref, v_ref, o_ref, q_s, k_s, v_s, logits_ready, v_ready, free, *, tokens: int, p: Plan):
    b, _, n, h = o_ref.shape
    k_first, v_first = (n, 2 * n) if q_ref.shape[2] > n else (0, 0)  # the three of them beside each other in one array
    (q_flat, q_tiled), (k_flat, k_tiled), (v_flat, v_tiled) = q_s, k_s, v_s
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    heads = (b * n - block + PROCESSORS - 1) // PROCESSORS  # that this block takes
    scale = h**-0.5 * LOG2E

    def place(i):
        head = block + i * PROCESSORS
        return head // n, lax.rem(head, n)

    @pl.when(warpgroup == p.warpgroups)
    def _load():
        plgpu.set_max_registers(LOADER[p.warpgroups], action="decrease")

        @pl.loop(0, heads)
        def _head(i):
            slot = lax.rem(i, p.stages)
            pl.when(i >= p.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            image, head = place(i)
            rows = pl.ds(i * 0, p.rows)  # a start that is not constant: rows behind the last are asked for
            plgpu.copy_gmem_to_smem(q_ref.at[image, rows, head], q_flat.at[slot], logits_ready.at[slot])
            plgpu.copy_gmem_to_smem(k_ref.at[image, rows, head + k_first], k_flat.at[slot], logits_ready.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[image, rows, head + v_first], v_flat.at[slot], v_ready.at[slot])

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
                q = q_tiled.at[slot, rows]
                s = masked(product(q, transposed(k_tiled.at[slot, pl.ds(0, p.keys)]), p.keys), tokens)
                largest = s.max(axis=1) * scale
                e = jnp.exp2(s * scale - along(largest, s, 0))
                total = e.sum(axis=1)
                e = widened(e.astype(q_ref.dtype), p.rows)
                pl.when(tile < p.warpgroups)(lambda: plgpu.barrier_wait(v_ready.at[slot]))  # its first of this head
                o = product(e, v_tiled.at[slot], h)
                q[...] = (o * along(1 / total, o, 0)).astype(q_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_flat.at[slot, rows], o_ref.at[image, rows, head])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(free.at[slot])


@partial(jax.jit, static_argnums=(3, 4))
def forward(q, k, v, tokens: int, n: int):
    """o [B, T, N, 64] of q, k, v like it, of whose T rows the first `tokens` are keys.

    Or of one array [B, T, 3 N, 64] that holds q, k and v, given three times. n: N. A jit of its own: then the layers of a model
    share one module, which is compiled once, and not once a layer.
    """
    p = plan(q.shape[1], tokens)
    ring = partial(buffer, p.stages, p.rows, dtype=q.dtype)
    return plgpu.kernel(
        partial(_forward_kernel, tokens=tokens, p=p),
        out_type=jax.ShapeDtypeStruct((*q.shape[:2], n, HEAD), q.dtype),
        scratch_types=[
            *(ring(), ring(), ring()),
            plgpu.Barrier(num_arrivals=2, num_barriers=p.stages),
            plgpu.Barrier(num_barriers=p.stages),
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
    """softmax(q k^T / sqrt(H)) v for q, k, v [B, T, N, 64] in bfloat16, T at most 256; o like q.

    tokens: the keys from this row on are padding: no query sees them and their gradients are zero. ValueError for other shapes and
    dtypes. What `refuses` (`plan.py`) says no to does not run here.
    """
    _, t, _, h = q.shape
    tokens = t if tokens is None else tokens
    if not (q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype == jnp.bfloat16):
        raise ValueError(f"q, k, v are {q.dtype}{q.shape}, {k.dtype}{k.shape}, {v.dtype}{v.shape}: one bfloat16 shape is required")
    if h != HEAD or not 1 <= tokens <= t <= MOST:
        raise ValueError(f"q is [B, T, N, H] = {q.shape} with {tokens} keys: H = {HEAD} and 1 <= keys <= T <= {MOST} is required")
    return _attention(*vary_alike(q, k, v), tokens)
