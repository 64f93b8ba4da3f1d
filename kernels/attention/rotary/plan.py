"""Which kernels run the attention half with rotary positions: those of the half without (`general/`), with `turning.py` in them."""

from dataclasses import replace
from functools import cache

from kernels import by_xla
from kernels.attention.plan import Plan, Refused, general_backward, general_forward
from kernels.attention.rotary import turning
from kernels.attention.tiling import LONG, ProductTiles, Shape, product_tiles
from kernels.device import LANES, Device
from kernels.vmem import padded_bytes


@cache
def plan(s: Shape, device: Device) -> Plan | Refused:
    """The plan of the half by kernels, or why there is none."""
    if why := turning.refuses(s.h, s.k):
        return Refused(reason=f"rotary positions: {why}")
    try:
        forward = general_forward(s, device, product=_product)
        return Plan(head_lanes=s.h, forward=forward, backward=general_backward(s, device, product=_product))
    except NotImplementedError as error:
        return Refused(reason=str(error))


@cache
def choose(s: Shape, device: Device) -> Plan | Refused:
    """`plan`, but for what is left to XLA because that takes fewer cycles by the one count (LOG.md, 2026-11-27)."""
    if by_xla.few_tokens(s.t)[0]:
        return Refused(reason=f"rotary positions: images of {s.t} tokens are XLA's")
    return plan(s, device)


def _product(step: str, s: Shape, device: Device) -> ProductTiles:
    """`product_tiles`; of the projection with room for the tables of angles, float32 and twice each."""
    if step != "project":
        return product_tiles(step, s, device)
    tables = 2 * 2 * padded_bytes(min(s.t, max(LONG, 512)), LANES, 4)
    tiles = product_tiles(step, s, replace(device, vmem_bytes=device.vmem_bytes - tables))
    return replace(tiles, needs=tiles.needs + tables)
