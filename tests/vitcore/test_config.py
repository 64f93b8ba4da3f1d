"""ViTConfig and variants: the paper's parameter counts, and errors that say what to do."""

import dataclasses
from functools import partial

import jax
import pytest

import vitcore


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ViT-B/16", 86_567_656),
        ("ViT-B/32", 88_224_232),
        ("ViT-L/16", 304_326_632),
        ("ViT-L/32", 306_535_400),
        ("ViT-H/14", 632_045_800),
    ],
)
def test_parameter_counts_of_the_paper(name, count):
    shapes = jax.eval_shape(partial(vitcore.init, config=vitcore.variant(name)), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_hidden_layer_adds_its_parameters():
    with_hidden = vitcore.variant("ViT-B/16", representation_size=768)
    shapes = jax.eval_shape(partial(vitcore.init, config=with_hidden), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 86_567_656 + 768 * 768 + 768


def test_config_is_hashable_and_frozen():
    config = vitcore.variant("ViT-S/16", image_size=(224, 160))
    assert hash(config) == hash(vitcore.variant("ViT-S/16", image_size=(224, 160)))
    assert config.tokens == 14 * 10 + 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(image_size=225), "image_size=225 is not divisible by patch_size=16: use a multiple of 16, e.g. 224"),
        (dict(num_heads=7), "width=768 is not divisible by num_heads=7"),
        (dict(width=0), "width=0: a positive integer is required"),
        (dict(depth=-1), "depth=-1: a positive integer is required"),
        (dict(dropout=1.0), "dropout=1.0: a rate in"),
        (dict(pool="max"), "pool='max': 'token', 'gap', 'map', 'first' or 'none' is required"),
        (dict(gelu="relu"), "gelu='relu'"),
        (dict(eps=0.0), "eps=0.0"),
        (dict(eps="1e-6"), "eps='1e-6'"),
        (dict(representation_size=0), "representation_size=0"),
        (dict(hidden=3), "unknown field hidden of ViTConfig"),
    ],
)
def test_bad_values_are_refused(changes, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        vitcore.variant("ViT-B/16", **changes)


@pytest.mark.parametrize(
    ("name", "near"), [("ViT-B16", "ViT-B/16"), ("vit-l/16", "ViT-L/16"), ("ViT-XXL/14", "ViT-L/16"), ("", "ViT-B/16")]
)
def test_unknown_model_shows_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown model '{name}'.*{near}"):
        vitcore.variant(name)
