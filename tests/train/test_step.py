"""The training step on meshes: the same numbers on every mesh, and no collective in the program that the design does not name."""

import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.device import DEVICES
from kernels.launch import Launch
from tests.train.small import batch, mesh_of
from train.losses import softmax_cross_entropy
from train.optim import optimizer, schedule
from train.step import StepOptions, make_eval_step, make_init, make_train_step
from vitcore import GPU, REFERENCE, ViTConfig, apply, apply_on, init, partition_specs, variant
from vitcore.context import Context
from vitcore.model import forward
from vitcore.ops import fused
from vitcore.sharding import MeshShape

WORKER = Path(__file__).parent / "mesh_worker.py"
ROOT = Path(__file__).parents[2]


def ten_steps(tmp_path_factory, mesh, *options):
    out = tmp_path_factory.mktemp("mesh") / "run.npz"
    command = [sys.executable, WORKER, mesh, out, *map(str, options)]
    subprocess.run(command, check=True, timeout=600, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return dict(np.load(out))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return ten_steps(tmp_path_factory, "1x1")


def assert_same_run(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    np.testing.assert_allclose(b["losses"], a["losses"], rtol=tolerance)
    np.testing.assert_allclose(b["norms"], a["norms"], rtol=10 * tolerance)
    for name in a.keys() - {"losses", "norms", "devices", "split"}:
        x, y = a[name], b[name]
        if name.endswith("['qkv']['bias']"):
            x, y = x[:, [0, 2]], y[:, [0, 2]]  # the softmax does not see k's bias: its gradient is rounding, which Adam makes large
        assert np.abs(y - x).max() <= tolerance * np.abs(x).max(), name


@pytest.mark.parametrize("mesh", ["2x4", *(pytest.param(m, marks=pytest.mark.slow) for m in ("8x1", "8x4", "1x8"))])
def test_every_mesh_gives_the_numbers_of_one_device(mesh, single, tmp_path_factory):
    """Ten steps with dropout, clipping, decay and Polyak average: losses and all parameters to 1e-5 relative (float32)."""
    many = ten_steps(tmp_path_factory, mesh)
    assert many["devices"] == np.prod([int(n) for n in mesh.split("x")])
    assert many["split"] > 0
    assert_same_run(single, many)


@pytest.mark.parametrize(("mesh", "parts"), [pytest.param("1x1", 4, marks=pytest.mark.slow), ("2x4", 2)])
def test_accumulation_gives_the_numbers_of_one_batch(mesh, parts, single, tmp_path_factory):
    assert_same_run(single, ten_steps(tmp_path_factory, mesh, parts))


def test_blocks_made_again_in_parts_give_the_numbers_of_blocks_kept(single, tmp_path_factory):
    """Every second block's input kept, the batch of a device, 16 images of 17 tokens, taken two images at a time."""
    assert_same_run(single, ten_steps(tmp_path_factory, "2x4", 1, 2, 34))


def test_the_runs_compared_above_move(single):
    assert len(set(single["losses"])) == 10
    assert np.ptp(single["['average']['norm']['scale']"]) > 1e-4


# --- one step against plain JAX ---------------------------------------------------------------------------------------------

CONFIG = variant("ViT-Nano/4", image_size=8, channels=1, num_classes=10, representation_size=64)


@pytest.mark.parametrize("shape", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 4)])
def test_step_is_adam_on_the_gradient_of_the_mean_loss(shape):
    mesh = mesh_of(*shape)
    tx = optimizer(schedule(base_lr=1e-2, total_steps=100), base_lr=1e-2, weight_decay=0.1)
    options = StepOptions(clip_norm=0.1, label_smoothing=0.1)
    state = make_init(CONFIG, mesh, tx, options)(jax.random.key(3))
    params = jax.tree.map(np.asarray, state.params)
    images, labels = batch(mesh)
    state, metrics = make_train_step(CONFIG, mesh, tx, options)(state, images, labels)

    def loss(p):
        return softmax_cross_entropy(apply(p, np.asarray(images), CONFIG), np.asarray(labels), label_smoothing=0.1).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    norm = optax.global_norm(jax.tree.map(np.asarray, gradient))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    assert norm > 0.1

    @jax.jit
    def moved(params, gradient):
        clipped = jax.tree.map(lambda g: g * 0.1 / (norm + 1e-6), gradient)
        return optax.apply_updates(params, tx.update(clipped, tx.init(params), params)[0])

    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(moved(params, gradient)), strict=True):
        # Adam's first update is the sign of the gradient: where that is rounding, so is the sign
        assert np.mean(np.abs(np.asarray(got) - want) <= 1e-5) > 0.999


