"""Attention along lines as Pallas TPU kernels; `reference.py` is the specification, `core.py` has the kernels.

Where `plan.plan` finds nothing that fits, XLA compiles the specification: `by_xla` gives the reason.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention.lines import core, reference
from kernels.attention.lines.core import Static
from kernels.attention.lines.plan import LineShape, lines_of
from kernels.attention.lines.plan import plan as choose
from kernels.attention.plan import Refused
from kernels.device import LANES
from kernels.launch import Launch, vary_alike
from kernels.settings import own


def by_xla(shape: LineShape, *, launch: Launch) -> str:
    """Why attention along lines of this shape is XLA's and not a kernel's; "" where it is a kernel's."""
    chosen = choose(shape, launch.device)
    return chosen.reason if isinstance(chosen, Refused) else ""


def _diagonals(pairs):
    """[C, L, L] of queries and keys, summed for each offset: [C, 2L-1]."""
    c, length, _ = pairs.shape
    rows = jnp.pad(pairs[:, ::-1], ((0, 0), (0, 0), (0, length)))  # rows of 2L, read as rows of 2L - 1: each moves on by one
    return rows.reshape(c, -1)[:, : length * (2 * length - 1)].reshape(c, length, -1).sum(1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(static: Static, lines, relative) -> Any:
    return core.forward(static, lines, relative)


def _backward(static: Static, saved, dy):
    lines, relative = saved
    dlines, *pairs = core.backward(static, lines, relative, dy)
    return dlines, jnp.concatenate([_diagonals(a) for a in pairs])


_core.defvjp(own(lambda static, lines, relative: (_core(static, lines, relative), (lines, relative))), own(_backward))


def attention(qkv, relative, *, heads: int, launch: Launch) -> Any:
    """`reference.attention`: qkv [M, L, 2 N d] and the tables [2d, 2L-1] to [M, L, N d] in qkv's dtype, differentiable in both.

    By kernels or, where they do not fit, by XLA; ValueError for shapes that do not fit together.
    """
    m, length, k = qkv.shape
    d = k // (2 * heads)
    if k % (4 * heads) or relative.shape != (2 * d, 2 * length - 1):
        raise ValueError(
            f"attention along lines: qkv has shape {qkv.shape} and the tables {relative.shape}; required [M, L, 2 N d] with an "
            f"even d and N = heads = {heads}, and [2d, 2L-1]"
        )
    shape = LineShape(m, length, heads, d, jnp.dtype(qkv.dtype))
    chosen = choose(shape, launch.device)
    if isinstance(chosen, Refused):
        return reference.attention(qkv, relative, heads=heads)
    static = Static(plan=chosen, length=length, d=d, dtype=qkv.dtype, launch=launch)
    qkv, relative = vary_alike(qkv, relative)
    relative = relative.astype(qkv.dtype).astype(jnp.float32)
    more = lines_of(shape) - m
    # the lines of zeros that fill up the last registers get no gradient
    lines = jnp.pad(qkv.astype(jnp.float32), ((0, more), (0, 0), (0, 0))).reshape(-1, LANES, length, heads, 2 * d)
    lines = lines.transpose(2, 4, 0, 3, 1).reshape(length, 2 * d, -1, LANES)
    y: Any = _core(static, lines, relative)
    y = y.reshape(length, d, -1, heads, LANES)
    return y.transpose(2, 4, 0, 3, 1).reshape(m + more, length, heads * d)[:m].astype(qkv.dtype)
