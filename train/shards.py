"""How the data axis splits a model's parameters and its optimizer: --shard, and what `auto` makes of it.

A step on a data axis of several devices sends about the same bytes whether it sums gradients whole (none) or scatters them and
brings parameters together again (optimizer); splitting the parameters too (parameters) brings them together once more, for the
backward pass. So the less is split, the faster a step is, and the more memory it takes. The choice goes by the model alone: every
process of a job, and its continuation on other devices, comes to the same one. `vitcore.collectives.Shard` says what each does.
"""

import jax.numpy as jnp
from jax.sharding import Mesh

from vitcore import families, parameters
from vitcore.collectives import MeshShape, Shard

WHOLE = 2**24  # parameters up to which all is whole: 16 bytes each, with Adam's moments and the gradient, a quarter GiB
COPY = 2**30  # bytes up to which a device holds a copy of the parameters during a step: a sixteenth of a TPU core's memory

_WORDS = {
    "parameters": "parameters and optimizer split over the data axis",
    "optimizer": "the optimizer split over the data axis",
    "none": "parameters and optimizer whole on each of the data axis",
}


def choose(asked: str, config, mesh: Mesh | MeshShape, dtype) -> Shard:
    """What --shard means for a model on a mesh. dtype: of the products, in which parameters are brought together."""
    if asked != "auto":
        return asked  # pyright: ignore[reportReturnType]
    here = parameters.count(families.leaves(config)) / (mesh if isinstance(mesh, MeshShape) else MeshShape.of(mesh)).model
    if here <= WHOLE:
        return "none"
    return "optimizer" if here * jnp.dtype(dtype).itemsize <= COPY else "parameters"


def said(shard: Shard, mesh: Mesh) -> str:
    """For the line that says what a mesh lies on; "" where there is nothing to split over."""
    return f"; {_WORDS[shard]} (--shard {shard})" if mesh.shape["data"] > 1 else ""
