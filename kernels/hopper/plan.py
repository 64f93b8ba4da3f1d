"""Which products the Hopper kernel (`product.py`) takes, and with which tiles: plain numbers, so that asking imports no Mosaic GPU."""

from dataclasses import dataclass

import jax.numpy as jnp

from kernels.attention.hopper.plan import not_hopper

DEEP = 64  # of K at a time: 128 bytes of bfloat16, the widest swizzle of shared memory


@dataclass(frozen=True)
class Tiles:
    """Everything chosen for one product; hashable.

    rows, columns: of a tile of the result. stages: slices of x and w in shared memory at a time. cluster: blocks, below each other,
    that share slices of w. alternate: the two warpgroups take whole tiles in turn, and each has its epilogue while the other
    multiplies; else they take the halves of one tile. given, made: pieces of 64 x 64 in shared memory, of each warpgroup, on their way
    in and out.
    """

    rows: int = 128
    columns: int = 128
    stages: int = 5
    cluster: int = 2
    alternate: bool = True
    given: int = 2
    made: int = 2


WIDE = Tiles(columns=192, stages=4)  # three quarters of the bytes of two narrow ones
NARROW = Tiles()


def tiles(k: int, n: int, kind: str) -> Tiles:
    """The tiles of a product [M, K] @ [K, N] with an epilogue of this kind."""
    if n % WIDE.columns == 0 and kind != "slope":
        return WIDE
    return NARROW


def refuses(dtype, k: int, *widths: int) -> str | None:
    """Why the kernel does not take products of this dtype over k into these widths on the device present; None if it does."""
    if (why := not_hopper()) is not None:
        return why
    if dtype != jnp.bfloat16:
        return f"dtype {jnp.dtype(dtype).name}, the kernel takes bfloat16"
    if k % DEEP:
        return f"{k} summed over, the kernel takes multiples of {DEEP}"
    if bad := [n for n in widths if n % NARROW.columns and n % WIDE.columns]:
        return f"{bad[0]} columns, the kernel takes multiples of {NARROW.columns} or {WIDE.columns}"
    return None
