"""Batches from the host straight onto a mesh; pixels travel as they are there, mostly bytes, and become floats on the device.

    with Feed(train_batches(source, ..., pixels="uint8"), on_mesh(mesh)) as feed:   # the next one travels while this one is used
        batch = feed.next()                   # global arrays, split over "data"
        images = to_unit(batch["image"])      # float32 [B, Y, X, C] in [-1, 1], or as `pixels` says

Normalising on the device costs it nothing that shows (one elementwise pass) and the host a quarter of the memory and of the way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train import mesh as meshes
from train.data.rows import Batch
from vitcore.normalisation import HALF, Pixels, normalise


@partial(jax.jit, static_argnums=1)
def to_unit(images: jax.Array, pixels: Pixels = HALF) -> jax.Array:
    """uint8 0..255 to float32 in [-1, 1]: what the host would have made of them, to 1.2e-7 (a device may fuse the two roundings).

    float32 images are in [-1, 1] already. pixels: what a model wants of either, where it is not that.
    """
    if images.dtype == jnp.uint8:
        images = jnp.clip(images.astype(jnp.float32) * jnp.float32(2 / 255) - 1, -1, 1)
    return normalise(images, pixels)


def on_mesh(mesh: Mesh) -> Callable[[Batch], dict[str, Any]]:
    """A function from this process's rows, as `train_batches` and `eval_batches` yield them, to the global batch on `mesh`.

    The arrays keep their names and dtypes and are split over "data"; with MixUp "label" is what `StepOptions.losses` takes, (label,
    other label, share). Transfers are begun, not waited for, and no program is launched (several processes must launch theirs in
    one order): any thread may call it.
    """
    where = NamedSharding(mesh, P("data"))
    _, blocks = meshes.data_shard(mesh)

    def place(batch: Batch) -> dict[str, Any]:
        placed: dict[str, Any] = {
            key: jax.make_array_from_process_local_data(where, rows, (rows.shape[0] * blocks, *rows.shape[1:]))
            for key, rows in batch.items()
        }
        if "share" in placed:
            placed["label"] = (placed["label"], placed.pop("other_label"), placed.pop("share"))
        return placed

    return place
