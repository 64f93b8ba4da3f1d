"""The leaves of a ResNet (`vitcore/resnet.py`): shapes, initial values, places on a mesh, multiply-adds, names in published
files."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vitcore.parameters import ROWS, Leaf, Name, Path, Split, constant, lecun, normal
from vitcore.resnet import AXIAL_HEADS, FORMS, GROUPS, ResNetStem, Unit, units


def leaves(c: ResNetStem, image_shape: tuple[int, int], channels: int, *, under: Path = ("stem",), timm="") -> tuple[Leaf, ...]:
    """Every leaf of a ResNet without its head, below the path `under`, in order.

    image_shape: (Y, X), for the multiply-adds, of which only those count whose tap falls on the image and not on padding.
    timm: what stands before the names of timm's layout.
    """
    side = _Sides(*image_shape, FORMS[c.form].same)
    named = (timm, timm if timm and not c.depths else f"{timm}stem.")  # a root alone is all of timm's backbone
    root = _Array(("conv_root", "kernel"), (7, 7, channels, c.root_channels), adds=side.convolve(7, 2) * channels * c.root_channels)
    out = [_leaf(("root", "conv", "kernel"), [root], None, c.form, named)]
    if c.form != "pre":
        out += [_leaf(("root", "norm", a.name[-1]), [a], None, c.form, named) for a in _norm_arrays("gn_root", c.root_channels)]
    side.convolve(3, 2)  # the pool
    stages: dict[int, list[list[_Array]]] = {}
    for unit in units(c):
        stages.setdefault(unit.stage, []).append(list(_unit_arrays(unit, c.form, side)))
    for stage, (first, *rest) in stages.items():
        out += [_leaf((f"stage{stage}", "first", *a.name), [a], (stage, 1), c.form, named) for a in first]
        for same in zip(*rest, strict=True):  # one array of every unit
            out.append(_leaf((f"stage{stage}", "rest", *same[0].name), same, (stage, 2), c.form, named, stack=True))
    if c.form == "pre":
        out += [_leaf(("norm", a.name[-1]), [a], None, c.form, named) for a in _norm_arrays("norm", c.channels)]
    return tuple(dataclasses.replace(leaf, path=(*under, *leaf.path)) for leaf in out)


_GROUPS = ("the groups of GroupNorm", GROUPS)
_HEADS = ("the heads of axial attention", AXIAL_HEADS)


class _Array(NamedTuple):
    """One array of one unit. name: (layer, kernel or scale or bias), as the hybrids' files call it. model: its axis that is split
    over the model axis, None for none. adds: multiply-adds. start: of a scale, its first value. deviation: of a normal draw.
    unit: what the model axis must divide."""

    name: tuple[str, ...]
    shape: tuple[int, ...]
    model: int | None = None
    adds: int = 0
    start: float = 1.0
    deviation: float = 0.0
    unit: tuple[str, int] = _GROUPS


def _leaf(path, same: Sequence[_Array], where, form: str, timm: tuple[str, str], *, stack=False) -> Leaf:
    """The leaf of one array, or with `stack` of the same array of several units. where: (stage, number of the first unit) or
    None. timm: what stands before timm's names, and before those of the root."""
    a = same[0]
    split: list[Split | None] = [None] * len(a.shape)
    if a.name[-1] == "kernel":
        split[-1] = ROWS  # its statistics are those of an output channel
    if a.model is not None:
        split[a.model] = Split(data=split[a.model] is ROWS, model=a.unit)
    names: dict[str, list[Name]] = {}
    for i in range(len(same)):
        unit = where and (where[0], where[1] + i)
        for naming, name in _names(form, a.name, unit, timm):
            names.setdefault(naming, []).append(name._replace(part=(i,) if stack else ()))
    initial = _lecun if a.name[-1] == "kernel" else constant(a.start if a.name[-1] == "scale" else 0.0)
    if a.deviation:
        initial = normal(a.deviation)
    return Leaf(
        path=path,
        shape=((len(same),) if stack else ()) + a.shape,
        initial=initial,
        split=((None,) if stack else ()) + tuple(split) if any(split) else (),
        names={naming: tuple(listed) for naming, listed in names.items()},
        multiply_adds={"stem": sum(b.adds for b in same)} if a.adds else {},
    )


def _lecun(key, shape):
    """`parameters.lecun` of kernels [..., y, x, in, out]: an axis in front is no fan in."""
    return lecun(key, shape[-4:]) if len(shape) == 4 else jnp.stack([lecun(k, shape[1:]) for k in jax.random.split(key, shape[0])])


