"""What follows a product before it goes to memory, on float32 numbers."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

LOG2E = 1.4426950408889634
CUBIC = 0.044715


def _logistic(z):
    """1 / (1 + 2^-z), by a reciprocal square root twice: the quotient of floats would take ten times as long."""
    r = jax.lax.rsqrt(1.0 + jnp.exp2(-z))
    return r * r


RATES = {"tanh": (8 / jnp.pi) ** 0.5 * LOG2E, "quick": 1.702 * LOG2E}


def gelu(a, form: str):
    if form == "erf":
        return 0.5 * a * (1.0 + jax.lax.erf(a * 0.5**0.5))
    inner = a + CUBIC * a * a * a if form == "tanh" else a
    return a * _logistic(RATES[form] * inner)


def slope(a, form: str):
    if form == "erf":
        density = (2 * jnp.pi) ** -0.5 * jnp.exp2(-0.5 * LOG2E * a * a)
        return 0.5 * (1.0 + jax.lax.erf(a * 0.5**0.5)) + a * density
    cubic = CUBIC if form == "tanh" else 0.0
    s = _logistic(RATES[form] * (a + cubic * a * a * a))
    return s + a * s * (1.0 - s) * (RATES[form] / LOG2E) * (1.0 + 3 * cubic * a * a)


@dataclass(frozen=True)
class Epilogue:
    bias: bool = False
    gelu: str = ""
    keep: bool = False
    residual: bool = False
    slope: str = ""

    @property
    def beside(self) -> bool:
        return self.residual or bool(self.slope)

    def apply(self, y, beside):
        if self.gelu:
            return gelu(y, self.gelu)
        if self.residual:
            return y + beside
        if self.slope:
            return y * slope(beside, self.slope)
        return y
