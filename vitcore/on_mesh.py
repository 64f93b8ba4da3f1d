"""The model on a user's own mesh."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vitcore.collectives import MeshShape
from vitcore.context import Context
from vitcore.model import check, forward
from vitcore.sharding import partition_specs


def apply_on(mesh: Mesh, config, *, ops=None, dtype=jnp.float32, remat=0, edit=None):
    """`apply` on a user's own mesh: a function (params, images, dropout_key=None) -> logits [B, V], to be called under jit.

    The mesh has the axes ("data", "model"), of any sizes; images are split over "data" (B divisible by it), parameters as
    `partition_specs(config, mesh)` says, logits come back split over "data". edit: as in `apply`, of this device's images, with the
    global index of the first of them. Differentiable.

        mesh = jax.make_mesh((8, 4), ("data", "model"))
        specs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), vitcore.partition_specs(config, mesh))
        params = jax.jit(partial(vitcore.init, config=config), out_shardings=specs)(key)
        logits = jax.jit(vitcore.apply_on(mesh, config))(params, images)
    """
    shape = MeshShape.of(mesh)
    specs = partition_specs(config, shape)

    def run(params, images, dropout_key=None):
        check(params, images, config)
        if images.shape[0] % shape.data:
            raise ValueError(
                f"images are {list(images.shape)}: [B, Y, X, C] with B divisible by the data axis, {shape.data}, is required"
            )

        def local(params, images, *key):
            first = lax.axis_index("data") * images.shape[0]
            context = Context(
                ops=ops, dtype=dtype, mesh=shape, remat=remat, dropout_key=key[0] if key else None, first_example=first, edit=edit
            )  # fmt: skip
            return forward(params, images, config, context)

        keys = () if dropout_key is None else (dropout_key,)
        return jax.shard_map(local, mesh=mesh, in_specs=(specs, P("data"), *(P() for _ in keys)), out_specs=P("data"))(
            params, images, *keys
        )

    return run
