"""Schedules and optimizers of the paper, on optax.

Everything here is elementwise: it runs inside shard_map on each device's shard of the parameters as well as on whole arrays.
Clipping by the global norm is not here, for it needs a sum over the mesh: the train step does it before it calls `update`.
Count: the t-th call of `update` (t = 0, 1, ...) uses schedule(t), as in optax and the release; with a warm-up the first has rate 0.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


def schedule(
    *,
    base_lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    decay: Literal["linear", "cosine"] = "cosine",
    linear_end: float = 1e-5,
) -> Callable[[Any], jax.Array]:
    """The learning rate of step t: linear warm-up times linear or cosine decay.

        p = clip((t - warmup) / (total - warmup), 0, 1)
        linear: end + (base - end) (1 - p)      cosine: base (1 + cos(pi p)) / 2      times min(1, t / warmup)

    Linear ends at linear_end (1e-5 in the release), cosine at 0. Returns a function from an int scalar (array or not) to a
    float32 scalar. Raises ValueError where the warm-up leaves no step to decay in. Source: the release's learning rate schedule.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} of total_steps={total_steps}: the warm-up must be shorter than the run")
    if decay not in ("linear", "cosine"):
        raise ValueError(f"decay={decay!r}: must be 'linear' or 'cosine'")

    def rate(step):
        # The subtraction stays an integer: float32 loses single steps past 2**24.
        progress = jnp.clip(jnp.asarray(step - warmup_steps, jnp.float32) / (total_steps - warmup_steps), 0.0, 1.0)
        if decay == "linear":
            lr = linear_end + (base_lr - linear_end) * (1.0 - progress)
        else:
            lr = base_lr * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.asarray(lr * jnp.minimum(1.0, step / warmup_steps) if warmup_steps else lr, jnp.float32)

    return rate


def optimizer(
    learning_rate: optax.Schedule,
    *,
    base_lr: float,
    weight_decay: float = 0.0,
    weight_decay_form: Literal["adamw", "independent"] = "adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    first_moment: Literal["float32", "bfloat16"] = "float32",
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay on kernels.

        m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2     u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
        adamw:        w -= lr_t u + lr_t wd w
        independent:  w -= lr_t u + (lr_t / base_lr) wd w

    learning_rate: lr_t, from `schedule`; base_lr: its peak, which the independent form divides away. The forms are in use with
    very different values: Table 3's 0.1 is adamw's, the independent form's usual 1e-4 is the same decay at base_lr 1e-3. Leaves
    named "kernel" decay; biases, norms, the class token and position embeddings never do. first_moment: dtype m is kept in
    between steps; the update itself uses the float32 value. State: optax's, so `optax.tree_utils.tree_map_params` maps it.
    Raises ValueError for an unknown form or dtype, or a negative decay. Sources: Kingma & Ba 2015; Loshchilov & Hutter 2019.
    """
    if weight_decay_form not in ("adamw", "independent"):
        raise ValueError(f"weight_decay_form={weight_decay_form!r}: must be 'adamw' or 'independent'")
    if first_moment not in ("float32", "bfloat16"):
        raise ValueError(f"first_moment={first_moment!r}: must be 'float32' or 'bfloat16'")
    if weight_decay < 0 or base_lr <= 0:
        raise ValueError(f"weight_decay={weight_decay}, base_lr={base_lr}: required are a decay >= 0, a rate > 0")
    rate = weight_decay if weight_decay_form == "adamw" else weight_decay / base_lr
    return optax.chain(
        kept_in(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), "mu", jnp.dtype(first_moment)),
        decay_kernels(rate),
        optax.scale_by_learning_rate(learning_rate),
    )


def sgd(
    learning_rate: optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> optax.GradientTransformation:
    """m = momentum m + g + wd w; w -= lr_t m: the paper's fine-tuning (Table 4), without weight decay, and BiT's pre-training, with
    (paper D.1). State as in `optimizer`.

    weight_decay: wd, of kernels only. dtype: what m is kept in between steps; the update itself uses the float32 value.
    Raises ValueError for a negative decay.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay}: a decay of 0 or more is required")
    trace = kept_in(optax.trace(decay=momentum), "trace", jnp.dtype(dtype))
    parts = (trace, optax.scale_by_learning_rate(learning_rate))
    return (
        optax.chain(decay_kernels(weight_decay), *parts) if weight_decay else optax.chain(*parts)
    )  # states of before it are as they were


def adamw(
    learning_rate: optax.Schedule,
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    depth: int,
    mu_dtype: Literal["float32", "bfloat16"] = "float32",
) -> optax.GradientTransformation:
    """AdamW with a learning rate that falls from the head down: fine-tuning as of BEiT, MAE and DeiT-III.

        w -= lr_t s (u + wd w)      s = layer_decay^(depth + 1 - l)

    l: 0 for the embedding, 1 ... depth for the blocks, whose leaves are stacked on a leading axis, depth + 1 for the last norm and
    the head. u: Adam's update; wd of kernels only. State as in `optimizer`. Raises ValueError for a share outside (0, 1].
    """
    if not 0 < layer_decay <= 1 or weight_decay < 0:
        raise ValueError(f"layer_decay={layer_decay}, weight_decay={weight_decay}: a share in (0, 1] and 0 or more are required")
    return optax.chain(
        kept_in(optax.scale_by_adam(), "mu", jnp.dtype(mu_dtype)),
        decay_kernels(weight_decay),
        scale_layers(layer_decay, depth),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_layers(share: float, depth: int) -> optax.GradientTransformation:
    """Multiplies the update of each leaf by share^(depth + 1 - its layer), as in `adamw`."""

    def scale(path, update):
        part = path[0].key
        if part == "blocks":
            rates = share ** jnp.arange(depth, 0, -1, dtype=update.dtype)
            return update * rates.reshape(-1, *(1,) * (update.ndim - 1))
        return update if part in ("norm", "head", "pre_logits") else update * share ** (depth + 1)

    def update(updates, params=None):
        del params
        return jax.tree_util.tree_map_with_path(scale, updates)

    return optax.identity() if share == 1 else optax.stateless(update)


def kept_in(optimizer: optax.GradientTransformation, field: str, dtype) -> optax.GradientTransformation:
    """An optimizer one part of whose state is kept in a dtype and worked on in float32.

    Not scale_by_adam(mu_dtype=): that one multiplies b1 by m in bfloat16, where 0.9 is 0.8984, and is off by several times the
    rounding of m itself.
    """
    if dtype == jnp.float32:
        return optimizer

    def kept(state, dtype):
        return state._replace(**{field: optax.tree.cast(getattr(state, field), dtype)})

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, kept(state, jnp.float32), params)
        return updates, kept(state, dtype)

    return optax.GradientTransformation(lambda params: kept(optimizer.init(params), dtype), update)


def decay_kernels(rate: float) -> optax.GradientTransformation:
    """Adds rate * w to the update of every leaf named "kernel". Not optax.masked: that one needs the tree's shape at `init`."""

    def update(updates, params):
        if params is None:
            raise ValueError("params=None: weight decay needs the parameters, optimizer.update(gradients, state, params)")
        return jax.tree_util.tree_map_with_path(lambda path, u, w: u + rate * w if is_kernel(path) else u, updates, params)

    return optax.stateless(update) if rate else optax.identity()


def is_kernel(path) -> bool:
    """Whether a key path of the parameter tree ends in "kernel": the leaves that decay."""
    return isinstance(path[-1], jax.tree_util.DictKey) and path[-1].key == "kernel"
