"""Queries and keys turned in kernels: in float32 as they leave the product that makes them, and their gradients turned back.

    q'[i] = q[i] cos - q[i + H/2] sin,  q'[i + H/2] = q[i + H/2] cos + q[i] sin          i < H/2

A head, or some heads, fill a column of 128 lanes. There the other half of each pair stands H/2 lanes away, on the one side for the
first half and on the other for the second; the sines have the sign. `Turned` is an epilogue of `general.forward.project`: no array
goes through HBM for it, and the MXU works meanwhile. Backward turns by the opposite angles, where the core's gradients lie: 4
arrays of B * T * K; values, the third section, stay where they are.
"""

from typing import Any, NamedTuple

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


def turn_columns(x, cos, sin, width: int):
    """x [R, columns] float32 turned, in columns of 128 lanes; cos, sin [R, 128] as of `tables`."""
    half, first = width // 2, iota(LANES, 1) % width < width // 2

    def column(x):
        other = pltpu.roll(x, half, 1)
        if width < LANES:
            other = jnp.where(first, pltpu.roll(x, LANES - half, 1), other)
        return x * cos + other * sin

    return jnp.concatenate([column(x[:, c : c + LANES]) for c in range(0, x.shape[1], LANES)], axis=1)


class Turned(NamedTuple):
    """Of q and k in the block of a product. tables: cosines and signed sines [T, 128] float32. width: of a head."""

    tables: tuple[Any, Any]
    width: int

    def of_section(self, y, c: int, sections: int, rows):
        """y [R, columns] float32, section c of the `sections` of a block, or of all three the grid's; rows: refs of the tables."""
        if c == 2:
            return y
        at = turn_columns(y, rows[0][...], rows[1][...], self.width)
        return at if sections > 1 else jnp.where(pl.program_id(2) < 2, at, y)


def of_rows(turn: Turn, tokens: int, width: int) -> Turned:
    cos, sin = tables(turn, tokens, width)
    return Turned((jnp.asarray(cos), jnp.asarray(sin)), width)


def turned_back(qkv, turn: Turn, width: int, *, launch: Launch):
    """qkv [3, B, T, K] with queries and keys turned by the opposite angles, in its place. width: of a head."""
    _, b, t, k = qkv.shape
    cos, sin = tables(turn, t, width)
    rows = t if t <= ROWS else ROWS
    images = divisor(b, ROWS // t) if rows == t else 1

    def kernel(x_ref, cos_ref, sin_ref, out_ref):
        def image(i, _):
            x = x_ref[0, i].astype(F32)
            out_ref[0, i] = turn_columns(x, cos_ref[...], sin_ref[...], width).astype(out_ref.dtype)

        sweep(images, 1, image)

    block = pl.BlockSpec((1, images, rows, k), lambda c, i, j: (c, i, j, 0))
    table = pl.BlockSpec((rows, LANES), lambda c, i, j: (j, 0))
    size = 2 * b * t * k
    return call(
        kernel,
        launch=launch,
        name="attention_turn_back",
        grid=(2, b // images, pl.cdiv(t, rows)),
        in_specs=[block, table, table],
        out_specs=[block],
        out_shapes=[(qkv.shape, qkv.dtype)],
        semantics=("parallel", "parallel", "parallel"),
        cost=pl.CostEstimate(flops=3 * size, transcendentals=0, bytes_accessed=2 * size * qkv.dtype.itemsize),
        aliases={0: 0},
    )(qkv, jnp.asarray(cos), jnp.asarray(-sin))[0]
