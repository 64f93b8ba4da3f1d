"""What each TPU generation and each GPU offers: the only place in the code where a device is described.

Everything about a TPU is per TensorCore, the unit a Pallas kernel runs on (a v5p device is two of them). Memory sizes and
bandwidths, and which operand types Mosaic takes, are those of jax's own `pltpu.get_tpu_info`; FLOPs a cycle and clocks are the
pair that gives the published peak (v3 61.6, v4 137.6, v5e 196.6, v5p 229.4, v6e 917.5, 7x 1153 TFLOP/s a core), and the compiler's
estimate for a large matrix product agrees with them to within a third on every generation. GPUs: the vendor's data sheets; the ops
leave their tiles to XLA and cuDNN, so there is nothing else to know.
"""

from dataclasses import dataclass

KiB = 2**10
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
    strided_loads: bool  # loads with a stride over sublanes are one instruction; elsewhere Mosaic makes them of one load a row
    strided_roll: bool  # Mosaic rotates each row of a register by a lane more than the one before
    topology: str  # libtpu's name of the smallest slice, of which a compiler without a TPU takes one core
    bf16_matmul: bool  # False: Mosaic rejects bfloat16 operands; cast to float32 in VMEM, which is one MXU pass all the same

    @property
    def peak_flops(self) -> float:
        """bfloat16 FLOP/s of the core."""
        return self.flops_per_cycle * self.clock_hz

    @property
    def smem_bytes(self) -> int:
        """Memory of scalars: small in the generations, v2 and v3, that take no bfloat16 products either."""
        return (1024 if self.bf16_matmul else 16) * KiB

    @property
    def hbm_bytes_per_cycle(self) -> float:
        return self.hbm_bytes_per_second / self.clock_hz


def _tpu(
    name, kind, topology, vmem, hbm, bandwidth, mxu, flops, clock, strided_loads=True, strided_roll=True, bf16_matmul=True
) -> Device:
    return Device(
        name=name,
        kind=kind,
        topology=topology,
        vmem_bytes=vmem * MiB,
        hbm_bytes=hbm * GiB,
        hbm_bytes_per_second=bandwidth * 1e9,
        mxu=mxu,
        flops_per_cycle=flops,
        clock_hz=clock * 1e9,
        strided_loads=strided_loads,
        strided_roll=strided_roll,
        bf16_matmul=bf16_matmul,
    )


# name, device kind, smallest topology, VMEM MiB, HBM GiB, HBM GB/s, MXU, FLOP/cycle, clock GHz
_TPUS = (
    _tpu("v2", "TPU v2", "v2:2x2", 16, 8, 358, 128, 2**15, 0.70, strided_loads=False, strided_roll=False, bf16_matmul=False),
    _tpu("v3", "TPU v3", "v3:2x2", 16, 16, 412, 128, 2**16, 0.94, strided_loads=False, strided_roll=False, bf16_matmul=False),
    _tpu("v4", "TPU v4", "v4:2x2x1", 16, 16, 615, 128, 2**17, 1.05, strided_loads=False, strided_roll=False),
    _tpu("v5e", "TPU v5 lite", "v5e:2x2", 128, 16, 820, 128, 2**17, 1.50),
    _tpu("v5p", "TPU v5", "v5p:2x2x1", 64, 48, 1230, 128, 2**17, 1.75),
    _tpu("v6e", "TPU v6 lite", "v6e:2x2", 128, 32, 1640, 256, 2**19, 1.75),
    _tpu("7x", "TPU7x", "tpu7x:2x2x1", 64, 96, 3700, 256, 2**19, 2.20),
)

# Interpreted kernels pick their tiles as on the first target, so that what runs on a CPU is what a v3 would run.
CPU = _tpu("cpu", "cpu", "", 16, 16, 412, 128, 2**16, 0.94, strided_loads=False, strided_roll=False)

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


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A graphics card. peak_flops: dense bfloat16 FLOP/s with float32 accumulation."""

    name: str
    kind: str  # which jax.Device.device_kind of this card contains; of several that do, the longest
    memory_bytes: int
    peak_flops: float
    bytes_per_second: float


def _gpu(name: str, kind: str, memory: float, teraflops: float, bandwidth: float) -> GPU:
    return GPU(name=name, kind=kind, memory_bytes=int(memory * GiB), peak_flops=teraflops * 1e12, bytes_per_second=bandwidth * 1e9)


# name, part of the device kind, memory GiB, dense bfloat16 TFLOP/s, memory GB/s
GPUS = (
    _gpu("H200", "H200", 141, 989.4, 4800),
    _gpu("H100", "H100", 80, 989.4, 3350),
    _gpu("H100 PCIe", "H100 PCIe", 80, 756, 2000),
    _gpu("A100", "A100-SXM4-40GB", 40, 312, 1555),
    _gpu("A100 80GB", "A100-SXM4-80GB", 80, 312, 2039),
    _gpu("L4", "NVIDIA L4", 24, 121, 300),
    _gpu("RTX 3090", "RTX 3090", 24, 71, 936),
    _gpu("RTX 4090", "RTX 4090", 24, 165.2, 1008),
    _gpu("RTX 5090", "RTX 5090", 32, 209.5, 1792),
)


def gpu(kind: str) -> GPU | None:
    """The card whose `jax.Device.device_kind` is `kind`; None for one that is not in the table."""
    words = f"{kind} "
    return max((g for g in GPUS if f"{g.kind} " in words), key=lambda g: len(g.kind), default=None)
