"""What a parameter is: one record, a `Leaf`, holds everything that anybody asks about it, and lists of leaves describe models.

A model's family (`vitcore/families.py`) lists its leaves; each stem, position embedding, block, pool and head lists those that it
adds. All else reads the list: `init` its shapes and initial values, `specs` its places on a mesh, `weight_names` its names in
published files, `flops` its multiply-adds. Nothing else knows the shape of a leaf, so one more leaf is one more record:

    Leaf(path=("stem", "gamma"), shape=(config.width,), initial=ones, names={"timm": (Name("patch_embed.gamma"),)})

A block lists the leaves of one layer, with neither the layer axis nor "blocks" in front; `stacked` adds both.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vitcore.collectives import MeshShape

Path = tuple[str, ...]
NUMBERED_KEYS = 9  # of the leaves that draw from a numbered key; more would change none of them, but nobody needs more


# --- initial values: functions (key, shape) -> float32 array -----------------------------------------------------------------


def zeros(key, shape):
    return jnp.zeros(shape, jnp.float32)


def ones(key, shape):
    return jnp.ones(shape, jnp.float32)


def constant(value: float):
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def normal(deviation: float):
    return lambda key, shape: deviation * jax.random.normal(key, shape, jnp.float32)


def xavier(key, shape):
    """Uniform with variance 2 / (fan_in + fan_out); the last two axes are (in, out), those in front are drawn apart."""
    limit = (6 / (shape[-2] + shape[-1])) ** 0.5
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit)


def lecun(key, shape):
    """Normal with variance 1 / fan_in, cut at two deviations; all axes but the last are the fan in."""
    # a normal cut at two deviations has a deviation of 0.8796: divided out, so that the variance is 1 / fan_in
    scale = math.prod(shape[:-1]) ** -0.5 / 0.87962566103423978
    return jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) * scale


# --- the record --------------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """How one axis of a leaf is split over a mesh.

    model: over the model axis, in units of which there are so many: ("num_heads", 12) splits whole heads, and a model axis that
    does not divide 12 is refused by that name; None: not. data: over the data axis too, where that divides what is left of the
    axis; of a data axis of several names over those that do, and where none does the axis stays whole over "data". rest: over the
    names that are left then.
    """

    data: bool = False
    model: tuple[str, int] | None = None
    rest: bool = False


ROWS = Split(data=True)
COLUMNS = Split(rest=True)


class Name(NamedTuple):
    """The name of a leaf, or of a part of it, in one published layout.

    text: the name. Of a leaf with a layer axis it holds {block}, which each layer's name replaces; other words in braces are those
    of `weight_names.words`, which differ between two styles of one layout. part: index of the part, behind the layer's. axes: the
    transposition from our part to the file's, None for none. shape: in the file, None for that of the transposed part. outside: the
    file's common prefix does not stand before it. when: the fields of `weight_names.Style` that say whether a file has this name.
    """

    text: str
    part: tuple[int | slice, ...] = ()
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    outside: bool = False
    when: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of the parameters, float32.

    path: its keys in the tree. shape: the whole array's. initial: (key, shape) -> its initial value. split: one `Split` or None an
    axis, or () for a leaf that is whole everywhere. names: in published files, by `weight_names.Naming`; the layouts without it
    are left out. multiply_adds: of what it is used in, an image, by the part of the model that they are counted for in `flops`.
    key: the number of its key among NUMBERED_KEYS, None for a key made from its path, which no other leaf's coming or going can
    change. layers: the length of the leading layer axis, 0 for none.
    """

    path: Path
    shape: tuple[int, ...]
    initial: Callable[[Any, tuple[int, ...]], Any]
    split: tuple[Split | None, ...] = ()
    names: Mapping[str, Sequence[Name]] = dataclasses.field(default_factory=dict)
    multiply_adds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    key: int | None = None
    layers: int = 0

    def __post_init__(self):
        assert not self.split or len(self.split) == len(self.shape), f"{self.path}: {self.split} for the axes of {self.shape}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def stacked(leaves: Iterable[Leaf], layers: int, under: Path = ("blocks",)) -> tuple[Leaf, ...]:
    """The leaves of one layer as those of `layers` layers, along a leading axis, below the path `under`."""
    return tuple(
        dataclasses.replace(
            leaf,
            path=(*under, *leaf.path),
            shape=(layers, *leaf.shape),
            split=(None, *leaf.split) if leaf.split else (),
            multiply_adds={part: layers * n for part, n in leaf.multiply_adds.items()},
            layers=layers,
        )
        for leaf in leaves
    )


