"""Which attention calls the Hopper kernels (`forward.py`) take: plain numbers, so that asking costs no import of Mosaic GPU."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

CAPABILITY = "9.0"  # Hopper: wgmma and the tensor memory accelerator, which these kernels are written in
HEAD = 64  # one row of a head is 128 bytes, the widest swizzle of shared memory
TILE = 64  # rows of one wgmma
MOST = 256  # keys of a whole row: one wgmma's columns, and half a warpgroup's registers
NARROW = 200  # columns for three warpgroups: a block of four starts with 128 registers a thread, and wgmma with 208 wants 130
COMPUTE = 2  # warpgroups that multiply, at least; one more loads


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything chosen for one call; hashable.

    keys: columns of a row of logits, tokens rounded up to what wgmma takes. tiles: of TILE rows that a head's T rows take.
    warpgroups: that multiply in the forward pass. stages: heads in shared memory at a time, forward. chunk: queries taken at a
    time for the gradients of keys and values, whose sums stand in registers meanwhile.
    """

    keys: int
    tiles: int
    warpgroups: int
    stages: int = 2
    chunk: int = 128

    @property
    def rows(self) -> int:
        return TILE * self.tiles


def plan(t: int, tokens: int) -> Plan:
    """The plan for rows of t, of which `tokens` are keys."""
    tiles = max(COMPUTE, -(-t // TILE))  # a tile for each warpgroup, should it lie behind the last row
    keys = -(-tokens // 8) * 8
    return Plan(keys=keys, tiles=tiles, warpgroups=min(3, tiles) if keys <= NARROW else COMPUTE)


def not_hopper() -> str | None:
    """What the device present is, if no Hopper GPU."""
    if jax.default_backend() != "gpu":
        return f"the devices are {jax.default_backend()}, the kernels are for GPUs"
    if (found := getattr(jax.devices()[0], "compute_capability", "unknown")) != CAPABILITY:
        return f"compute capability {found}, the kernels are written for {CAPABILITY}"
    return None


def refuses(dtype, head_width: int, t: int) -> str | None:
    """Why the kernels do not take heads of this dtype and width and rows of t on the device that is present; None if they do."""
    if (why := not_hopper()) is not None:
        return why
    if dtype != jnp.bfloat16:
        return f"dtype {jnp.dtype(dtype).name}, the kernels take bfloat16"
    if head_width != HEAD:
        return f"heads of {head_width}, the kernels take {HEAD}"
    if t > MOST:
        return f"{t} tokens, the kernels hold rows of {MOST} at most"
    return None
