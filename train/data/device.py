"""Batches from the host straight onto a mesh, some ahead of the one in use; pixels travel as bytes and become floats there.

    with OnMesh(train_batches(source, ..., pixels="uint8"), mesh) as batches:
        batch = next(batches)     # {"image": float32 [B, Y, X, C] in [-1, 1], "label": ...} as global arrays, split over "data"
        saved = batches.get_state()

Normalising on the device costs it nothing that shows (one elementwise pass) and the host a quarter of the memory and of the way.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.data.pipeline import EvalBatches, TrainBatches


def to_unit(images: jax.Array) -> jax.Array:
    """uint8 0..255 to float32 in [-1, 1]: what the host would have made of them, to 1.2e-7 (a device may fuse the two roundings).

    float32 images are what they should be already, and pass.
    """
    if images.dtype != jnp.uint8:
        return images
    return jnp.clip(images.astype(jnp.float32) * jnp.float32(2 / 255) - 1, -1, 1)


_normalise = jax.jit(to_unit)


class OnMesh(Iterator[dict[str, Any]]):
    """`batches` on the devices of `mesh`, `ahead` of them before they are asked for, on top of what waits on the host.

    Yields "image": float32 [B, Y, X, C] in [-1, 1]; "label": int32 [B], or with MixUp what `StepOptions.losses` takes, (label int32
    [B], other label int32 [B], share float32 [B]); "weight": float32 [B] in evaluation. B is the global batch. The state is that
    of the last batch handed out, whatever is ahead of it. Device memory: ahead + 1 batches as they travel, and one of floats.
    """

    def __init__(self, batches: TrainBatches | EvalBatches, mesh: Mesh, *, ahead: int = 1):
        if ahead < 0:
            raise ValueError(f"{ahead} batches ahead were asked for; the number must be >= 0")
        self.batches, self._ahead = batches, ahead
        self._place = NamedSharding(mesh, P("data"))
        self._waiting: deque[tuple[dict[str, Any], Any]] = deque()
        self._state: Any = None  # of the last batch handed out; None before the first

    def _fetch(self) -> None:
        while len(self._waiting) <= self._ahead:
            batch = next(self.batches, None)
            if batch is None:
                return
            placed = {key: jax.make_array_from_process_local_data(self._place, rows) for key, rows in batch.items()}
            state = self.batches.get_state() if isinstance(self.batches, TrainBatches) else None
            self._waiting.append((placed, state))

    def __next__(self) -> dict[str, Any]:
        self._fetch()
        if not self._waiting:
            raise StopIteration
        batch, self._state = self._waiting.popleft()
        batch["image"] = _normalise(batch["image"])
        if "share" in batch:
            batch["label"] = (batch["label"], batch.pop("other_label"), batch.pop("share"))
        return batch

    def get_state(self) -> dict[str, int]:
        """As `TrainBatches.get_state`, of what was handed out."""
        assert isinstance(self.batches, TrainBatches), "an evaluation has no state to go on from"
        return self._state or self.batches.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """As `TrainBatches.set_state`."""
        assert isinstance(self.batches, TrainBatches), "an evaluation has no state to go on from"
        self._waiting.clear()
        self._state = None
        self.batches.set_state(state)

    def close(self) -> None:
        self._waiting.clear()
        self.batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
