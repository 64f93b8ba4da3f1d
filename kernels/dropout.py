"""The dropout mask every implementation shares: a hash of where an element stands, not a stream of random numbers.

    keep(key, row, column)  <=>  hash(hash(key + row) + column) / 2**24 >= rate

`row` is the element's global row (example x T + token) and `column` its global feature, so a mask is the same in the forward
and the backward pass, in a kernel and in the reference, on one device and on any mesh. The hardware generators of the TPUs
differ by generation and return zeros in interpret mode; a counter hash costs about ten integer operations an element instead.

The hash is the 32-bit finaliser "lowbias32" (two multiplications, three xor-shifts). All arithmetic is int32, wrapping: the
same bits as uint32, and the type that Mosaic compares and shifts on every generation. Comparing 24 bits keeps the sign out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# One constant per place in a block where dropout stands, so that two masks of one layer never coincide.
EMBEDDING, ATTENTION_OUT, MLP_HIDDEN, MLP_OUT = 0x1B873593, 0x2545F491, 0x3C6EF372, 0x4F1BBCDC

_GOLDEN = -1640531527  # 0x9E3779B9 as int32: spreads neighbouring rows and columns over all bits


class Dropout(NamedTuple):
    """What an op needs to know to drop: how much, and where its block of elements stands.

    rate: float in [0, 1), static. key: int32 scalar array, one per (run, step, layer). row: int32 scalar, the global index of
    the first row this call sees (first example x T). column: int32 scalar, the global index of the first column of an axis
    split over the model axis (the MLP's hidden axis).
    """

    rate: float
    key: jax.Array
    row: jax.Array | int = 0
    column: jax.Array | int = 0


def _mix(h):
    h = h ^ lax.shift_right_logical(h, jnp.int32(16))
    h = h * jnp.int32(0x7FEB352D)
    h = h ^ lax.shift_right_logical(h, jnp.int32(15))
    h = h * jnp.int32(-2073254261)  # 0x846CA68B
    return h ^ lax.shift_right_logical(h, jnp.int32(16))


def site_key(key, site: int):
    """The int32 key of one dropout site of a layer; scalar work, done once a call."""
    return _mix(jnp.asarray(key, jnp.int32) ^ jnp.int32(site))


def row_hash(key, rows):
    """int32 hash of global rows, any shape; computed once a row, not once an element."""
    return _mix(key + rows * jnp.int32(_GOLDEN))


def keep(hashed_rows, columns, rate: float):
    """bool mask, True where the element stays. `hashed_rows` and `columns` broadcast against each other."""
    return keep_above(hashed_rows, columns, jnp.int32(round(rate * 2**24)))


def keep_above(hashed_rows, columns, threshold):
    """`keep` for a rate of threshold / 2**24, an int32 array."""
    return lax.shift_right_logical(_mix(hashed_rows + columns * jnp.int32(_GOLDEN)), jnp.int32(8)) >= threshold


def apply(x, dropout: Dropout | None, site: int, column=0, *, tokens=None):
    """Inverted dropout of x [B, T, K] at a site; the identity where `dropout` is None or its rate 0. Plain jax.numpy.

    tokens: of an image, where the rows of x are more.
    """
    if dropout is None or dropout.rate == 0.0:
        return x
    b, t, _ = x.shape
    rows = lax.broadcasted_iota(jnp.int32, (b, t, 1), 0) * (tokens or t) + lax.broadcasted_iota(jnp.int32, (b, t, 1), 1)
    return _dropped(x, rows, dropout, site, column)


def apply_rows(x, t: int, dropout: Dropout | None, site: int, column=0, *, tokens=None):
    """`apply` of x [B * T, K], rows of T each, and the result likewise: the same mask, and no array of three axes on the way."""
    if dropout is None or dropout.rate == 0.0:
        return x
    return _dropped(x, _rows(x.shape[0], t, tokens)[:, None], dropout, site, column)


def vectors(shape: tuple[int, int], t: int, dropout: Dropout, site: int, column=0, *, tokens=None):
    """(hashed rows [M], columns [N]), int32: what `keep` takes of the mask that `apply_rows` uses for an array [M, N]."""
    m, n = shape
    rows = jnp.asarray(dropout.row, jnp.int32) + _rows(m, t, tokens)
    columns = jnp.asarray(column, jnp.int32) + lax.broadcasted_iota(jnp.int32, (n,), 0)
    return row_hash(site_key(dropout.key, site), rows), columns


def _rows(m: int, t: int, tokens: int | None):
    """How many rows of tokens stand before each of m rows, t an image of which `tokens` are tokens."""
    row = lax.broadcasted_iota(jnp.int32, (m,), 0)
    return row if tokens in (None, t) else row // t * tokens + row % t


def _dropped(x, rows, dropout: Dropout, site: int, column):
    """Inverted dropout of x [..., K], whose rows [..., 1] are so many behind `dropout.row`."""
    columns = jnp.asarray(column, jnp.int32) + lax.broadcasted_iota(jnp.int32, (1,) * (x.ndim - 1) + x.shape[-1:], x.ndim - 1)
    rows = jnp.asarray(dropout.row, jnp.int32) + rows
    mask = keep(row_hash(site_key(dropout.key, site), rows), columns, dropout.rate)
    return jnp.where(mask, x * jnp.asarray(1.0 / (1.0 - dropout.rate), x.dtype), jnp.zeros((), x.dtype))
