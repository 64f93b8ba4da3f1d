"""A model that is only asked: what it computes for every image of a source, each once, on any mesh.

The images go through the mesh in batches; what comes back is whole on every process, in the order of the source, without the
rows that fill up the last batch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train import distributed
from train import mesh as meshes
from train.data import Source, eval_batches
from train.data.device import on_mesh, to_unit
from train.feed import Feed
from train.meeting import Told
from train.signals import asked, beat
from train.step import shardings
from vitcore.config import ViTConfig
from vitcore.model import encode, forward, represent
from vitcore.ops import Ops, resolve
from vitcore.sharding import MeshShape, gather, partition_specs


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How images are brought to a model. batch_size: rounded up to what divides over the mesh. preprocess: a key of PREPROCESSES.
    threads: that decode; None chooses. decoder: a key of DECODERS."""

    batch_size: int
    preprocess: str = "resize"
    threads: int | None = None
    decoder: str = "pillow"

    def rows(self, fn: Callable, source: Source, config: ViTConfig, mesh: Mesh) -> Iterator[tuple[Any, np.ndarray]]:
        """Yields (fn(images) without padding, labels), batch after batch; fn returns a tree of arrays [B, ...]."""
        size = meshes.whole_rows(min(self.batch_size, len(source)), mesh)
        stopping = distributed.AnyProcess(mesh)
        whole = jax.jit(lambda *arrays: arrays, out_shardings=NamedSharding(mesh, P()))
        batches = eval_batches(
            source, image_size=config.image_shape[0], channels=config.channels, batch_size=size,
            preprocess=self.preprocess, shard=meshes.data_shard(mesh), threads=self.threads, decoder=self.decoder, pixels="uint8",
        )  # fmt: skip
        with Feed(batches, on_mesh(mesh)) as feed:
            while True:
                batch = feed.next(asked)
                if stopping(asked()):
                    raise Told("asked to stop in a measurement")
                if batch is None:
                    return
                beat(f"measuring on {source.name}")
                found, labels, weights = whole(fn(to_unit(batch["image"])), batch["label"], batch["weight"])
                real = np.asarray(weights) > 0
                yield jax.tree.map(lambda a, real=real: np.asarray(a)[real], found), np.asarray(labels)[real]

    def all(self, fn: Callable, source: Source, config: ViTConfig, mesh: Mesh) -> tuple[Any, np.ndarray]:
        """`rows` in one: the tree of arrays [len(source), ...], labels [len(source)]."""
        found, labels = zip(*self.rows(fn, source, config, mesh), strict=True)
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found), np.concatenate(labels)


def put_params(params, config: ViTConfig, mesh: Mesh):
    """A host tree laid out on the mesh as `partition_specs` says. Every process holds the same tree."""
    where = shardings(mesh, partition_specs(config, mesh))

    def put(leaf, sharding):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, params, where)


def make_features(
    config: ViTConfig, mesh: Mesh, *, ops: Ops | None = None, dtype=jnp.float32,
    read: Literal["pre-logits", "representation", "tokens"] = "pre-logits", block: int = 0,
):  # fmt: skip
    """A compiled function (params, images [B, Y, X, C]) -> float32 [B, F], split over "data".

    read: what the head reads, behind the hidden layer where there is one; the representation y of Eq. 4; or all the tokens behind a
    block, counted from 1 (0: the last), side by side: the first blocks' transfer to what is unlike the pre-training better than
    the last's. Raises ValueError for a block that there is not.
    """
    shape, ops = MeshShape.of(mesh), resolve(ops)
    if not 0 <= block <= config.depth:
        raise ValueError(f"block {block}: the model has blocks 1 to {config.depth}")
    upto = dataclasses.replace(config, depth=block or config.depth)

    def local(params, images):
        if read == "tokens":
            some = {**params, "blocks": jax.tree.map(lambda a: a[: upto.depth], params["blocks"])}
            x = encode(some, images, upto, ops=ops, dtype=dtype, mesh=shape)
            return x.reshape(x.shape[0], -1).astype(jnp.float32)
        x = encode(params, images, config, ops=ops, dtype=dtype, mesh=shape)
        y = represent(params, x, config, ops=ops, mesh=shape)
        if read == "pre-logits" and config.representation_size is not None:
            p = gather(params["pre_logits"], partition_specs(config, shape)["pre_logits"], shape, y.dtype)
            product = jnp.einsum("bd,de->be", y, p["kernel"].astype(y.dtype), preferred_element_type=jnp.float32)
            y = jnp.tanh(product + p["bias"])
        return y.astype(jnp.float32)

    specs = partition_specs(config, mesh)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data")))


def make_predict(config: ViTConfig, mesh: Mesh, *, ops: Ops | None = None, dtype=jnp.float32, best: int = 5):
    """A compiled function (params, images) -> int32 [B, best]: the classes of the largest logits, largest first, split over
    "data". Of equal logits the lower class comes first. best is cut to the number of classes."""
    run = partial(forward, config=config, ops=ops, dtype=dtype, mesh=MeshShape.of(mesh))

    def local(params, images):
        return jax.lax.top_k(run(params, images), min(best, config.num_classes))[1]

    specs = partition_specs(config, mesh)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data")))
