"""How the attention kernels see heads in the lanes of a block, and the walk over tiles: shared by forward and backward."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.device import LANES, Device


@dataclass(frozen=True, kw_only=True)
class CoreTiles:
    """images and lanes (whole heads) a grid step; queries a tile; keys a chunk (T: whole rows)."""

    images: int
    lanes: int
    queries: int
    keys: int
    streamed: bool = False  # the tiles of queries come in the grid, one a step; else a step takes all of them in a loop
    needs: int = 0  # bytes of VMEM


def round_up(n: int, m: int) -> int:
    return -(-n // m) * m


def sweep(total: int, size: int, body) -> None:
    """body(start, length) for consecutive tiles of `size` and, last, the shorter rest; a loop where there are several."""
    full = total // size
    if full == 1:
        body(0, size)
    elif full > 1:

        def step(i, _):
            body(pl.multiple_of(i * size, size), size)

        lax.fori_loop(0, full, step, None)
    if total % size:
        body(full * size, total % size)


@dataclass(frozen=True)
class Head:
    """Where one head lies in the lanes of a block: the columns [lo, hi) that it touches, and its own [first, last)."""

    first: int
    last: int
    lo: int
    hi: int

    def mask(self, value):
        """value [rows, hi - lo] in float32 (not every generation selects in bfloat16), zero outside the head's own lanes."""
        value = value.astype(jnp.float32)
        if (self.first, self.last) == (self.lo, self.hi):
            return value
        lane = self.lo + lax.broadcasted_iota(jnp.int32, (1, self.hi - self.lo), 1)
        return jnp.where((lane >= self.first) & (lane < self.last), value, 0.0)

    def columns(self):
        return [(c, min(c + LANES, self.hi)) for c in range(self.lo, self.hi, LANES)]


def heads_of(lanes: int, h: int) -> list[list[Head]]:
    """The heads of a block of `lanes` lanes, in runs that share no column with each other."""
    runs: list[list[Head]] = []
    for first in range(0, lanes, h):
        head = Head(first, first + h, first // LANES * LANES, min(round_up(first + h, LANES), lanes))
        if runs and head.lo < runs[-1][-1].hi:
            runs[-1].append(head)
        else:
            runs.append([head])
    return runs


def narrow(value, dtype, device: Device):
    """A float32 value as an operand beside arrays of `dtype`; left alone where the MXU rounds float32 operands by itself."""
    return value.astype(dtype) if device.bf16_matmul else value


class Sums(dict):
    """Sums over heads, one a column of lanes; values, not memory."""

    def add(self, head: Head, value):
        for lo, hi in head.columns():
            part = value[:, lo - head.lo : hi - head.lo]
            self[lo, hi] = self[lo, hi] + part if (lo, hi) in self else part

    def store(self, ref, at: tuple, dtype):
        """Writes each column to ref[*at, column]."""
        for (lo, hi), value in self.items():
            ref[(*at, slice(lo, hi))] = value.astype(dtype)
