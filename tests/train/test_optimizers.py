"""--optimizer lion, adafactor, muon and --sam: what optax computes of each matrix alone, the same on any mesh and after a stop."""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vitcore
from tests.train.interruption import interrupt_before
from tests.train.small import batch, mesh_of, with_a_head
from train import finetune, pretrain
from train.optimizers import WHOLE, named
from train.step import StepOptions, make_init, make_train_step
from vitcore import REFERENCE

CONFIG = vitcore.variant("ViT-Nano/4", image_size=8, channels=1, num_classes=10, depth=2, representation_size=None)
NAMES = ["lion", "adafactor", "muon"]


def tree_of(seed) -> Any:
    """A tree like the parameters, of numbers of the order of one."""
    params = jax.eval_shape(partial(vitcore.init, config=CONFIG), jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)])


def two_updates(tx) -> Any:
    params: Any = tree_of(0)
    state = tx.init(params)
    for seed in (1, 2):
        updates, state = jax.jit(tx.update)(tree_of(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def agree(found, expected, *, but=()):
    for path, leaf in jax.tree.leaves_with_path(found):
        if path[0].key not in but:
            other = expected
            for key in path:
                other = other[key.key]
            np.testing.assert_allclose(leaf, other, rtol=2e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def kernels(params):
    return jax.tree.map(lambda label: label == "kernel", vitcore.optax_labels(CONFIG))


def test_lion_is_optax_s():
    found, _ = two_updates(named("lion", lambda _: 0.01, CONFIG, weight_decay=0.1))
    agree(found, two_updates(optax.lion(0.01, b1=0.9, b2=0.99, weight_decay=0.1, mask=kernels))[0])


def test_adafactor_is_optax_s_of_each_matrix_alone():
    alone = vitcore.per_layer(
        optax.adafactor(0.01, min_dim_size_to_factor=64, multiply_by_parameter_scale=False, clipping_threshold=1.0), CONFIG
    )
    found, state = two_updates(named("adafactor", lambda _: 0.01, CONFIG, weight_decay=0.0, factored=64))
    agree(found, two_updates(alone)[0])
    factored = state[0][0].v_row["blocks"]["qkv"]["kernel"]
    assert factored.shape == (2, 3, 64)  # of D x D matrices, and not of layers and columns


def test_muon_is_optax_s_of_each_matrix_of_the_blocks_alone():
    """The others are Adam's: optax's own rule would take every matrix, the head's too, and no stacked one."""
    alone = vitcore.per_layer(optax.contrib.muon(0.01, consistent_rms=0.2), CONFIG)
    found, _ = two_updates(named("muon", lambda _: 0.01, CONFIG, weight_decay=0.0))
    agree(found, two_updates(alone)[0], but=("head", "patch_embed"))
    adam, _ = two_updates(optax.nadamw(0.01, weight_decay=0.0))
    agree({"head": found["head"]}, adam)


def test_decay_and_layers_are_those_of_adamw():
    found, _ = two_updates(named("muon", lambda _: 0.01, CONFIG, weight_decay=0.1, layer_decay=0.5))
    plain, _ = two_updates(named("muon", lambda _: 0.01, CONFIG, weight_decay=0.0, layer_decay=1.0))
    w = tree_of(0)
    assert np.abs(found["blocks"]["qkv"]["kernel"] - plain["blocks"]["qkv"]["kernel"]).max() > 1e-3
    moved, whole = (np.abs(p["blocks"]["norm1"]["bias"] - w["blocks"]["norm1"]["bias"]).mean(1) for p in (found, plain))
    np.testing.assert_allclose(moved / whole, [0.25, 0.5], rtol=1e-4)  # of two layers, below the head


def steps(name, data, model, *, sam=0.0, shard: Any = "parameters") -> Any:
    """(losses and norms, parameters, average, the state) of three steps with clipping and Polyak average."""
    mesh, rate = mesh_of(data, model), lambda _: 0.01
    tx = optax.adam(rate) if name == "adam" else named(name, rate, CONFIG, weight_decay=0.1, factored=64)
    options = StepOptions(ops=REFERENCE, shard=shard, clip_norm=1.0, polyak=0.9, sam=sam, whole=name in WHOLE)
    state = make_init(CONFIG, mesh, tx, options)(jax.random.key(0))
    state = state._replace(params=with_a_head(state.params))
    images, labels = batch(mesh, 8)
    step, found = make_train_step(CONFIG, mesh, tx, options), []
    for _ in range(3):
        state, metrics = step(state, images, labels)
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return found, jax.tree.map(np.asarray, state.params), jax.tree.map(np.asarray, state.average), state


def but_keys(params) -> Any:
    """(the parameters with zeros for the keys' bias, the keys' bias). It adds the same to all logits of a query: by the softmax
    its gradient is 0, of which rounding alone is left, and Lion takes the sign of that, Adafactor and Adam its share of itself."""
    blocks = params["blocks"]
    bias = np.asarray(blocks["qkv"]["bias"])  # [L, 3, D]
    without = np.where(np.arange(3)[:, None] == 1, 0, bias)
    return params | {"blocks": blocks | {"qkv": blocks["qkv"] | {"bias": without}}}, bias[:, 1]


def near(ours, theirs, *, atol=1e-5, moved=3 * 0.01 * 1.5):
    """Every element within a thousandth of a step, but the keys' bias, of which no more is certain than how far it can go."""
    (ours, here), (theirs, there) = but_keys(ours), but_keys(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
    assert max(np.abs(here).max(), np.abs(there).max()) < moved  # it begins at 0


def test_the_gradient_of_the_keys_bias_is_rounding():
    """What `near` leaves out is 1e-18 of the values' beside it in float64 (1e-9 in float32)."""
    images = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 1))
    with jax.enable_x64(True):
        params: Any = jax.tree.map(lambda a: 0.1 * a.astype(jnp.float64), tree_of(0))

        def loss(p):
            return jnp.square(vitcore.apply(p, images, CONFIG, ops=REFERENCE, dtype=jnp.float64)).sum()

        bias = jax.jit(jax.grad(loss))(params)["blocks"]["qkv"]["bias"]
        assert np.abs(bias[:, 1]).max() < 1e-14 * np.abs(bias[:, 2]).max()


@pytest.mark.parametrize(
    ("name", "data", "model", "shard"),
    [
        pytest.param("muon", 2, 2, "parameters", marks=pytest.mark.slow),
        pytest.param("adafactor", 2, 1, "optimizer", marks=pytest.mark.slow),
        pytest.param("lion", 2, 2, "parameters", marks=pytest.mark.slow),
        pytest.param("muon", 2, 1, "none", marks=pytest.mark.slow),
    ],
)
def test_any_mesh_takes_the_same_steps_and_splits_the_state(name, data, model, shard):
    expected, found = steps(name, 1, 1), steps(name, data, model, shard=shard)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    for ours, theirs in zip(found[1:3], expected[1:3], strict=True):
        near(ours, theirs)
    kept = [a for a in jax.tree.leaves(found[3].opt_state) if a.shape == (2, 64, 128)]
    assert all(a.sharding.is_fully_replicated == (shard == "none") for a in kept)
    assert kept or name == "adafactor"  # which has sums over rows and columns instead


@pytest.mark.slow
def test_sam_is_optax_s():
    """On one device, of a quadratic-free loss: the gradient of the neighbour `rho` uphill, by optax.contrib.sam."""
    found = steps("adam", 1, 1, sam=0.1)
    assert abs(found[0][2][0] - steps("adam", 1, 1)[0][2][0]) > 1e-5
    params = with_a_head(vitcore.init(jax.random.key(0), CONFIG))
    rng = np.random.default_rng(0)
    images, labels = rng.uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32), rng.integers(0, 10, 8)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(vitcore.apply(params, images, CONFIG), labels).mean()

    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01))
    sam = optax.contrib.sam(clipped, optax.chain(optax.contrib.normalize(), optax.sgd(0.1)), opaque_mode=True)

    @jax.jit
    def step(params, state):
        updates, state = sam.update(jax.grad(loss)(params), state, params, grad_fn=lambda p, _: jax.grad(loss)(p))
        return optax.apply_updates(params, updates), state

    state = sam.init(params)
    for _ in range(3):
        params, state = step(params, state)
    near(found[1], params, atol=1e-4)  # of another program: Adam divides what is all but no gradient by itself


