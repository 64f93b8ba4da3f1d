"""The model on a user's own mesh: `apply`, `features` and `attention_maps` as functions to be called under jit.

The mesh has a data and a model axis, of any sizes, Auto or Explicit. Images are split over "data" (B divisible by it), parameters
as `partition_specs(config, mesh)` says, and what comes back is split over "data". What lies elsewhere is brought there. Other names
are said by axes=("fsdp", "tp"), here and in `partition_specs`: each a name of the mesh's, several, as in axes=(("dcn", "fsdp"),
"tp"), or None for an axis that there is not. Over what other axes the mesh has, everything is replicated.

    mesh = jax.make_mesh((8, 4), ("data", "model"))
    specs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), vitcore.partition_specs(config, mesh))
    params = jax.jit(partial(vitcore.init, config=config), out_shardings=specs)(key)
    logits = jax.jit(vitcore.apply_on(mesh, config))(params, images)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.attention.statistics.reference import Statistics
from kernels.settings import own
from vitcore.collectives import AXES, Axes, MeshShape
from vitcore.context import Capture, Context
from vitcore.model import asked_for, blocks_of, check, forward, representation
from vitcore.sharding import partition_specs


def apply_on(mesh: Mesh, config, *, ops=None, dtype=jnp.float32, remat=0, edit=None, axes: Axes = AXES):
    """`apply` on a mesh: a function (params, images, dropout_key=None) -> logits [B, V].

    edit: as in `apply`, called for the images of a device with the global index of the first of them. Differentiable. Raises
    ValueError for a mesh of other axes or one that the model does not divide over, and when called as `apply`.
    """
    context = Context(ops=ops, dtype=dtype, remat=remat, edit=edit)
    return _mapped(mesh, axes, config, context, lambda *given: forward(*given), P("data"))


def features_on(
    mesh: Mesh, config, *, ops=None, dtype=jnp.float32, remat=0, blocks: tuple[int, ...] | None = None, axes: Axes = AXES
):
    """`features` on a mesh: a function (params, images) -> [B, D] float32, or with `blocks` a tuple of [B, T, D]."""
    if blocks is None:
        context = Context(ops=ops, dtype=dtype, remat=remat)
        return _mapped(mesh, axes, config, context, lambda *given: representation(*given)[0].astype(jnp.float32), P("data"))
    context = Context(ops=ops, dtype=dtype, remat=remat, capture=Capture(features=tuple(blocks)))

    def local(*given):
        return tuple(representation(*given)[1]["features"].astype(jnp.float32))

    return _mapped(mesh, axes, config, context, local, tuple(P("data") for _ in blocks))


def attention_maps_on(
    mesh: Mesh,
    config,
    *,
    blocks: tuple[int, ...] | None = None,
    mean: bool = False,
    ops=None,
    dtype=jnp.float32,
    axes: Axes = AXES,
):
    """`attention_maps` on a mesh: a function (params, images) -> [K, B, N, T, T] with N split over "model", or, with `mean`,
    [K, B, T, T]."""
    if mean:
        run = attention_statistics_on(mesh, config, blocks=blocks, mean=True, ops=ops, dtype=dtype, axes=axes)
        return lambda *given: run(*given).mean
    context = Context(ops=ops, dtype=dtype, capture=Capture(maps=blocks_of(config, blocks)))
    return _mapped(mesh, axes, config, context, lambda *given: representation(*given)[1]["maps"], P(None, "data", "model"))


def attention_statistics_on(
    mesh: Mesh,
    config,
    *,
    blocks: tuple[int, ...] | None = None,
    mean: bool = False,
    row: bool = False,
    distance: bool = False,
    ops=None,
    dtype=jnp.float32,
    axes: Axes = AXES,
):
    """`attention_statistics` on a mesh: a function (params, images) -> `Statistics`, whose N is split over "model"."""
    capture = asked_for(config, blocks, mean=mean, row=row, distance=distance)
    heads = P(None, "data", "model")
    where = Statistics(P(None, "data") if mean else None, heads if row else None, heads if distance else None)
    context = Context(ops=ops, dtype=dtype, capture=capture)
    return _mapped(mesh, axes, config, context, lambda *given: representation(*given)[1]["statistics"], where)


def _mapped(mesh: Mesh, axes: Axes, config, context: Context, local: Callable, out_specs):
    """A function (params, images, dropout_key=None) -> local(params, images, config, context) of each device's shards. out_specs:
    in "data" and "model", whatever the mesh calls them."""
    shape = MeshShape.of(mesh, axes)
    names = {"data": shape.over_data or None, "model": shape.over_model or None}
    out_specs = jax.tree.map(lambda spec: P(*(names.get(part) for part in spec)), out_specs, is_leaf=lambda x: isinstance(x, P))
    rows = P(names["data"])
    specs = partition_specs(config, shape)

    @own
    def run(params, images, dropout_key=None):
        check(params, images, config)
        if images.shape[0] % shape.data or images.shape[0] == 0:
            raise ValueError(
                f"images are {list(images.shape)}: [B, Y, X, C] with B above 0 and divisible by the data axis, {shape.data}, is "
                "required"
            )

        def here(params, images, *key):
            first = lax.axis_index(shape.over_data) * images.shape[0] if shape.over_data else 0
            own = context._replace(mesh=shape, dropout_key=key[0] if key else None, first_example=first)
            return local(params, images, config, own)

        if AxisType.Explicit in mesh.axis_types:  # such axes are part of an array's type, which must be right beforehand
            params = jax.tree.map(lambda a, spec: jax.reshard(a, NamedSharding(mesh, spec)), params, specs)
            images = jax.reshard(images, NamedSharding(mesh, rows))
        keys = () if dropout_key is None else (dropout_key,)
        in_specs = (specs, rows, *(P() for _ in keys))
        return jax.shard_map(here, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(params, images, *keys)

    return run
