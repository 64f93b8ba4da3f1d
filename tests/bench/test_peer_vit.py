"""The peer's model is ours: the same logits from the same weights, the same number of parameters, a step that learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.peers import vit
from vitcore import REFERENCE, ViTConfig, apply, init, variant

CONFIG = ViTConfig(image_size=16, patch_size=8, width=24, depth=1, mlp_dim=48, num_heads=3, num_classes=5)


def ours() -> dict:
    params = init(jax.random.key(0), CONFIG)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(tree, [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])
    embed = params["patch_embed"]
    embed["position"] = embed["position"].at[0].set(0.0)  # the peer's class token has no position
    return params


def theirs(params: dict) -> dict:
    """Our parameters in the peer's tree."""
    d, n = CONFIG.width, CONFIG.num_heads

    def block(i):
        w = jax.tree.map(lambda a: a[i], params["blocks"])
        heads = {
            name: {"kernel": w["qkv"]["kernel"][k].reshape(d, n, -1), "bias": w["qkv"]["bias"][k].reshape(n, -1)}
            for k, name in enumerate(("query", "key", "value"))
        }
        out = {"kernel": w["out"]["kernel"].reshape(n, -1, d), "bias": w["out"]["bias"]}
        mlp = {"in": w["mlp_in"], "out": w["mlp_out"]}
        return {"norm1": w["norm1"], "attention": {**heads, "out": out}, "norm2": w["norm2"], "mlp": mlp}

    embed = params["patch_embed"]
    return {
        "embedding": {"kernel": embed["kernel"], "bias": embed["bias"]},
        "position": embed["position"][None, 1:],
        "cls": embed["cls"][None, None],
        "blocks": {f"block_{i}": block(i) for i in range(CONFIG.depth)},
        "norm": params["norm"],
        "head": params["head"],
    }


def images():
    return jax.random.normal(jax.random.key(2), (3, 16, 16, 3), jnp.float32)


def test_the_same_weights_give_the_same_logits():
    params = ours()
    tree = theirs(params)
    assert jax.tree.map(lambda a: a.shape, tree) == jax.tree.map(lambda a: a.shape, vit.shapes(CONFIG))
    want = apply(params, images(), CONFIG, ops=REFERENCE)
    np.testing.assert_allclose(vit.forward(tree, images(), jnp.float32), want, rtol=2e-4, atol=2e-4)
    assert np.abs(vit.forward(tree, images(), jnp.bfloat16) - want).max() > 1e-3  # it does compute in bfloat16


def test_parameters_are_the_release_s():
    shapes = jax.tree.leaves(vit.shapes(variant("ViT-B/16")))
    assert sum(np.prod(s.shape) for s in shapes) == 86_567_656 - 768  # a class token without a position


@pytest.mark.slow
def test_its_step_learns():
    tx, params = vit.optimizer(), theirs(ours())
    state, losses = tx.init(params), []
    labels = jnp.arange(3)
    step = jax.jit(lambda p, s: vit.step(p, s, images(), labels, tx=tx, dtype=jnp.float32))
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_its_optimizer_decays_kernels_alone_and_has_one_moment_in_bfloat16():
    tx, params = vit.optimizer(), {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
    state = tx.init(params)
    moments = [m for m in jax.tree.leaves(state) if m.dtype == jnp.bfloat16]
    assert len(moments) == len(jax.tree.leaves(params))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_allclose(jnp.stack(jax.tree.leaves(updates)), [[0.0] * 3, [-1e-4] * 3])


def test_what_the_release_has_not_is_refused():
    with pytest.raises(ValueError, match="a plain ViT with a class token"):
        vit.shapes(dataclasses.replace(CONFIG, pool="gap"))
