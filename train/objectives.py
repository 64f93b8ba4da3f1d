"""What a step minimises and an evaluation counts, by what a model predicts: classes of images, or colours of masked patches.

Both functions of an objective run inside the `shard_map` of a step, on one device's images, and do no collective of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vitcore import masked
from vitcore.model import forward, masked_predictions
from vitcore.pixels import for_model, to_unit

CORRUPTION = 0x3A5C  # folded into a step's key: the corruption's draws are no others'


class Objective(NamedTuple):
    """losses: (params, images, labels, config, context, options, key) -> [B] float32, to be averaged. sums: (the same) -> {"count",
    "correct", "loss"}, [B] float32 each, which add up over the images. context, options: `vitcore.context.Context` and
    `train.step.StepOptions`. key: a JAX PRNG key."""

    losses: Callable
    sums: Callable


def objective_of(config) -> Objective:
    """That of a model's configuration."""
    return MASKED if getattr(config, "masked", None) else CLASSES


# --- classes -----------------------------------------------------------------------------------------------------------------


def _class_losses(params, images, labels, config, context, options, key):
    return options.losses(forward(params, for_model(images, options.pixels), config, context), labels)


def _class_sums(params, images, labels, config, context, options, key):
    logits = forward(params, for_model(images, options.pixels), config, context)
    best = logits.argmax(-1)
    correct = best == labels if labels.ndim == 1 else jnp.take_along_axis(labels, best[:, None], 1)[:, 0] > 0
    losses = options.losses(logits, labels)
    return {"count": jnp.ones_like(losses), "correct": correct.astype(jnp.float32), "loss": losses}


CLASSES = Objective(_class_losses, _class_sums)


# --- masked patches ----------------------------------------------------------------------------------------------------------


def predicted(params, images, config, context, options, key):
    """(predictions [B, K, outputs], the corrupted patches' targets [B, K, ...], the Corruption) of images, bytes or floats."""
    key = jax.random.fold_in(key, CORRUPTION)
    found, chosen = masked_predictions(params, for_model(images, options.pixels), config, context, key)
    targets = masked.TARGETS[config.masked.target].of(
        to_unit(images), config
    )  # of the image's own pixels, whatever the model wants
    return found, masked.at(targets, chosen.places), chosen


def _masked_losses(params, images, labels, config, context, options, key):
    found, targets, _ = predicted(params, images, config, context, options, key)
    return masked.TARGETS[config.masked.target].losses(found, targets).mean(1)


def _masked_sums(params, images, labels, config, context, options, key):
    """Counted are colours: of each corrupted patch one, or sixteen."""
    found, targets, _ = predicted(params, images, config, context, options, key)
    target = masked.TARGETS[config.masked.target]
    losses = target.losses(found, targets)
    count = jnp.full_like(losses[:, 0], losses.shape[1] * target.colours)
    right = target.right(target.best(found, config), targets, config).sum(1).astype(jnp.float32)
    return {"count": count, "correct": right, "loss": losses.sum(1) * target.colours}


MASKED = Objective(_masked_losses, _masked_sums)
