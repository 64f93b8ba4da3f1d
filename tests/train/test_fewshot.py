"""Few-shot regression against scikit-learn's, the draws, and the job."""

import json

import jax
import numpy as np
import pytest
from sklearn.linear_model import Ridge

import vitcore
from train import fewshot
from train import mesh as meshes
from train.data import open_source
from vitcore.sharding import MeshShape

CONFIG = vitcore.variant("ViT-Nano/4", image_size=8, channels=1, num_classes=10, representation_size=48)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: vitcore.init(jax.random.key(0), CONFIG))()


@pytest.fixture(scope="module")
def sources():
    return open_source("digits", "train"), open_source("digits", "val")


@pytest.fixture(scope="module")
def features(params, sources):
    """Those of the drawn images at 25 shots, seed 0, and of the test images."""
    train, test = sources
    chosen = fewshot.draw(train.labels(), 25, train.classes, 0)
    images = [np.stack([np.asarray(s[i].image, np.float32) / 127.5 - 1 for i in which]) for s, which in (
        (train, chosen.tolist()), (test, range(len(test))))]  # fmt: skip
    read = jax.jit(lambda x: vitcore.features(params, x, CONFIG))
    return (*(np.asarray(read(x)) for x in images), train.labels()[chosen], test.labels())


@pytest.mark.parametrize("shots", [1, 5, 10, 25])
def test_it_is_scikit_learn_s_ridge(features, shots):
    """On features of a model; 64 of them, so that there are fewer rows than columns and more."""
    train, test, labels, _ = features
    rows = np.concatenate([np.flatnonzero(labels == c)[:shots] for c in range(10)])
    x, x_test = fewshot.prepare(train[rows], test)
    y = fewshot.targets(labels[rows], 10)
    for l2 in (fewshot.L2, 0.5):
        ours = x_test @ fewshot.ridge(x, y, l2=l2)
        theirs = Ridge(alpha=l2, fit_intercept=False).fit(x, y).predict(x_test)
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
        assert len(set(theirs.argmax(1))) > 3


def test_the_constant_column_is_an_intercept(features):
    """A penalty on W of the column 100 is a ten-thousandth of one on the intercept itself: Ridge with a free intercept, nearly."""
    train, test, labels, _ = features
    x, x_test = fewshot.prepare(train, test)
    y = fewshot.targets(labels, 10)
    ours = x_test @ fewshot.ridge(x, y, l2=10.0)
    theirs = Ridge(alpha=10.0).fit(x[:, :-1], y).predict(x_test[:, :-1])
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_preparing_uses_the_training_images_alone():
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((20, 3)) * 5 + 2, rng.standard_normal((4, 3))
    x, x_test = fewshot.prepare(train, test)
    np.testing.assert_allclose(x[:, :3].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(x[:, :3].std(0), 1, atol=1e-4)
    assert (x[:, 3] == 100).all()
    np.testing.assert_allclose(x_test[:, :3], (test - train.mean(0)) / (train.std(0) + 1e-5))
    x, x_test = fewshot.prepare(train, test, whiten=False, bias=0)
    np.testing.assert_array_equal(x, train)
    assert fewshot.prepare(np.ones((2, 3)), test)[0].max() == 100  # a feature that never changes is no division by zero


def test_draws_are_balanced_nested_and_by_seed():
    labels = np.repeat(np.arange(3), 30)
    five, ten = (fewshot.draw(labels, k, "abc", 0) for k in (5, 10))
    assert np.bincount(labels[ten]).tolist() == [10, 10, 10]
    assert set(five) < set(ten)
    assert set(fewshot.draw(labels, 5, "abc", 1)) != set(five)
    np.testing.assert_array_equal(five, fewshot.draw(labels, 5, "abc", 0))
    with pytest.raises(ValueError, match="class 'c' has 30 training images, 31 shots need 31"):
        fewshot.draw(np.append(labels, [0, 1]), 31, "abc", 0)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)], ids=str)
