"""Which kernels run the attention half with rotary positions: those of the half without (`general/`), with `turning.py` in them."""

from dataclasses import replace
from functools import cache

from kernels import by_xla, parts
from kernels.attention.plan import BACKWARD_ROWS, FORWARD_ROWS, GeneralBackward, GeneralForward, Plan, Refused
from kernels.attention.rotary import turning
from kernels.attention.tiling import LONG, STEPS, ProductTiles, Shape, core_tiles, product_tiles
from kernels.device import LANES, Device
from kernels.vmem import padded_bytes


@cache
def plan(s: Shape, device: Device) -> Plan | Refused:
    """The plan of the half by kernels, or why there is none."""
    if why := turning.refuses(s.h, s.k):
        return Refused(reason=f"rotary positions: {why}")
    try:
        return Plan(head_lanes=s.h, forward=_forward(s, device), backward=_backward(s, device))
    except NotImplementedError as error:
        return Refused(reason=str(error))


@cache
def choose(s: Shape, device: Device) -> Plan | Refused:
    """`plan`, but for what is left to XLA because that takes fewer cycles by the one count (LOG.md, 2026-11-27)."""
    if by_xla.few_tokens(s.t)[0]:
        return Refused(reason=f"rotary positions: images of {s.t} tokens are XLA's")
    return plan(s, device)


def _forward(s: Shape, device: Device) -> GeneralForward:
    part = s._replace(b=s.b // parts.count(s.b, s.t, FORWARD_ROWS))
    return GeneralForward(
        images=part.b,
        project=_project(part, device),
        core=core_tiles(part, device, backward=False),
        output=product_tiles("output", part, device),
    )


def _backward(s: Shape, device: Device) -> GeneralBackward:
    part = s._replace(b=s.b // parts.count(s.b, s.t, BACKWARD_ROWS))
    tiles = {step: product_tiles(step, part, device) for step in STEPS if step not in ("project", "output")}
    return GeneralBackward(
        images=part.b, project=_project(part, device), core=core_tiles(part, device, backward=True), **tiles
    )  # fmt: skip


def _project(s: Shape, device: Device) -> ProductTiles:
    """Of the projection, with room for the tables of angles, float32 and twice each."""
    tables = 2 * 2 * padded_bytes(min(s.t, max(LONG, 512)), LANES, 4)
    tiles = product_tiles("project", s, replace(device, vmem_bytes=device.vmem_bytes - tables))
    return replace(tiles, needs=tiles.needs + tables)
