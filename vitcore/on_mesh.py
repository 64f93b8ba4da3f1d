"""The model on a user's own mesh: `apply`, `features` and `attention_maps` as functions to be called under jit.

The mesh has the axes ("data", "model"), of any sizes, Auto or Explicit. Images are split over "data" (B divisible by it),
parameters as `partition_specs(config, mesh)` says, and what comes back is split over "data". What lies elsewhere is brought there.

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
from vitcore.collectives import MeshShape
from vitcore.context import Capture, Context
from vitcore.model import asked_for, blocks_of, check, forward, representation
from vitcore.sharding import partition_specs


def apply_on(mesh: Mesh, config, *, ops=None, dtype=jnp.float32, remat=0, edit=None):
    """`apply` on a mesh: a function (params, images, dropout_key=None) -> logits [B, V].

    edit: as in `apply`, called for the images of a device with the global index of the first of them. Differentiable. Raises
    ValueError for a mesh of other axes or one that the model does not divide over, and when called as `apply`.
    """
    context = Context(ops=ops, dtype=dtype, remat=remat, edit=edit)
    return _mapped(mesh, config, context, lambda *given: forward(*given), P("data"))


def features_on(mesh: Mesh, config, *, ops=None, dtype=jnp.float32, remat=0, blocks: tuple[int, ...] | None = None):
    """`features` on a mesh: a function (params, images) -> [B, D] float32, or with `blocks` a tuple of [B, T, D]."""
    if blocks is None:
        context = Context(ops=ops, dtype=dtype, remat=remat)
        return _mapped(mesh, config, context, lambda *given: representation(*given)[0].astype(jnp.float32), P("data"))
    context = Context(ops=ops, dtype=dtype, remat=remat, capture=Capture(features=tuple(blocks)))

    def local(*given):
        return tuple(representation(*given)[1]["features"].astype(jnp.float32))

    return _mapped(mesh, config, context, local, tuple(P("data") for _ in blocks))


def attention_maps_on(
    mesh: Mesh, config, *, blocks: tuple[int, ...] | None = None, mean: bool = False, ops=None, dtype=jnp.float32
):
    """`attention_maps` on a mesh: a function (params, images) -> [K, B, N, T, T] with N split over "model", or, with `mean`,
    [K, B, T, T]."""
    if mean:
        run = attention_statistics_on(mesh, config, blocks=blocks, mean=True, ops=ops, dtype=dtype)
        return lambda *given: run(*given).mean
    context = Context(ops=ops, dtype=dtype, capture=Capture(maps=blocks_of(config, blocks)))
    return _mapped(mesh, config, context, lambda *given: representation(*given)[1]["maps"], P(None, "data", "model"))


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
):
    """`attention_statistics` on a mesh: a function (params, images) -> `Statistics`, whose N is split over "model"."""
    capture = asked_for(config, blocks, mean=mean, row=row, distance=distance)
    heads = P(None, "data", "model")
    where = Statistics(P(None, "data") if mean else None, heads if row else None, heads if distance else None)
    context = Context(ops=ops, dtype=dtype, capture=capture)
    return _mapped(mesh, config, context, lambda *given: representation(*given)[1]["statistics"], where)


def _mapped(mesh: Mesh, config, context: Context, local: Callable, out_specs):
    """A function (params, images, dropout_key=None) -> local(params, images, config, context) of each device's shards."""
    shape = MeshShape.of(mesh)
    specs = partition_specs(config, shape)

    def run(params, images, dropout_key=None):
        check(params, images, config)
        if images.shape[0] % shape.data:
            raise ValueError(
                f"images are {list(images.shape)}: [B, Y, X, C] with B divisible by the data axis, {shape.data}, is required"
            )

        def here(params, images, *key):
            first = lax.axis_index("data") * images.shape[0]
            own = context._replace(mesh=shape, dropout_key=key[0] if key else None, first_example=first)
            return local(params, images, config, own)

        if AxisType.Explicit in mesh.axis_types:  # such axes are part of an array's type, which must be right beforehand
            params = jax.tree.map(lambda a, spec: jax.reshard(a, NamedSharding(mesh, spec)), params, specs)
            images = jax.reshard(images, NamedSharding(mesh, P("data")))
        keys = () if dropout_key is None else (dropout_key,)
        in_specs = (specs, P("data"), *(P() for _ in keys))
        return jax.shard_map(here, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(params, images, *keys)

    return run
