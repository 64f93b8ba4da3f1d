"""Which kernels run the attention half with relative positions, and how they are cut into grid steps: plain arithmetic, no arrays.

Rows of keys are whole. A tile of queries, all of them or a multiple of 128, needs a window of the table of offsets; `window` says
which. `plan` chooses, and says where XLA does it.
"""

from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

from kernels.attention.plan import Plan, Refused, general_backward, general_forward
from kernels.attention.tiling import ROWS, UNROLLED, ProductTiles, RelativeTiles, Shape, group_lanes, heads_of, product_tiles
from kernels.device import LANES, SUBLANES, Device
from kernels.parts import divisor
from kernels.vmem import padded_bytes, round_up


class Window(NamedTuple):
    """`lanes` columns of the table from `first` on: the logit of query u of the tile and key s stands at s - u + reach of them."""

    first: Any  # int or int32
    lanes: int
    reach: int


def _reach(t: int, queries: int, size: int) -> int:
    return round_up(size, SUBLANES if queries == t else LANES)


def anchor(t: int, queries: int) -> int:
    """The column of offset 0 in the table."""
    return _reach(t, queries, t)


def window(t: int, queries: int, start, size: int) -> Window:
    """What `size` queries from `start` on need of the table, of t tokens in tiles of `queries`."""
    reach = _reach(t, queries, size)
    first = anchor(t, queries) - start - reach
    return Window(first, round_up(t + reach, LANES), reach)


def length(t: int, queries: int) -> int:
    """Columns of the table, zeros around the offsets included."""
    w = window(t, queries, 0, queries)
    return w.first + w.lanes


# Float32 arrays that the compiler keeps in VMEM for each head of an unrolled step: [queries, T], [queries, window], [T, columns].
FORWARD_TEMPORARIES, BACKWARD_TEMPORARIES = (2, 1, 3), (4, 2, 5)
SHARE = 0.84  # of VMEM, by the count below; the rest is for spilled registers
SHORT = 32  # tokens, fewer are XLA's: of 5 it takes a third of the kernels' cycles on v5e, of 50 a quarter more
TOKENS = 1400  # most whose rows of keys are whole


def _needs(s: Shape, t: RelativeTiles, *, backward: bool) -> int:
    arrays = 8 if backward else 4
    squares, windows, operands = BACKWARD_TEMPORARIES if backward else FORWARD_TEMPORARIES
    columns, whole = length(s.t, t.queries), t.queries == s.t
    blocks = 2 * arrays * t.images * padded_bytes(s.t, t.lanes, s.itemsize)
    table = 2 * (4 + 8 * backward) * round_up(t.lanes, SUBLANES) * columns
    scratch = 0 if whole or not backward else 2 * padded_bytes(s.t, t.lanes, 4)
    width = max(head.hi - head.lo for run in heads_of(t.lanes, s.h) for head in run)
    one = squares * padded_bytes(t.queries, s.t, 4) + operands * padded_bytes(s.t, width, 4)
    one += windows * padded_bytes(t.queries, window(s.t, t.queries, 0, t.queries).lanes, 4)
    heads = t.lanes // s.h if whole else group_lanes(s) // s.h
    return blocks + table + scratch + heads * one


def core_tiles(s: Shape, device: Device, *, backward: bool) -> RelativeTiles:
    """All heads in one step if they fit, then shorter tiles of queries. NotImplementedError where nothing fits."""
    group, budget = group_lanes(s), device.vmem_bytes * SHARE
    lengths = [s.t] * (s.t <= 640) + [q for q in (512, 384, 256, LANES) if q < s.t]
    for queries in lengths if s.t <= TOKENS else []:
        for lanes in (n for n in range(s.k, 0, -1) if s.k % n == 0 and n % group == 0):
            if lanes > group and lanes // s.h * s.t * queries > UNROLLED:
                continue
            images = divisor(s.b, 128 // round_up(s.t, 2 * SUBLANES)) if lanes == s.k else 1
            found = RelativeTiles(images=images, lanes=lanes, queries=queries)
            while (needs := _needs(s, found, backward=backward)) > budget and found.images > 1:
                found = replace(found, images=divisor(s.b, found.images - 1))
            if needs <= budget:
                return replace(found, needs=needs)
    raise NotImplementedError(
        f"relative positions: rows of {s.t} keys of heads of width {s.h} do not fit the {device.vmem_bytes >> 20} MiB of VMEM of "
        f"a {device.name}"
    )


@cache
def plan(s: Shape, device: Device) -> Plan | Refused:
    """The plan of the half, or why XLA does it: both passes are kernels or neither is."""
    if s.t < SHORT:
        return Refused(reason=f"relative positions: images of {s.t} tokens are shorter than the {SHORT} from which kernels gain")
    try:
        forward = general_forward(s, device, core=partial(core_tiles, device=device, backward=False), product=_product)
        backward = general_backward(s, device, core=partial(core_tiles, device=device, backward=True), product=_product)
        return Plan(head_lanes=s.h, forward=forward, backward=backward)
    except NotImplementedError as error:
        return Refused(reason=str(error))


def _product(step: str, s: Shape, device: Device) -> ProductTiles:
    """`product_tiles` of as many images as a grid step may take, each padded to whole registers: 64 of five tokens spill on v3."""
    return product_tiles(step, s._replace(b=divisor(s.b, ROWS // round_up(s.t, 2 * SUBLANES))), device)
