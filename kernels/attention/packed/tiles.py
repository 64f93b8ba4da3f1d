"""How many images the packed core takes a grid step: plain arithmetic, no arrays."""

from dataclasses import dataclass

from kernels.attention.tiling import CORE_SHARE, Shape, heads_of
from kernels.device import LANES, SUBLANES, Device
from kernels.vmem import round_up

SQUARES, ROWS = 10, 12  # float32 [R, S], and [R, columns], that the compiler keeps for the heads in flight


@dataclass(frozen=True, kw_only=True)
class PackedCore:
    """images: of a grid step, whole registers of float32; `needs` bytes of VMEM."""

    images: int
    needs: int = 0


def packed_core(s: Shape, device: Device) -> PackedCore | None:
    """As many images as have a row of keys in one column of lanes, or 8. None where the batch does not fill a step, heads are no
    whole registers, or a step does not fit VMEM."""
    images = max(SUBLANES, LANES // s.t // SUBLANES * SUBLANES)
    while images > SUBLANES and images > s.b:
        images -= SUBLANES
    needs = _bytes(s, images)
    if s.h % SUBLANES or images > s.b or needs > CORE_SHARE * device.vmem_bytes:
        return None
    return PackedCore(images=images, needs=needs)


def _bytes(s: Shape, images: int) -> int:
    """Of the backward kernel: seven arrays of a step, each twice, and what the heads of a run keep."""
    rows, lanes = images * s.t, round_up(s.k, LANES)
    run = max(heads_of(s.k, s.h), key=len)
    columns = round_up(run[-1].hi - run[0].lo, LANES)
    return 4 * (2 * 7 * rows * lanes + SQUARES * rows * round_up(rows, LANES) + ROWS * round_up(rows, LANES) * columns)