class _Sides:
    """The (rows, columns) of the feature map on its way through the network; counts the taps of a convolution that fall on it."""

    def __init__(self, rows: int, columns: int, same: bool):
        self.sides, self.same = (rows, columns), same

    def convolve(self, side: int, stride: int) -> int:
        taps = math.prod(taps_on_image(n, side, stride, self.same) for n in self.sides)
        self.sides = tuple(-(-n // stride) for n in self.sides)
        return taps


def taps_on_image(n: int, side: int, stride: int, same: bool) -> int:
    """Over all positions of a kernel of `side` taps on a line of n values, how many taps meet a value and not the padding."""
    before = side // 2 if not same else max((-(-n // stride) - 1) * stride + side - n, 0) // 2
    starts = range(-before, -before + stride * -(-n // stride), stride)
    return sum(min(start + side, n) - max(start, 0) for start in starts)


def _unit_arrays(u: Unit, form: str, side: _Sides) -> Iterator[_Array]:
    """The arrays of one unit, whose image `side` is at and leaves behind."""
    grid = side.sides
    pixels = [side.convolve(1, 1), side.convolve(3, u.stride), side.convolve(1, 1)]
    # the axis split over "model": of conv1 the outputs, of conv2 and conv3 the inputs; conv1 before axial attention is whole
    split = (3, 2, 2) if form != "axial" else (None, None, 2)
    kernels = [("conv1", 1, u.into, u.middle), ("conv2", 3, u.middle, u.middle), ("conv3", 1, u.middle, u.out)]
    for (layer, width, into, out), model, taps in zip(kernels, split, pixels, strict=True):
        if form == "axial" and layer == "conv2":
            yield from _axial_arrays("height", u.middle, grid[0], grid[1])
            yield from _axial_arrays("width", u.middle, grid[1], grid[0])
        else:
            unit = _HEADS if form == "axial" else _GROUPS
            yield _Array((layer, "kernel"), (width, width, into, out), model, taps * into * out, unit=unit)
    if u.project:
        yield _Array(("conv_proj", "kernel"), (1, 1, u.into, u.out), None, pixels[2] * u.into * u.out)
    inside = partial(_norm_arrays, channels=u.middle, model=0)
    if form == "pre":
        yield from (*_norm_arrays("gn1", u.into), *inside("gn2"), *inside("gn3"))
        return
    yield from (*inside("gn1"), *inside("gn2")) if form == "post" else _norm_arrays("gn1", u.middle)
    yield from _norm_arrays("gn3", u.out, start=0.0)
    yield from _norm_arrays("gn_proj", u.out) if u.project else ()


def _axial_arrays(axis: str, c: int, length: int, lines: int) -> Iterator[_Array]:
    """The arrays of attention along lines of a grid, so many of this length, of c channels."""
    d = c // AXIAL_HEADS
    # logits: q with k, q and k each with a table, half of c wide; values and their table: c
    adds = lines * (length * c * 2 * c + length * length * 7 * c // 2)
    yield _Array((axis, "qkv"), (c, 2 * c), 1, adds, deviation=1 / c, unit=_HEADS)
    yield _Array((axis, "relative"), (2 * d, 2 * length - 1), deviation=1 / d)
    for layer, channels in (("gn_qkv", 2 * c), ("gn_out", c)):
        yield from (a._replace(name=(axis, *a.name), unit=_HEADS) for a in _norm_arrays(layer, channels, model=0))


def _norm_arrays(layer: str, channels: int, model: int | None = None, start: float = 1.0) -> tuple[_Array, _Array]:
    return _Array((layer, "scale"), (channels,), model, start=start), _Array((layer, "bias"), (channels,), model)


# --- names in published files -------------------------------------------------------------------------------------------------

_TIMM = {"conv_root": "conv", "gn_root": "norm", "conv_proj": "downsample.conv", "gn_proj": "downsample.norm"}
_LETTERS = {"conv1": "a", "conv2": "b", "conv3": "c", "gn1": "a", "gn2": "b", "gn3": "c", "conv_proj": "a/proj"}
_GREEK = {"scale": "gamma", "bias": "beta"}


def _names(form: str, name: tuple[str, ...], unit: tuple[int, int] | None, timm: tuple[str, str]) -> Iterator[tuple[str, Name]]:
    """(naming, Name) of one array in every layout. name: (layer, leaf). unit: (stage, number), None outside of the stages.

    The release has three layouts: that of the hybrids and of BiT's post-activation form; for the pre-activation form that of the
    first release (resnet/block1/unit01/a/standardized_conv2d/kernel) and that of the later code (block1/unit01/conv1/kernel).
    """
    if form == "axial":  # nobody has published weights
        return
    layer, leaf = name
    if form == "post":
        yield "release", Name(f"block{unit[0]}/unit{unit[1]}/{layer}/{leaf}" if unit else f"{layer}/{leaf}")
    else:
        block = f"block{unit[0]}/unit{unit[1]:02d}/" if unit else "root_block/" if layer == "conv_root" else ""
        first = f"{_LETTERS[layer]}/" if unit else ""
        kind = "standardized_conv2d/kernel" if leaf == "kernel" else f"group_norm/{_GREEK[leaf]}"
        yield "release", Name(f"{block}{first}{kind}", when={"bit": "first"})
        yield "release", Name(f"{block}{'norm-pre-head' if layer == 'norm' else layer}/{leaf}", when={"bit": "later"})
    place = f"{timm[0]}stages.{unit[0] - 1}.blocks.{unit[1] - 1}." if unit else timm["root" in layer]
    theirs = f"{place}{_TIMM.get(layer, layer.replace('gn', 'norm'))}"
    axes = (3, 2, 0, 1) if leaf == "kernel" else None
    yield "timm", Name(f"{theirs}.{'bias' if leaf == 'bias' else 'weight'}", axes=axes)
