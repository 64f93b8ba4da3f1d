"""Which attention calls the Hopper kernels (`forward.py`) take: plain numbers, so that asking costs no import of Mosaic GPU."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

PROCESSORS = 132  # of an H100 or H200 (SXM); a card with fewer runs the rest of the blocks after the first
CAPABILITY = "9.0"  # Hopper: wgmma and the tensor memory accelerator, which these kernels are written in
HEADS = (64, 80, 128)  # widths that are tried; others of 16 n would be as 80, in pieces
# The most rows of a head width for which half blocks take the kernels: where a card has run them, ahead of cuDNN's (80: expected)
TAKEN = {64: 258, 80: 258, 128: 128}
TILE = 64  # rows of one wgmma
WHOLE = 256  # keys of a row of logits at once: one wgmma's columns, and half a warpgroup's registers
SPAN = 192  # of them where rows are longer, the sums beside them being rescaled
COPY = 256  # rows of one copy into shared memory, at most
NARROW = 200  # columns for three warpgroups: a block of four starts with 128 registers a thread, and wgmma with 208 wants 130
COMPUTE = 2  # warpgroups that multiply, at least; one more loads
SHARED = 224 * 1024  # bytes of a block's shared memory, less what barriers and alignment take


def pieces(head: int) -> tuple[tuple[int, int], ...]:
    """(first column, width) of the parts of a head in shared memory, each as wide as a swizzle: 128, 64 or 32 bytes."""
    found, first = [], 0
    for width in (64, 32, 16):
        while head - first >= width:
            found.append((first, width))
            first += width
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything chosen for one call; hashable.

    head: its width. keys: columns of a row of logits, tokens rounded up to what wgmma takes. spans: (first, width) of the keys
    taken at a time. tiles: of TILE rows that a head's T rows take. warpgroups: that multiply in the forward pass. stages: heads in
    shared memory at a time, forward. chunk: queries taken at a time for the gradients of keys and values, whose sums stand in
    registers meanwhile.
    """

    head: int
    keys: int
    spans: tuple[tuple[int, int], ...]
    tiles: int
    warpgroups: int
    stages: int
    chunk: int

    @property
    def rows(self) -> int:
        return TILE * self.tiles

    @property
    def copies(self) -> tuple[tuple[int, int], ...]:
        """(first, how many) of the rows that a copy takes."""
        return tuple((first, min(COPY, self.rows - first)) for first in range(0, self.rows, COPY))


def memory(rows: int, head: int) -> tuple[int, int]:
    """Bytes of shared memory that rows of a head take, forward (a stage) and backward."""
    return 2 * 3 * rows * head, 2 * (4 * rows + COMPUTE * TILE) * head + 2 * 4 * rows


def _spans(keys: int) -> tuple[tuple[int, int], ...]:
    """Whole tiles each but the last, as a product sums over them."""
    span = keys if keys <= WHOLE else SPAN
    return tuple((first, min(span, keys - first)) for first in range(0, keys, span))


def plan(t: int, tokens: int, head: int = 64) -> Plan:
    """The plan for rows of t, of which `tokens` are keys."""
    tiles = max(COMPUTE, -(-t // TILE))  # a tile for each warpgroup, should it lie behind the last row
    keys = -(-tokens // 8) * 8
    return Plan(
        head=head,
        keys=keys,
        spans=_spans(keys),
        tiles=tiles,
        warpgroups=min(3, tiles) if keys <= NARROW and head == 64 else COMPUTE,
        stages=2 if 2 * memory(TILE * tiles, head)[0] <= SHARED else 1,
        chunk=128 if head == 64 else 64,
    )


def longest(head: int) -> int:
    """The most rows of this head width that both kernels hold in shared memory."""
    return next(rows for rows in range(1024, 0, -TILE) if max(memory(rows, head)) <= SHARED)


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
    if head_width not in TAKEN:
        return f"heads of {head_width}, the kernels are for {', '.join(map(str, TAKEN))}"
    if t > TAKEN[head_width]:
        return f"{t} tokens, the kernels are for rows of {TAKEN[head_width]} at most"
    return None
