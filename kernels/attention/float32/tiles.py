"""Tiles of the forward chain on float32 rows (`chain.py`): plain arithmetic, no arrays."""

from dataclasses import dataclass

from kernels.attention.tiling import CORE_SHARE, SPILLS, Float32Core, Shape, group_lanes
from kernels.device import LANES, SUBLANES, Device
from kernels.parts import divisor
from kernels.vmem import round_up


@dataclass(frozen=True, kw_only=True)
class RowTiles:
    """Of a product on whole images: images, and columns of the result, a grid step; `needs` bytes of VMEM."""

    images: int
    columns: int
    needs: int = 0


IMAGE_ROWS = 800  # most rows of a step; with more, the code of the norm is long and nothing is gained


def _widths(total: int) -> list[int]:
    return [c for c in range(total, 0, -1) if total % c == 0 and (c == total or c % LANES == 0)]


def _rows(s: Shape) -> tuple[int, int]:
    """Rows of an image in float32, and in packed bfloat16."""
    return round_up(s.t, SUBLANES), round_up(s.t, 16)


def _images(s: Shape) -> list[int]:
    most = max(1, IMAGE_ROWS // round_up(s.t, SUBLANES))
    return sorted({divisor(s.b, n) for n in range(1, most + 1)}, reverse=True)


def project_tiles(s: Shape, device: Device) -> RowTiles | None:
    """Of LN and the three projections, whose weights are streamed once a step's images: so first many images, then wide columns."""
    rows, packed = _rows(s)
    for n in _images(s):
        for columns in _widths(s.k):
            x, z = 2 * n * packed * s.d * s.itemsize, n * rows * s.d * 4
            needs = x + z + 2 * (s.d + n * rows) * columns * 4
            if needs + SPILLS <= device.vmem_bytes:
                return RowTiles(images=n, columns=columns, needs=needs)
    return None


def output_tiles(s: Shape, device: Device) -> RowTiles | None:
    """Of the output product, whose weights stay while all rows pass: so first wide columns, then many images."""
    rows, packed = _rows(s)
    for columns in _widths(s.d):
        for n in _images(s):
            o, blocks = 2 * n * rows * s.k * 4, 2 * 2 * n * packed * columns * s.itemsize
            needs = o + blocks + (s.k + n * rows) * columns * 4
            if needs + SPILLS <= device.vmem_bytes:
                return RowTiles(images=n, columns=columns, needs=needs)
    return None


FORWARD_SQUARES = 2.5  # float32 [R, S] that the compiler keeps for each unrolled head, at most


def forward_core(s: Shape, device: Device) -> Float32Core | None:
    """The core of the chain: as many heads a step as fit VMEM, none of them padded; None where no group of them does."""
    rows, keys = round_up(s.t, SUBLANES), round_up(s.t, LANES)
    for lanes in range(s.k, 0, -group_lanes(s)):
        blocks = (2 * 4 * rows + keys) * round_up(lanes, LANES) * 4
        heads = lanes // s.h * FORWARD_SQUARES * rows * keys * 4
        if s.k % lanes == 0 and blocks + heads <= CORE_SHARE * device.vmem_bytes:
            return Float32Core(lanes=lanes)
    return None
