"""Softmax attention on packed projections, as Pallas TPU kernels: o = softmax(q k^T / sqrt(H)) v, head by head.

Layout. The projections are one array [3, B, T, K], K = N * H: the product of LN(x) with w_qkv [3, D, K] as it stands. A kernel
takes it three times through three index maps, and writes o as [B, T, K]: no transpose, no split, no padding in HBM. A block is
exactly T rows; in VMEM the heads lie side by side in the lanes, and a head is worked on in the whole 128-lane columns that it
touches: its queries are masked to its own lanes, so that the products with the columns of k are the head's alone (the MXU would
pad a width of 64 to 128 anyway). So every head width and every number of heads takes one path, a head across a column border
(width 80) included.

Forward, a tile of queries at a time: s = q k^T, p = exp(s - max), o = (p v) / sum(p). While T keys fit, the softmax sees whole
rows; beyond, it is the online softmax over chunks of keys. Backward recomputes p and works on the transpose, s' = k q^T, so that
the sums of the softmax run over sublanes and only dq and o need a transposed product:

    dv = p' do,  dp' = v do^T,  ds' = p' * (dp' - sum_s(p' * dp')),  dk = ds' q / sqrt(H),  dq = ds'^T k / sqrt(H)

It also returns o, if the gradient of an output projection needs it. Probabilities never leave VMEM. Everything between the
products is float32; operands of products are rounded to the dtype of the arrays, where the reference rounds them too.

HBM traffic: forward 4 and backward 8 arrays of B * T * K. Paper: appendix A; online softmax: Milakov and Gimelshein 2018;
recomputation: Dao et al. 2022.
"""

import contextlib
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.attention import core_backward, wide_core
from kernels.attention.heads import CoreTiles, Sums, heads_of, narrow, round_up, sweep
from kernels.device import LANES, SUBLANES, Device
from kernels.launch import Launch, call, dot, vmem_limit
from kernels.parts import divisor

# Float32 arrays that the compiler keeps in VMEM for each head of an unrolled step, read off its "used ... of 16 MiB" on v3:
# operands and results [T, columns of the head], and tiles [keys, queries].
FORWARD_TEMPORARIES, BACKWARD_TEMPORARIES = (3, 2), (5, 3)
UNROLLED = 2**20  # logits of the heads unrolled in one step: more compile slowly and gain nothing
WHOLE_ROWS = 2048  # longest row of keys whose softmax is not online
ROWS = 128  # a tile of queries or a chunk of keys is a multiple of this, or all there are


