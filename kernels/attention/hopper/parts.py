"""What the Hopper kernels are made of: products of tiles, and what Pallas has no word for.

Buffers of shared memory have two names for the same bytes. TMA copies through the flat one, which may reach past the last row of an
array: rows that are not there arrive as zeros and are not stored, so that no row of padding goes through memory. (A tiled copy has
to divide.) wgmma reads the tiled one; rows of 128 bytes are swizzled alike in both.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from kernels.attention.hopper.plan import HEAD

ROWS = plgpu.Layout.WGMMA.reduce(1)  # a number a row of an accumulator
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a number a column
LOG2E = 1.4426950408889634  # the kernels' exponentials have base 2

_SWIZZLE = plgpu.SwizzleTransform(128)
_TILES = plgpu.TilingTransform((8, 64))

PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def buffer(*rows: int, dtype):
    """Scratch: a pair (flat, tiled) of names for [*rows, HEAD] in shared memory."""
    shape = (*rows, HEAD)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(_SWIZZLE,)),
        plgpu.SMEM(shape, dtype, transforms=(_TILES, _SWIZZLE)),
    )


def transposed(ref):
    return plgpu.transpose_ref(ref, (1, 0))


def load(ref, layout, **options):
    """What is behind ref, in this layout; jax 0.12 takes no index beside the reference."""
    index = ((),) if jax.__version_info__ < (0, 12) else ()
    return plgpu.load(ref, *index, layout=layout, **options)


def product(a, b, columns: int):
    """a [64, K] @ b [K, columns] in float32; a in shared memory or registers, b in shared memory."""

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
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
