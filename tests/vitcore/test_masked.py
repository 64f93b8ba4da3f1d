"""Masked patch prediction: what is corrupted, by an independent count and hash; colours by fractions; loss and every gradient
against float64 NumPy (tests/tape.py)."""

import dataclasses
import re
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcore
from tests import oracle, tape
from tests.tape import Number
from tests.vitcore.test_entries import attention, mlp, norm, table
from train.objectives import CORRUPTION, objective_of
from train.step import StepOptions
from vitcore import masked
from vitcore.context import Context
from vitcore.masked import Masked
from vitcore.sharding import MeshShape

TINY: Any = dict(image_size=(16, 24), patch_size=8, width=16, depth=1, mlp_dim=24, num_heads=2, num_classes=0, channels=1)


def config_of(target="mean", rate=0.5, **changes) -> Any:
    return vitcore.ViTConfig(**TINY | changes, masked=Masked(target=target, rate=rate))


# --- what is corrupted ---------------------------------------------------------------------------------------------------------


def mixed(h):
    """lowbias32 in Python's own integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        h = ((h ^ (h >> shift)) * factor) % 2**32
    return h


def corrupted_by_hand(key, example, patches, rate):
    """(the corrupted patches, whose embedding stands in each patch's place) of one image."""
    word = int(jax.random.bits(key, (), jnp.uint32))

    def draw(site, patch):
        return mixed((mixed(word ^ site) + (example * patches + patch) * 0x9E3779B9) % 2**32)

    def signed(h):
        return h - 2**32 if h >= 2**31 else h

    order = sorted(range(patches), key=lambda n: signed(draw(0x165667B1, n)))
    chosen, source = order[: max(1, int(rate * patches + 0.5))], list(range(patches))
    for n in chosen:
        kind = (draw(0x27D4EB2F, n) >> 8) / 2**24
        if kind < 0.8:
            source[n] = -1
        elif kind < 0.9:
            source[n] = (n + 1 + (draw(0x5BD1E995, n) >> 8) % (patches - 1)) % patches
    return sorted(chosen), source


def test_the_draws_are_the_hash_of_key_example_and_patch():
    config, key = config_of(rate=0.7, image_size=(40, 40)), jax.random.key(5)
    found = masked.corruption(key, 1000, 20, config)
    for i in range(20):
        places, source = corrupted_by_hand(key, 1000 + i, 25, 0.7)
        assert found.places[i].tolist() == places
        assert found.source[i].tolist() == source


@pytest.mark.parametrize("rate", [0.5, 0.15])
def test_the_paper_s_shares_are_corrupted(rate):
    """Exactly the rate of every image's patches; of these 80, 10 and 10 %, within four deviations; no patch is favoured."""
    config = vitcore.variant("ViT-B/16", num_classes=0, masked=Masked(rate=rate))
    images, n = 1000, 196
    places, source = jax.tree.map(np.asarray, masked.corruption(jax.random.key(0), 0, images, config))
    k = round(rate * n)
    assert places.shape == (images, k)
    chosen = np.zeros((images, n), bool)
    np.put_along_axis(chosen, places, True, 1)
    assert (chosen.sum(1) == k).all()
    assert (source[~chosen] == np.broadcast_to(np.arange(n), chosen.shape)[~chosen]).all()
    own = source == np.arange(n)
    shares = [((source == -1) & chosen).mean(), (chosen & ~own & (source >= 0)).mean(), (own & chosen).mean()]
    for share, wanted in zip(np.array(shares) / chosen.mean(), (0.8, 0.1, 0.1), strict=True):
        assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / chosen.sum()) ** 0.5
    assert np.abs(chosen.mean(0) - k / n).max() < 5 * (rate * (1 - rate) / images) ** 0.5
    apart = (source - np.arange(n))[chosen & ~own & (source >= 0)] % n
    assert apart.min() >= 1
    counts = np.bincount(apart, minlength=n)[1:]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < n + 5 * (2 * n) ** 0.5  # chi squared


