"""How attention along lines is cut into grid steps, and where XLA does it: plain arithmetic, no arrays."""

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any, NamedTuple

import jax.numpy as jnp

from kernels.attention.plan import Refused
from kernels.device import LANES, SUBLANES, Device
from kernels.vmem import round_up

REGISTER = 4 * SUBLANES * LANES  # bytes
SHARE = 0.9  # of VMEM, by the count below
SMEM_OF_OTHERS = 2 * 1024  # bytes of it that are not the tables'
TERMS = 32  # channels of one turn of a loop over places: short turns wait for themselves
SUMS = 32  # registers that are summed up over a loop


class LineShape(NamedTuple):
    """Of a call: m lines of `length` places, of `heads` heads, v d wide, q and k half of that."""

    m: int
    length: int
    heads: int
    d: int
    dtype: Any


@dataclass(frozen=True, kw_only=True)
class LinesPlan:
    """A grid step has 8 registers' rows of 128 lines; `turn` and `half_turn`: places of one turn of a loop over places, whose body
    goes through all channels, or through those of q and k alone. needs: bytes of VMEM of the backward pass, the larger."""

    rows: int  # of 128 lines of one head, in all, whole grid steps
    turn: int
    half_turn: int
    needs: int


def _divisor(n: int, most: int) -> int:
    return max(k for k in range(1, max(1, min(n, most)) + 1) if n % k == 0)


def lines_of(shape: LineShape) -> int:
    """The lines with those that fill up whole registers: of 128, and 8 rows of heads."""
    return round_up(shape.m, LANES * (SUBLANES // gcd(SUBLANES, shape.heads)))


@cache
def plan(s: LineShape, device: Device) -> LinesPlan | Refused:
    """The plan, or why XLA does it."""
    if s.dtype not in (jnp.float32, jnp.bfloat16):
        return Refused(reason=f"attention along lines: {jnp.dtype(s.dtype)} is XLA's, kernels take float32 or bfloat16")
    half = s.d // 2
    blocks = 2 * REGISTER * (s.length * (half + s.d) + 2 * s.length + 2 * (half + s.d))
    sums = 2 * 4 * (s.d + half + SUBLANES) * round_up(s.length * SUBLANES, LANES)
    needs = blocks + sums + 2 * REGISTER * s.length
    needs += 2 * 4 * SUBLANES * LANES * (2 * s.length - 1)
    if needs > SHARE * device.vmem_bytes:
        return Refused(
            reason=f"attention along lines: {s.length} places of {s.d} channels a head need {needs >> 20} MiB of the "
            f"{device.vmem_bytes >> 20} MiB of VMEM of a {device.name}"
        )
    if (tables := 4 * (2 * s.length - 1) * 2 * s.d) > device.smem_bytes - SMEM_OF_OTHERS:
        return Refused(
            reason=f"attention along lines: tables of {tables} bytes do not fit the {device.smem_bytes} bytes of SMEM of a "
            f"{device.name}"
        )
    return LinesPlan(
        rows=lines_of(s) // LANES * s.heads,
        turn=_divisor(s.length, TERMS // (half + s.d)),
        half_turn=_divisor(s.length, TERMS // half),
        needs=needs,
    )
