"""A model that is only asked: what it computes for every image of a source, each once, on any mesh.

The images go through the mesh in batches; what comes back is whole on every process, in the order of the source, without the
rows that fill up the last batch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train import distributed
from train import mesh as meshes
from train.data import Source, eval_batches
from train.data.augment import How
from train.data.device import on_mesh
from train.data.suspects import current
from train.feed import Feed
from train.meeting import Told
from train.signals import asked, beat
from train.step import shardings
from vitcore.config import ViTConfig
from vitcore.context import Context
from vitcore.model import encode, forward, representation
from vitcore.normalisation import HALF, Pixels
from vitcore.ops import Ops
from vitcore.pixels import for_model, to_unit
from vitcore.sharding import partition_specs

_wanted = jax.jit(to_unit, static_argnums=1)  # of a model with pixels of its own; what reads [-1, 1] takes bytes into its program


class NoImage(ValueError):
    """Of a set that is to be measured no image can be read."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How images are brought to a model. batch_size: rounded up to what divides over the mesh. preprocess: a key of PREPROCESSES.
    antialias: see `train.data.augment.How`. threads: that decode; None chooses. decoder: a key of DECODERS. pixels: what the model
    wants."""

    batch_size: int
    preprocess: str = "resize"
    antialias: bool = False
    threads: int | None = None
    decoder: str = "pillow"
    pixels: Pixels = HALF

    def rows(self, fn: Callable, source: Source, config: ViTConfig, mesh: Mesh) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        """Yields (fn(images), labels, places in the source) of the images that can be read, batch after batch; fn gets bytes and
        returns a tree of arrays [B, ...]. Raises ValueError for a model of images that are not square."""
        if config.image_shape[0] != config.image_shape[1]:
            raise ValueError(
                f"the model takes images of {config.image_shape[0]} x {config.image_shape[1]} pixels, images are read as squares: "
                "give --image-size, to which its position embedding is fitted"
            )
        size = meshes.whole_rows(min(self.batch_size, len(source)), mesh)
        stopping = distributed.AnyProcess(mesh)
        whole = jax.jit(lambda *arrays: arrays, out_shardings=NamedSharding(mesh, P()))
        batches = eval_batches(
            source, image_size=config.image_shape[0], channels=config.channels, batch_size=size,
            preprocess=self.preprocess, how=How(antialias=self.antialias), shard=meshes.data_shard(mesh), threads=self.threads,
            decoder=self.decoder, pixels="uint8", reading=current(),
        )  # fmt: skip
        start = 0
        with Feed(batches, on_mesh(mesh)) as feed:
            while True:
                batch = feed.next(asked)
                if stopping(asked()):
                    raise Told("asked to stop in a measurement")
                if batch is None:
                    return
                beat(f"measuring on {source.name}")
                images = batch["image"] if self.pixels == HALF else _wanted(batch["image"], self.pixels)
                found, labels, weights = whole(fn(images), batch["label"], batch["weight"])
                real = np.asarray(weights) > 0
                yield (
                    jax.tree.map(lambda a, real=real: np.asarray(a)[real], found),
                    np.asarray(labels)[real],
                    start + real.nonzero()[0],
                )
                start += len(real)

    def all(self, fn: Callable, source: Source, config: ViTConfig, mesh: Mesh) -> tuple[Any, np.ndarray, np.ndarray]:
        """`rows` in one: the tree of arrays [K, ...], labels [K], places [K] of the K images that can be read, in order.

        Raises NoImage where that is none.
        """
        found, labels, places = zip(*self.rows(fn, source, config, mesh), strict=True)
        if not sum(map(len, labels)):
            raise NoImage(f"not one image of {source.name} can be read: mend the files, or name another set")
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found), np.concatenate(labels), np.concatenate(places)


def put_params(params, config: ViTConfig, mesh: Mesh):
    """A host tree laid out on the mesh as `partition_specs` says. Every process holds the same tree."""
    where = shardings(mesh, partition_specs(config, meshes.shape_of(mesh)))

    def put(leaf, sharding):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, params, where)


def make_features(
    config: ViTConfig, mesh: Mesh, *, ops: Ops | None = None, dtype=jnp.float32,
    read: Literal["pre-logits", "representation", "tokens"] = "pre-logits", block: int = 0,
):  # fmt: skip
    """A compiled function (params, images [B, Y, X, C], bytes or floats in [-1, 1]) -> float32 [B, F], split over "data".

    read: what the head reads, behind the hidden layer where there is one; the representation y of Eq. 4; or all the tokens behind a
    block, counted from 1 (0: the last), side by side: the first blocks' transfer to what is unlike the pre-training better than
    the last's. Raises ValueError for a block that there is not.
    """
    context = Context(ops=ops, dtype=dtype, mesh=meshes.shape_of(mesh))
    if read == "tokens" and not isinstance(config, ViTConfig):
        raise ValueError("tokens behind a block are asked for, and the model is a ResNet, which has none: read its representation")
    if not 0 <= block <= config.depth:
        raise ValueError(f"block {block}: the model has blocks 1 to {config.depth}")
    upto = dataclasses.replace(config, depth=block or config.depth) if isinstance(config, ViTConfig) else config

    def local(params, images):
        images = for_model(images)
        if read == "tokens":
            some = {**params, "blocks": jax.tree.map(lambda a: a[: upto.depth], params["blocks"])}
            x = encode(some, images, upto, context)
            return x.reshape(x.shape[0], -1).astype(jnp.float32)
        y, _ = representation(params, images, config, context, behind_hidden=read == "pre-logits")
        return y.astype(jnp.float32)

    specs, rows = partition_specs(config, meshes.shape_of(mesh)), meshes.rows(mesh)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs, rows), out_specs=rows))


def make_predict(config: ViTConfig, mesh: Mesh, *, ops: Ops | None = None, dtype=jnp.float32, best: int = 5, scored=False):
    """A compiled function (params, images as in `make_features`) -> int32 [B, best]: the classes of the largest logits, largest
    first, split over "data". Of equal logits the lower class comes first. best is cut to the number of classes. scored: their
    probabilities too, a pair (classes, float32 [B, best] by softmax)."""
    context = Context(ops=ops, dtype=dtype, mesh=meshes.shape_of(mesh))

    def local(params, images):
        logits = forward(params, for_model(images), config, context)
        values, classes = jax.lax.top_k(logits, min(best, config.num_classes))
        return (classes, jnp.exp(values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))) if scored else classes

    specs, rows = partition_specs(config, meshes.shape_of(mesh)), meshes.rows(mesh)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs, rows), out_specs=rows))
