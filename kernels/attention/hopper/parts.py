"""What the Hopper kernels are made of: products of tiles, and what Pallas has no word for.

Buffers of shared memory have two names for the same bytes. TMA copies through the flat one, which may reach past the last row of an
array: rows that are not there arrive as zeros and are not stored, so that no row of padding goes through memory. (A tiled copy has
to divide.) wgmma reads the tiled one; rows of 128 bytes are swizzled alike in both.
"""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels.attention.hopper.plan import Plan, pieces

ROWS = plgpu.Layout.WGMMA.reduce(1)  # a number a row of an accumulator
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a number a column
WARPS = 4  # of a warpgroup
LOG2E = 1.4426950408889634  # the kernels' exponentials have base 2

PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def buffer(*rows: int, head: int, dtype):
    """Scratch for [*rows, head] in shared memory: a pair (flat, tiled) of names for each of its `pieces`."""

    def piece(width):
        shape, swizzle = (*rows, width), plgpu.SwizzleTransform(2 * width)
        tiled = plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), swizzle))
        return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=(swizzle,)), tiled)

    return [piece(width) for _, width in pieces(head)]


def part(buffers, *index) -> list:
    """What wgmma reads of a buffer at this index, of each piece."""
    return [tiled.at[index] for _, tiled in buffers]


def fetch(ref, place, buffers, slot, zero, p: Plan, barrier) -> None:
    """Copies a head of an image (`place`) of ref [B, T, N, H] into a slot of a buffer; the barrier gets `arrivals(p)` for it.

    zero: a 0 that is not constant, so that rows behind the last may be asked for.
    """
    image, head = place
    for (first, width), (flat, _) in zip(pieces(p.head), buffers, strict=True):
        for start, many in p.copies:
            source = ref.at[image, pl.ds(zero + start, many), head, pl.ds(first, width)]
            plgpu.copy_gmem_to_smem(source, flat.at[slot, pl.ds(start, many)], barrier)


def arrivals(p: Plan) -> int:
    """Copies that bring a head into shared memory."""
    return len(pieces(p.head)) * len(p.copies)


def store(values, buffers, index, ref, place, rows, p: Plan) -> None:
    """Writes a tile's values, one array a piece, into a buffer at this index, and from there into rows of a head of ref."""
    for value, (flat, tiled) in zip(values, buffers, strict=True):
        tiled.at[index][...] = value.astype(flat.dtype)
    plgpu.commit_smem()
    image, head = place
    for (first, width), (flat, _) in zip(pieces(p.head), buffers, strict=True):
        plgpu.copy_smem_to_gmem(flat.at[index], ref.at[image, rows, head, pl.ds(first, width)])


def from_behind(i, n: int):
    """The place of the i-th of n things that are taken from the last to the first."""
    return n - 1 - i


def transposed(ref):
    return plgpu.transpose_ref(ref, (1, 0))


def load(ref, layout, **options):
    """What is behind ref, in this layout; jax 0.12 takes no index beside the reference."""
    index = ((),) if jax.__version_info__ < (0, 12) else ()
    return plgpu.load(ref, *index, layout=layout, **options)


def product(a, b, columns: int):
    """a [64, K] @ b [K, columns] in float32; a in shared memory or registers, b in shared memory, both in pieces of K."""

    def run(accumulator):
        for left, right in zip(a, b, strict=True):
            plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((64, columns), jnp.float32))


def along(vector, like, axis: int):
    """The vector of an accumulator's rows (axis 0) or columns (axis 1) in the shape of `like`."""
    return lax.broadcast_in_dim(vector, like.shape, [axis])


def _inline(shape, dtype):
    layout = plgpu.Layout.WGMMA
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout))


def _joined(left, right):
    registers = np.concatenate([left.registers, right.registers], 1)
    return mgpu.FragmentedArray(_registers=registers, _layout=left.layout, _is_signed=left.is_signed)


def widened(x, columns: int):
    """x [64, K] with columns of zeros behind: wgmma sums over multiples of 64."""
    rows, have = x.shape
    if have == columns:
        return x

    @_inline((rows, columns), x.dtype)
    def run(_, x):
        zero = mgpu.FragmentedArray.splat(mgpu.c(0, x.mlir_dtype), (rows, columns - have), x.layout, is_signed=x.is_signed)
        return _joined(x, zero)

    return run(x)  # pyright: ignore[reportCallIssue]  (the decorator gives the context)


def masked(x, tokens: int):
    """x [64, K] with -inf from column `tokens` on: compares only the last columns, of which K has fewer than eight too many."""
    whole = tokens // 8 * 8
    if whole == x.shape[1]:
        return x

    @_inline(x.shape, x.dtype)
    def run(_, x):
        head, tail = (x[:, :whole], x[:, whole:]) if whole else (None, x)
        i32 = ir.IntegerType.get_signless(32)
        column = mgpu.FragmentedArray.broadcasted_iota(i32, tail.shape, 1, layout=x.layout, is_signed=True)
        low = mgpu.FragmentedArray.splat(mgpu.c(float("-inf"), x.mlir_dtype), tail.shape, x.layout)
        tail = (column < tokens - whole).select(tail, low)
        return _joined(head, tail) if whole else tail

    return run(x)  # pyright: ignore[reportCallIssue]  (the decorator gives the context)


def column_sums(x):
    """Sums of the columns of x [64, 64] float32 over the 16 rows of each warp, [4, 64] as [256]: nothing is waited for.

    A thread has two rows of 16 columns, and the eight threads of a warp with the same columns have other rows. In three steps each
    of them hands half of its columns to another and takes that one's half of the rest, until it has two columns of all rows.
    """
    layout = plgpu.Layout.WG_STRIDED((WARPS * x.shape[1],), vec_size=2)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,), return_type=plgpu.ShapeDtypeStruct((WARPS * x.shape[1],), x.dtype, layout=layout)
    )
    def run(_, x):
        i32 = ir.IntegerType.get_signless(32)
        lane = arith.remui(mgpu.utils.thread_idx(), mgpu.c(32, i32))
        groups = [reduce(arith.addf, x.registers[:, j].flat) for j in range(x.shape[1] // 8)]  # of eight columns, two a thread
        for distance in (16, 8, 4):
            high = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, mgpu.c(distance, i32)), mgpu.c(0, i32))
            half = len(groups) // 2
            given = [arith.select(high, a, b) for a, b in zip(groups[:half], groups[half:], strict=True)]
            kept = [arith.select(high, b, a) for a, b in zip(groups[:half], groups[half:], strict=True)]
            groups = [arith.addf(a, mgpu.utils.shfl_bfly(b, distance)) for a, b in zip(kept, given, strict=True)]
        registers = np.array(groups, dtype=object)
        strided = mgpu.WGStridedFragLayout(shape=(WARPS * x.shape[1],), vec_size=2)
        return mgpu.FragmentedArray(_registers=registers, _layout=strided, _is_signed=x.is_signed)

    return run(x)  # pyright: ignore[reportCallIssue]  (the decorator gives the context)