def test_corruption_goes_by_the_example():
    config, key = config_of(), jax.random.key(1)
    whole = masked.corruption(key, 0, 8, config)
    part = masked.corruption(key, 3, 5, config)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[3:], b)
    other = masked.corruption(jax.random.key(2), 0, 8, config)
    assert (np.asarray(whole.source) != np.asarray(other.source)).any()
    assert {config_of(rate=r).masked.count(6) for r in (0.01, 0.1)} == {1}
    assert config_of(rate=1.0).masked.count(6) == 6


def test_corrupted_embeddings_are_mask_another_s_or_their_own():
    patches = jax.random.normal(jax.random.key(0), (2, 4, 3)).astype(jnp.bfloat16)
    chosen = masked.Corruption(jnp.array([[0, 1], [2, 3]]), jnp.array([[-1, 3, 2, 3], [0, 1, 2, -1]]))
    out = masked.corrupted(patches, chosen, jnp.full(3, 7.0))
    assert out.dtype == jnp.bfloat16
    mask = np.full(3, 7.0)
    want = [[mask, patches[0, 3], patches[0, 2], patches[0, 3]], [patches[1, 0], patches[1, 1], patches[1, 2], mask]]
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.array(want, np.float32))


# --- colours -------------------------------------------------------------------------------------------------------------------


def exact_levels(patch, cells):
    """The upper three bits of the mean of each of cells x cells equal parts of bytes [P, P, C], by fractions."""
    p = patch.shape[0]

    def share(cell, pixel):
        low, high = max(Fraction(cell * p, cells), pixel), min(Fraction((cell + 1) * p, cells), pixel + 1)
        return max(Fraction(0), high - low)

    def mean(i, j, c):
        total = sum(share(i, y) * share(j, x) * int(patch[y, x, c]) for y in range(p) for x in range(p))
        return int(total / Fraction(p, cells) ** 2 / 32)

    return [[[mean(i, j, c) for c in range(patch.shape[2])] for j in range(cells)] for i in range(cells)]


@pytest.mark.parametrize(("side", "cells"), [(4, 1), (5, 4), (8, 4), (14, 4), (14, 1)])
def test_colours_are_exact(side, cells):
    rng = np.random.default_rng(side)
    patches = rng.integers(0, 256, (3, side, side, 3), np.uint8)
    patches[0], patches[1] = 255, np.repeat(rng.integers(0, 9, (side, side, 1)), 3, 2) // 8 + 31  # means next to an edge, 32
    floats = (patches.astype(np.float64) * 2 / 255 - 1).astype(np.float32)
    np.testing.assert_array_equal(masked.levels(floats, cells), [exact_levels(patch, cells) for patch in patches])


def test_a_colour_has_nine_bits_red_first_and_is_shown_by_its_middle():
    target, config = masked.TARGETS["mean"], config_of(channels=3)
    assert int(masked.colour(jnp.array([5, 0, 3]))) == 5 * 64 + 3
    assert target.outputs(config) == 512
    assert masked.TARGETS["small"].outputs(config) == 16 * 512
    assert masked.TARGETS["pixels"].outputs(config) == 64 * 3
    assert target.outputs(config_of()) == 8
    np.testing.assert_allclose(target.shown(jnp.array([5 * 64 + 3]), config), [[[[5.5 / 8, 0.5 / 8, 3.5 / 8]]][0]])


def test_patches_are_where_the_model_sees_them():
    """The first patch of the second row of the image, as the projection of the model reads it."""
    config = config_of(channels=3)
    images = jax.random.uniform(jax.random.key(0), (2, 16, 24, 3))
    np.testing.assert_array_equal(masked.patches_of(images, config)[:, 3], images[:, 8:16, :8])


# --- loss and gradients --------------------------------------------------------------------------------------------------------


