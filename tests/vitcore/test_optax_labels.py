"""Optimizers of optax on stacked parameters: what they decay, and that each layer is a matrix of its own where they ask for it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import vitcore
from vitcore import families

TINY = vitcore.ViTConfig(image_size=8, patch_size=4, channels=1, width=16, depth=3, num_heads=2, mlp_dim=32, num_classes=5)
NAMES = ("ViT-B/16", "R50+ViT-B/16", "R50x1", "Axial-ViT-B/16", "AxialResNet-50")


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32), tree)


def one_by_one(tree):
    """{path and index: matrix} of a tree, its blocks cut into layers, and q, k, v apart: written down for TINY alone."""
    out = {}
    for keys, value in jax.tree.leaves_with_path(tree):
        path = tuple(key.key for key in keys)
        layers = range(3) if path[0] == "blocks" else [None]
        for i in layers:
            layer = value if i is None else value[i]
            for j in range(3) if "qkv" in path else [None]:
                out["/".join(map(str, (*path, i, j)))] = layer if j is None else layer[j]
    return out


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_of_every_kind_of_model_has_a_label(name):
    config = vitcore.variant(name, num_classes=7)
    labels = {leaf.path: "" for leaf in families.leaves(config)}
    for keys, label in jax.tree.leaves_with_path(vitcore.optax_labels(config)):
        labels[tuple(key.key for key in keys)] = label
    assert set(labels.values()) <= {"kernel", "bias", "norm", "embedding"}
    for leaf in families.leaves(config):
        axes = len(leaf.shape) - (leaf.path[0] == "blocks" or "rest" in leaf.path) - ("qkv" in leaf.path[:-1])
        if labels[leaf.path] == "kernel":
            assert axes in (2, 4), f"{leaf.path}: no matrix and no convolution"
        if labels[leaf.path] in ("bias", "norm"):
            assert axes == 1, leaf.path


def test_the_mask_of_kernels_is_what_the_paper_decays():
    params = vitcore.init(jax.random.key(0), TINY)
    mask = jax.tree.map(lambda label: label == "kernel", vitcore.optax_labels(TINY))
    tx = optax.adamw(1.0, weight_decay=0.5, mask=mask)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for keys, update in jax.tree.leaves_with_path(updates):
        value: Any = params
        for key in keys:
            value = value[key.key]
        expected = -0.5 * value if keys[-1].key == "kernel" else 0 * value
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=jax.tree_util.keystr(keys))


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(optax.lamb(0.1, weight_decay=0.1), id="lamb"),
        pytest.param(contrib.muon(0.1, ns_steps=1), id="muon", marks=pytest.mark.slow),
        pytest.param(optax.adamw(0.1), id="adamw"),
        pytest.param(optax.adafactor(0.1), id="adafactor", marks=pytest.mark.slow),
    ],
)
def test_per_layer_is_the_optimizer_on_layers_that_were_never_stacked(tx):
    params = random_like(vitcore.init(jax.random.key(0), TINY), 0)
    apart, whole = one_by_one(params), params
    other, state = tx.init(apart), (mine := vitcore.per_layer(tx, TINY)).init(params)
    for step in range(2):
        grads = random_like(params, step + 1)
        updates, state = mine.update(grads, state, whole)
        expected, other = tx.update(one_by_one(grads), other, apart)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        for name, update in one_by_one(updates).items():
            np.testing.assert_allclose(update, expected[name], rtol=2e-4, atol=2e-6, err_msg=name)
        whole, apart = optax.apply_updates(whole, updates), optax.apply_updates(apart, expected)


def test_without_it_stacked_layers_are_taken_for_one():
    tx = optax.lamb(0.1, weight_decay=0.1)
    params = random_like(vitcore.init(jax.random.key(0), TINY), 0)
    grads = random_like(params, 1)
    plain, _ = tx.update(grads, tx.init(params), params)
    mine = vitcore.per_layer(tx, TINY)
    updates, _ = mine.update(grads, mine.init(params), params)
    kernel = ("blocks", "mlp_in", "kernel")
    trees: Any = (plain, updates)
    a, b = (tree[kernel[0]][kernel[1]][kernel[2]] for tree in trees)
    assert float(jnp.abs(a - b).max()) > 1e-3


def test_a_rate_by_layer():
    depths = vitcore.layer_indices(TINY)
    assert depths["patch_embed"]["kernel"] == depths["patch_embed"]["position"] == 0
    assert depths["blocks"]["mlp_in"]["kernel"].ravel().tolist() == [1, 2, 3]
    assert depths["norm"]["scale"] == depths["head"]["kernel"] == 4
    params = vitcore.init(jax.random.key(0), TINY)
    scaled = jax.tree.map(lambda p, depth: p * 0.5 ** (4 - depth), params, depths)
    assert jax.tree.map(jnp.shape, scaled) == jax.tree.map(jnp.shape, params)
    with pytest.raises(ValueError, match="layer_indices is for models with blocks"):
        vitcore.layer_indices(vitcore.variant("R50x1", num_classes=3))
