"""Rows of tokens between the dtype of the arrays and float32, for the generations whose MXU is fed float32 (v2, v3).

Whole 16 rows of bfloat16 are unpacked and packed by kernels/body.py, which says why; `token` says which token a row then holds.
The rows of an array behind its last whole 16 stay in order.
"""

import jax.numpy as jnp
from jax import lax

from kernels.body import PACKED_ROWS, from_float32, to_float32, unpacked_row


def pieces(total: int, size: int) -> list[tuple[int, int]]:
    """(first, count) of consecutive pieces of `size` rows, a multiple of 16, and of the shorter rest, cut again at whole 16."""
    whole = total // PACKED_ROWS * PACKED_ROWS
    found = [(a, min(size, whole - a)) for a in range(0, whole, size)]
    return found + [(whole, total - whole)] * (total > whole)


def _packs(count: int, dtype) -> bool:
    return dtype == jnp.bfloat16 and count % PACKED_ROWS == 0


def widen(value):
    """[rows, columns] in float32, each whole 16 rows as 8 even and 8 odd ones."""
    return to_float32(value, _packs(value.shape[0], value.dtype))


def narrow(value, dtype):
    """The inverse of `widen`: float32 [rows, columns] in `dtype`, rounded to nearest, in the order of the array."""
    return from_float32(value, dtype, _packs(value.shape[0], dtype))


def token(first: int, count: int, dtype):
    """int32 [count, 1]: the tokens in rows first ... of what `widen` made of an array of `dtype`."""
    return first + unpacked_row(lax.broadcasted_iota(jnp.int32, (count, 1), 0), _packs(count, dtype))