def loss_by_hand(p, images, config, key):
    """The mean loss over the corrupted patches of bytes [B, Y, X, C], from the paper's equations; p: a tree of Numbers."""
    (rows, columns), side, total = config.grid, config.patch_size, Number(0.0)
    for i, image in enumerate(images):
        cells = [image[y * side : (y + 1) * side, x * side : (x + 1) * side] for y in range(rows) for x in range(columns)]
        places, source = corrupted_by_hand(key, i, len(cells), config.masked.rate)
        flat = Number(np.stack([cell.reshape(-1) for cell in cells]) / 127.5 - 1)
        kernel = p["patch_embed"]["kernel"].reshape(-1, config.width)
        patches = tape.einsum("np,pd->nd", flat, kernel) + p["patch_embed"]["bias"]
        mask = p["masked"]["embedding"].reshape(1, -1)
        z = [mask if n < 0 else patches[n : n + 1] for n in source]
        first = [p["patch_embed"]["cls"].reshape(1, -1)] if config.pool == "token" else []
        x = tape.concatenate(first + z, 0) + table(config, "1d", p["patch_embed"])
        for layer in range(config.depth):
            w = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"], is_leaf=lambda a: isinstance(a, Number))
            x = x + attention(x, w, config)
            x = x + mlp(x, w)
        y = norm(x, p["norm"])[np.array(places) + len(first)]
        found = tape.einsum("kd,do->ko", y, p["masked"]["head"]["kernel"]) + p["masked"]["head"]["bias"]
        for row, place in enumerate(places):
            if config.masked.target == "pixels":
                apart = found[row] - Number(cells[place].reshape(-1) / 127.5 - 1)
                total = total + (apart * apart).mean(0)
                continue
            parts = {"mean": 1, "small": 4}[config.masked.target]
            levels = np.array(exact_levels(cells[place], parts)).reshape(parts**2, -1)
            numbers = levels @ 8 ** np.arange(config.channels)[::-1]
            share = found[row].reshape(parts**2, -1).softmax()
            right = share[np.arange(parts**2), numbers]
            total = total - right.of(np.log, lambda x: 1 / x).mean(0)
    return total / (len(images) * len(places))


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("mean", {}),
        pytest.param("small", {"depth": 2}, marks=pytest.mark.slow),
        pytest.param("pixels", {"pool": "gap"}, marks=pytest.mark.slow),
        pytest.param("mean", {"channels": 3, "pool": "gap", "depth": 2}, marks=pytest.mark.slow),
    ],
    ids=["mean", "small", "pixels", "512 colours"],
)
def test_loss_and_every_gradient_agree_with_numpy(target, changes):
    config, key = config_of(target, **changes), jax.random.key(11)
    params = vitcore.init(jax.random.key(0), config)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda a: a + 0.2 * rng.standard_normal(a.shape).astype(np.float32), params)
    images = rng.integers(0, 256, (5, 16, 24, config.channels), np.uint8)

    def loss(params):
        losses = objective_of(config).losses(params, images, None, config, Context(), StepOptions(), key)
        assert losses.shape == (5,)
        return losses.mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    numbers = jax.tree.map(Number, params)
    leaves = jax.tree.leaves(numbers, is_leaf=lambda a: isinstance(a, Number))
    wanted = loss_by_hand(numbers, images, config, jax.random.fold_in(key, CORRUPTION))
    np.testing.assert_allclose(value, wanted.value, rtol=1e-6)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(gradient)]
    for name, got, want in zip(names, jax.tree.leaves(gradient), tape.gradients(wanted, leaves), strict=True):
        assert np.abs(want).max() > 1e-6 or "qkv" in name, name
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6 * max(1.0, np.abs(want).max()), err_msg=name)


