"""What a patch embedding measures, how it is cut into grid steps on each TPU generation, and what that costs: no arrays."""

from dataclasses import dataclass, replace
from functools import cache

from jax.experimental import pallas as pl

from kernels.by_xla import FEW_TOKENS, ByXLA
from kernels.device import LANES, SUBLANES, Device
from kernels.vmem import padded_bytes, round_up

# Rows of patches in flight: the transposes of one hide behind the loads and stores of the others. Interpreted, unrolling only
# lengthens the compilation; two still walk both the loop and its remainder.
_GROUP, _GROUP_INTERPRETED = 7, 2
# Rows that keep the MXU busy: small images share a grid step until they have as many tokens.
_ROWS_A_STEP = 256
_IMAGES_A_STEP = 16
# Share of VMEM that the blocks and scratch listed in `vmem_bytes` may take; the compiler spills into the rest.
# The smallest tiles spill least.
_VMEM_SHARE, _VMEM_SHARE_OF_SMALLEST = 0.8, 0.88


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What an image and its weights measure. `tokens` counts the class token where there is one."""

    batch: int
    channels: int
    rows: int  # of patches
    columns: int
    patch: int
    width: int
    tokens: int
    itemsize: int

    @property
    def contracted(self) -> int:
        return self.patch * self.channels * self.patch

    @property
    def side(self) -> int:
        """Rows of pixels of a row of patches, all channels."""
        return self.channels * self.patch

    @property
    def first(self) -> int:
        """Token of the first patch: 1 after a class token, else 0."""
        return self.tokens - self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of all three kernels."""

    images: int  # of a grid step
    rows: int  # of patches, of a block of the image
    width: int  # of a tile of D
    group: int  # rows of patches in flight
    strided_loads: bool  # loads gather the pixels of a patch; else a product does
    needs: int = 0  # bytes of VMEM


def _divisors(n: int) -> list[int]:
    return [d for d in range(n, 0, -1) if n % d == 0]


def vmem_bytes(s: Shape, t: Plan) -> int:
    """VMEM of the hungriest of the three kernels at tiles t: the parameters' gradient, or the image's."""
    long = s.patch * round_up(s.columns, SUBLANES)
    image = 2 * t.images * s.channels * t.rows * padded_bytes(s.patch, long, s.itemsize)
    padded = t.images * s.rows * padded_bytes(round_up(s.columns, SUBLANES), s.contracted, 4)
    patches = t.images * padded_bytes(s.tokens, s.contracted, 4)
    tokens = 2 * t.images * padded_bytes(s.tokens, t.width, s.itemsize)
    weight = 2 * padded_bytes(s.contracted, t.width, 4)
    added = 2 * padded_bytes(s.tokens, t.width, 4)
    turned = t.group * (padded_bytes(long, s.side, 4) + 2 * padded_bytes(s.side, long, 4)) + padded_bytes(long, long, 4)
    return image + padded + patches + tokens + weight + added + turned + t.images * padded_bytes(s.tokens, t.width, 4)


@cache
def plan(s: Shape, device: Device) -> Plan:
    """The tiles for a shape: all of D if it fits, then whole images, then as many images as fill the MXU.

    NotImplementedError where not even one row of patches at 128 columns of D fits the core's VMEM.
    """
    widths = [w for w in _divisors(s.width) if w % LANES == 0] or [s.width]
    budget = _VMEM_SHARE * device.vmem_bytes
    group = _GROUP_INTERPRETED if device.name == "cpu" else _GROUP

    def at(images: int, rows: int, width: int) -> Plan:
        flight = min(group, images * rows)
        t = Plan(images=images, rows=rows, width=width, group=flight, strided_loads=device.strided_loads)
        return replace(t, needs=vmem_bytes(s, t))

    # a block of fewer rows than fit in flight leaves the transposes exposed: narrower tiles of D come first
    for fewest in (min(group, s.rows), 1):
        for width in widths:
            for rows in (r for r in _divisors(s.rows) if r >= fewest):
                if at(1, rows, width).needs > budget:
                    continue
                room = min(_IMAGES_A_STEP, max(1, _ROWS_A_STEP // round_up(s.tokens, SUBLANES)))
                return next(t for n in _divisors(s.batch) if n <= room and (t := at(n, rows, width)).needs <= budget)
    least = at(1, 1, widths[-1])
    if least.needs <= _VMEM_SHARE_OF_SMALLEST * device.vmem_bytes:
        return least
    raise NotImplementedError(
        f"patch_embed: {s.tokens} tokens of {s.contracted} pixels take {least.needs / 2**20:.0f} MiB of VMEM and a {device.name} "
        f"core has {device.vmem_bytes / 2**20:.0f}; use larger patches, smaller images, or the reference op"
    )


def choose(s: Shape, device: Device) -> Plan | ByXLA:
    """`plan`, or XLA where it is ahead by the one count: a step's rows of few patches do not hide their transposes (LOG.md,
    2026-11-27)."""
    if s.tokens <= FEW_TOKENS:
        return ByXLA(reason=f"images of {s.tokens} tokens: too few patches to hide their transposes")
    return plan(s, device)


def cost(s: Shape, *, backward: bool = False) -> pl.CostEstimate:
    """FLOPs and bytes of one pass over the image: forward, or the gradient of the parameters (or of the image, the same)."""
    image = s.batch * s.channels * s.rows * s.columns * s.patch**2 * s.itemsize
    tokens = s.batch * s.tokens * s.width * s.itemsize
    parameters = (s.contracted + s.tokens) * s.width * 4
    flops = 2 * s.batch * s.rows * s.columns * s.contracted * s.width
    if backward:
        flops += s.batch * s.tokens * s.width
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=image + tokens + parameters)
