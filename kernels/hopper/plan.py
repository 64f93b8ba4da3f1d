"""Which products the Hopper kernel (`product.py`) takes, and with which tiles; which half blocks are made of it.

Plain numbers, so that asking imports no Mosaic GPU.
"""

from dataclasses import dataclass
from functools import cache
from math import log

import jax.numpy as jnp

from kernels.attention.hopper.plan import not_hopper
from kernels.hopper.table import TABLE

# Names of what half blocks keep for their backward pass, products and statistics of norms: a checkpoint around a block knows them
KEPT, STATISTICS = "kept by the GPU ops", "layer norm statistics"

DEEP = 64  # of K at a time: 128 bytes of bfloat16, the widest swizzle of shared memory
THREADS = 128  # of a warpgroup, over which a row of the norm is spread
WIDEST = 2048  # row of the norm, for its registers
READS = ("residual", "slope")  # kinds of epilogue that read an array of the result's shape


@dataclass(frozen=True)
class Tiles:
    """Everything chosen for one product; hashable.

    rows, columns: of a tile of the result. stages: slices of x and w in shared memory at a time. cluster: blocks, below each
    other, that share slices of w. alternate: the two warpgroups take whole tiles in turn, and each has its epilogue while the
    other multiplies; else they take the halves of one tile. given, made: pieces of 64 x 64 in shared memory, of each warpgroup,
    on their way in and out. given may be 0: what an epilogue reads then comes through the ring behind a tile's last slices, in
    the place of x, so that it is there when the products are done, and takes no memory of its own.
    """

    rows: int = 128
    columns: int = 128
    stages: int = 5
    cluster: int = 2
    alternate: bool = True
    given: int = 2
    made: int = 2


def memory(t: Tiles, kind: str) -> int:
    """Bytes of shared memory, without barriers, of a block with these tiles and an epilogue of this kind."""
    ring = t.stages * (t.rows + t.columns) * DEEP
    pieces = t.made + (t.given if kind in READS else 0)
    return 2 * (ring + 2 * pieces * 64 * 64)


@cache
def tiles(k: int, n: int, kind: str) -> Tiles:
    """The tiles of a product [M, K] @ [K, N] with an epilogue of this kind: of the nearest in the table whose columns divide N."""
    entries = {place: Tiles(*fields) for place, fields in TABLE.items()}
    fits = {place: t for place, t in entries.items() if place[0] == kind and n % t.columns == 0}

    def away(place):
        return abs(log(place[1] / k)) + abs(log(place[2] / n))

    return fits[min(fits, key=away)] if fits else Tiles()


def refuses(dtype, d: int, inner: int) -> str | None:
    """Why the half block [M, D] -> [M, inner] -> [M, D] is not of our kernels on the device that is present; None if it is."""
    if (why := not_hopper()) is not None:
        return why
    if dtype != jnp.bfloat16:
        return f"dtype {jnp.dtype(dtype).name}, the kernels take bfloat16"
    if d % THREADS or d > WIDEST:
        return f"rows of {d}, the kernels take multiples of {THREADS} to {WIDEST}"
    if inner % THREADS:
        return f"{inner} columns between, the kernels take multiples of {THREADS}"
    return None