@pytest.mark.slow
def test_sam_is_the_same_on_any_mesh():
    found, expected = steps("adam", 2, 2, sam=0.1), steps("adam", 1, 1, sam=0.1)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer", "muon"],
        ["--optimizer", "adafactor"],
        ["--optimizer", "lion", "--learning-rate", "0.0005", "--weight-decay", "0.5", "--first-moment", "bfloat16"],
        ["--sam", "0.05"],
    ],
    ids=lambda words: words[1],
)
def test_a_stopped_run_goes_on_bit_for_bit(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*words, "--model", "ViT-Nano/4", "--steps", "6", "--mesh", "2x1", "--shard", "parameters", "--checkpoint-every", "2"]
    words += ["--eval-every", "6", "--log-every", "1", "--checkpoint-wait", "--polyak", "0.9", "--drop-path", "0.2"]
    assert pretrain.main([*words, "--out", "whole"]) == 0
    interrupt_before(monkeypatch, 4)
    assert pretrain.main([*words, "--out", "broken"]) == 130
    interrupt_before(monkeypatch, None)
    assert pretrain.main([*words, "--out", "broken"]) == 0
    whole, broken = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "broken")
    )
    for line in (*whole, *broken):
        line.pop("images_per_second")
    assert whole == broken
    assert len(whole) == 6


@pytest.mark.parametrize(
    ("job", "words", "said"),
    [
        (pretrain, ["--optimizer", "lion"], "--optimizer lion: --learning-rate and --weight-decay are required"),
        (pretrain, ["--optimizer", "muon", "--sgd", "0.9"], "--optimizer muon and --sgd 0.9: give one of them"),
        (pretrain, ["--optimizer", "muon", "--first-moment", "bfloat16"], "--optimizer muon keeps its moments in float32"),
        (pretrain, ["--optimizer", "muon", "--weight-decay-form", "independent"], "--weight-decay-form independent is Adam's"),
        (pretrain, ["--optimizer", "muon", "--model", "R50x1", "--image-size", "32"], "this is a ResNet"),
        (pretrain, ["--sam", "-1"], "--sam -1.0: a radius of 0 or more is required"),
        (pretrain, ["--drop-path", "1"], "--drop-path 1.0: a rate in [0, 1) is required"),
        (finetune, ["--init", "w.npz", "--optimizer", "muon"], "--optimizer muon: --learning-rate is required"),
        (
            finetune,
            ["--init", "w.npz", "--optimizer", "muon", "--learning-rate", "1e-3", "--momentum-dtype", "bfloat16"],
            "keeps its moments in float32",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_one_line(job, words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert job.main([*words, "--mesh", "1x1"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_rate_falls_as_it_does_for_adamw():
    with pytest.raises(ValueError, match="layer_decay=0"):
        named("lion", lambda _: jnp.float32(0.1), CONFIG, weight_decay=0.1, layer_decay=0.0)
