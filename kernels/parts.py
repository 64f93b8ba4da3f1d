"""A batch worked through in equal parts, one after the other, so that what lies in HBM between the kernels of an op is bounded.

Nothing is cut out of the arrays, which would copy them: a step gets them whole, with the first image of its part, and puts its
results in their place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.launch import vary_alike


def divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most max(limit, 1)."""
    return next(d for d in range(max(1, min(n, limit)), 0, -1) if n % d == 0)


def count(b: int, t: int, limit: int) -> int:
    """Into how many parts of at most `limit` tokens b images of t are cut; 1 where the divisors of b give much shorter ones."""
    n = b // divisor(b, limit // t)
    return n if b // n * t * 4 >= min(limit, b * t) else 1


def _firsts(x, n: int):
    """[n] int32: the first image of each part."""
    return x.shape[0] // n * jnp.arange(n, dtype=jnp.int32)


def forward(step: Callable[..., Any], n: int, x):
    """y like x [B, T, D] of step(first, y) -> y, which fills the images of the part that begins with image `first`."""
    y = vary_alike(x, lax.empty(x.shape, x.dtype))[1]
    return lax.scan(lambda y, first: (step(first, y), None), y, vary_alike(x, _firsts(x, n))[1])[0]


def backward(step: Callable[..., Any], n: int, x, dy):
    """(dx, sums) of step(first, dy) -> (dy, sums), which puts dx in the place of dy for the images of the part that begins with
    image `first`; the sums, float32, are added up."""
    firsts = vary_alike(x, _firsts(x, n))[1]
    if n == 1:
        return step(firsts[0], dy)

    def add(before, first):
        dy, sums = before
        dy, more = step(first, dy)
        return (dy, jax.tree.map(jnp.add, sums, more)), None

    shapes, tree = jax.tree.flatten(jax.eval_shape(step, firsts[0], dy)[1])
    _, dy, *zeros = vary_alike(x, dy, *(jnp.zeros(s.shape, s.dtype) for s in shapes))
    return lax.scan(add, (dy, jax.tree.unflatten(tree, zeros)), firsts)[0]
