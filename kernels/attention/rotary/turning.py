"""The kernel that turns queries and keys where they lie, in the array of the projections: a row is read and written once.

    q'[i] = q[i] cos - q[i + H/2] sin,  q'[i + H/2] = q[i + H/2] cos + q[i] sin          i < H/2

A head, or some heads, fill a column of 128 lanes. There the other half of each pair stands H/2 lanes away, on the one side for the
first half and on the other for the second; `sines` has the sign. Backward is the same by the opposite angles. HBM traffic: 4 arrays
of B * T * K, where values, the third section, stay where they are.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.rotary.reference import Turn
from kernels.body import F32, iota, sweep
from kernels.device import LANES
from kernels.launch import Launch, call
from kernels.parts import divisor

ROWS = 1024  # tokens a grid step: some MiB, and steps as long as a transfer wants


def refuses(width: int, k: int) -> str:
    """Why the kernel does not take heads of this width, k columns of them in all; "" where it does."""
    if LANES % width or k % LANES:
        return f"heads of width {width}, {k} columns in all, do not fill whole columns of {LANES} lanes"
    return ""


def tables(turn: Turn, tokens: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, signed sines) [tokens, 128] float32, as the lanes of a column have them."""
    cos, sin = turn.table(tokens, width)
    heads = LANES // width
    return (
        np.tile(np.concatenate([cos, cos], 1), heads).astype(np.float32),
        np.tile(np.concatenate([-sin, sin], 1), heads).astype(np.float32),
    )


def turned(qkv, turn: Turn, width: int, *, launch: Launch, back: bool = False):
    """qkv [3, B, T, K] with queries and keys turned, in its place; back: by the opposite angles. width: of a head."""
    _, b, t, k = qkv.shape
    cos, sin = tables(turn, t, width)
    rows = t if t <= ROWS else ROWS
    images = divisor(b, ROWS // t) if rows == t else 1
    half = width // 2

    def kernel(x_ref, cos_ref, sin_ref, out_ref):
        first = iota(LANES, 1) % width < half

        def column(i, c):
            x = x_ref[0, i, :, c : c + LANES].astype(F32)
            other = pltpu.roll(x, half, 1)
            if width < LANES:
                other = jnp.where(first, pltpu.roll(x, LANES - half, 1), other)
            out_ref[0, i, :, c : c + LANES] = (x * cos_ref[...] + other * sin_ref[...]).astype(out_ref.dtype)

        def image(i, _):
            for c in range(0, k, LANES):
                column(i, c)

        sweep(images, 1, image)

    block = pl.BlockSpec((1, images, rows, k), lambda c, i, j: (c, i, j, 0))
    table = pl.BlockSpec((rows, LANES), lambda c, i, j: (j, 0))
    size = 2 * b * t * k
    return call(
        kernel,
        launch=launch,
        name="attention_turn_back" if back else "attention_turn",
        grid=(2, b // images, pl.cdiv(t, rows)),
        in_specs=[block, table, table],
        out_specs=[block],
        out_shapes=[(qkv.shape, qkv.dtype)],
        semantics=("parallel", "parallel", "parallel"),
        cost=pl.CostEstimate(flops=3 * size, transcendentals=0, bytes_accessed=2 * size * qkv.dtype.itemsize),
        aliases={0: 0},
    )(qkv, jnp.asarray(cos), jnp.asarray(-sin if back else sin))[0]
