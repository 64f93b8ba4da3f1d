"""What collectives take on the links between the chips of a slice: one table of published rates, and how they are used.

A collective is bound by what a chip must receive over the links that lead to others of its group: N (n - 1) / n of N bytes on n
chips for an all-gather (N: its result) or a reduce-scatter (N: its operand); an all-reduce is both. Along an axis of the torus that
is closed two links bring them, along an open one the chip at the end has one; a group of several axes has those of all. Groups
whose members stand apart share the links between them.

These are lower bounds: the time of a first byte, of barriers and of a worse algorithm come on top (XLA's gathers of one axis
after the other use one axis's links at a time). What the two cores of a chip exchange goes over no link; nothing is published
about it, and it is counted at the HBM's rate.
"""

import re
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from bench import slices
from kernels.device import DEVICES


class Fabric(NamedTuple):
    """The links of a chip. rate: bytes a second of one link, in one direction."""

    ports: int
    rate: float
    source: str


_DOCS = "Cloud TPU documentation, page of the generation"
# The documentation's all-reduce bandwidth of a pod, over its chips and ports, is the rate of a link in one direction, the same that
# "bidirectional bandwidth of a chip" gives over ports and two directions.
LINKS = {
    "v2": Fabric(4, 62.0e9, "496 Gbit/s a link: Jouppi et al., CACM 63(7), 2020"),
    "v3": Fabric(
        4,
        82.0e9,
        f"656 Gbit/s a link: Jouppi et al., CACM 63(7), 2020; {_DOCS}: all-reduce 340 TB/s, 1,024 chips, 4 ports: 83 GB/s",
    ),
    "v4": Fabric(6, 50.0e9, "50 GB/s a link, 6 links: Jouppi et al., TPU v4, ISCA 2023"),
    "v5e": Fabric(4, 50.0e9, f"{_DOCS}: 400 GB/s bidirectional, 4 ports; all-reduce 51.2 TB/s, 256 chips"),
    "v5p": Fabric(6, 100.0e9, f"{_DOCS}: 1,200 GB/s bidirectional, 6 ports"),
    "v6e": Fabric(4, 100.0e9, f"{_DOCS}: 800 GB/s bidirectional, 4 ports; all-reduce 102.4 TB/s, 256 chips"),
    "7x": Fabric(6, 100.0e9, f"{_DOCS}: 1,200 GB/s bidirectional, 6 ports"),
}


class Reach(NamedTuple):
    """Where the members of a collective's groups stand. cores: of a chip, in one group. axes: (number of a torus axis, chips
    of a group along it) where more than one. stride: of how many groups the members alternate along a link."""

    cores: int = 1
    axes: tuple[tuple[int, int], ...] = ()
    stride: int = 1

    @property
    def chips(self) -> int:
        return prod(n for _, n in self.axes)


class Event(NamedTuple):
    """A piece of a program as a core runs it: `what` is "compute" (cycles), "send" (a collective, at once waited for), "start" or
    "done" (of the collective of that name). bytes: of one run, as `bench.hlo.Operation` has them; trips: runs."""

    what: str
    cycles: int = 0
    kind: str = ""
    bytes: int = 0
    trips: int = 1
    name: str = ""
    reach: Reach = Reach()


class Played(NamedTuple):
    """Seconds of a program on one core: its own work, all its collectives, and of those what runs beside nothing."""

    compute: float
    communication: float
    exposed: float


def groups_of(text: str) -> list[list[int]]:
    """The groups that `replica_groups` or `source_target_pairs` write: lists of devices; none for all of them."""
    if text.startswith("{"):
        return [[int(n) for n in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", text)]
    found = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not found:
        return []
    import numpy as np

    shape, sides, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
    assert shape is not None
    assert sides is not None
    numbers = np.arange(prod(sides)).reshape(sides)
    return (numbers if order is None else numbers.transpose(order)).reshape(shape).tolist()


def reach_of(text: str, places: Sequence[tuple[tuple[int, ...], int]]) -> Reach:
    """How far a collective's groups reach. text: as `bench.hlo.Operation.groups`. places: (coordinates, core of the chip) of each
    device of the program, in their order."""
    groups = groups_of(text) or [list(range(len(places)))]
    widest = Reach()
    for group in groups:
        where = [places[device] for device in group]
        chips = {chip for chip, _ in where}
        seen = [sorted({chip[axis] for chip in chips}) for axis in range(len(where[0][0]))]
        axes = tuple((axis, len(at)) for axis, at in enumerate(seen) if len(at) > 1)
        if prod(n for _, n in axes) != len(chips):  # no rectangle: as a line of them
            axes = ((axes[0][0], len(chips)),)
        strides = [(at[-1] - at[0]) // (len(at) - 1) for at in seen if len(at) > 1]
        reach = Reach(len(where) // len(chips), axes, max(strides, default=1))
        widest = max(widest, reach, key=lambda r: (r.chips, r.stride, r.cores))
    return widest


def seconds(event: Event, target: str, chips: tuple[int, ...]) -> float:
    """Seconds that the runs of a collective take at least on a slice of so many chips along each axis."""
    reach, size, rate = event.reach, event.bytes, LINKS[target].rate
    kind = event.kind.removesuffix("-start")
    here = slices.devices_per_chip(target)
    inside = size / 2 / DEVICES[target].hbm_bytes_per_second if reach.cores > 1 else 0.0
    closed = slices.closed(target, chips)
    ways = sum(2 if closed[axis] else 1 for axis, _ in reach.axes)
    shared = reach.stride * here // reach.cores  # groups whose parts go over the same links
    between = 0.0
    if reach.axes and kind in ("all-to-all", "ragged-all-to-all"):
        axis, length = max(reach.axes, key=lambda a: a[1] / (2 if closed[a[0]] else 1))
        between = size * reach.cores * shared * length / 4 / ((2 if closed[axis] else 1) * rate)
    elif reach.axes and kind == "collective-permute":
        between = size * shared / rate
    elif reach.axes:
        between = size * (reach.chips - 1) / reach.chips * shared / (ways * rate)
    both = 2 if kind == "all-reduce" else 1
    return both * (between + inside) * event.trips


def played(events: Sequence[Event], target: str, chips: tuple[int, ...]) -> Played:
    """The program on one core: collectives take the links one after the other, and a core waits where the program does."""
    clock, links, compute, communication = 0.0, 0.0, 0.0, 0.0
    ends: dict[str, float] = {}
    for event in events:
        if event.what == "compute":
            clock += (work := event.cycles / DEVICES[target].clock_hz)
            compute += work
        elif event.what == "done":
            clock = max(clock, ends.pop(event.name, 0.0))
        else:
            taken = seconds(event, target, chips)
            communication += taken
            ends[event.name] = links = max(clock, links) + taken
            if event.what == "send":
                clock = ends.pop(event.name)
    return Played(compute, communication, clock - compute)


def from_json(records: Sequence[Any]) -> tuple[Event, ...]:
    """Events as JSON keeps them."""

    def one(record) -> Event:
        what, cycles, kind, size, trips, name, (cores, axes, stride) = record
        return Event(what, cycles, kind, size, trips, name, Reach(cores, tuple((axis, n) for axis, n in axes), stride))

    return tuple(map(one, records))
