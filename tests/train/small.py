"""What tests of a training step share: a mesh of simulated devices, a small batch on it, a head that passes a gradient on."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def mesh_of(data, model):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: data * model])


def batch(mesh, n=16, seed=0):
    """(images [n, 8, 8, 1] in [-1, 1], labels of ten classes), split over the data axis."""
    rng = np.random.default_rng(seed)
    place = NamedSharding(mesh, P("data"))
    return jax.device_put(rng.uniform(-1, 1, (n, 8, 8, 1)).astype(np.float32), place), jax.device_put(rng.integers(0, 10, n), place)


def with_a_head(params) -> Any:
    """The head's kernel is of zeros at first, and the blocks would have no gradient."""
    kernel = params["head"]["kernel"]
    new = jax.device_put(0.3 * jax.random.normal(jax.random.key(1), kernel.shape), kernel.sharding)
    return params | {"head": params["head"] | {"kernel": new}}
