"""Batches from the host straight onto a mesh; pixels travel as they are there, mostly bytes, and become floats on the device.

    with Feed(train_batches(source, ..., pixels="uint8"), on_mesh(mesh)) as feed:   # the next one travels while this one is used
        batch = feed.next()                   # global arrays, split over "data"
        state, metrics = step(state, batch["image"], batch["label"])   # bytes: `vitcore.pixels.to_unit` stands in the step

Normalising on the device costs it nothing that shows (one elementwise pass) and the host a quarter of the memory and of the way.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from train import mesh as meshes
from train.data.rows import Batch


def on_mesh(mesh: Mesh) -> Callable[[Batch], dict[str, Any]]:
    """A function from this process's rows, as `train_batches` and `eval_batches` yield them, to the global batch on `mesh`.

    The arrays keep their names and dtypes and are split over "data"; with MixUp "label" is what `StepOptions.losses` takes, (label,
    other label, share). Transfers are begun, not waited for, and no program is launched (several processes must launch theirs in
    one order): any thread may call it.
    """
    where = NamedSharding(mesh, meshes.rows(mesh))
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
