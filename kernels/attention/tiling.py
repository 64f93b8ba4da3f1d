"""How the kernels of the attention half are cut into grid steps, and how heads lie in the lanes of a block: no arrays.

A head is worked on in the whole 128-lane columns that it touches, so every head width takes one path. Each function of this file
chooses the tiles of one kind of kernel, by what they take of the VMEM; `plan.py` puts them together.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from kernels.device import LANES, SUBLANES, Device
from kernels.parts import divisor
from kernels.vmem import round_up


class Shape(NamedTuple):
    """B images of T tokens of width D, N heads of width H, and the dtype of x."""

    b: int
    t: int
    d: int
    n: int
    h: int
    dtype: jnp.dtype

    @property
    def k(self) -> int:
        return self.n * self.h

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class ProductTiles:
    """Of a matrix-product kernel: images, rows (T: all) and columns of the weights a grid step; sections of qkv_kernel (3 or 1)."""

    images: int
    rows: int
    columns: int
    sections: int = 1
    needs: int = 0  # bytes of VMEM


@dataclass(frozen=True, kw_only=True)
class CoreTiles:
    """Of softmax attention: images and lanes (whole heads) a grid step; queries a tile; keys a chunk (T: whole rows)."""

    images: int
    lanes: int
    queries: int
    keys: int
    # Of a step's unrolled heads: by how many heads their softmax and what follows it run behind their logits; (): one by one.
    lags: tuple[int, ...] = ()
    turns: int = 1  # images whose heads take turns together: the MXU waits at the first and the last heads of each such run
    streamed: bool = False  # the tiles of queries come in the grid, one a step; else a step takes all of them in a loop
    needs: int = 0  # bytes of VMEM


@dataclass(frozen=True, kw_only=True)
class RelativeTiles:
    """Of softmax attention with relative positions: images and lanes (whole heads) a grid step, queries a tile (T, or a multiple of
    128). needs: bytes of VMEM."""

    images: int
    lanes: int
    queries: int
    needs: int = 0


@dataclass(frozen=True, kw_only=True)
class Float32Core:
    """Of softmax attention on float32 rows: whole rows of keys, and `lanes` lanes, all their heads unrolled, a grid step. lags: of
    the backward pass, as of `CoreTiles`. shared: its results are written over what they are made of, and go to HBM from there."""

    lanes: int
    lags: tuple[int, ...] = (0, 0)
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class FlatTiles:
    """Of a matrix-product kernel on flat float32 rows: columns of the result, and rows of the batch, a grid step. apart: of a
    sum of products, each adds to those before it."""

    columns: int
    rows: int
    apart: bool = False


@dataclass(frozen=True)
class Head:
    """Where one head lies in the lanes of a block: the columns [lo, hi) that it touches, and its own [first, last)."""

    first: int
    last: int
    lo: int
    hi: int

    def mask(self, value):
        """value [rows, hi - lo] in float32 (not every generation selects in bfloat16), zero outside the head's own lanes."""
        value = value.astype(jnp.float32)
        if (self.first, self.last) == (self.lo, self.hi):
            return value
        lane = self.lo + lax.broadcasted_iota(jnp.int32, (1, self.hi - self.lo), 1)
        return jnp.where((lane >= self.first) & (lane < self.last), value, 0.0)

    def columns(self):
        return [(c, min(c + LANES, self.hi)) for c in range(self.lo, self.hi, LANES)]


