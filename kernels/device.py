"""What each TPU generation offers a kernel: one table, the only place in the code where a device is described.

Everything is per TensorCore, the unit a Pallas kernel runs on (a v5p device is two of them). Memory sizes and bandwidths, and
which operand types Mosaic takes, are those of jax's own `pltpu.get_tpu_info`; FLOPs a cycle and clocks are the pair that gives the
published peak (v3 61.6, v4 137.6, v5e 196.6, v5p 229.4, v6e 917.5, 7x 1153 TFLOP/s a core), and the compiler's estimate for
a large matrix product agrees with them to within a third on every generation.
"""

from dataclasses import dataclass

MiB = 2**20
GiB = 2**30

LANES = 128  # the minor dimension of every vector register, all generations
SUBLANES = 8  # rows of a float32 register; a bfloat16 tile in memory is twice that


@dataclass(frozen=True, kw_only=True)
class Device:
    """One TensorCore. Hashable, so that it can be part of a static argument."""

    name: str  # "v2" ... "7x", or "cpu" where kernels are interpreted
    kind: str  # jax.Device.device_kind of this generation
    vmem_bytes: int
    hbm_bytes: int
    hbm_bytes_per_second: float
    mxu: int  # rows and columns of one systolic array
    flops_per_cycle: int  # bfloat16 products with float32 accumulation, all arrays of the core, two FLOPs each
    clock_hz: float
    bf16_matmul: bool  # False: Mosaic rejects bfloat16 operands; cast to float32 in VMEM, which is one MXU pass all the same

    @property
    def peak_flops(self) -> float:
        """bfloat16 FLOP/s of the core."""
        return self.flops_per_cycle * self.clock_hz

    @property
    def hbm_bytes_per_cycle(self) -> float:
        return self.hbm_bytes_per_second / self.clock_hz


def _device(name, kind, vmem, hbm, bandwidth, mxu, flops, clock, bf16_matmul=True) -> Device:
    return Device(
        name=name,
        kind=kind,
        vmem_bytes=vmem * MiB,
        hbm_bytes=hbm * GiB,
        hbm_bytes_per_second=bandwidth * 1e9,
        mxu=mxu,
        flops_per_cycle=flops,
        clock_hz=clock * 1e9,
        bf16_matmul=bf16_matmul,
    )


# name, device kind, VMEM MiB, HBM GiB, HBM GB/s, MXU, FLOP/cycle, clock GHz
_TPUS = (
    _device("v2", "TPU v2", 16, 8, 358, 128, 2**15, 0.70, bf16_matmul=False),
    _device("v3", "TPU v3", 16, 16, 412, 128, 2**16, 0.94, bf16_matmul=False),
    _device("v4", "TPU v4", 16, 16, 615, 128, 2**17, 1.05),
    _device("v5e", "TPU v5 lite", 128, 16, 820, 128, 2**17, 1.50),
    _device("v5p", "TPU v5", 64, 48, 1230, 128, 2**17, 1.75),
    _device("v6e", "TPU v6 lite", 128, 32, 1640, 256, 2**19, 1.75),
    _device("7x", "TPU7x", 64, 96, 3700, 256, 2**19, 2.20),
)

# Interpreted kernels pick their tiles as on the first target, so that what runs on a CPU is what a v3 would run.
CPU = _device("cpu", "cpu", 16, 16, 412, 128, 2**16, 0.94)

DEVICES: dict[str, Device] = {device.name: device for device in (*_TPUS, CPU)}

_KINDS = {device.kind: device for device in DEVICES.values()} | {
    "TPU v5e": DEVICES["v5e"],  # other names of the same chips, as jax lists them
    "TPU v5p": DEVICES["v5p"],
    "TPU v6e": DEVICES["v6e"],
    "TPU7": DEVICES["7x"],
}


def from_kind(kind: str) -> Device:
    """The Device whose `jax.Device.device_kind` is `kind`. ValueError for a device without kernels."""
    if kind not in _KINDS:
        raise ValueError(f"no kernels for the device kind {kind!r}; known: {', '.join(sorted(_KINDS))}. Use the reference ops.")
    return _KINDS[kind]
