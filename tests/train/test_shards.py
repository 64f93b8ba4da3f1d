"""What the data axis splits (--shard): the same numbers whatever it is, on any ops; a run goes on under another setting."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Literal
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.train.interruption import interrupt_before
from tests.train.small import batch, mesh_of, with_a_head
from train import mesh as meshes
from train import pretrain
from train import step as step_module
from train.mesh import parted as parted_mesh
from train.mesh import rows, shape_of
from train.shards import better, choose, laid_for, parted, said
from train.step import StepOptions, make_eval_step, make_init, make_train_step
from vitcore import GPU, REFERENCE, families, parameters, partition_specs, variant
from vitcore.sharding import AXES, MeshShape

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
    assert not GPU.alone()
    same(three_steps(data, model, shard, GPU), three_steps(1, 1, "parameters", REFERENCE))


ALONE = GPU._replace(alone=lambda: True)  # as on a Hopper GPU, whose multiprocessors our kernels hold


@pytest.mark.slow
@pytest.mark.parametrize("model", [1, 2])
def test_sums_behind_the_last_block_change_no_number(model):
    same(three_steps(2, model, "optimizer", ALONE), three_steps(1, 1, "parameters", REFERENCE))


def waits_for_sums(jaxpr, waiting=()) -> tuple[int, list[bool]]:
    """(barriers of a jaxpr that something summed over a mesh goes into, which of its results come of a sum); waiting: the same of
    its arguments."""
    of, count = dict(zip(jaxpr.invars, waiting, strict=False)), 0
    for eqn in jaxpr.eqns:
        given = [not isinstance(v, Literal) and of.get(v, False) for v in eqn.invars]
        inner = next((getattr(p, "jaxpr", p) for p in eqn.params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")), None)
        if inner is not None:
            more, results = waits_for_sums(inner, given)
            count += more
        else:
            count += eqn.primitive.name == "optimization_barrier" and any(given)
            results = [any(given) or eqn.primitive.name == "reduce_scatter"] * len(eqn.outvars)
        of.update(zip(eqn.outvars, results, strict=True))
    return count, [not isinstance(v, Literal) and of.get(v, False) for v in jaxpr.outvars]


@pytest.mark.parametrize(
    ("ops", "shard", "waits"), [(GPU, "optimizer", True), (ALONE, "optimizer", False), (ALONE, "parameters", True)]
)
def test_beside_kernels_that_hold_a_device_nothing_is_summed(ops, shard, waits):
    """No block waits for sums of gradients, unless parameters come layer by layer; but each for the gradients of the one before, so
    that what these are made of is freed."""
    mesh, tx, options = mesh_of(2, 1), optax.sgd(0.1), StepOptions(ops=ops, shard=shard)
    state = jax.eval_shape(make_init(CONFIG, mesh, tx, options), jax.random.key(0))
    jaxpr = make_train_step(CONFIG, mesh, tx, options).trace(state, *batch(mesh, 8)).jaxpr.jaxpr
    assert (waits_for_sums(jaxpr)[0] > 0) == waits
    assert str(jaxpr).count("optimization_barrier") >= CONFIG.depth
    assert str(jaxpr).count("reduce_scatter") > 0


@pytest.mark.parametrize(
    ("platform", "data", "shard", "alone", "one"),
    [
        ("gpu", 2, "optimizer", True, True),
        ("gpu", 2, "parameters", True, False),
        ("gpu", 2, "none", True, False),
        ("gpu", 1, "optimizer", True, False),
        ("gpu", 2, "optimizer", False, False),
        ("cpu", 2, "optimizer", True, False),
    ],
)
def test_one_collective_of_all_parameters_where_kernels_hold_a_gpu(platform, data, shard, alone, one, monkeypatch):
    """XLA is told to join them all, for kernels that hold a GPU, where parameters are brought together once a step."""
    device: Any = SimpleNamespace(platform=platform, device_kind="a GPU", process_index=0)
    stand_in: Any = SimpleNamespace(axis_names=AXES, shape={"data": data, "model": 1}, devices=np.array([[device]] * data))
    monkeypatch.setattr(meshes, "_known", lambda device, options: True)
    asked = []

    def options_of(mesh, together):
        asked.append(meshes.compiler_options(stand_in, together))
        return {}

    monkeypatch.setattr(step_module, "compiler_options", options_of)
    make_train_step(CONFIG, mesh_of(data, 1), optax.sgd(0.1), StepOptions(ops=ALONE if alone else GPU, shard=shard))
    (told,) = asked
    assert set(told) == ({f"xla_gpu_{name}_combine_threshold_bytes" for name in ("all_gather", "reduce_scatter")} if one else set())
    assert all(int(value) > 2**36 for value in told.values())


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
        ("ViT-H/14", (257, 2), 257 * 8, "auto"),  # 514 does not divide its width: the longer axis would leave most of it whole
    ],
)
def test_a_model_axis_with_a_reason_is_left_alone(name, mesh, images, asked):
    assert faster(name, mesh, images, asked) == ""


def line_of(data, shard: Any = "parameters", name="ViT-H/14"):
    config = variant(name, num_classes=1000)
    shape = parted(shard, MeshShape(data, 1), config)
    return shape.parts, said(shard, shape, config)


def test_a_data_axis_is_in_two_where_and_only_where_that_leaves_less_on_a_device():
    parts, line = line_of(512)
    assert parts == (256, 2)
    assert "rows over 256 and columns over 2 of its 512" in line
    assert "beyond its share" not in line
    for data, shard, name in ((32, "parameters", "ViT-H/14"), (512, "none", "ViT-H/14"), (512, "optimizer", "ViT-L/16")):
        assert line_of(data, shard, name)[0] == ()
    assert line_of(512, "optimizer", "ViT-B/16")[0] == (256, 2)


def test_parameters_that_a_data_axis_does_not_divide_are_never_silent():
    """Of 96 devices, 32 split the rows and 3 no columns; of 257, which is a prime, nothing splits anything."""
    parts, line = line_of(96)
    assert parts == (32, 3)
    assert "each device holds 2% of the parameters beyond its share, for 96 does not divide 1280 and 5120" in line
    parts, line = line_of(257)
    assert parts == ()
    assert "each device holds 100% of the parameters beyond its share, for 257 does not divide 1280 and 5120" in line


WIDE = dataclasses.replace(CONFIG, width=12, num_heads=2, mlp_dim=36)  # that 4 divides, and 8 does not


def trained(data, model, shard, ops=REFERENCE, images=16):
    """(losses of three steps with Adam on WIDE, elements of the state that the first device holds)."""
    mesh, tx = laid_for(shard, mesh_of(data, model), WIDE), optax.adam(1e-2)
    options = StepOptions(ops=ops, shard=shard, clip_norm=1.0)
    state = make_init(WIDE, mesh, tx, options)(jax.random.key(0))
    state = state._replace(params=with_a_head(state.params))
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state))
    pixels, labels = jax.device_put(batch(mesh_of(data, model), images), NamedSharding(mesh, rows(mesh)))
    step, losses = make_train_step(WIDE, mesh, tx, options), []
    for _ in range(3):
        state, metrics = step(state, pixels, labels)
        losses.append(float(metrics["loss"]))
    return losses, held


def test_a_data_axis_in_two_is_the_same_training_and_splits_what_one_does_not():
    """On 8x1 the matrices lie in eighths, which 8 does not divide: as (4, 2)."""
    expected, whole = trained(1, 1, "parameters")
    losses, held = trained(8, 1, "parameters")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    leaves = families.leaves(WIDE)
    matrices = sum(leaf.size for leaf in leaves if any(s and s.rest for s in leaf.split))
    table = next(leaf.size for leaf in leaves if leaf.path == ("patch_embed", "position"))  # over 4 of the 8
    once = parameters.count(leaves)
    assert whole == 3 * once + 2  # parameters and moments, and two counters
    assert held == 3 * (once - matrices - table + matrices // 8 + table // 4) + 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "model", "shard", "ops"),
    [
        (8, 1, "optimizer", REFERENCE),
        (8, 1, "none", REFERENCE),
        (4, 2, "parameters", REFERENCE),
        (8, 1, "parameters", GPU),
        (6, 1, "parameters", REFERENCE),  # columns of 12 and 36 over 3, rows over 2
    ],
)
def test_every_way_to_lie_on_a_data_axis_in_two_is_the_same_training(data, model, shard, ops):
    images = 12 if data == 6 else 16
    expected = trained(1, 1, "parameters", images=images)[0]
    np.testing.assert_allclose(trained(data, model, shard, ops, images)[0], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ops", [REFERENCE, GPU])
def test_rows_over_both_parts_of_a_data_axis_are_summed_over_one_after_the_other(ops, monkeypatch):
    """As over the cores of a v3 chip and then over chips: the same training, and each gradient is scattered twice."""
    monkeypatch.setitem(globals(), "WIDE", CONFIG)
    expected = trained(1, 1, "parameters")[0]
    monkeypatch.setitem(globals(), "laid_for", lambda shard, mesh, config: parted_mesh(mesh, 2))
    np.testing.assert_allclose(trained(8, 1, "parameters", ops)[0], expected, rtol=1e-5)
    specs = partition_specs(CONFIG, shape_of(parted_mesh(mesh_of(8, 1), 2)))
    assert specs["blocks"]["mlp_in"]["kernel"] == P(None, ("rest", "data"), "model")


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_goes_on_with_its_data_axis_in_two_on_other_meshes(tmp_path, monkeypatch, capsys):
    """From 8x1, in two, onto 4x2, which is one, and back: what an unbroken run on 8x1 ends with; without a change bit for bit."""
    monkeypatch.chdir(tmp_path)
    of = pretrain.model_of
    monkeypatch.setattr(pretrain, "model_of", lambda *a, **k: dataclasses.replace(of(*a, **k), width=12, num_heads=2, mlp_dim=36))
    words = ["--model", "ViT-Nano/4", "--steps", "6", "--checkpoint-every", "2", "--eval-every", "6", "--batch-size", "16"]
    words += ["--log-every", "1", "--checkpoint-wait", "--shard", "parameters"]

    def go(out, mesh, upto=None):
        interrupt_before(monkeypatch, upto)
        return pretrain.main([*words, "--out", out, "--mesh", mesh])

    assert go("whole", "8x1") == 0
    assert "rows over 4 and columns over 2 of its 8" in capsys.readouterr().out
    assert go("same", "8x1", 2) == 130
    assert go("same", "8x1") == 0
    assert go("other", "8x1", 2) == 130
    assert go("other", "4x2", 2) == 130
    assert "mesh 4x2: 8 devices" in (line := capsys.readouterr().out)
    assert "resuming at step 2" in line
    assert go("other", "8x1") == 0
    assert "resuming at step 4" in capsys.readouterr().out
    last = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("whole", "same", "other")]
    losses = [line.split('"loss": ')[1].split(",")[0] for line in last]
    assert losses[1] == losses[0]
    np.testing.assert_allclose(float(losses[2]), float(losses[0]), rtol=1e-5)


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