def heads_of(lanes: int, h: int) -> list[list[Head]]:
    """The heads of a block of `lanes` lanes, in runs that share no column with each other."""
    runs: list[list[Head]] = []
    for first in range(0, lanes, h):
        head = Head(first, first + h, first // LANES * LANES, min(round_up(first + h, LANES), lanes))
        if runs and head.lo < runs[-1][-1].hi:
            runs[-1].append(head)
        else:
            runs.append([head])
    return runs


# ---- general: matrix products

ROWS = 400  # rows a grid step: the start of a step and the LN of its first image are paid once
LONG = 640  # an image of more tokens is cut into tiles of this many rows
PRODUCT_SHARE = 0.92  # of VMEM, by the count below; the rest is for spilled registers

# The six matrix-product kernels: how many sections of weights they have, and whether the columns of their weights are D (or K).
STEPS = {
    "project": (3, False),
    "output": (1, True),
    "output_gradient": (1, False),
    "input_gradient": (3, False),
    "output_weights": (1, True),
    "projection_weights": (3, False),
}
WEIGHTS = ("output_weights", "projection_weights")  # these sum over the batch


def _product_bytes(step: str, s: Shape, device: Device, t: ProductTiles) -> int:
    """Weights, pipelined blocks of tokens (twice), scratch, and the temporaries."""
    d, k, size, n = s.d, s.k, s.itemsize, t.columns
    operand = 2 if device.bf16_matmul and size == 2 else 4  # bytes of a weight and of a cast activation
    sections, of_d = STEPS[step]
    one = round_up(t.rows, 16)
    r, m = t.images * one, t.sections * n
    several = r if one <= LANES else one  # where the compiler works on several short images at once
    w = m * (1 if (n, t.sections) == (d if of_d else k, sections) else 2)
    return {
        "project": w * d * operand + 2 * r * size * (d + m) + r * d * operand + 4 * one * (2 * d + 2 * n),
        "output": w * k * operand + 2 * r * size * (k + 2 * n) + 4 * several * (k + 3 * n),
        "output_gradient": w * d * operand + 2 * r * size * (d + n) + r * d * operand + 4 * one * (2 * d + n),
        "input_gradient": w * d * operand + 2 * r * size * (3 * d + m) + r * d * 4 + 4 * one * (6 * d + n),
        "output_weights": w * k * 4 + 2 * r * size * (k + n) + 4 * one * (k + 3 * n) + 4 * k * 256,
        "projection_weights": w * d * 4 + 2 * r * size * (d + m) + 4 * one * (4 * d + 256) + 4 * d * 256,
    }[step]


def product_tiles(step: str, s: Shape, device: Device) -> ProductTiles:
    """Tiles of one of the `STEPS`.

    Weights, or the sums for their gradients, resident in VMEM if they fit, several images a step; else column tiles of them, and as
    many images as hide their transfer. NotImplementedError where not even 128 rows and 128 columns fit.
    """
    sections, of_d = STEPS[step]
    full = s.d if of_d else s.k
    widths = [c for c in range(full - 1, 0, -1) if full % c == 0 and c % LANES == 0]
    lengths = [s.t] * (s.t <= LONG) + [rows for rows in (512, 256, 128) if rows < s.t]
    together = [n for n in range(min(s.b, max(1, ROWS // s.t)), 0, -1) if s.b % n == 0]
    for weights in ([(full, sections)], [(c, 1) for c in (full, *widths)]):
        for rows in lengths:
            for images in together if rows == s.t else [1]:
                for columns, taken in weights:
                    t = ProductTiles(images=images, rows=rows, columns=columns, sections=taken)
                    if (needs := _product_bytes(step, s, device, t)) <= PRODUCT_SHARE * device.vmem_bytes:
                        return ProductTiles(images=images, rows=rows, columns=columns, sections=taken, needs=needs)
    raise NotImplementedError(
        f"attention half, {step}: 128 tokens of width {s.d} with {min((full, *widths))} columns of the weights do not fit the "
        f"{device.vmem_bytes >> 20} MiB of VMEM of a {device.name}. Split the heads over a model axis, or use the reference ops."
    )


# ---- general: softmax attention

# Float32 arrays that the compiler keeps in VMEM for each head of an unrolled step, read off its "used ... of 16 MiB" on v3:
# operands and results [T, columns of the head], and tiles [keys, queries].
FORWARD_TEMPORARIES, BACKWARD_TEMPORARIES = (3, 2), (5, 3)
UNROLLED = 2**20  # logits of the heads unrolled in one step: more compile slowly and gain nothing
WHOLE_ROWS = 2048  # longest row of keys whose softmax is not online
TILE = 128  # a tile of queries or a chunk of keys is a multiple of this, or all there are
COUNTED_TOKENS = 3 * LANES  # of an image, at most, whose heads are taken in turns: 200 and 264 were compiled, longer ones were not
CORE_SHARE = 0.94  # of VMEM
TURNS_VMEM = 128 * 2**20  # of the generations where two images' heads in turns were counted, v5e and v6e


def group_lanes(s: Shape) -> int:
    """Lanes of the fewest heads that fill whole columns of lanes."""
    group = math.lcm(s.h, LANES)
    return group if s.k % group == 0 else s.k


def _core_bytes(s: Shape, t: CoreTiles, *, backward: bool) -> int:
    arrays, (operands, squares) = (8, BACKWARD_TEMPORARIES) if backward else (4, FORWARD_TEMPORARIES)
    rows, lanes = round_up(s.t, 16), round_up(t.lanes, LANES)
    window = max(head.hi - head.lo for run in heads_of(group_lanes(s), s.h) for head in run)
    whole = (t.queries, t.keys) == (s.t, s.t)
    blocks = 2 * arrays * t.images * rows * lanes * s.itemsize
    scratch = 2 * rows * lanes * 4 if backward and not whole else 0
    heads = (t.lanes if whole else group_lanes(s)) // s.h
    tile = round_up(t.keys, 8) * round_up(t.queries, LANES)
    return blocks + scratch + 4 * heads * (operands * max(t.queries, t.keys) * window + squares * tile)


def core_tiles(s: Shape, device: Device, *, backward: bool) -> CoreTiles:
    """All heads in one step if they fit, then shorter query tiles, then chunks of keys.

    NotImplementedError if a group of heads that fills whole columns does not fit VMEM even with the smallest tiles.
    """
    k, group, budget = s.k, group_lanes(s), device.vmem_bytes * CORE_SHARE
    lengths = [s.t] if s.t <= 640 else []
    lengths += [q for q in (512, 384, 256, TILE) if q < s.t]
    for keys in [s.t, 1024, 512, 256, TILE] if s.t <= WHOLE_ROWS else [1024, 512, 256, TILE]:
        for queries in lengths:
            for steps in range(1, k // group + 1):
                lanes = k // steps
                logits = lanes // s.h * keys * queries
                if k % steps or lanes % group or keys > s.t or (lanes > group and logits > UNROLLED):
                    continue
                found = CoreTiles(images=1, lanes=lanes, queries=queries, keys=keys, lags=_lags(s, device, lanes, queries, keys))
                if _core_bytes(s, found, backward=backward) <= budget:
                    return _several_images(s, device, found, budget, backward)
    if backward and (found := _streamed(s, group, budget)):
        return found
    raise NotImplementedError(
        f"attention over {s.t} tokens: keys and values of {group // s.h} heads of width {s.h} do not fit the "
        f"{device.vmem_bytes >> 20} MiB of VMEM of a {device.name}. Use fewer tokens, or the reference ops."
    )


def _lags(s: Shape, device: Device, lanes: int, queries: int, keys: int) -> tuple[int, ...]:
    """`CoreTiles.lags` of a step: none where it has one head, tiles of queries or chunks of keys, or operands that are cast."""
    whole = (queries, keys) == (s.t, s.t) and s.t <= COUNTED_TOKENS
    return (1, 3) if device.bf16_matmul and lanes > s.h and whole else ()


def _several_images(s: Shape, device: Device, t: CoreTiles, budget: float, backward: bool) -> CoreTiles:
    """The tiles with as many images a step as fit, where images come whole and all heads at once: short ones together, of longer
    ones two whose heads take turns, where there is room."""
    images = divisor(s.b, 256 // s.t) if t.lanes == s.k else 1
    if images == 1 and t.lags and t.lanes == s.k and s.b % 2 == 0 and device.vmem_bytes >= TURNS_VMEM:
        images = 2
    while True:
        found = replace(t, images=images, turns=2 if images == 2 and 256 // s.t < 2 else 1)
        needs = _core_bytes(s, found, backward=backward)
        if images == 1 or needs <= budget:
            return replace(found, needs=needs)
        images = divisor(s.b, images - 1)


def _streamed(s: Shape, lanes: int, budget: float) -> CoreTiles | None:
    """Tiles of the backward pass where the queries of a group of heads do not fit beside its keys: tile by tile in the grid."""
    operands, squares = BACKWARD_TEMPORARIES
    window = max(head.hi - head.lo for run in heads_of(lanes, s.h) for head in run)
    rows, columns = round_up(s.t, 16), round_up(lanes, LANES)
    for queries, keys in ((256, 512), (256, 256), (128, 256), (128, 128)):
        resident = rows * columns * (2 * s.itemsize + 4 * s.itemsize + 8)  # k, v; dk, dv twice; their float32 sums
        blocks = 2 * 4 * queries * columns * s.itemsize
        temporaries = 4 * (lanes // s.h) * (operands * max(queries, keys) * window + squares * queries * keys)
        needs = resident + blocks + temporaries
        if keys < s.t and needs <= budget:
            return CoreTiles(images=1, lanes=lanes, queries=queries, keys=keys, streamed=True, needs=needs)
    return None


def head_lanes(s: Shape, device: Device) -> int:
    """Lanes that a head should take in the arrays: H, or H rounded up to whole columns where only single heads fit VMEM.

    Heads of width 80 share columns in groups of 8. A core with 16 MiB cannot hold 8 heads of 1370 tokens, but it can hold one; the
    weights of the projections are then padded with zero columns, which change nothing.
    """
    fits = {}
    for lanes in (s.h, round_up(s.h, LANES)):
        with contextlib.suppress(NotImplementedError):
            fits[lanes] = core_tiles(s._replace(h=lanes), device, backward=True)
    whole = [lanes for lanes, found in fits.items() if found.keys == s.t]
    return next(iter((*whole, *fits)), s.h)


# ---- float32

# Bytes that the compiler spills in the fused kernel for twelve heads of 197 tokens; v2, with one MXU, used 17.3 of 16 MiB.
FUSED_TEMPORARIES = {"v2": 9 * 2**19, "v3": 3 * 2**20, "cpu": 3 * 2**20}
CORE_TEMPORARIES = 8  # float32 [R, S] that the compiler keeps for each unrolled head of the backward core
SHARED_HEADS = 8  # most heads unrolled in `shared_core`; with more, what the compiler keeps was not counted
SPILLS = 3 * 2**20  # VMEM left to the compiler by the products


def fused_bytes(s: Shape, device: Device) -> int | None:
    """VMEM of the fused forward kernel, one image and all weights; None on cores that it is not for."""
    if device.bf16_matmul or s.h % SUBLANES:
        return None
    one, padded = round_up(s.t, SUBLANES), round_up(s.t, LANES)
    d, k = round_up(s.d, LANES), round_up(s.k, LANES)
    weights = 4 * 4 * d * k
    blocks = 2 * 2 * round_up(s.t, 16) * d * s.itemsize
    scratch = 4 * (one * d + (2 * one + padded) * k)
    # measured at ViT-B/16; rows in flight are D wide (four heads of ViT-H/14 took 3.8 MB where heads alone gave 2.1)
    temporaries = FUSED_TEMPORARIES[device.name] * (s.n * one * padded) // (12 * 200 * 256) * max(s.d, 768) // 768
    return weights + blocks + scratch + temporaries


def float32_core(s: Shape, device: Device) -> Float32Core | None:
    """As many heads a step as fit VMEM; None where no group of them does, or on cores that these kernels are not for."""
    if device.bf16_matmul or s.h % SUBLANES:
        return None
    rows, keys = round_up(s.t, SUBLANES), round_up(s.t, LANES)
    for lanes in range(s.k, 0, -group_lanes(s)):
        blocks = 2 * 8 * rows * round_up(lanes, LANES) * 4
        heads = lanes // s.h * (CORE_TEMPORARIES * rows * keys * 4)
        if s.k % lanes == 0 and blocks + heads <= CORE_SHARE * device.vmem_bytes:
            # not on v2, whose one MXU leaves less to win, and whose VMEM nobody has compiled it for
            turns = device.flops_per_cycle > 2 * LANES**2 and s.t <= COUNTED_TOKENS
            return Float32Core(lanes=lanes, lags=(1, 2) if turns else (0, 0))
    return None


def shared_core(s: Shape, device: Device) -> Float32Core | None:
    """Of the backward pass, one group of heads a step, head by head, in three slots of q, k, v and do that the results share; None
    where those and what the compiler keeps for two heads do not fit VMEM, or on cores that these kernels are not for."""
    if device.bf16_matmul or s.h % SUBLANES:
        return None
    rows, keys, lanes = round_up(s.t, SUBLANES), round_up(s.t, LANES), group_lanes(s)
    needs = 4 * (3 * 4 * rows * lanes + 2 * CORE_TEMPORARIES * rows * keys)
    fits = lanes % LANES == 0 and lanes // s.h <= SHARED_HEADS and needs <= device.vmem_bytes
    return Float32Core(lanes=lanes, shared=True) if fits else None