# --- the leaves that most layers are made of ---------------------------------------------------------------------------------


def dense(path: Path, kernel: tuple[int, ...], initial, *, names: Mapping[str, str], bias=zeros, **own) -> tuple[Leaf, Leaf]:
    """A dense layer's kernel [..., in, out] and bias [..., out] below `path`.

    names: of the layer in each layout, e.g. {"release": "head", "timm": "head"}: "head/kernel" is as ours, "head.weight"
    transposed. bias: its initial value. own: fields of the kernel's Leaf; bias_split and bias_key are the bias's.
    """
    bias_own = {field: own.pop(f"bias_{field}") for field in ("split", "key") if f"bias_{field}" in own}
    return (
        Leaf(path=(*path, "kernel"), shape=kernel, initial=initial, names=named(names, "kernel", (1, 0)), **own),
        Leaf(path=(*path, "bias"), shape=(*kernel[:-2], kernel[-1]), initial=bias, names=named(names, "bias"), **bias_own),
    )


def norm(path: Path, width: int, *, names: Mapping[str, str]) -> tuple[Leaf, Leaf]:
    """A norm's scale (one) and bias (zero), [width] each, below `path`. names: of the norm in each layout, as in `dense`."""
    return (
        Leaf(path=(*path, "scale"), shape=(width,), initial=ones, names=named(names, "scale")),
        Leaf(path=(*path, "bias"), shape=(width,), initial=zeros, names=named(names, "bias")),
    )


def named(layers: Mapping[str, str], leaf: str, axes: tuple[int, ...] | None = None) -> dict[str, tuple[Name, ...]]:
    """The names of a layer's `leaf` (kernel, scale or bias) in each layout. axes: a kernel's transposition in torch's layouts."""
    torch = "bias" if leaf == "bias" else "weight"
    return {
        layout: (Name(f"{layer}/{leaf}") if layout == "release" else Name(f"{layer}.{torch}", axes=axes),)
        for layout, layer in layers.items()
    }


# --- what is read off a list -------------------------------------------------------------------------------------------------


def init(key, leaves: Iterable[Leaf]):
    """The tree of initial values: a nested dict of float32 arrays."""
    numbered = jax.random.split(key, NUMBERED_KEYS)

    def own(leaf):
        return jax.random.fold_in(key, zlib.crc32("/".join(leaf.path).encode())) if leaf.key is None else numbered[leaf.key]

    return nested({leaf.path: leaf.initial(own(leaf), leaf.shape) for leaf in leaves})


def shapes(leaves: Iterable[Leaf]) -> dict[Path, tuple[int, ...]]:
    """{path: shape}."""
    return {leaf.path: leaf.shape for leaf in leaves}


def count(leaves: Iterable[Leaf]) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in leaves)


def multiply_adds(leaves: Iterable[Leaf]) -> dict[str, int]:
    """Multiply-adds of a forward pass for one image, by part of the model."""
    out: dict[str, int] = {}
    for leaf in leaves:
        for part, n in leaf.multiply_adds.items():
            out[part] = out.get(part, 0) + n
    return out


def specs(leaves: Iterable[Leaf], mesh: MeshShape):
    """The tree of PartitionSpecs on a mesh. ValueError, as from `check_mesh`, where the model axis does not divide."""
    leaves = tuple(leaves)
    check_mesh(leaves, mesh)
    return nested({leaf.path: _spec(leaf, mesh) for leaf in leaves})


