"""What the bodies of the TPU kernels share: how rows change between bfloat16 and float32.

Rows in and out of VMEM. A register of bfloat16 holds two rows in each of its words, 2i in the lower and 2i + 1 in the upper half.
The casts of Mosaic put rows in order sublane by sublane, on v2 and v3 through memory, in regions of code that nothing is scheduled
across (8.7 cycles a register of v3). LN, products and softmax do not depend on the order of rows. So there 16 rows are unpacked by
integer arithmetic, into 8 even rows and 8 odd ones (2.7 cycles a register), and packed again where they leave.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels.device import SUBLANES

PACKED_ROWS = 2 * SUBLANES  # rows of a bfloat16 register
_UPPER_HALF = -65536  # of a word
_QUIET_NAN = 0x7FC00000


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
