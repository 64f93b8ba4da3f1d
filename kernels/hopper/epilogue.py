"""What follows a product before it goes to memory, in float32: GELU and its slope in few instructions, and what may be combined.

GELU's tanh form and CLIP's are a times a logistic function; the quotient in it is a reciprocal square root twice, since a division
of floats takes ten times as long. Exact to a few units of float32, as exp2 is.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels.mlp.reference import LOGISTIC

LOG2E = 1.4426950408889634
RATE = {"tanh": (8 / jnp.pi) ** 0.5, **LOGISTIC}  # of the logistic function
CUBIC = {"tanh": 0.044715, **dict.fromkeys(LOGISTIC, 0.0)}


def _logistic(a, form: str):
    """The logistic function of RATE (a + CUBIC a^3)."""
    rate = -LOG2E * RATE[form]
    power = a * (rate + rate * CUBIC[form] * (a * a)) if CUBIC[form] else a * rate
    r = jax.lax.rsqrt(1.0 + jnp.exp2(power))
    return r * r


def gelu(a, form: str):
    """A GELU of `kernels.mlp.reference.GELUS`, of float32."""
    if form == "erf":
        return 0.5 * a * (1.0 + jax.lax.erf(a * 0.5**0.5))
    return a * _logistic(a, form)


def gelu_and_slope(a, form: str):
    """gelu(a) and its derivative."""
    if form == "erf":
        below = 0.5 * (1.0 + jax.lax.erf(a * 0.5**0.5))
        return a * below, below + a * ((2 * jnp.pi) ** -0.5 * jnp.exp2((-0.5 * LOG2E) * (a * a)))
    s = _logistic(a, form)
    h = a * s
    inner = RATE[form] + (3 * CUBIC[form] * RATE[form]) * (a * a) if CUBIC[form] else RATE[form]
    return h, s + (h - h * s) * inner


@dataclass(frozen=True)
class Epilogue:
    """What becomes of y, a product's sums; hashable.

    bias: a row is added first. gelu: then this form of GELU is taken; keep: and what it is taken of is written, too. residual: or
    that many times an array of the result's shape is added. slope: or y is multiplied by the slope of this form of GELU at an array
    of its shape, and the GELU of that array is written, too. dropout: the rate at which elements are dropped, by the mask of
    `kernels/dropout.py`, of GELU's result, of what is added to the array beside, and of both that a slope makes. sums: the sums of
    the first output's columns are made, too.
    """

    bias: bool = False
    gelu: str = ""
    keep: bool = False
    residual: float = 0.0
    slope: str = ""
    dropout: float = 0.0
    sums: bool = False

    @property
    def beside(self) -> bool:
        """Whether an array of the result's shape is read."""
        return bool(self.residual or self.slope)

    @property
    def outputs(self) -> int:
        """Arrays [M, N] that are made."""
        return 1 + bool(self.keep or self.slope)

    @property
    def kind(self) -> str:
        """What the table of tiles calls it."""
        if self.beside:
            return "slope" if self.slope else "residual"
        return ("kept" if self.keep else "gelu") if self.gelu else "plain"

    def __call__(self, y, bias: Any = None, beside: Any = None, mask: Any = None) -> tuple:
        """The outputs, for y and what stands beside it in float32; bias broadcast to y's shape. mask: bool, what is not dropped."""
        y = y if bias is None else y + bias
        if self.slope:
            h, slope = gelu_and_slope(beside, self.slope)
            return self._dropped(y * slope, mask), self._dropped(h, mask)
        if self.residual:
            return (self._dropped(y, mask) + (beside if self.residual == 1.0 else self.residual * beside),)
        if not self.gelu:
            return (self._dropped(y, mask),)
        h = self._dropped(gelu(y, self.gelu), mask)
        return (h, y) if self.keep else (h,)

    def _dropped(self, y, mask):
        return y if mask is None else jnp.where(mask, y * (1.0 / (1.0 - self.dropout)), 0.0)
