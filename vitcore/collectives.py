"""The mesh as the model sees it, and every collective that a model does.

Everything here is Manual mode under `jax.shard_map(..., check_vma=True)`: JAX then knows which values differ between
devices, and differentiation puts every sum where it belongs. Two kinds of collective stand here, and no others: `gather` brings
matrices together over "data" just before they are used (its transpose, a reduce-scatter, takes their gradients apart again), and
`sum_over_model` ends a half block.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from kernels.settings import own

Axes = tuple[str | tuple[str, ...] | None, str | tuple[str, ...] | None]  # what a mesh calls the data and the model axis
AXES = ("data", "model")

# How the data axis splits parameters, and with them what an optimizer keeps of each. parameters: split, and brought together layer
# by layer, again for the backward pass. optimizer: split between two steps, and brought together once a step, a whole copy in the
# dtype of the products until the backward pass is done. none: whole on every device, gradients summed.
Shard = Literal["parameters", "optimizer", "none"]


def _axes(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


class MeshShape(NamedTuple):
    """What the model must know of a mesh. Static. data, model: devices along the two axes. over_data, over_model: their names on
    the mesh, none for an axis that there is not. parts: devices along each name of the data axis where it has several."""

    data: int
    model: int
    over_data: tuple[str, ...] = ("data",)
    over_model: tuple[str, ...] = ("model",)
    parts: tuple[int, ...] = ()

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh, axes: Axes = AXES) -> "MeshShape":
        """The shape of a `jax.sharding.Mesh`. axes: what it calls the data and the model axis: a name, several, or None for none.

        Over what other axes there are, everything is replicated. ValueError for a name that the mesh has not, or twice.
        """
        over = tuple(_axes(names) for names in axes)
        both = [name for names in over for name in names]
        if len(over) != 2 or len(set(both)) < len(both) or not set(both) <= set(mesh.axis_names):
            raise ValueError(
                f"axes={axes} of a mesh with the axes {tuple(mesh.axis_names)}: (data axis, model axis) of its names are required, "
                "each a name, several or None, e.g. jax.make_mesh((8, 4), ('fsdp', 'tp')) with axes=('fsdp', 'tp')"
            )
        data, model = (math.prod(mesh.shape[name] for name in names) for names in over)
        parts = tuple(mesh.shape[name] for name in over[0]) if len(over[0]) > 1 else ()
        return cls(data, model, *over, parts)

    @property
    def over(self) -> tuple[str, ...]:
        """The names of both."""
        return self.over_data + self.over_model

    def length(self, names: tuple[str, ...]) -> int:
        """Devices along these of the data axis's names."""
        sizes = self.parts or (self.data,)
        return math.prod(size for name, size in zip(self.over_data, sizes, strict=False) if name in names)

    def shards(self, spec: P) -> int:
        """In how many parts a spec splits an array."""
        names = [name for entry in spec for name in _axes(entry)]
        return self.length(tuple(names)) * (self.model if any(name in self.over_model for name in names) else 1)


def layer_specs(specs):
    """The specs of one layer inside the scan: the leading L axis taken off those of the blocks."""
    return jax.tree.map(lambda spec: P(*spec[1:]), specs)


def lies_on(entry, names: tuple[str, ...]) -> bool:
    """Whether an entry of a PartitionSpec splits over any of these axes of a mesh."""
    return any(axis in names for axis in _axes(entry))


def without_data(spec: P, mesh: MeshShape) -> P:
    """A spec of what is whole over the data axis."""
    kept = [tuple(axis for axis in _axes(entry) if axis not in mesh.over_data) for entry in spec]
    return P(*(axes[0] if len(axes) == 1 else axes or None for axes in kept)) if any(kept) else P()


Places = tuple[tuple[int, tuple[str, ...]], ...]  # where the data axis splits an array: a dimension, and the mesh's axes along it


def places(spec: P, mesh: MeshShape) -> Places:
    """Where a data axis splits an array, in the order in which it is brought together: along the name that stands first in the
    axis, then along the second what that brought, and gradients are summed the other way round. So what the first name joins, say
    the chips of a slice or its hosts, sees a part of the bytes alone. () for an array that is whole, or of one device."""
    found = [(dim, name) for name in mesh.over_data for dim, entry in enumerate(spec) if name in _axes(entry)]
    return tuple((dim, (name,)) for dim, name in found if mesh.length((name,)) > 1)


def gather(params, specs, mesh: MeshShape | None, dtype):
    """Parameters ready for use: matrices whole over "data" and in `dtype`, vectors float32 and varying over "data".

    Where there is nothing to gather, matrices stay float32: the ops round them, and no rounded copy of a layer is saved for the
    backward pass.
    """
    if mesh is None:
        return params

    def one(w, spec):
        w = _vary_axes(w, mesh.over_data)
        return _gather(w, dtype, where) if (where := places(spec, mesh)) else w

    return jax.tree.map(one, params, specs)


# Gathered in the compute dtype, half the bytes in bfloat16; the gradients are summed in float32.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w, dtype, where: Places):
    return _together(w, dtype, where)


