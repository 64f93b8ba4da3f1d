"""The peer of our whole models on a TPU: the Vision Transformer as its public JAX release writes it, in plain jax.

Written from the published description: a Flax module per layer, unrolled, `nn.MultiHeadDotProductAttention`, `nn.LayerNorm`
and `nn.Dense` with dtype bfloat16 over float32 parameters, class token, no rematerialisation. What those modules compute is
spelled out here, because it decides what XLA makes of it:

- a dense layer casts input, kernel and bias to bfloat16, and product and sum leave it as bfloat16;
- attention keeps the heads apart, [B, T, N, H], divides the query by sqrt(H), and its logits and softmax are bfloat16;
- the layer norm takes mean and mean square of the float32 input, and returns float32, which the next layer casts;
- positions are added before the class token is put in front; the head is float32;
- the step is softmax cross-entropy, clipping to a global norm of 1, Adam with a first moment in bfloat16, decoupled weight decay of
  the kernels and a warm-up with cosine decay, the state donated.

So it is less precise than our reference, which accumulates and normalises attention in float32, and faster: it is what people run.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from vitcore.config import ViTConfig

S = jax.ShapeDtypeStruct
_EPS = 1e-6


def shapes(config: ViTConfig) -> dict[str, Any]:
    """The parameters as float32 shapes: a dict a layer, attention kernels [D, N, H] and [N, H, D].

    ValueError for any other model than the release's plain one with a class token.
    """
    c, d, n = config, config.width, config.num_heads
    plain = (c.stem, c.representation_size, c.pool, c.position, c.block, c.gelu, c.eps, c.registers)
    if plain != (None, None, "token", "1d", "encoder", "tanh", _EPS, 0):
        raise ValueError(f"the peer is a plain ViT with a class token; got {config}: compare another model with our reference")
    h = d // n

    def p(*shape):
        return S(shape, jnp.float32)

    def dense(inside, outside):
        return {"kernel": p(*inside, *outside), "bias": p(*outside)}

    def norm():
        return {"scale": p(d), "bias": p(d)}

    def block():
        heads = {name: dense((d,), (n, h)) for name in ("query", "key", "value")}
        attention = {**heads, "out": dense((n, h), (d,))}
        mlp = {"in": dense((d,), (c.mlp_dim,)), "out": dense((c.mlp_dim,), (d,))}
        return {"norm1": norm(), "attention": attention, "norm2": norm(), "mlp": mlp}

    return {
        "embedding": dense((c.patch_size, c.patch_size, c.channels), (d,)),
        "position": S((1, c.grid[0] * c.grid[1], d), jnp.float32),
        "cls": p(1, 1, d),
        "blocks": {f"block_{i}": block() for i in range(c.depth)},
        "norm": norm(),
        "head": dense((d,), (c.num_classes,)),
    }


def _dense(p, x, axes: int, dtype):
    """x [..., inside] @ kernel + bias over the last `axes` axes of x, all of it in `dtype`."""
    last = tuple(range(x.ndim - axes, x.ndim))
    y = jax.lax.dot_general(x.astype(dtype), p["kernel"].astype(dtype), ((last, tuple(range(axes))), ((), ())))
    return y + p["bias"].astype(dtype)


def _norm(p, x):
    z = x.astype(jnp.float32)
    mean, square = z.mean(-1, keepdims=True), jnp.square(z).mean(-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + _EPS) * p["scale"]
    return (z - mean) * factor + p["bias"]


def _attention(p, x, dtype):
    q, k, v = (_dense(p[name], x, 1, dtype) for name in ("query", "key", "value"))
    q = q / jnp.sqrt(q.shape[-1]).astype(dtype)
    probs = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
    return _dense(p["out"], jnp.einsum("bnts,bsnh->btnh", probs, v), 2, dtype)


def _mlp(p, x, dtype):
    return _dense(p["out"], jax.nn.gelu(_dense(p["in"], x, 1, dtype)), 1, dtype)


def forward(params, images, dtype=jnp.bfloat16):
    """Logits [B, V] float32 of images [B, Y, X, C]."""
    e = params["embedding"]
    side = e["kernel"].shape[0]
    x = jax.lax.conv_general_dilated(
        images.astype(dtype), e["kernel"].astype(dtype), (side, side), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = x + e["bias"].astype(dtype)
    x = x.reshape(x.shape[0], -1, x.shape[-1]) + params["position"].astype(dtype)
    x = jnp.concatenate([jnp.tile(params["cls"].astype(dtype), (x.shape[0], 1, 1)), x], axis=1)
    for p in params["blocks"].values():
        x = x + _attention(p["attention"], _norm(p["norm1"], x), dtype)
        x = x + _mlp(p["mlp"], _norm(p["norm2"], x), dtype)
    return _dense(params["head"], _norm(params["norm"], x)[:, 0], 1, jnp.float32)


def optimizer() -> optax.GradientTransformation:
    """The release's: clipping to a norm of 1, Adam with a bfloat16 first moment, decay 1e-4 of kernels, warm-up and cosine."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10_000, 90_000)

    def kernels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1] == jax.tree_util.DictKey("kernel"), params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(mu_dtype=jnp.bfloat16),
        optax.scale_by_learning_rate(rate),
        optax.add_decayed_weights(-1e-4, mask=kernels),
    )


def step(params, state, images, labels, *, tx, dtype):
    """One training step: (params, state, loss)."""

    def loss(params):
        logits = forward(params, images, dtype)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value
