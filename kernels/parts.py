"""A batch taken in equal parts, one after the other, so that what lies in HBM between the kernels of an op is bounded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.launch import vary_alike


def divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most max(limit, 1)."""
    return next(d for d in range(max(1, min(n, limit)), 0, -1) if n % d == 0)


def count(x, limit: int) -> int:
    """Into how many parts of at most `limit` tokens x [B, T, D] is cut; 1 where the divisors of B give much shorter ones only."""
    b, t, _ = x.shape
    n = b // divisor(b, limit // t)
    return n if b // n * t * 4 >= min(limit, b * t) else 1


def cut(x, n: int):
    """[B, ...] as [n, B / n, ...]."""
    return x.reshape(n, -1, *x.shape[1:])


def scalars_of(scalars, n: int, rows: int, *, row: int):
    """[n, ...]: the scalars of each part, whose first rows, `scalars[row]`, are `rows` apart."""
    return scalars + rows * jnp.arange(n, dtype=jnp.int32)[:, None] * (jnp.arange(scalars.size) == row)


def backward(step: Callable[..., Any], n: int, scalars, x, dy, *, row: int):
    """(dx [B, T, D], sums) of step(scalars, x, dy) -> (dx, sums) over n parts; the sums, float32, are added up."""
    if n == 1:
        return step(scalars, x, dy)
    parts = scalars_of(scalars, n, x.shape[0] // n * x.shape[1], row=row), cut(x, n), cut(dy, n)

    def add(sums, part):
        dx, more = step(*part)
        return jax.tree.map(jnp.add, sums, more), dx

    shapes = jax.eval_shape(lambda *part: step(*part)[1], *(p[0] for p in parts))
    zeros = vary_alike(scalars, *(jnp.zeros(s.shape, s.dtype) for s in shapes))[1:]
    sums, dx = lax.scan(add, zeros, parts)
    return dx.reshape(x.shape), sums
