"""Rows of tokens between the dtype of the arrays and float32, for the generations whose MXU is fed float32 (v2, v3).

A bfloat16 array packs rows 2i and 2i + 1 into one word. Mosaic's own casts put the rows back in order, sublane by sublane: 8.7
cycles a register of v3. The products, LN and softmax do not mind the order, so here 16 rows become 8 even and 8 odd ones by two
bit operations (2.7 cycles), and become 16 rows again where they leave: `widen` and `narrow` are inverse to each other, and `token`
says which token a row holds. The rows of an array behind its last whole 16 stay in order.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels.device import SUBLANES

F32 = jnp.float32
PAIR = 2 * SUBLANES  # rows of a bfloat16 register


def pieces(total: int, size: int) -> list[tuple[int, int]]:
    """(first, count) of consecutive pieces of `size` rows, a multiple of 16, and of the shorter rest, cut again at whole 16."""
    whole = total // PAIR * PAIR
    found = [(a, min(size, whole - a)) for a in range(0, whole, size)]
    return found + [(whole, total - whole)] * (total > whole)


def widen(value):
    """[rows, columns] in float32, each whole 16 rows as 8 even and 8 odd ones."""
    if value.dtype == F32:
        return value
    rows = value.shape[0]
    if rows % PAIR:
        return value.astype(F32)
    parts = []
    for a in range(0, rows, PAIR):
        words = pltpu.bitcast(value[a : a + PAIR], jnp.int32)
        parts += [pltpu.bitcast(words << 16, F32), pltpu.bitcast(words & jnp.int32(-65536), F32)]
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _rounded(value):
    """The bits of float32 `value`, its upper 16 rounded to nearest even. (`pltpu.pack_elementwise` cannot be interpreted.)"""
    bits = pltpu.bitcast(value, jnp.int32)
    return bits + jnp.int32(0x7FFF) + (lax.shift_right_logical(bits, jnp.int32(16)) & 1)


def narrow(value, dtype):
    """The inverse of `widen`: float32 [rows, columns] in `dtype`, rounded to nearest, in the order of the array."""
    rows = value.shape[0]
    if dtype == F32 or rows % PAIR:
        return value.astype(dtype)
    parts = []
    for a in range(0, rows, PAIR):
        even, odd = _rounded(value[a : a + SUBLANES]), _rounded(value[a + SUBLANES : a + PAIR])
        words = lax.shift_right_logical(even, jnp.int32(16)) | (odd & jnp.int32(-65536))
        parts.append(pltpu.bitcast(words, dtype))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def token(first: int, count: int, dtype):
    """int32 [count, 1]: the tokens in rows first ... of what `widen` made of an array of `dtype`."""
    row = lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    if dtype == F32 or count % PAIR:
        return first + row
    within = row & (PAIR - 1)
    return first + row - within + ((within & (SUBLANES - 1)) << 1) + (within >> 3)
