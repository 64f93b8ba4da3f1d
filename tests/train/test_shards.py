"""What the data axis splits (--shard): the same numbers whatever it is, on any ops; a run goes on under another setting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests.train.interruption import interrupt_before
from tests.train.small import batch, mesh_of, with_a_head
from train import pretrain
from train.shards import better, choose, said
from train.step import StepOptions, make_eval_step, make_init, make_train_step
from vitcore import GPU, REFERENCE, partition_specs, variant
from vitcore.sharding import MeshShape

CONFIG = variant("ViT-Nano/4", image_size=8, channels=1, num_classes=10, depth=2, dropout=0.1, drop_path=0.3)


def three_steps(data, model, shard, ops):
    """(losses, the parameters, how many of the state's arrays are split, correct images) of three steps with dropout and stochastic
    depth."""
    mesh, tx = mesh_of(data, model), optax.sgd(0.1, momentum=0.9)
    options = StepOptions(ops=ops, shard=shard, clip_norm=1.0)
    state = make_init(CONFIG, mesh, tx, options)(jax.random.key(0))
    state = state._replace(params=with_a_head(state.params))
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    images, labels = batch(mesh, 8)
    step, losses = make_train_step(CONFIG, mesh, tx, options), []
    for _ in range(3):
        state, metrics = step(state, images, labels)
        losses.append(float(metrics["loss"]))
    sums = make_eval_step(CONFIG, mesh, options)(
        state.params, images, labels, jax.device_put(np.ones(8, np.float32), labels.sharding)
    )
    return losses, jax.tree.map(np.asarray, state.params), split, float(sums["loss"])


def same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[3], expected[3], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[1], expected[1])


def test_nothing_split_and_the_optimizer_split_are_the_same_training():
    """On two devices, by the reference ops: the numbers of one device, and state where the option says."""
    expected = three_steps(1, 1, "parameters", REFERENCE)
    whole, optimizer = three_steps(2, 1, "none", REFERENCE), three_steps(2, 1, "optimizer", REFERENCE)
    same(whole, expected)
    same(optimizer, expected)
    assert whole[2] == 0
    assert optimizer[2] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "model", "shard"),
    [
        (2, 1, "optimizer"),
        (2, 1, "parameters"),
        (1, 2, "none"),
        (2, 2, "optimizer"),
        (2, 2, "parameters"),
        (2, 2, "none"),
    ],
)
def test_sums_in_turn_and_halves_of_a_batch_change_no_number(data, model, shard):
    """The GPU ops, whose blocks sum their gradients in turn on a data axis and take the batch in halves on a model axis."""
    assert GPU.paced
    same(three_steps(data, model, shard, GPU), three_steps(1, 1, "parameters", REFERENCE))


def test_auto_goes_by_the_model_s_size():
    mesh = mesh_of(2, 1)

    def auto(name, dtype=jnp.bfloat16):
        return choose("auto", variant(name, image_size=224, num_classes=1000), mesh, dtype)

    assert [auto(f"ViT-{size}") for size in ("Ti/16", "B/16", "L/16", "H/14")] == ["none", "optimizer", "optimizer", "parameters"]
    assert auto("ViT-L/16", jnp.float32) == "parameters"
    assert choose("none", variant("ViT-H/14", image_size=224, num_classes=1000), mesh, jnp.float32) == "none"
    assert "--shard optimizer" in said("optimizer", mesh)
    assert said("optimizer", mesh_of(1, 2)) == ""


def test_specs_of_whole_parameters_keep_the_model_axis():
    specs = partition_specs(CONFIG, MeshShape(2, 2), shard="none")
    axes = {axis for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)) for axis in jax.tree.leaves(tuple(spec))}
    assert axes == {"model"}


@pytest.mark.slow
def test_a_run_goes_on_under_another_setting(tmp_path, monkeypatch, capsys):
    """Interrupted with whole parameters, it resumes with split ones and ends as an unbroken run does."""
    monkeypatch.chdir(tmp_path)
    words = ["--model", "ViT-Nano/4", "--steps", "6", "--mesh", "2x1", "--checkpoint-every", "2", "--eval-every", "6"]
    words += ["--log-every", "1", "--checkpoint-wait"]
    assert pretrain.main([*words, "--out", "whole", "--shard", "parameters"]) == 0
    interrupt_before(monkeypatch, 4)
    assert pretrain.main([*words, "--out", "broken", "--shard", "none"]) == 130
    interrupt_before(monkeypatch, None)
    assert pretrain.main([*words, "--out", "broken", "--shard", "optimizer"]) == 0
    assert "resuming at step 4" in capsys.readouterr().out
    last = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("whole", "broken")]
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in last]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_the_option_is_no_part_of_what_a_run_is():
    args = pretrain.Pretrain()
    assert pretrain.identity(args) == pretrain.identity(dataclasses.replace(args, shard="none"))


def faster(name, mesh, images, asked="auto"):
    return better(variant(name, image_size=224, num_classes=1000), MeshShape(*mesh), images, asked=asked, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("name", "mesh", "images"),
    [("ViT-B/16", (8, 4), 4096), ("ViT-L/16", (1, 2), 256), ("ViT-H/14", (8, 4), 4096), ("R50x1", (8, 4), 4096)],
)
def test_a_model_axis_that_nothing_asks_for_is_said(name, mesh, images):
    assert f"--mesh {mesh[0] * mesh[1]}x1 is faster" in faster(name, mesh, images)


@pytest.mark.parametrize(
    ("name", "mesh", "images", "asked"),
    [
        ("ViT-B/16", (32, 1), 4096, "auto"),  # there is none
        ("ViT-B/16", (8, 4), 16, "auto"),  # not an image for each device
        ("ViT-B/16", (16, 2), 64, "auto"),  # sums of gradients would be more bytes than sums of tokens
        ("ViT-H/14", (8, 4), 4096, "none"),  # ten GiB on every device
        ("ViT-H/14", (256, 2), 4096, "auto"),  # 512 does not divide its width: the longer axis would leave most of it whole
    ],
)
def test_a_model_axis_with_a_reason_is_left_alone(name, mesh, images, asked):
    assert faster(name, mesh, images, asked) == ""


def test_parameters_that_a_data_axis_does_not_divide_are_never_silent():
    huge = variant("ViT-H/14", num_classes=1000)
    line = said("parameters", MeshShape(512, 1), huge)
    assert "but for 67% of the parameters, whole on each because 512 does not divide 1280; --mesh 256x2 splits them" in line
    assert "but for" not in said("parameters", MeshShape(32, 1), huge)
    assert "but for" not in said("none", MeshShape(512, 1), huge)
    specs = jax.tree.leaves(partition_specs(huge, MeshShape(512, 1)), is_leaf=lambda x: isinstance(x, P))
    assert sum("data" in str(spec) for spec in specs) < sum(
        "data" in str(spec)
        for spec in jax.tree.leaves(partition_specs(huge, MeshShape(256, 2)), is_leaf=lambda x: isinstance(x, P))
    )


@pytest.mark.parametrize(("mesh", "faster"), [("1x3", True), ("2x1", False)])
def test_a_run_says_that_another_mesh_is_faster(mesh, faster, tmp_path, monkeypatch, capsys):
    """Its lines, up to where the loop would begin."""

    def begin(spec, say, **_):
        raise ValueError("the loop begins")

    monkeypatch.setattr("train.loop.train", begin)
    words = ["--model", "ViT-Ti/16", "--image-size", "64", "--batch-size", "96", "--steps", "2", "--out", str(tmp_path / "run")]
    assert pretrain.main([*words, "--mesh", mesh]) == 2
    said = capsys.readouterr()
    assert "the loop begins" in said.err
    assert ("mesh 1x3: --mesh 3x1 is faster" in said.out) == faster
