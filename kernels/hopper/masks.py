"""Dropout of the Hopper half blocks: the mask of `kernels/dropout.py` as what the products' epilogues take of it.

What is static of a `Dropout` (`Drops`) is an argument of a custom_vjp that is not differentiated, the rest are int32 arrays beside
the others.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from kernels import dropout as drop


@dataclass(frozen=True)
class Drops:
    """The rate, and t rows an image of which `tokens` are tokens; hashable."""

    rate: float
    t: int
    tokens: int


def split(dropout: drop.Dropout | None, t: int, tokens: int | None) -> tuple[Drops | None, tuple]:
    """(what is static, int32 (key, row, column)) of dropout for images of t rows; (None, ()) where nothing is dropped."""
    if dropout is None or dropout.rate == 0.0:
        return None, ()
    place = tuple(jnp.asarray(a, jnp.int32) for a in (dropout.key, dropout.row, dropout.column))
    return Drops(float(dropout.rate), t, tokens or t), place


def _column(place, site: int):
    return place[2] if site == drop.MLP_HIDDEN else 0  # the only axis that is split over the devices of a model axis


def masked(drops: Drops | None, place, shape: tuple[int, int], site: int):
    """(`mask` of `product` for a result of this shape, the rate); (None, 0.0) where nothing is dropped."""
    if drops is None:
        return None, 0.0
    given = drop.Dropout(drops.rate, *place)
    return drop.vectors(shape, drops.t, given, site, _column(place, site), tokens=drops.tokens), drops.rate


def dropped(drops: Drops | None, place, x, site: int):
    """Dropout of rows x [M, N], in its dtype, multiplied in float32."""
    if drops is None:
        return x
    given = drop.Dropout(drops.rate, *place)
    wide = drop.apply_rows(x.astype(jnp.float32), drops.t, given, site, _column(place, site), tokens=drops.tokens)
    return wide.astype(x.dtype)