def check_mesh(leaves: Iterable[Leaf], mesh: MeshShape) -> None:
    """Raise ValueError where the model axis does not divide what is split over it."""
    units = dict.fromkeys(split.model for leaf in leaves for split in leaf.split if split and split.model)
    for what, n in units:
        if n % mesh.model:
            raise ValueError(
                f"{what}={n} is not divisible by the model axis of the {mesh.data}x{mesh.model} mesh: "
                f"use a model axis that divides {n}, e.g. --mesh {mesh.data * mesh.model}x1"
            )


def whole_over_data(leaves: Iterable[Leaf], mesh: MeshShape) -> tuple[int, tuple[int, ...]]:
    """(how many parameters of matrices that a data axis is to split a device holds beyond its share, the lengths that the axis does
    not divide). Raises ValueError as `check_mesh`."""
    leaves = tuple(leaves)
    check_mesh(leaves, mesh)
    extra, lengths = 0, set()
    for leaf in leaves:
        if any(s and s.data for s in leaf.split) and (over := mesh.data // mesh.length(_data_of(spec := _spec(leaf, mesh)))) > 1:
            extra += leaf.size // mesh.shards(spec) * (over - 1) // over
            lengths |= {n for n, split in zip(leaf.shape, leaf.split, strict=True) if split and split.data}
    return extra, tuple(sorted(lengths))


def _data_of(spec: P) -> tuple[str, ...]:
    """The names of the axes that a spec splits over."""
    return tuple(name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry))


def _spec(leaf: Leaf, mesh: MeshShape) -> P:
    if not any(leaf.split):
        return P()
    data: dict[int, tuple[str, ...]] = {}
    left = mesh.over_data
    for first in (True, False):
        for dim, (n, split) in enumerate(zip(leaf.shape, leaf.split, strict=True)):
            if split and (split.data if first else split.rest and not split.data):
                data[dim] = _dividing(left, n // (mesh.model if split.model else 1), mesh)
                left = tuple(name for name in left if name not in data[dim])

    def entry(dim: int, split: Split | None):
        # the name that is gathered first lies innermost, so that what it brings together is one block
        names = (mesh.over_model if split and split.model else ()) + data.get(dim, ())[::-1]
        return names[0] if len(names) == 1 else names or None

    return P(*(entry(dim, split) for dim, split in enumerate(leaf.split)))


def _dividing(names: tuple[str, ...], n: int, mesh: MeshShape) -> tuple[str, ...]:
    """Those of the names along which most devices split n evenly; of equals the first."""
    if n % mesh.length(names) == 0:
        return names
    names = tuple(name for name in names if mesh.length((name,)) > 1)
    some = (tuple(c) for k in range(len(names), -1, -1) for c in itertools.combinations(names, k))
    return max((c for c in some if n % mesh.length(c) == 0), key=mesh.length)


def check(params, leaves: Iterable[Leaf]) -> None:
    """Raise ValueError, naming one leaf, where the tree has other leaves or shapes than the list."""
    have = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    need = {"".join(f"[{key!r}]" for key in path): shape for path, shape in shapes(leaves).items()}
    if have != need:
        name = min(name for name in have.keys() | need.keys() if have.get(name) != need.get(name))
        raise ValueError(
            f"params{name} is {have.get(name, 'missing')}, the config requires {need.get(name, 'no such entry')}: "
            "use the config the parameters were made with"
        )


def nested(flat: Mapping[Path, Any]) -> dict:
    """{path: value} as a nested dict."""
    tree: dict = {}
    for path, value in flat.items():
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return tree


def flat(tree, path: Path = ()) -> dict[Path, Any]:
    """A nested dict as {path: value}: the inverse of `nested`."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {leaf: value for key, inner in tree.items() for leaf, value in flat(inner, (*path, key)).items()}
