"""Which images the Hopper kernel (`hopper.py`) takes as bytes, and how it cuts them: plain numbers, no import of Mosaic GPU."""

from dataclasses import dataclass
from functools import cache

import jax.numpy as jnp

from kernels.attention.hopper.plan import SHARED, not_hopper

ROWS, COLUMNS = 128, 128  # of a tile of the result
BOX = 256  # the most elements of a copy's inner axis
UNIT = 16  # bytes: strides of a copy are multiples of it, and of what a wgmma sums over, 16 values
ALIGNED = 128  # bytes, where a copy into shared memory begins
MADE = 2  # pieces of 64 x 64 in shared memory on their way out, of each warpgroup
STAGES = 2  # slices of the image and of the weights in shared memory at a time, at least, of each warpgroup


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What an image and its weights measure; hashable. rows, columns: of patches. tokens: rows of the result for an image; first: 1
    behind a class token, else 0. Behind the patches the rest of the rows is padding."""

    batch: int
    channels: int
    rows: int
    columns: int
    patch: int
    width: int
    tokens: int
    first: int

    @property
    def end(self) -> int:
        """Row behind the last patch."""
        return self.first + self.rows * self.columns

    @property
    def line(self) -> int:
        """Bytes of a row of pixels."""
        return self.columns * self.run

    @property
    def run(self) -> int:
        """Bytes of a row of pixels of a patch."""
        return self.patch * self.channels

    @property
    def padded(self) -> int:
        """Values that such a row takes of what the product sums over: whole ones of a wgmma."""
        return -(-self.run // UNIT) * UNIT


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything chosen for one call; hashable.

    lines: rows of pixels, of each patch, in a slice. bands: rows of patches in a slice, all that a tile's rows can lie in. box:
    bytes of a copy's inner axis. swizzle: bytes, of the weights. stages, cluster: as in `kernels.hopper.plan.Tiles`.
    """

    lines: int
    bands: int
    box: int
    swizzle: int
    stages: int
    cluster: int = 2


def _bands(s: Shape, lines: int) -> int:
    """Rows of patches that ROWS tokens in a row can lie in, and as many more as align a slice."""
    bands = (ROWS - 2) // s.columns + 2
    while bands * lines * s.line % ALIGNED:
        bands += 1
    return bands


@cache
def plan(s: Shape, stages: int = STAGES) -> Plan | None:
    """The plan with the most rows of pixels in a slice; None where no slice fits shared memory and its copies."""
    for lines in (n for n in range(s.patch, 0, -1) if s.patch % n == 0):
        row = lines * s.line
        box = next((n for n in range(BOX, 0, -UNIT) if row % n == 0), None)
        swizzle = next((n for n in (128, 64, 32) if lines * s.padded % (n // 2) == 0), None)
        if box is None or swizzle is None or lines * s.padded > BOX or row // box > BOX:
            continue
        bands = _bands(s, lines)
        each = bands * row + 2 * lines * s.padded * COLUMNS
        room = (SHARED - 2 * 2 * MADE * 64 * 64) // (2 * each)
        if bands <= BOX and room >= stages:
            return Plan(lines=lines, bands=bands, box=box, swizzle=swizzle, stages=min(room, 4))
    return None


def refuses(s: Shape, dtype) -> str | None:
    """Why the kernel does not take these bytes for tokens of this dtype on the device that is present; None if it does."""
    if (why := not_hopper()) is not None:
        return why
    if dtype != jnp.bfloat16:
        return f"dtype {jnp.dtype(dtype).name}, the kernel makes bfloat16"
    if s.width % COLUMNS:
        return f"tokens of {s.width}, the kernel takes multiples of {COLUMNS}"
    if s.run % 2:
        return f"patches of {s.run} bytes a row of pixels, the kernel takes even numbers"
    if plan(s) is None:
        return f"rows of {s.line} bytes in patches of {s.patch}: no slice of them that is copied in units of {UNIT} bytes fits"
    return None
