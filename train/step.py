"""One training step and one evaluation step on a mesh, each a single shard_map with all axes manual.

The model does its own collectives (`vitcore/model.py`). What is left to this file: the mean of the loss over the batch, the
global gradient norm, and the update, which is elementwise and runs on each device's shard; of an optimizer that looks at whole
matrices it stands behind the shard_map, and XLA partitions it. Differentiating the mean inside
the shard_map is right because check_vma knows which values differ between devices: every parameter's gradient arrives already
summed, and scattered where the parameter is.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.losses import sigmoid_cross_entropy, softmax_cross_entropy
from train.mesh import compiler_options, shape_of
from train.mesh import rows as rows_of
from train.objectives import objective_of
from vitcore import keep
from vitcore.config import ViTConfig
from vitcore.context import Context
from vitcore.model import init
from vitcore.normalisation import HALF, Pixels
from vitcore.ops import Ops, for_training
from vitcore.sharding import MeshShape, Shard, partition_specs


class TrainState(NamedTuple):
    """All that a run is between two steps. step: int32 scalar, batches used, the skipped ones too. average: Polyak average of
    params, or None."""

    step: Any
    params: Any
    opt_state: Any
    average: Any


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is taken. accumulate: parts the batch is worked through in, one update for all. clip_norm: bound of the global
    gradient norm, None for none. polyak: decay of the parameters' average, 0 for none. seed: of the dropout masks. pixels: what the
    model wants. shard: how the data axis splits parameters and optimizer (`vitcore.collectives.Shard`). sam: how far uphill the
    gradient is taken, 0 for here. whole: the optimizer looks at whole matrices. The rest: as in
    `vitcore.apply` and `train.recipes`."""

    ops: Ops | None = None
    dtype: Any = jnp.float32
    remat: int = 0
    accumulate: int = 1
    loss: str = "softmax"
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    polyak: float = 0.0
    seed: int = 0
    pixels: Pixels = HALF
    shard: Shard = "parameters"
    sam: float = 0.0
    whole: bool = False

    def losses(self, logits, labels):
        """[B] float32. labels: int32 [B], or [B, V], or with MixUp (label [B], other label [B], share of the first [B])."""
        if isinstance(labels, tuple):  # a loss is linear in its target: to mix losses is to mix targets
            label, other, share = labels
            return share * self.losses(logits, label) + (1 - share) * self.losses(logits, other)
        if self.loss == "sigmoid":
            return sigmoid_cross_entropy(logits, labels)
        return softmax_cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def state_specs(
    config: ViTConfig, mesh: Mesh, tx: optax.GradientTransformation, *, polyak: bool, shard: Shard = "parameters"
) -> TrainState:
    """PartitionSpecs of a TrainState: what mirrors a parameter, by its name and shape, lies where the parameter lies; all else,
    such as counters and Adafactor's sums over rows and columns, everywhere."""
    specs = partition_specs(config, shape_of(mesh), shard=shard)
    params = jax.eval_shape(partial(init, config=config), jax.random.key(0))
    shapes = [(path, leaf.shape) for path, leaf in jax.tree.leaves_with_path(params)]
    flat = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    known = {path: (shape, spec) for (path, shape), spec in zip(shapes, flat, strict=True)}

    def place(path, leaf):
        # not optax.tree.map_params, which takes no optimizer that parts the tree by tables of its own, as Muon does
        for shape, spec in (known[path[i:]] for i in range(len(path)) if path[i:] in known):
            return spec if shape == leaf.shape else P()
        return P()

    opt_state = jax.tree.map_with_path(place, jax.eval_shape(tx.init, params))
    return TrainState(P(), specs, opt_state, specs if polyak else None)


def shardings(mesh: Mesh, specs):
    """The NamedShardings of a tree of PartitionSpecs."""
    return jax.tree.map(partial(NamedSharding, mesh), specs, is_leaf=lambda x: isinstance(x, P))


def make_init(config: ViTConfig, mesh: Mesh, tx, options: StepOptions):
    """A compiled function key -> TrainState at step 0; every device makes its own shards, the same values on every mesh."""

    def start(key):
        params = init(key, config)
        average = jax.tree.map(jnp.copy, params) if options.polyak else None
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)

    specs = state_specs(config, mesh, tx, polyak=bool(options.polyak), shard=options.shard)
    return jax.jit(start, out_shardings=shardings(mesh, specs))


def make_train_step(config: ViTConfig, mesh: Mesh, tx, options: StepOptions):
    """A compiled function (state, images [B, Y, X, C], labels as `StepOptions.losses`) -> (state, metrics), scalars: float32 "loss"
    and "gradient_norm", and bool "finite".

    images: bytes 0..255, which become floats inside, or floats in [-1, 1]. B is the global batch, split over "data"; it must be
    divisible by the data axis times `accumulate`. The state is donated. Where the loss or the gradient is not finite, `step`
    alone moves on: parameters, optimizer and average stay as they were.
    """
    specs = state_specs(config, mesh, tx, polyak=bool(options.polyak), shard=options.shard)
    gradients, rows = _gradients(config, shape_of(mesh), options), (rows_of(mesh),) * 2
    told = compiler_options(mesh, together=options.shard == "optimizer" and for_training(options.ops).alone())
    if options.whole:
        mapped = jax.shard_map(gradients, mesh=mesh, in_specs=(specs.params, P(), *rows), out_specs=(specs.params, P(), P()))

        def step(state, images, labels):
            return _updated(state, *mapped(state.params, state.step, images, labels), tx, options)

        placed = shardings(mesh, specs), NamedSharding(mesh, P())
        return jax.jit(step, donate_argnums=0, out_shardings=placed, compiler_options=told)

    def step_here(state, images, labels):
        return _updated(state, *gradients(state.params, state.step, images, labels), tx, options)

    mapped = jax.shard_map(step_here, mesh=mesh, in_specs=(specs, *rows), out_specs=(specs, P()))
    return jax.jit(mapped, donate_argnums=0, compiler_options=told)