def test_evaluation_weighs_every_image_once():
    mesh = mesh_of(4, 2)
    tx = optimizer(schedule(base_lr=1e-2, total_steps=100), base_lr=1e-2)
    options = StepOptions()
    params = make_init(CONFIG, mesh, tx, options)(jax.random.key(3)).params
    params["head"]["kernel"] = jax.device_put(jax.random.normal(jax.random.key(1), (64, 10)), params["head"]["kernel"].sharding)
    images, labels = batch(mesh, 24)
    weights = jax.device_put(np.arange(24) < 19, NamedSharding(mesh, P("data"))).astype(jnp.float32)
    sums = make_eval_step(CONFIG, mesh, options)(params, images, labels, weights)
    logits = jax.jit(partial(apply, config=CONFIG))(jax.tree.map(np.asarray, params), np.asarray(images))[:19]
    assert sums["count"] == 19
    assert sums["correct"] == (logits.argmax(-1) == np.asarray(labels)[:19]).sum()
    np.testing.assert_allclose(sums["loss"], softmax_cross_entropy(logits, np.asarray(labels)[:19]).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("accumulate", "ops"), [pytest.param(1, None, marks=pytest.mark.slow), (2, None), (2, GPU._replace(bytes=True))]
)
def test_bytes_become_floats_inside_the_step(accumulate, ops):
    """The same loss, update and sums for bytes as for the floats that they stand for; also where the op is given bytes."""
    mesh = mesh_of(2, 2)
    tx = optimizer(schedule(base_lr=1e-2, total_steps=100), base_lr=1e-2)
    options = StepOptions(accumulate=accumulate, ops=ops)
    start = make_init(CONFIG, mesh, tx, options)
    step, evaluate = make_train_step(CONFIG, mesh, tx, options), make_eval_step(CONFIG, mesh, options)
    place = NamedSharding(mesh, P("data"))
    pixels = np.random.default_rng(1).integers(0, 256, (16, 8, 8, 1), np.uint8)
    floats = (pixels.astype(np.float64) * 2 / 255 - 1).astype(np.float32)
    labels, weights = jax.device_put((np.arange(16) % 10, np.ones(16, np.float32)), place)
    found = []
    for images in (pixels, floats):
        images, state = jax.device_put(images, place), start(jax.random.key(3))
        state.params["head"]["kernel"] += 0.1
        sums = evaluate(state.params, images, labels, weights)
        state, metrics = step(state, images, labels)
        found.append((sums, metrics, state.params))
        lowered = step.lower(state, images, labels).as_text()
        assert ("ui8" in lowered) == (images.dtype == np.uint8)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_apply_on_a_users_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "model"))  # as a user writes it: explicit axes
    config = ViTConfig(image_size=8, patch_size=4, width=32, depth=2, mlp_dim=64, num_heads=4, num_classes=3, dropout=0.2)
    specs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(config, mesh))
    params = jax.jit(partial(init, config=config), out_shardings=specs)(jax.random.key(0))
    params["head"]["kernel"] = jax.device_put(jax.random.normal(jax.random.key(1), (32, 3)), specs["head"]["kernel"])
    images = jax.device_put(jax.random.uniform(jax.random.key(2), (4, 8, 8, 3)), NamedSharding(mesh, P("data")))
    run = apply_on(mesh, config)
    key = jax.random.key(5)
    alone = jax.tree.map(np.asarray, params)
    plain = jax.jit(lambda p, k: apply(p, np.asarray(images), config, dropout_key=k))
    for k in (None, key):
        want = plain(alone, k)
        np.testing.assert_allclose(jax.jit(run)(params, images, k), want, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(run(p, images, key)).sum()))(params)
    want = jax.jit(jax.grad(lambda p: jnp.square(plain(p, key)).sum()))(alone)
    for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * np.abs(w).max() + 1e-9)


# --- the program ------------------------------------------------------------------------------------------------------------


