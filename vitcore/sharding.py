"""Where each parameter lives on a mesh ("data", "model"), and the two collectives that follow from it.

The columns of q, k, v (whole heads) and the hidden columns of the MLP are split over "model", so a half block needs one sum
at its end. Every matrix is split over "data" besides, along an axis of rows where it has one, and brought together layer by
layer when it is used; vectors are too small to be worth a collective each and stay whole. Optimizer state follows the
parameters. Batches are split over "data" and replicated over "model".

Everything here is Manual mode under `jax.shard_map(..., check_vma=True)`: JAX then knows which values differ between
devices, and differentiation puts every sum where it belongs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vitcore.config import ViTConfig

AXES = ("data", "model")


class MeshShape(NamedTuple):
    """Devices along the two axes: what the model must know of a mesh. Static."""

    data: int
    model: int

    @classmethod
    def of(cls, mesh: Mesh) -> "MeshShape":
        """The shape of a `jax.sharding.Mesh`; ValueError where its axes are not named data and model."""
        if tuple(mesh.axis_names) != AXES:
            raise ValueError(
                f"mesh axes are {mesh.axis_names}: ('data', 'model') is required, e.g. jax.make_mesh((8, 4), ('data', 'model'))"
            )
        return cls(mesh.shape["data"], mesh.shape["model"])


def check_mesh(config: ViTConfig, mesh: MeshShape) -> None:
    """Raise ValueError where heads or hidden columns do not divide over the model axis."""
    for what, n in (("num_heads", config.num_heads), ("mlp_dim", config.mlp_dim)):
        if n % mesh.model:
            raise ValueError(
                f"{what}={n} is not divisible by the model axis of the {mesh.data}x{mesh.model} mesh: "
                f"use a model axis that divides {n}, e.g. --mesh {mesh.data * mesh.model}x1"
            )


def partition_specs(config: ViTConfig, mesh: Mesh | MeshShape | None):
    """The PartitionSpec of every parameter: a tree like that of `init`. With mesh None: nothing is split.

    An axis that the data axis does not divide stays whole. Raises ValueError where the model axis does not divide.
    """
    shape = MeshShape.of(mesh) if isinstance(mesh, Mesh) else mesh or MeshShape(1, 1)
    check_mesh(config, shape)
    c, data = config, shape.data

    def rows(n):
        return "data" if n % data == 0 else None

    def both(n):
        return ("model", "data") if n % (shape.model * data) == 0 else "model"

    norm = {"scale": P(), "bias": P()}
    specs = {
        "patch_embed": {"kernel": P(None, None, None, rows(c.width)), "bias": P(), "position": P(None, rows(c.width))},
        "blocks": {
            "norm1": norm,
            "qkv": {"kernel": P(None, None, rows(c.width), "model"), "bias": P(None, None, "model")},
            "out": {"kernel": P(None, both(c.width), None), "bias": P()},
            "norm2": norm,
            "mlp_in": {"kernel": P(None, rows(c.width), "model"), "bias": P(None, "model")},
            "mlp_out": {"kernel": P(None, both(c.mlp_dim), None), "bias": P()},
        },
        "norm": norm,
        "head": {"kernel": P(rows(c.feature_size), None), "bias": P()},
    }
    if c.pool == "token":
        specs["patch_embed"]["cls"] = P()
    if c.representation_size is not None:
        specs["pre_logits"] = {"kernel": P(rows(c.width), None), "bias": P()}
    return specs


def block_specs(specs):
    """The specs of one layer inside the scan: the leading L axis taken off."""
    return jax.tree.map(lambda spec: P(*spec[1:]), specs["blocks"])


def _axes(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def gather(params, specs, mesh: MeshShape | None, dtype):
    """Parameters ready for use: matrices whole over "data" and in `dtype`, vectors float32 and varying over "data".

    With nothing to gather, matrices stay float32: the ops round what they need, and no layer's copy is kept for the backward pass.
    """
    if mesh is None:
        return params

    def one(w, spec):
        dims = [i for i, entry in enumerate(spec) if "data" in _axes(entry)] if mesh.data > 1 else []
        return _gather(w, dims[0], dtype) if dims else _vary_axes(w, ("data",))

    return jax.tree.map(one, params, specs)


# Gathered in the compute dtype, half the bytes in bfloat16; the gradients are summed in float32.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w, dim, dtype):
    return lax.all_gather(w.astype(dtype), "data", axis=dim, tiled=True)


def _gather_forward(w, dim, dtype):
    # the all_gather itself, not `_gather`: `recompute_gathers` must see the primitive in the forward pass of the derivative
    return lax.all_gather(w.astype(dtype), "data", axis=dim, tiled=True), None


def _gather_backward(dim, dtype, _, g):
    return (lax.psum_scatter(g.astype(jnp.float32), "data", scatter_dimension=dim, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


MIDDLE = "tokens between the halves of a block"


def recompute_gathers(keeps):
    """Checkpoint policy of a block: keep what its ops keep (`Ops.keeps`) but no gathered weights, which would be L whole layers."""

    def policy(prim, *avals, **params):
        if prim is lax.all_gather_p:
            return False
        return keeps is None or (prim.name == "name" and params["name"] == MIDDLE) or keeps(prim, *avals, **params)

    return policy


def _vary_axes(x, axes):
    new = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, new, to="varying") if new else x


def vary(tree, mesh: MeshShape | None, specs=None):
    """Mark values as differing between the devices of both axes, so that a sum over them appears in the backward pass.

    With `specs`, parameters split over "data" are left as they are: `gather` sees to them.
    """
    if mesh is None:
        return tree
    if specs is None:
        return jax.tree.map(lambda x: _vary_axes(x, AXES), tree)
    split = jax.tree.map(lambda spec: any("data" in _axes(entry) for entry in spec), specs)
    return jax.tree.map(lambda x, s: x if s else _vary_axes(x, AXES), tree, split)


def apply_on(mesh: Mesh, config: ViTConfig, *, ops=None, dtype=jnp.float32, remat=0):
    """`apply` on a user's own mesh: a function (params, images, dropout_key=None) -> logits [B, V], to be called under jit.

    The mesh has the axes ("data", "model"), of any sizes; images are split over "data" (B divisible by it), parameters as
    `partition_specs(config, mesh)` says, logits come back split over "data". Differentiable.

        mesh = jax.make_mesh((8, 4), ("data", "model"))
        specs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), vitcore.partition_specs(config, mesh))
        params = jax.jit(partial(vitcore.init, config=config), out_shardings=specs)(key)
        logits = jax.jit(vitcore.apply_on(mesh, config))(params, images)
    """
    from vitcore.model import check, forward  # model imports this module

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
            return forward(
                params,
                images,
                config,
                ops=ops,
                dtype=dtype,
                dropout_key=key[0] if key else None,
                remat=remat,
                mesh=shape,
                first_example=first,
            )

        keys = () if dropout_key is None else (dropout_key,)
        return jax.shard_map(local, mesh=mesh, in_specs=(specs, P("data"), *(P() for _ in keys)), out_specs=P("data"))(
            params, images, *keys
        )

    return run