def test_the_probe_of_a_run(params, sources, features, shape):
    """On any mesh what the features computed on one device give."""
    from train.frozen import put_params

    mesh, _ = meshes.make(MeshShape(*shape))
    protocol = fewshot.Protocol(shots=(5, 25), seeds=1)
    run = fewshot.probe(CONFIG, mesh, *sources, protocol=protocol, batch_size=64, read="representation")
    found = run(put_params(params, CONFIG, mesh))
    train, test, labels, test_labels = features
    want = fewshot.accuracy(train, labels, test, test_labels, 10)
    assert found.keys() == {"fewshot_5", "fewshot_25"}
    assert found["fewshot_25"] == pytest.approx(want, abs=1.5 / 355)
    assert 0.3 < found["fewshot_5"] < found["fewshot_25"] + 0.05
    hidden = fewshot.probe(CONFIG, mesh, *sources, protocol=protocol, batch_size=64)(put_params(params, CONFIG, mesh))
    assert hidden != found


def test_the_job_on_pixels_and_on_a_file(params, tmp_path, capsys):
    assert fewshot.main(["--features", "pixels", "--mesh", "2x1", "--out", str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out
    assert "the pixels" in printed
    held = json.loads((tmp_path / "r.json").read_text())["accuracy"]
    assert held.keys() == {"1", "5", "10", "25"}
    means = {k: np.mean(v) for k, v in held.items()}
    assert 0.3 < means["1"] < means["5"] < means["25"] < 1
    assert f"25-shot: {means['25']:.2%}" in printed
    # the same numbers by scikit-learn from the pixels themselves
    train, test = open_source("digits", "train"), open_source("digits", "val")
    chosen = fewshot.draw(train.labels(), 25, train.classes, 2)
    x, x_test = (np.stack([s[i].image.reshape(-1) / 127.5 - 1 for i in w]) for s, w in ((train, chosen), (test, range(355))))
    x, x_test = fewshot.prepare(x, x_test)
    y = fewshot.targets(train.labels()[chosen], 10)
    theirs = Ridge(alpha=1024, fit_intercept=False).fit(x, y).predict(x_test)
    assert held["25"][2] == pytest.approx((theirs.argmax(1) == test.labels()).mean(), abs=1.5 / 355)

    vitcore.save(tmp_path / "w.npz", params, CONFIG)
    assert fewshot.main(["--init", str(tmp_path / "w.npz"), "--mesh", "4x2", "--shots", "1", "2", "--seeds", "2"]) == 0
    assert "release naming" in (printed := capsys.readouterr().out)
    assert "2-shot: " in printed


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--init is required"),
        (["--init", "/no/such.npz"], "/no/such.npz"),
        (["--init", "/no/such/run"], "/no/such/run: there is no such"),
        (["--features", "pixels", "--shots", "1000"], "1000 shots need 1000: choose fewer --shots"),
        (["--features", "pixels", "--shots", "0"], "positive numbers are required"),
        (["--features", "pixels", "--batch-size", "0"], "--batch-size 0: a positive number is required"),
        (["--features", "pixels", "--data", "digit"], "unknown data source 'digit'"),
        (["--shotz", "3"], "--shotz"),
    ],
)
def test_a_mistake_is_one_line(argv, words, capsys):
    assert fewshot.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("train.fewshot: error: ")
    assert said.count("\n") == 1
    assert words in said


def test_tokens_behind_a_block_are_those_of_the_shorter_model(params):
    import dataclasses

    from train.frozen import make_features, put_params
    from vitcore.context import Context
    from vitcore.model import encode
    from vitcore.ops import REFERENCE

    images = jax.random.uniform(jax.random.key(0), (8, 8, 8, 1), minval=-1)
    mesh, _ = meshes.make(MeshShape(4, 2))
    placed = put_params(params, CONFIG, mesh)
    short = dataclasses.replace(CONFIG, depth=1)
    some = {**params, "blocks": jax.tree.map(lambda a: a[:1], params["blocks"])}
    want = np.asarray(encode(some, images, short, Context(ops=REFERENCE))).reshape(8, -1)
    found = make_features(CONFIG, mesh, read="tokens", block=1)(placed, images)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="block 5: the model has blocks 1 to 4"):
        make_features(CONFIG, mesh, read="tokens", block=5)


def test_targets_are_minus_one_and_one():
    assert fewshot.targets(np.array([1, 0]), 3).tolist() == [[-1, 1, -1], [1, -1, -1]]