def tiles(shape: tuple[int, int, int, int], device: Device, dtype, *, backward: bool) -> CoreTiles:
    """Tiles for shape (B, T, N, H): all heads in one step if they fit, then shorter query tiles, then chunks of keys.

    NotImplementedError if a group of heads that fills whole columns does not fit VMEM even with the smallest tiles.
    """
    b, t, n, h = shape
    k, size = n * h, jnp.dtype(dtype).itemsize
    group = math.lcm(h, LANES) if k % math.lcm(h, LANES) == 0 else k
    arrays, (operands, squares) = (8, BACKWARD_TEMPORARIES) if backward else (4, FORWARD_TEMPORARIES)
    window = max(head.hi - head.lo for run in heads_of(group, h) for head in run)
    rows, budget = round_up(t, 16), device.vmem_bytes * 0.94

    def bytes_of(images, lanes, queries, keys):
        blocks = 2 * arrays * images * rows * round_up(lanes, LANES) * size
        scratch = 2 * rows * round_up(lanes, LANES) * 4 if backward and (queries, keys) != (t, t) else 0
        heads = lanes // h if (queries, keys) == (t, t) else group // h
        tile = round_up(keys, 8) * round_up(queries, LANES)
        return blocks + scratch + 4 * heads * (operands * max(queries, keys) * window + squares * tile)

    lengths = [t] if t <= 640 else []
    lengths += [q for q in (512, 384, 256, ROWS) if q < t]
    for keys in [t, 1024, 512, 256, ROWS] if t <= WHOLE_ROWS else [1024, 512, 256, ROWS]:
        for queries in lengths:
            for steps in range(1, k // group + 1):
                lanes = k // steps
                logits = lanes // h * keys * queries
                if k % steps or lanes % group or keys > t or (lanes > group and logits > UNROLLED):
                    continue
                if bytes_of(1, lanes, queries, keys) <= budget:
                    images = divisor(b, 256 // t) if steps == 1 else 1
                    while images > 1 and bytes_of(images, lanes, queries, keys) > budget:
                        images = divisor(b, images - 1)
                    needs = bytes_of(images, lanes, queries, keys)
                    return CoreTiles(images=images, lanes=lanes, queries=queries, keys=keys, needs=needs)
    found = _streamed(t, group, group // h, window, size, budget) if backward else None
    if found is not None:
        return found
    raise NotImplementedError(
        f"attention over {t} tokens: keys and values of {group // h} heads of width {h} do not fit the "
        f"{device.vmem_bytes >> 20} MiB of VMEM of a {device.name}. Use fewer tokens, or the reference ops."
    )


def _streamed(t: int, lanes: int, heads: int, window: int, size: int, budget: float) -> CoreTiles | None:
    """Tiles of the backward pass where the queries of a group of heads do not fit beside its keys: tile by tile in the grid."""
    operands, squares = BACKWARD_TEMPORARIES
    whole, wide = round_up(t, 16), round_up(lanes, LANES)
    for queries, keys in ((256, 512), (256, 256), (128, 256), (128, 128)):
        resident = whole * wide * (2 * size + 4 * size + 8)  # k, v; dk, dv twice; their float32 sums
        blocks = 2 * 4 * queries * wide * size
        temporaries = 4 * heads * (operands * max(queries, keys) * window + squares * queries * keys)
        needs = resident + blocks + temporaries
        if keys < t and needs <= budget:
            return CoreTiles(images=1, lanes=lanes, queries=queries, keys=keys, streamed=True, needs=needs)
    return None


def head_lanes(shape: tuple[int, int, int, int], device: Device, dtype) -> int:
    """Lanes that a head should take in the arrays: H, or H rounded up to whole columns where only single heads fit VMEM.

    Heads of width 80 share columns in groups of 8. A core with 16 MiB cannot hold 8 heads of 1370 tokens, but it can hold one; the
    caller then pads the weights of the projections (zero columns change nothing).
    """
    b, t, n, h = shape
    fits = {}
    for lanes in (h, round_up(h, LANES)):
        with contextlib.suppress(NotImplementedError):
            fits[lanes] = tiles((b, t, n, lanes), device, dtype, backward=True)
    whole = [lanes for lanes, found in fits.items() if found.keys == t]
    return next(iter((*whole, *fits)), h)


def cost(shape: tuple[int, int, int, int], dtype, *, backward: bool) -> pl.CostEstimate:
    """FLOPs of the products (2 forward; 6 backward, two of them recomputation), exponentials, HBM bytes. shape (B, T, N, H)."""
    b, t, n, h = shape
    products, arrays = (6, 8) if backward else (2, 4)
    return pl.CostEstimate(
        flops=products * 2 * b * n * t * t * h,
        transcendentals=b * n * t * t,
        bytes_accessed=arrays * b * t * n * h * jnp.dtype(dtype).itemsize,
    )


def _forward_kernel(q_ref, k_ref, v_ref, o_ref, *, t: CoreTiles, h: int, scale: float, device: Device):
    images, total, lanes = o_ref.shape
    factor = scale * math.log2(math.e)  # exp(x / sqrt(H)) = 2**(factor x), one multiplication either way

    def attend(i, head, q, start, size):
        """One chunk of keys: logits [Tq, S] and values [S, columns]."""
        keys = pl.ds(start, size)
        k, v = k_ref[0, i, keys, head.lo : head.hi], v_ref[0, i, keys, head.lo : head.hi]
        return dot(q, k, device, contract=(1, 1)), v

    def whole(i, head, q, wide):
        if device.bf16_matmul or total < SUBLANES:
            s, v = attend(i, head, q, 0, total)
        else:  # widened and transposed once for the heads of a column: 8 % fewer cycles on v3 (on v6e 18 % more)
            columns = slice(head.lo, head.hi)
            if (head.lo, head.hi) not in wide:
                k, v = k_ref[0, i, :, columns].astype(jnp.float32), v_ref[0, i, :, columns].astype(jnp.float32)
                wide[head.lo, head.hi] = k.T, v
            k, v = wide[head.lo, head.hi]
            s = dot(q, k, device)
        p = jnp.exp2((s - s.max(1, keepdims=True)) * factor)
        return dot(narrow(p, v.dtype, device), v, device) * (1.0 / p.sum(1, keepdims=True))

    def online(i, head, q):
        def chunk(start, size, carry):
            m, norm, acc = carry
            s, v = attend(i, head, q, start, size)
            new = jnp.maximum(m, s.max(1, keepdims=True))
            p, shrink = jnp.exp2((s - new) * factor), jnp.exp2((m - new) * factor)
            return new, norm * shrink + p.sum(1, keepdims=True), acc * shrink + dot(narrow(p, v.dtype, device), v, device)

        zeros = jnp.zeros((q.shape[0], 1), jnp.float32)
        carry = zeros - jnp.inf, zeros, jnp.zeros(q.shape, jnp.float32)
        full = total // t.keys
        carry = lax.fori_loop(0, full, lambda c, carry: chunk(pl.multiple_of(c * t.keys, t.keys), t.keys, carry), carry)
        if total % t.keys:
            carry = chunk(full * t.keys, total % t.keys, carry)
        return carry[2] * (1.0 / carry[1])

    def image(i):
        for run in heads_of(lanes, h):

            def tile(start, size, run=run):
                sums, wide = Sums(), {}
                for head in run:
                    q = narrow(head.mask(q_ref[0, i, pl.ds(start, size), head.lo : head.hi]), o_ref.dtype, device)
                    o = whole(i, head, q, wide) if t.keys == total else online(i, head, q)
                    sums.add(head, head.mask(o))

                sums.store(o_ref, (i, pl.ds(start, size)), o_ref.dtype)

            sweep(total, t.queries, tile)

    sweep(images, 1, lambda i, _: image(i))


def forward(qkv, *, num_heads: int, launch: Launch, width: int | None = None):
    """o [B, T, K] of qkv [3, B, T, K]; width: of a head, if its lanes are padded. Not differentiable by itself: see `attention`."""
    _, b, total, k = qkv.shape
    shape = b, total, num_heads, k // num_heads
    if wide_core.takes(total, num_heads, shape[3], launch.device):
        price = cost(shape, qkv.dtype, backward=False)
        return wide_core.packed(qkv, num_heads=num_heads, width=width or shape[3], launch=launch, cost=price)
    t = tiles(shape, launch.device, qkv.dtype, backward=False)
    section = [pl.BlockSpec((1, t.images, total, t.lanes), lambda i, g, c=c: (c, i, 0, g)) for c in range(3)]
    rows = pl.BlockSpec((t.images, total, t.lanes), lambda i, g: (i, 0, g))

    def kernel(q, k, v, o):
        _forward_kernel(q, k, v, o, t=t, h=shape[3], scale=(width or shape[3]) ** -0.5, device=launch.device)

    return call(
        kernel,
        launch=launch,
        name="attention_core_forward",
        grid=(b // t.images, k // t.lanes),
        in_specs=section,
        out_specs=[rows],
        out_shapes=[((b, total, k), qkv.dtype)],
        semantics=("parallel", "parallel"),
        cost=cost(shape, qkv.dtype, backward=False),
        vmem_bytes=vmem_limit(launch.device, t.needs),
    )(qkv, qkv, qkv)[0]


def backward(qkv, do, *, num_heads: int, launch: Launch, width: int | None = None, with_o: bool) -> tuple[jax.Array, ...]:
    """(dqkv [3, B, T, K], and with_o: o [B, T, K]) of qkv [3, B, T, K] and do [B, T, K]; width: as in `forward`."""
    shape = *do.shape[:2], num_heads, do.shape[2] // num_heads
    price = cost(shape, qkv.dtype, backward=True)
    if not with_o and wide_core.takes(shape[1], num_heads, shape[3], launch.device):
        return (wide_core.packed(qkv, do, num_heads=num_heads, width=width or shape[3], launch=launch, cost=price),)
    t = tiles(shape, launch.device, qkv.dtype, backward=True)
    return core_backward.backward(qkv, do, tiles=t, num_heads=num_heads, launch=launch, width=width, with_o=with_o, cost=price)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(qkv, num_heads, launch):
    return forward(qkv, num_heads=num_heads, launch=launch)


_attention.defvjp(
    lambda qkv, num_heads, launch: (forward(qkv, num_heads=num_heads, launch=launch), qkv),
    lambda num_heads, launch, qkv, do: (backward(qkv, do, num_heads=num_heads, launch=launch, with_o=False)[0],),
)


def attention(qkv, num_heads: int, *, launch: Launch) -> Any:
    """Multi-head softmax attention of packed projections qkv [3, B, T, N*H] -> [B, T, N*H]; float32 or bfloat16, differentiable.

    ValueError for another shape or dtype; NotImplementedError where T is too long for VMEM.
    """
    if qkv.ndim != 4 or qkv.shape[0] != 3 or min(qkv.shape) < 1 or num_heads < 1 or qkv.shape[-1] % num_heads:
        raise ValueError(f"attention: qkv has shape {qkv.shape}; required [3, B, T, N*H] with N = num_heads = {num_heads}")
    if qkv.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"attention: qkv is {qkv.dtype}; required float32 or bfloat16")
    return _attention(qkv, num_heads, launch)
