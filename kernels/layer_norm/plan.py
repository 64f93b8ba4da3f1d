"""How layer normalisation is cut into grid steps: plain arithmetic, no arrays."""

from dataclasses import dataclass
from functools import cache

from kernels.device import LANES, Device
from kernels.vmem import round_up

# Blocks of some 2 MiB in float32 keep the DMA engines busy and leave room for the two copies of each that the pipeline holds.
_BLOCK_BYTES = 2 * 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """rows: of one grid step, a multiple of 16 (the bfloat16 tile). needs: bytes of VMEM."""

    rows: int
    needs: int = 0


def _vmem_bytes(rows: int, d: int) -> int:
    """Of a step's blocks and what they become in float32."""
    return rows * round_up(d, LANES) * 4 * 10


@cache
def plan(shape: tuple[int, int], device: Device) -> Plan:
    """The plan for [R, D] rows on a device. NotImplementedError where not even 16 rows fit its VMEM."""
    r, d = shape
    lanes = round_up(d, LANES)
    if _vmem_bytes(16, d) > device.vmem_bytes:
        raise NotImplementedError(f"layer_norm of width {d} does not fit the {device.vmem_bytes} bytes of VMEM; use the reference")
    rows = min(512, _BLOCK_BYTES // (lanes * 4), device.vmem_bytes // _vmem_bytes(1, d))
    rows = max(16, min(rows // 16 * 16, r // 16 * 16))
    return Plan(rows=rows, needs=_vmem_bytes(rows, d))
