"""Looking inside a model: the functions against NumPy written apart from them, statistics of whole models, and the command."""

import dataclasses
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from PIL import Image

import vitcore
from tests.oracle import kernels_in
from tests.vitcore.test_model import SMALL, small_inputs
from vitcore.inspect import main, positions_of
from vitcore.positions import POSITIONS

# ---- the functions


def test_distances_are_those_of_centres_in_pixels():
    config = dataclasses.replace(SMALL, image_size=(8, 12))  # patches of 4: two rows of three
    found = vitcore.token_distances(config)
    centres = [(2 + 4 * (i // 3), 2 + 4 * (i % 3)) for i in range(6)]
    for i, a in enumerate(centres):
        for j, b in enumerate(centres):
            assert found[1 + i, 1 + j] == pytest.approx(np.hypot(a[0] - b[0], a[1] - b[1]))
    assert not found[0].any()
    assert not found[:, 0].any()


def test_filters_are_eigenvectors_of_the_covariance():
    kernel = np.random.default_rng(0).standard_normal((2, 2, 3, 40)) + 1.5  # a mean that is no component
    found, shares = vitcore.projection_filters(jnp.asarray(kernel), 5)
    values, vectors = np.linalg.eigh(np.cov(kernel.reshape(12, 40)))
    assert found.shape == (5, 2, 2, 3)
    for k in range(5):
        assert abs(found[k].ravel() @ vectors[:, -1 - k]) == pytest.approx(1, abs=1e-4)
        assert found[k].ravel()[np.abs(found[k]).argmax()] > 0
    np.testing.assert_allclose(shares, values[::-1][:5] / values.sum(), rtol=1e-4)
    assert vitcore.projection_filters(kernel)[0].shape[0] == 12
    with pytest.raises(ValueError, match=r"kernel \[2, 2\], components=28: \[P, P, C, D\]"):
        vitcore.projection_filters(np.zeros((2, 2)))


def test_similarity_is_the_cosine_pair_by_pair():
    table = np.random.default_rng(1).standard_normal((7, 5))
    found = vitcore.position_similarity(table, (2, 3), 1)
    for a in range(6):
        for b in range(6):
            u, v = table[1 + a], table[1 + b]
            expected = (u @ v) / np.sqrt((u @ u) * (v @ v))
            assert found[a // 3, a % 3, b // 3, b % 3] == pytest.approx(expected, abs=1e-6)
    assert np.isfinite(vitcore.position_similarity(np.zeros((6, 5)), (2, 3))).all()
    with pytest.raises(ValueError, match=r"position \[7, 5\]: \[0 \+ 2 x 3, D\] is required"):
        vitcore.position_similarity(table, (2, 3))


@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_embedding_of_one_table_is_drawn(position):
    """Also of an entry that nobody here has heard of: what it adds says whether there is a table."""
    pool = "gap" if position == "1d-patches" else "token"
    config = vitcore.ViTConfig(
        image_size=16, patch_size=4, width=16, depth=2, mlp_dim=8, num_heads=2, num_classes=3, position=position, pool=pool
    )
    similar, why = positions_of(vitcore.init(jax.random.key(0), config), config)
    has = position not in ("1d-layers", "2d-layers", "relative", "rope", "none")
    assert (similar is not None) == has, why
    assert similar is None or similar.shape == (4, 4, 4, 4)


@pytest.mark.parametrize("class_tokens", [0, 1])
def test_rollout_is_the_product_from_the_last_block_to_the_first(class_tokens):
    maps = np.random.default_rng(2).dirichlet(np.ones(5), size=(3, 2, 5))
    found = vitcore.attention_rollout(maps, class_tokens=class_tokens)
    for image in range(2):
        a, b, c = (0.5 * m[image] + 0.5 * np.eye(5) for m in maps)
        product = c @ (b @ a)
        expected = product[0, 1:] if class_tokens else product.mean(0)
        np.testing.assert_allclose(found[image], expected, atol=1e-6)


# ---- of whole models


def assert_statistics(found, maps, config):
    """Of float32 maps [L, B, N, T, T], element by element."""
    np.testing.assert_allclose(found.mean, maps.mean(2), atol=1e-5)
    np.testing.assert_allclose(found.row, maps[:, :, :, 0], atol=1e-5)
    first, sums = config.class_tokens, np.einsum("lbnts,ts->lbnt", maps, vitcore.token_distances(config))
    np.testing.assert_allclose(found.distance, sums[..., first:].mean(-1), rtol=1e-5)


ASKED: Any = {"mean": True, "row": True, "distance": True}


@pytest.mark.parametrize("change", [{}, {"pool": "gap"}, {"position": "relative"}], ids=str)
def test_statistics_are_those_of_the_maps(change):
    config = dataclasses.replace(SMALL, **change)
    params, images = vitcore.init(jax.random.key(3), config), small_inputs()[1]
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    maps = np.asarray(vitcore.attention_maps(params, images, config))
    assert_statistics(vitcore.attention_statistics(params, images, config, **ASKED), maps, config)
    some = vitcore.attention_statistics(params, images, config, blocks=(3, 1), **ASKED)
    assert_statistics(some, maps[[2, 0]], config)


def test_statistics_run_on_the_kernel_and_write_no_maps():
    params, images = small_inputs()
    run = partial(vitcore.attention_statistics, config=SMALL, ops=vitcore.INTERPRET, row=True, distance=True)
    assert kernels_in(run, params, images).count("attention_statistics") == 1  # in the loop
    assert "[6,4,17,17]" not in str(jax.make_jaxpr(run)(params, images)).replace(" ", "")


def test_a_mesh_gives_the_same_statistics():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    params, images = small_inputs()
    for blocks in (None, (2,)):
        expected = vitcore.attention_statistics(params, images, SMALL, blocks=blocks, **ASKED)
        found = jax.jit(vitcore.attention_statistics_on(mesh, SMALL, blocks=blocks, **ASKED))(params, images)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_nothing_asked_for_is_refused():
    params, images = small_inputs()
    with pytest.raises(ValueError, match="no statistic is asked for: mean=True, row=True or distance=True is required"):
        vitcore.attention_statistics(params, images, SMALL)


# ---- the command


@pytest.fixture
def files(tmp_path):
    params, _ = small_inputs()
    vitcore.save(tmp_path / "small.npz", params, SMALL)
    pixels = np.random.default_rng(4).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    return tmp_path


def test_the_command_writes_pictures_and_numbers(files, capsys):
    out = files / "out"
    assert main([str(files / "small.npz"), str(files / "one.png"), "--out", str(out)]) == 0
    names = {"filters.png", "positions.png", "distances.png", "rollout.png", "inspect.json"}
    assert {path.name for path in out.iterdir()} == names
    told = json.loads((out / "inspect.json").read_text())
    assert np.array(told["attention_distance_pixels"]["mean"]).shape == (4, 4)
    assert np.array(told["rollout"]).shape == (1, 4, 4)
    assert told["left_out"] == []
    for name in names - {"inspect.json"}:
        assert min(Image.open(out / name).size) > 100
    assert main([str(files / "small.npz"), "--out", str(files / "none")]) == 0
    assert "no attention: it is an image's, and none is given" in capsys.readouterr().out
    assert not (files / "none" / "rollout.png").exists()


def test_the_command_says_what_is_wrong_in_a_line(files, capsys):
    (files / "text.png").write_text("no image")
    for words, said in (
        ([files / "small.npz", files / "text.png"], "text.png cannot be read as an image"),
        ([files / "small.npz", files / "gone.png"], "gone.png cannot be read as an image"),
        ([files / "gone.npz"], "gone.npz"),
        ([files / "small.npz", "--mean", "0.5"], "--mean and --std belong together"),
    ):
        assert main([*map(str, words), "--out", str(files / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not (files / "out").exists()
