"""What the bodies of the TPU kernels share: products, dropout, loops, and rows between bfloat16 and float32.

Products accumulate in float32. Values of a bfloat16 op are exact in one pass of the MXU, whether they reach it as bfloat16 or as
float32; a float32 op follows `jax.default_matmul_precision`, as its reference does. v2 and v3 take float32 operands only.

Rows in and out of VMEM. A register of bfloat16 holds two rows in each of its words, 2i in the lower and 2i + 1 in the upper half.
The casts of Mosaic put rows in order sublane by sublane, on v2 and v3 through memory, in regions of code that nothing is scheduled
across (8.7 cycles a register of v3). LN, products and softmax do not depend on the order of rows. So there 16 rows are unpacked by
integer arithmetic, into 8 even rows and 8 odd ones (2.7 cycles a register), and packed again where they leave.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dropout as drop
from kernels.device import SUBLANES, Device

F32 = jnp.float32

PACKED_ROWS = 2 * SUBLANES  # rows of a bfloat16 register
_UPPER_HALF = -65536  # of a word
_QUIET_NAN = 0x7FC00000


def operand_dtype(dtype, device: Device):
    """The dtype in which values of an op on `dtype` reach the MXU: their own, or float32 where Mosaic takes no bfloat16."""
    return dtype if device.bf16_matmul else F32


def operand(value, dtype, device: Device):
    """A float32 value as an operand beside arrays of `dtype`; left as it is where the MXU rounds float32 operands by itself."""
    return value.astype(operand_dtype(dtype, device))


def dot(a, b, dtype, contract: tuple[int, int] = (1, 0)):
    """a @ b over axis contract[0] of a and contract[1] of b, both 2-D operands, in float32. dtype: of the arrays of the op."""
    precision = lax.Precision.DEFAULT if dtype == jnp.bfloat16 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=F32)


def cast_dot(a, b, device: Device, contract: tuple[int, int] = (1, 0)):
    """`dot` of values that are not operands yet: where either is bfloat16, both are cast to what the MXU of the device takes."""
    if a.dtype != jnp.bfloat16 and b.dtype != jnp.bfloat16:
        return dot(a, b, F32, contract)
    # Mosaic makes a product with a single row or column a VPU product, and fails if that is bfloat16.
    single = 1 in (a.shape[1 - contract[0]], b.shape[1 - contract[1]])
    dtype = F32 if single else operand_dtype(jnp.bfloat16, device)
    return dot(a.astype(dtype), b.astype(dtype), jnp.bfloat16, contract)


def iota(n: int, axis: int):
    """0 .. n-1 along an axis of a 2-D vector."""
    return lax.broadcasted_iota(jnp.int32, (n, 1) if axis == 0 else (1, n), axis)


def kept(key, rows, columns, rate: float):
    """bool: the elements that dropout keeps. rows, columns: int32, global, broadcast against each other."""
    return drop.keep(drop.row_hash(key, rows), columns, rate)


def dropout(value, keep, rate: float):
    """Inverted dropout by a mask of `kept`. It is linear in value, and its own transpose: the gradient's too."""
    return jnp.where(keep, value * (1.0 / (1.0 - rate)), 0.0)


def sweep(total: int, size: int, body) -> None:
    """body(start, length) for consecutive tiles of `size` and, last, the shorter rest.

    Several tiles are one loop, so that the registers of one turn are free for the next.
    """
    full = total // size
    if full == 1:
        body(0, size)
    elif full > 1:
        lax.fori_loop(0, full, lambda i, _: body(pl.multiple_of(i * size, size), size), None)
    if total % size:
        body(full * size, total % size)


def over_chunks(total: int, size: int, chunk, carry):
    """carry = chunk(start, length, carry) over the keys, whole chunks in a loop and then the shorter rest."""
    full = total // size
    carry = lax.fori_loop(0, full, lambda c, carry: chunk(pl.multiple_of(c * size, size), size, carry), carry)
    return chunk(full * size, total % size, carry) if total % size else carry


def staggered(count: int, stages, lags) -> None:
    """stage(n) for n < count and each of the stages, which run `lags` turns behind the first: code is made in that order, and what
    stands beside each other does not wait for each other."""
    for turn in range(count + max(lags)):
        for stage, lag in zip(stages, (0, *lags), strict=True):
            if 0 <= turn - lag < count:
                stage(turn - lag)


def to_float32(rows, unpack: bool):
    """rows [n, K] in float32. unpack: they are bfloat16, n a multiple of 16, and the result has the order of `unpacked_row`."""
    if not unpack:
        return rows.astype(jnp.float32)
    words = pltpu.bitcast(rows, jnp.int32).reshape(-1, 1, SUBLANES, rows.shape[1])
    both = jnp.concatenate([words << 16, words & _UPPER_HALF], axis=1)
    return lax.bitcast_convert_type(both, jnp.float32).reshape(rows.shape)


def from_float32(rows, dtype, pack: bool):
    """The inverse of `to_float32`: float32 rows in `dtype`, rounded to nearest even; infinities and NaN stay what they are."""
    if not pack:
        return rows.astype(dtype)
    bits = lax.bitcast_convert_type(rows, jnp.int32)
    rounded = bits + (0x7FFF + (lax.shift_right_logical(bits, 16) & 1))
    # The addition would carry the mantissa of a NaN into its exponent and sign: 0x7fffffff becomes -0.0.
    rounded = jnp.where(rows == rows, rounded, _QUIET_NAN).reshape(-1, 2, SUBLANES, rows.shape[1])
    words = lax.shift_right_logical(rounded[:, 0], 16) | (rounded[:, 1] & _UPPER_HALF)
    return pltpu.bitcast(words.reshape(-1, rows.shape[1]), jnp.bfloat16)


def unpacked_row(place, unpack: bool):
    """int32: which row stands at `place` after `to_float32`: of 16 rows the even ones, then the odd ones."""
    return (place & -16) + 2 * (place & 7) + (lax.shift_right_logical(place, 3) & 1) if unpack else place
