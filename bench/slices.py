"""TPU slices: which ones a generation comes in, as libtpu names them, and the smallest that holds a mesh."""

import re
from math import prod
from typing import NamedTuple

_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
# generation -> (prefix of libtpu's topology names, chips of the slices, devices on a chip)
_SLICES = {
    "v2": ("v2", ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16"), 2),
    "v3": ("v3", ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "32x32"), 2),
    "v4": ("v4", _3D, 2),
    "v5e": ("v5e", _2D, 1),
    "v5p": ("v5p", _3D, 1),
    "v6e": ("v6e", _2D, 1),
    "7x": ("tpu7x", _3D, 2),
}


def cores(target: str, chips: str) -> int:
    """Devices, as jax counts them, of a slice of so many chips."""
    return prod(map(int, chips.split("x"))) * _SLICES[target][2]


def devices_per_chip(target: str) -> int:
    """Devices, as jax counts them, of one chip."""
    return _SLICES[target][2]


def along(chips: str) -> tuple[int, ...]:
    """Chips along each axis of a slice, or of libtpu's name of it: "v3:4x8" -> (4, 8)."""
    return tuple(map(int, chips.rpartition(":")[2].split("x")))


# What closes an axis of a slice to a ring: on v2 and v3 the pod's whole side, on v5e and v6e 16 chips, on three axes cubes of 4.
_RINGS = {"v2": 16, "v3": 32, "v5e": 16, "v6e": 16}


def closed(target: str, chips: tuple[int, ...]) -> tuple[bool, ...]:
    """Of each axis of a slice, whether its ends are linked. Three numbers, as devices have coordinates."""
    if side := _RINGS.get(target):
        return (*(n >= side for n in chips), *(False,) * (3 - len(chips)))
    return (all(n % 4 == 0 for n in chips),) * 3


class Host(NamedTuple):
    """A machine of a slice. chips: that it holds. threads: hardware threads (vCPUs) of it, two of a core."""

    chips: int
    threads: int
    source: str


_VM = "Cloud TPU documentation, VM types"
HOSTS = {
    "v2": Host(4, 96, f"{_VM}: 96 vCPUs with 8 cores"),
    "v3": Host(4, 96, f"{_VM}: 96 vCPUs with 8 cores"),
    "v4": Host(4, 240, f"{_VM}: 240 vCPUs with 4 chips"),
    "v5e": Host(4, 112, f"{_VM}: ct5lp-hightpu-4t, 112 vCPUs with 4 chips"),
    "v5p": Host(4, 208, f"{_VM}: ct5p-hightpu-4t, 208 vCPUs with 4 chips"),
    "v6e": Host(4, 180, f"{_VM}: ct6e-standard-4t, 180 vCPUs with 4 chips"),
    "7x": Host(4, 224, f"{_VM}: tpu7x-standard-4t, 224 vCPUs with 4 chips"),
}


def known(target: str, chips: str | None) -> str:
    """The chips of a slice that there is. ValueError for another."""
    if chips is None or chips not in _SLICES[target][1]:
        raise ValueError(f"--slice {chips}: {target} comes in slices of {', '.join(_SLICES[target][1])} chips")
    return chips


def topology(target: str, need: int, chips: str | None = None) -> tuple[str, int]:
    """libtpu's name of a slice and its devices: the one asked for, or the smallest that has `need` of them.

    ValueError where no slice, or not the one asked for, has so many.
    """
    prefix, known, per_chip = _SLICES[target]
    if chips is None:
        chosen = next((c for c in known if cores(target, c) >= need), None)
        if chosen is None:
            most = cores(target, known[-1])
            raise ValueError(
                f"a mesh of {need} devices is larger than the largest {target} slice, {known[-1]} chips with {most} devices"
            )
        return f"{prefix}:{chosen}", cores(target, chosen)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", chips) or chips not in known:
        raise ValueError(f"--slice {chips}: {target} comes in slices of {', '.join(known)} chips ({per_chip} devices a chip)")
    if cores(target, chips) < need:
        fits = next((c for c in known if cores(target, c) >= need), None)
        more = f"use a mesh of at most {cores(target, chips)}" + (f", or --slice {fits}" if fits else "")
        raise ValueError(
            f"a mesh of {need} devices is larger than the {target} slice {chips}, which has {cores(target, chips)}: {more}"
        )
    return f"{prefix}:{chips}", cores(target, chips)
