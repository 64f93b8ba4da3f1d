"""Pools, a table of entries that `ViTConfig.pool` chooses from, and the head behind any of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from vitcore.parameters import ROWS, Leaf, Name, constant, dense, lecun, zeros


class Pool(NamedTuple):
    """One way from the tokens to the representation of an image; `config` is a ViTConfig.

    class_token: whether a learned token stands before the patches. leaves: (config) -> its leaves, those of the class token
    included. pool: (params, x [B, T, D], normalise, config, context) -> [B, D] in the dtype of x; normalise is the last layer norm,
    which acts on each token alone, for x of any rank.
    """

    class_token: bool
    leaves: Callable
    pool: Callable


def class_token(config) -> tuple[Leaf, ...]:
    shape = (1, 1, config.width)
    names = {"release": "cls", "timm": "cls_token", "transformers": "embeddings.cls_token"}
    return (
        Leaf(
            path=("patch_embed", "cls"),
            shape=(config.width,),
            initial=zeros,
            names={naming: (Name(name, shape=shape),) for naming, name in names.items()},
        ),
    )


def _first(params, x, normalise, config, context):
    # not x[:, 0], before which XLA copies all of x on a TPU to another layout, forward and backward
    first = lax.broadcasted_iota(jnp.int32, (1, x.shape[1], 1), 1) == 0
    return normalise(jnp.where(first, x, jnp.zeros_like(x)).sum(1))


def _mean(params, x, normalise, config, context):
    return normalise(x).astype(jnp.float32).mean(1).astype(x.dtype)


POOLS: dict[str, Pool] = {
    "token": Pool(class_token=True, leaves=class_token, pool=_first),
    "gap": Pool(class_token=False, leaves=lambda config: (), pool=_mean),
}


# --- the head ----------------------------------------------------------------------------------------------------------------


def head_leaves(config) -> tuple[Leaf, ...]:
    """The leaves of the hidden layer, where there is one, and of the classifier. config: of any family."""
    leaves: tuple[Leaf, ...] = ()
    if config.representation_size is not None:
        shape = (config.width, config.representation_size)
        leaves += dense(
            ("pre_logits",),
            shape,
            lecun,
            split=(ROWS, None),
            key=8,
            names={"release": "pre_logits", "timm": "pre_logits.fc", "transformers": "pooler.dense"},
            multiply_adds={"head": shape[0] * shape[1]},
        )
    if config.num_classes:
        shape = (config.feature_size, config.num_classes)
        kernel, bias = dense(
            ("head",),
            shape,
            zeros,
            bias=constant(config.head_bias),
            split=(ROWS, None),
            names={"release": "head", "timm": "head", "transformers": "classifier"},
            multiply_adds={"head": shape[0] * shape[1]},
        )
        leaves += (_outside(kernel), _outside(bias))
    return leaves


def _outside(leaf: Leaf) -> Leaf:
    """transformers' classifier stands beside the model that its prefix is of."""
    names = {**leaf.names, "transformers": tuple(name._replace(outside=True) for name in leaf.names["transformers"])}
    return leaf.__class__(**{**vars(leaf), "names": names})


def hidden(params, y, config, context):
    """The representation y [B, D] behind the tanh layer, where the model has one; in the dtype of y."""
    if config.representation_size is None:
        return y
    return jnp.tanh(_dense(context.take(params, "pre_logits"), y)).astype(y.dtype)


def logits(params, y, config, context):
    """Logits [B, V] float32 of what the head reads; of a model without classes what the head would read, as float32."""
    return _dense(context.take(params, "head"), y) if config.num_classes else y.astype(jnp.float32)


def _dense(p, x):
    """x [B, D] @ kernel + bias, accumulated and returned in float32."""
    return jnp.einsum("bd,dv->bv", x, p["kernel"].astype(x.dtype), preferred_element_type=jnp.float32) + p["bias"]