def _gradients(config: ViTConfig, shape: MeshShape, options: StepOptions):
    """A function (parameters, number of the step, images, labels) -> (clipped gradients, loss, their norm) of a device's shards."""

    def loss_of(params, images, labels, first_example, key):
        """The sum over this part's images of loss / B, over all devices: parts add up to the mean over the global batch."""
        ops, _ = keep.choose(
            for_training(options.ops),
            config,
            images.shape[0],
            options.dtype,
            shape,
            remat=options.remat,
            average=bool(options.polyak),
        )
        context = Context(
            ops=ops,
            dtype=options.dtype,
            mesh=shape,
            shard=options.shard,
            remat=options.remat,
            dropout_key=key,
            first_example=first_example,
        )
        losses = objective_of(config).losses(params, images, labels, config, context, options, key)
        scale = 1.0 / (images.shape[0] * options.accumulate * shape.data)
        return lax.psum(losses.sum() * scale, shape.over_data)

    def gradient(params, images, labels, key):
        """(loss, gradients) of the global batch, of which this device has so many images."""
        here = images.shape[0]
        part, first = here // options.accumulate, lax.axis_index(shape.over_data) * here
        of_part = jax.value_and_grad(loss_of)
        if options.accumulate == 1:
            return of_part(params, images, labels, first, key)

        def add(total, i):
            rows = partial(lax.dynamic_slice_in_dim, start_index=i * part, slice_size=part)
            found = of_part(params, rows(images), jax.tree.map(rows, labels), first + i * part, key)
            return jax.tree.map(jnp.add, total, found), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
        return lax.scan(add, zeros, jnp.arange(options.accumulate))[0]

    def gradients(params, number, images, labels):
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        loss, grads = gradient(params, images, labels, key)
        if options.sam:  # with the same masks
            far = options.sam / (global_norm(grads) + 1e-12)
            _, grads = gradient(jax.tree.map(lambda p, g: p + far * g, params, grads), images, labels, key)
        norm = global_norm(grads)
        if options.clip_norm is not None:
            grads = jax.tree.map(partial(jnp.multiply, jnp.minimum(1.0, options.clip_norm / (norm + 1e-6))), grads)
        return grads, loss, norm

    return gradients


def _updated(state, grads, loss, norm, tx, options: StepOptions):
    """(the state behind a step, its metrics): an update where loss and gradients are finite."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if options.polyak:
        average = jax.tree.map(lambda a, p: a + (1 - options.polyak) * (p - a), average, params)
    # Not optax.apply_if_finite: after its limit that one takes the bad update.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new, old = (params, opt_state, average), (state.params, state.opt_state, state.average)
    params, opt_state, average = jax.tree.map(partial(jnp.where, finite), new, old)
    return TrainState(state.step + 1, params, opt_state, average), {"loss": loss, "gradient_norm": norm, "finite": finite}


def make_eval_step(config: ViTConfig, mesh: Mesh, options: StepOptions):
    """A compiled function (params, images, labels, weights [B] 0 or 1, first=0) -> float32 sums over the images: count, correct,
    loss.

    images: as in `make_train_step`. first: the index of images[0] in the set, by which masked patch prediction, whose count is of
    colours, corrupts the same patches of an image on any mesh and in any batch.
    """
    shape, rows = shape_of(mesh), rows_of(mesh)

    def step(params, images, labels, weights, first):
        first = first + lax.axis_index(shape.over_data) * images.shape[0]
        context = Context(ops=options.ops, dtype=options.dtype, mesh=shape, shard=options.shard, first_example=first)
        key = jax.random.key(options.seed)
        found = objective_of(config).sums(params, images, labels, config, context, options, key)
        return lax.psum({name: (weights * values).sum() for name, values in found.items()}, shape.over_data)

    specs = partition_specs(config, shape, shard=options.shard)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(specs, rows, rows, rows, P()), out_specs=P())
    return jax.jit(lambda params, images, labels, weights, first=0: mapped(params, images, labels, weights, jnp.int32(first)))


def global_norm(tree):
    """The Euclidean norm of a tree of shards over the whole mesh, each element counted once: a float32 scalar."""
    sums: dict[tuple[str, ...], Any] = defaultdict(float)
    for leaf in jax.tree.leaves(tree):
        split = tuple(sorted(jax.typeof(leaf).manual_axis_type.varying))
        sums[split] += jnp.square(leaf.astype(jnp.float32)).sum()
    return jnp.sqrt(sum(lax.psum(s, split) if split else s for split, s in sums.items()))
