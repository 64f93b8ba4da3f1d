"""Pools, a table of entries that `ViTConfig.pool` chooses from, and the head behind any of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.layer_norm import reference
from kernels.mlp.reference import GELUS
from vitcore.parameters import COLUMNS, ROWS, Leaf, Name, constant, dense, lecun, named, norm, normal, xavier, zeros


class Pool(NamedTuple):
    """One way from the tokens to the representation of an image; `config` is a ViTConfig.

    class_token: whether a learned token stands before the patches. leaves: (config) -> its leaves, those of the class token
    included. pool: (params, x [B, T, D], normalise, config, context) -> [B, D] in the dtype of x; normalise is the last layer norm,
    which acts on each token alone, for x of any rank. unnamed: nothing in a file of weights tells of it.
    """

    class_token: bool
    leaves: Callable
    pool: Callable
    unnamed: bool = False


def class_token(config) -> tuple[Leaf, ...]:
    names: dict[str, tuple[Name, ...]] = {
        naming: (Name(name, shape=(1, 1, config.width), when={"tower": False}),)
        for naming, name in (("release", "cls"), ("timm", "cls_token"), ("transformers", "{class}"))
    }
    names["transformers"] += (Name("{class}", when={"tower": True}),)
    return (Leaf(path=("patch_embed", "cls"), shape=(config.width,), initial=zeros, names=names),)


def registers(config) -> tuple[Leaf, ...]:
    """Of tokens that no pool reads and no position is added to ("Vision Transformers Need Registers", arXiv:2309.16588)."""
    if not config.registers:
        return ()
    shape = (config.registers, config.width)
    names = {"timm": "reg_token", "transformers": "embeddings.register_tokens"}
    return (
        Leaf(
            path=("patch_embed", "registers"),
            shape=shape,
            initial=normal(1e-6),
            split=(None, ROWS),
            names={naming: (Name(name, shape=(1, *shape)),) for naming, name in names.items()},
        ),
    )


def _first(params, x, normalise, config, context):
    # not x[:, 0], before which XLA copies all of x on a TPU to another layout, forward and backward
    first = lax.broadcasted_iota(jnp.int32, (1, x.shape[1], 1), 1) == 0
    return normalise(jnp.where(first, x, jnp.zeros_like(x)).sum(1))


def _mean(params, x, normalise, config, context):
    return normalise(x).astype(jnp.float32).mean(1).astype(x.dtype)


# --- attention pooling (the authors' later code: MAP) ---------------------------------------------------------------------------

_MAP = "MAPHead_0"


def _map_leaves(config) -> tuple[Leaf, ...]:
    """A learned query, an attention layer that it reads the tokens with, and an MLP; whole on every device of a model axis."""
    d, f, n, t = config.width, config.mlp_dim, config.num_heads, config.seen_tokens
    mha, h = f"{_MAP}/MultiHeadDotProductAttention_0", config.width // config.num_heads
    parts = ("query", "key", "value")
    out = {"release": f"{mha}/out", "timm": "attn_pool.proj", "transformers": "head.attention.out_proj"}
    return (
        Leaf(
            path=("map", "probe"),
            shape=(d,),
            initial=lambda key, shape: xavier(key, (1, *shape))[0],
            names={
                naming: (Name(f"{layer}{leaf}", shape=(1, 1, d)),)
                for naming, layer, leaf in (
                    ("release", f"{_MAP}/", "probe"),
                    ("timm", "attn_pool.", "latent"),
                    ("transformers", "head.", "probe"),
                )
            },
        ),
        Leaf(
            path=("map", "qkv", "kernel"),
            shape=(3, d, d),
            initial=xavier,
            split=(None, ROWS, COLUMNS),
            names={
                "release": tuple(Name(f"{mha}/{part}/kernel", part=(i,), shape=(d, n, h)) for i, part in enumerate(parts)),
                "timm": (
                    Name("attn_pool.q.weight", part=(0,), axes=(1, 0)),
                    Name("attn_pool.kv.weight", part=(slice(1, 3),), axes=(0, 2, 1), shape=(2 * d, d)),
                ),
                # torch's MultiheadAttention has q, k and v in one
                "transformers": (Name("head.attention.in_proj_weight", axes=(0, 2, 1), shape=(3 * d, d)),),
            },
            multiply_adds={"pool": 2 * t * d * d + 2 * t * d},  # keys and values; the probe's query is made once a batch
        ),
        Leaf(
            path=("map", "qkv", "bias"),
            shape=(3, d),
            initial=zeros,
            names={
                "release": tuple(Name(f"{mha}/{part}/bias", part=(i,), shape=(n, h)) for i, part in enumerate(parts)),
                "timm": (
                    Name("attn_pool.q.bias", part=(0,)),
                    Name("attn_pool.kv.bias", part=(slice(1, 3),), shape=(2 * d,)),
                ),
                "transformers": (Name("head.attention.in_proj_bias", shape=(3 * d,)),),
            },
        ),
        Leaf(
            path=("map", "out", "kernel"),
            shape=(d, d),
            initial=xavier,
            split=(ROWS, COLUMNS),
            names={**named(out, "kernel", (1, 0)), "release": (Name(f"{mha}/out/kernel", shape=(n, h, d)),)},
            multiply_adds={"pool": d * d},
        ),
        Leaf(path=("map", "out", "bias"), shape=(d,), initial=zeros, names=named(out, "bias")),
        *norm(
            ("map", "norm"),
            d,
            names={"release": f"{_MAP}/LayerNorm_0", "timm": "attn_pool.norm", "transformers": "head.layernorm"},
        ),
        *(
            leaf
            for i, (layer, shape) in enumerate((("mlp_in", (d, f)), ("mlp_out", (f, d))))
            for leaf in dense(
                ("map", layer),
                shape,
                xavier,
                bias=normal(1e-6),
                split=(ROWS, COLUMNS),
                names={
                    "release": f"{_MAP}/MlpBlock_0/Dense_{i}",
                    "timm": f"attn_pool.mlp.fc{i + 1}",
                    "transformers": f"head.mlp.fc{i + 1}",
                },
                multiply_adds={"pool": d * f},
            )
        ),
    )


def _map(params, x, normalise, config, context):
    """y = a + MLP(LN(a)), a = MHA(probe, z, z), z the tokens after the last norm."""
    p, z, n = context.take(params, "map"), normalise(x), config.num_heads
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def dense(form, a, kernel, bias):
        return jnp.einsum(form, a, kernel.astype(x.dtype), preferred_element_type=wide) + bias

    (w_q, w_k, w_v), (b_q, b_k, b_v) = p["qkv"]["kernel"], p["qkv"]["bias"]
    q = dense("d,dk->k", p["probe"].astype(x.dtype), w_q, b_q).astype(x.dtype).reshape(n, -1)
    k, v = (dense("btd,dk->btk", z, w, b).astype(x.dtype).reshape(*z.shape[:2], n, -1) for w, b in ((w_k, b_k), (w_v, b_v)))
    share = jax.nn.softmax(jnp.einsum("nh,btnh->bnt", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5).astype(x.dtype)
    o = jnp.einsum("bnt,btnh->bnh", share, v, preferred_element_type=wide).astype(x.dtype)
    a = dense("bd,dk->bk", o.reshape(o.shape[0], -1), p["out"]["kernel"], p["out"]["bias"]).astype(x.dtype)
    y = reference.layer_norm(a, p["norm"]["scale"], p["norm"]["bias"], eps=config.eps)
    y = GELUS[config.gelu](dense("bd,df->bf", y, p["mlp_in"]["kernel"], p["mlp_in"]["bias"]))
    return a + dense("bf,fd->bd", y.astype(x.dtype), p["mlp_out"]["kernel"], p["mlp_out"]["bias"]).astype(x.dtype)


def _corner(params, x, normalise, config, context):
    return normalise(x[:, 0])


def _unpooled(params, x, normalise, config, context):
    return normalise(x)


POOLS: dict[str, Pool] = {
    "token": Pool(class_token=True, leaves=class_token, pool=_first),
    "gap": Pool(class_token=False, leaves=lambda config: (), pool=_mean, unnamed=True),
    "map": Pool(class_token=False, leaves=_map_leaves, pool=_map),
    # the first patch, without a class token, and every token: what the authors' later code calls "0" and "none"
    "first": Pool(class_token=False, leaves=lambda config: (), pool=_corner, unnamed=True),
    "none": Pool(class_token=False, leaves=lambda config: (), pool=_unpooled, unnamed=True),
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
            split=(ROWS, COLUMNS),
            key=8,
            names={"release": "pre_logits", "timm": "pre_logits.fc", "transformers": "pooler.dense"},
            multiply_adds={"head": shape[0] * shape[1]},
        )
    if config.num_classes:
        shape = (config.feature_size, config.num_classes)
        classifier = "classifier" if config.head_bias is not None else "visual_projection"  # CLIP's, which has no bias
        kernel, bias = dense(
            ("head",),
            shape,
            zeros,
            bias=constant(config.head_bias or 0.0),
            split=(ROWS, COLUMNS),
            names={"release": "head", "timm": "head", "transformers": classifier},
            multiply_adds={"head": shape[0] * shape[1]},
        )
        leaves += (_outside(kernel), *(() if config.head_bias is None else (_outside(bias),)))
    return leaves


def _outside(leaf: Leaf) -> Leaf:
    """transformers' classifier stands beside the model that its prefix is of."""
    names = {**leaf.names, "transformers": tuple(name._replace(outside=True) for name in leaf.names["transformers"])}
    return leaf.__class__(**{**vars(leaf), "names": names})


def hidden(params, y, config, context):
    """The representation y [B, D] behind the tanh layer, where the model has one; in the dtype of y."""
    if config.representation_size is None:
        return y
    return jnp.tanh(linear(context.take(params, "pre_logits"), y)).astype(y.dtype)


def logits(params, y, config, context):
    """Logits [B, V] float32 of what the head reads; of a model without classes what the head would read, as float32."""
    return linear(context.take(params, "head"), y) if config.num_classes else y.astype(jnp.float32)


def linear(p, x):
    """x [..., D] @ kernel + bias, where there is one, accumulated and returned in float32."""
    y = jnp.einsum("...d,dv->...v", x, p["kernel"].astype(x.dtype), preferred_element_type=jnp.float32)
    return y + p["bias"] if "bias" in p else y