@pytest.mark.slow
def test_the_score_counts_colours():
    """Of `small` sixteen a patch; of `pixels` whether the mean of what is predicted has the patch's colour."""
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 1), np.uint8)
    for target, colours in (("small", 16), ("pixels", 1)):
        config = config_of(target)
        params = vitcore.init(jax.random.key(0), config)
        head = params["masked"]["head"]
        score = jax.jit(
            lambda params, config=config: objective_of(config).sums(
                params, images, None, config, Context(), StepOptions(), jax.random.key(0)
            )
        )
        sums = score(params)
        assert sums["count"].tolist() == [3 * colours] * 3
        patches = masked.TARGETS[target].of(images / 127.5 - 1, config)
        places = masked.corruption(jax.random.fold_in(jax.random.key(0), CORRUPTION), 0, 3, config).places
        true = np.asarray(masked.at(patches, places))
        if target == "pixels":  # zeros are predicted: grey, 127.5, of level 3 or 4
            assert (sums["correct"] <= 3).all()
            np.testing.assert_allclose(sums["loss"], (true**2).mean(-1).sum(-1), rtol=1e-5)
            continue
        assert sums["correct"].tolist() == (true == 0).sum((1, 2)).tolist()  # of equal logits the first
        np.testing.assert_allclose(sums["loss"], 3 * colours * np.log(8), rtol=1e-6)
        head["bias"] = head["bias"].at[jnp.arange(colours) * 8 + 4].set(9.0)
        sums = score(params)
        assert sums["correct"].tolist() == (true == 4).sum((1, 2)).tolist() != [0, 0, 0]


@pytest.mark.slow
@pytest.mark.ci
def test_the_kernels_read_corrupted_patches():
    """Losses and gradients on the Pallas kernels are those of the reference, to rounding, and the projection is the kernel's."""
    config = config_of(width=32, num_heads=2)
    params = vitcore.init(jax.random.key(0), config)
    params["masked"]["head"]["kernel"] = 0.3 * jax.random.normal(jax.random.key(1), (32, 8))
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 1), np.uint8)
    leaves, tree = jax.tree.flatten(params)

    def losses(ops):
        context = Context(ops=ops)
        return lambda *leaves: objective_of(config).losses(
            jax.tree.unflatten(tree, leaves), images, None, config, context, StepOptions(), jax.random.key(4)
        )  # fmt: skip

    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    (plain, of_plain), (ours, of_ours) = (
        jax.jit(jax.value_and_grad(lambda leaves, ops=ops: losses(ops)(*leaves).sum()))(leaves)
        for ops in (vitcore.REFERENCE, vitcore.INTERPRET)
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    for name, a, b in zip(names, of_ours, of_plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()), err_msg=name)
    oracle.assert_kernel_ran(losses(vitcore.INTERPRET), *leaves, name="patch_embed")


# --- the configuration ---------------------------------------------------------------------------------------------------------


def test_its_leaves_come_and_go_with_it():
    config = config_of()
    params = vitcore.init(jax.random.key(0), config)
    assert params["masked"]["embedding"].shape == (16,)
    assert params["masked"]["head"]["kernel"].shape == (16, 8)
    specs = vitcore.partition_specs(config, MeshShape(2, 2))
    assert specs["masked"]["head"]["kernel"] == jax.sharding.PartitionSpec("data", None)
    without = vitcore.init(jax.random.key(0), dataclasses.replace(config, masked=None))
    masks = params.pop("masked")
    assert np.asarray(masks["embedding"]).std() > 0.005
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, without)), "no other leaf's first values change"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Masked(target="colour"), "masked target 'colour': mean, small, pixels are the known ones"),
        (lambda: Masked(rate=0.0), "masked rate 0.0: a share of the patches in (0, 1] is required"),
        (lambda: Masked(rate=1.5), "masked rate 1.5"),
        (lambda: config_of(image_size=8), "makes one patch: masked patch prediction needs two at least"),
        (lambda: config_of("small", patch_size=2), "these have 2 pixels a side"),
        (lambda: config_of(channels=4), "channels=4: masked patch prediction has colours of 1 to 3 channels"),
    ],
)
def test_what_it_cannot_be_is_said(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()