def _together(w, dtype, where: Places):
    w = w.astype(dtype)
    for dim, axes in where:
        w = lax.all_gather(w, axes, axis=dim, tiled=True)
    return w


def _gather_forward(w, dtype, where):
    # the all_gathers themselves, not `_gather`: `recompute_gathers` must see the primitive in the forward pass of the derivative
    return _together(w, dtype, where), None


def _gather_backward(dtype, where, _, g):
    g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    for dim, axes in reversed(where):
        g = lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)
    return (g,)


_gather.defvjp(own(_gather_forward), own(_gather_backward))


# --- gradients summed in turn (`Ops.paced`) -----------------------------------------------------------------------------------


def gather_in_turn(params, specs, mesh: MeshShape, dtype, turn, summed: bool = True):
    """(`gather` of a layer's parameters, turn). Backward, the turn handed on stands for the sums of its gradients, which begin when
    those that `turn` stands for are done. Without `summed` it stands for the gradients alone, and their sums for nothing."""
    leaves, tree = jax.tree.flatten(params)
    all_places = tuple(places(spec, mesh) for spec in tree.flatten_up_to(specs))
    leaves = [_vary_axes(w, mesh.over_data) for w in leaves]
    split = [w for w, where in zip(leaves, all_places, strict=True) if where]
    if not split:
        return gather(params, specs, mesh, dtype), turn
    both: Any = _gather_in_turn(split, turn, tuple(filter(None, all_places)), dtype, mesh, summed)
    whole, turn = both
    rest = iter(whole)
    leaves = [next(rest) if where else w for w, where in zip(leaves, all_places, strict=True)]
    return jax.tree.unflatten(tree, leaves), turn


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _gather_in_turn(split, turn, of_each: tuple[Places, ...], dtype, mesh, summed: bool):
    return [_gather(w, dtype, where) for w, where in zip(split, of_each, strict=True)], turn


def _gather_in_turn_forward(split, turn, of_each, dtype, mesh, summed):
    return ([_gather_forward(w, dtype, where)[0] for w, where in zip(split, of_each, strict=True)], turn), None


def _gather_in_turn_backward(of_each, dtype, mesh, summed, _, gradients):
    whole, turn = lax.optimization_barrier(gradients)
    sums = [_gather_backward(dtype, where, None, g)[0] for g, where in zip(whole, of_each, strict=True)]
    return sums, turn + sum(_vary_axes(g.reshape(-1)[0], mesh.over) for g in (sums if summed else whole))


_gather_in_turn.defvjp(own(_gather_in_turn_forward), own(_gather_in_turn_backward))


@jax.custom_vjp
def in_turn(x, turn):
    """(x, turn). Backward, x's gradient goes on when what `turn` stands for is done."""
    return x, turn


in_turn.defvjp(own(lambda x, turn: ((x, turn), None)), own(lambda _, gradients: lax.optimization_barrier(gradients)))


MIDDLE = "tokens between the halves of a block"


def recompute_gathers(keeps):
    """Checkpoint policy of a block: save what its ops save (`Ops.keeps`), but not the gathered weights, which would be L layers of
    weights on every device."""

    def policy(prim, *avals, **params):
        if prim is lax.all_gather_p:
            return False
        return keeps is None or (prim.name == "name" and params["name"] == MIDDLE) or keeps(prim, *avals, **params)

    return policy


def _vary_axes(x, axes):
    new = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, new, to="varying") if new else x


def vary(tree, mesh: MeshShape | None, specs=None, outside: tuple[tuple[str, ...], ...] = ()):
    """Mark values as differing between the devices of both axes, so that a sum over them appears in the backward pass.

    With `specs`, parameters split over "data" are left as they are: `gather` sees to them. outside: paths of parameters that are
    used outside the sums over the model axis: they are marked along the data axis alone.
    """
    if mesh is None:
        return tree
    if specs is None:
        return jax.tree.map(lambda x: _vary_axes(x, mesh.over), tree)
    split = jax.tree.map(lambda spec: any(lies_on(entry, mesh.over_data) for entry in spec), specs)

    def one(path, x, split):
        axes = mesh.over_data if tuple(key.key for key in path) in outside else mesh.over
        return x if split else _vary_axes(x, axes)

    return jax.tree.map_with_path(one, tree, split)


def varies_over_model(x, mesh: MeshShape) -> bool:
    """Whether x differs, or may, between the devices of a model axis."""
    return not jax.typeof(x).manual_axis_type.varying.isdisjoint(mesh.over_model)


def vary_like(x, like):
    """x, marked as differing between the devices of the axes over which `like` does."""
    return _vary_axes(x, tuple(jax.typeof(like).manual_axis_type.varying))


def sum_over_model(x, mesh: MeshShape | None):
    """The sum of what the devices of a model axis have of x; x itself on one device."""
    return lax.psum(x, mesh.over_model) if mesh and mesh.over_model else x


def first_column(columns: int, mesh: MeshShape | None):
    """The global index of the first of a device's columns, of an axis of so many that is split over the model axis."""
    return lax.axis_index(mesh.over_model) * (columns // mesh.model) if mesh and mesh.over_model else 0
