"""Tiles of the chains on float32 rows, forward (`chain.py`) and backward (`backward.py`): plain arithmetic, no arrays."""

from dataclasses import dataclass

from kernels.attention.tiling import CORE_SHARE, SPILLS, FlatTiles, Float32Core, Shape, group_lanes
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


# ---- backward: products of flat rows

SUM_SPILLS = 2**20  # left to the compiler by a product of one array that adds to a sum: nothing but results are in flight


def _flat_tiles(columns: int, values: int, bytes_of, lengths: list[int], device: Device) -> FlatTiles:
    """The first of the tiles, the widest columns first, that fits VMEM."""
    for c in (c for c in range(columns, 0, -1) if columns % c == 0 and (c == columns or c % LANES == 0)):
        for rows in lengths:
            if bytes_of(c, rows) + SPILLS <= device.vmem_bytes:
                return FlatTiles(columns=c, rows=rows)
    raise NotImplementedError(f"attention half: products of {values} values do not fit the VMEM of a {device.name}")


def _flat_rows(total: int) -> list[int]:
    """Rows a step, the preferred first: what divides the rows of the batch, else what wastes little at the end."""
    return [r for r in (640, 512, 384, 256, LANES) if total % r == 0] + [r for r in (512, 256, LANES) if r < total] or [total]


def flat_product_tiles(m: int, sections: int, i: int, j: int, device: Device) -> FlatTiles:
    """Of sum_s [m, i] @ [i, j].

    Weights change seldom and are not prefetched: the room they leave is worth more, since the rows are read once a column tile.
    """

    def bytes_of(columns, rows):
        return 4 * (sections * i * columns + 2 * rows * (sections * i + columns))

    return _flat_tiles(j, sections * i * j, bytes_of, _flat_rows(m), device)


def flat_sum_tiles(m: int, sections: int, i: int, j: int, device: Device) -> FlatTiles:
    """The same; `apart` where the products together would read their rows, once for each column tile, for longer than they
    multiply: the weights of a single product fit VMEM whole, and the sum passes through HBM instead."""
    together = flat_product_tiles(m, sections, i, j, device)
    moved = 4 * m * (sections * i * (j // together.columns) + j) / device.hbm_bytes_per_cycle
    if together.columns == j or moved <= 2 * m * sections * i * j / device.flops_per_cycle:
        return together
    for rows in _flat_rows(m):
        if 4 * (i * j + 2 * rows * (i + 2 * j)) + SUM_SPILLS <= device.vmem_bytes:
            return FlatTiles(columns=j, rows=rows, apart=True)
    return together


def flat_gradient_tiles(m: int, i: int, j: int, device: Device) -> FlatTiles:
    """Of [m, i]^T @ [m, j]."""

    def bytes_of(columns, rows):
        return 4 * (2 * i * columns + 2 * rows * (i + columns) + i * rows)

    return _flat_tiles(j, i * j, bytes_of, _flat_rows(m), device)