def collectives(text):
    """(kind, result's element type and shape) of every collective in an HLO module's text; tuples are taken apart."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= (\(?.*?\)?) (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)(-start)?\(", line)
        if match:
            found += [
                (match[2], tuple(map(int, shape.split(","))) if shape else ())
                for shape in re.findall(r"[a-z]+\d+\[([\d,]*)\]", match[1])
            ]
    return found


@pytest.mark.parametrize("remat", [False, True])
def test_the_step_holds_the_named_collectives_and_no_others(remat):
    """Weights are gathered and their gradients scattered layer by layer over "data", tokens summed twice a block over "model",
    scalars summed for loss and norm, the gradients of vectors summed once. No activation and no logit is gathered, ever."""
    data, model, n, t = 2, 4, 16, 5
    d, f, v = 64, 128, 10
    mesh = mesh_of(data, model)
    tx = optimizer(schedule(base_lr=1e-2, total_steps=100), base_lr=1e-2, weight_decay=0.1)
    options = StepOptions(clip_norm=1.0, remat=remat)
    config = ViTConfig(**{**vars(CONFIG), "dropout": 0.1})
    state = make_init(config, mesh, tx, options)(jax.random.key(0))
    text = make_train_step(config, mesh, tx, options).lower(state, *batch(mesh, n)).compile().as_text()
    found = collectives(text)
    gathered = {shape for kind, shape in found if kind == "all-gather"}
    whole = {(3, d, d // model), (d // model, d), (d, f // model), (f // model, d), (4, 4, 1, d), (t, d), (d, d), (d, v)}
    assert gathered == whole
    scattered = {shape for kind, shape in found if kind == "reduce-scatter"}
    pieces = {(3, d // data, d // model), (d // model // data, d), (d // data, f // model), (f // model // data, d)}
    assert scattered == pieces | {(4, 4, 1, d // data), (t, d // data), (d // data, d), (d // data, v)}
    summed = [shape for kind, shape in found if kind == "all-reduce"]
    tokens = [shape for shape in summed if len(shape) == 3 and shape[1] == t]
    assert set(tokens) == {(n // data, t, d)}
    assert len(tokens) == (5 if remat else 4)  # a half block's sum, forward and backward; with remat the first again
    vectors = {(4, d), (4, 3, d // model), (4, f // model), (d,), (v,)}
    assert {shape for shape in summed if shape not in tokens} <= vectors | {()}
    assert {kind for kind, _ in found} == {"all-gather", "reduce-scatter", "all-reduce"}


def test_evaluation_gathers_weights_only():
    mesh = mesh_of(2, 4)
    tx = optimizer(schedule(base_lr=1e-2, total_steps=100), base_lr=1e-2)
    params = make_init(CONFIG, mesh, tx, StepOptions())(jax.random.key(0)).params
    images, labels = batch(mesh)
    weights = jax.device_put(np.ones(16, np.float32), NamedSharding(mesh, P("data")))
    found = collectives(make_eval_step(CONFIG, mesh, StepOptions()).lower(params, images, labels, weights).compile().as_text())
    assert {shape for kind, shape in found if kind == "all-reduce"} == {(8, 5, 64), ()}
    assert {kind for kind, _ in found} == {"all-gather", "all-reduce"}


def kept(ops, data: int, dropout: float, remat=0) -> list[tuple[int, ...]]:
    """Shapes of what the scan over the blocks keeps for the backward pass, on a mesh of `data` devices, two images on each."""
    config = ViTConfig(**{**vars(CONFIG), "dropout": dropout})
    mesh = mesh_of(data, 1)
    specs = partition_specs(config, mesh)

    def loss(params, images):
        key = jax.random.key(0) if dropout else None
        context = Context(ops=ops._replace(unrolled=()), mesh=MeshShape.of(mesh), dropout_key=key, remat=remat)
        return jax.lax.psum(jnp.square(forward(params, images, config, context)).sum(), "data")

    params = jax.eval_shape(partial(init, config=config), jax.random.key(0))
    images = jax.ShapeDtypeStruct((2 * data, 8, 8, 1), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(specs, P("data")), out_specs=specs))(params, images)
    steps = config.depth // max(remat, 1)
    scans = [eqn for eqn in jaxpr.eqns[0].params["jaxpr"].eqns if eqn.primitive.name == "scan" and eqn.params["length"] == steps]
    assert len(scans) == 2
    return [tuple(var.aval.shape) for var in scans[0].outvars[1:]]  # behind the tokens that the loop carries


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("ops", [REFERENCE, GPU, fused(Launch(device=DEVICES["v3"]))], ids=["reference", "gpu", "kernels"])
def test_a_mesh_keeps_no_more_for_the_backward_pass_than_one_device(ops, dropout):
    """Without remat the ops choose which activations are kept, and a mesh keeps the same, and not L whole layers of weights. The
    checkpoint that drops the weights once kept every intermediate inside the GPU ops, four times the memory."""
    layers, d, f = CONFIG.depth, CONFIG.width, CONFIG.mlp_dim
    alone, on_mesh = kept(ops, 1, dropout), kept(ops, 2, dropout)
    weights = {(layers, 3, d, d), (layers, d, d), (layers, d, f), (layers, f, d)}
    assert not weights & set(on_mesh)
    activations = [math.prod(shape) for shape in on_mesh]
    assert max(activations) >= layers * 2 * 5 * d  # the blocks' inputs at least are there
    assert sum(activations) <= 1.1 * sum(math.prod(shape) for shape in alone if shape not in weights)


def test_blocks_made_again_in_parts_keep_their_groups_input_alone_on_a_mesh(monkeypatch):
    """Where a group of blocks takes the batch in parts, the checkpoint that drops its gathered weights must not keep what the parts
    make again: two images here, a part each, keep one input a group."""
    monkeypatch.setattr("vitcore.layers.PART", 5)
    assert kept(GPU, 2, 0.0, remat=2) == [(CONFIG.depth // 2, 2, 6, CONFIG.width)]
