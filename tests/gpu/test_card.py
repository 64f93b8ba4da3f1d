"""What must hold on a GPU, run on one: `make test-gpu`. Where there are two cards, meshes of two as well.

The ops by themselves are in tests/kernels/test_gpu.py, which the same command runs on the card. Here: the model with the ops that a
GPU takes by default, the training step on 1x1, 2x1 and 1x2, and whole jobs: a run that is killed and goes on, one that gets a
SIGTERM, an export that another process could load.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vitcore
from tests import oracle
from train.optim import optimizer, schedule
from train.step import StepOptions, make_init, make_train_step
from vitcore.ops import resolve

pytestmark = pytest.mark.gpu  # `make test-gpu` has jax take memory as it needs it: several processes share the card
ROOT = Path(__file__).parents[2]
CONFIG = vitcore.variant("ViT-Ti/16", image_size=64, num_classes=10, dropout=0.1)
MESHES = [(1, 1)] + [shape for shape in ((2, 1), (1, 2), (2, 2)) if shape[0] * shape[1] <= len(jax.devices())]


def images(n: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, *CONFIG.image_shape, 3)).astype(np.float32)


def test_this_is_a_gpu_and_takes_its_own_ops():
    assert jax.default_backend() == "gpu"
    assert resolve(None) is vitcore.GPU


@pytest.mark.parametrize("size", [64, 80])  # 17 tokens and 26
def test_the_model_agrees_with_the_reference(size):
    """Logits in bfloat16, by cuDNN's attention: as near to float64 as the reference ops in bfloat16 are."""
    config = vitcore.variant("ViT-Ti/16", image_size=size, num_classes=10)
    params = vitcore.init(jax.random.key(0), config)
    params["head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, size, size, 3)), jnp.float32)

    def logits(ops):
        return lambda x: vitcore.apply(params, x, config, ops=ops, dtype=jnp.bfloat16)

    truth = vitcore.apply(params, x, config, ops=vitcore.REFERENCE)
    errors = [float(jnp.abs(jax.jit(logits(ops))(x) - truth).max()) for ops in (vitcore.GPU, vitcore.REFERENCE)]
    assert errors[0] <= oracle.FACTOR * errors[1], errors


def losses(shape: tuple[int, int], ops, steps: int = 4) -> list[float]:
    """Losses of a few float32 steps with dropout, the same batch each time."""
    n = shape[0] * shape[1]
    mesh = jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[:n], axis_types=(AxisType.Auto,) * 2)
    tx = optimizer(schedule(base_lr=1e-3, total_steps=100), base_lr=1e-3, weight_decay=0.1)
    options = StepOptions(ops=ops, clip_norm=1.0)
    config = vitcore.ViTConfig(**{**vars(CONFIG), "num_heads": 4})
    state = make_init(config, mesh, tx, options)(jax.random.key(0))
    rows = NamedSharding(mesh, P("data"))
    batch = jax.device_put(images(8), rows), jax.device_put(np.arange(8, dtype=np.int32), rows)
    step = make_train_step(config, mesh, tx, options)
    found = []
    with jax.default_matmul_precision("highest"):
        for _ in range(steps):
            state, metrics = step(state, *batch)
            found.append(float(metrics["loss"]))
    return found


@pytest.fixture(scope="module")
def alone() -> list[float]:
    return losses((1, 1), vitcore.REFERENCE)


@pytest.mark.parametrize("shape", MESHES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_step_on_every_mesh_gives_the_losses_of_the_reference_on_one_card(shape, alone):
    np.testing.assert_allclose(losses(shape, vitcore.GPU), alone, rtol=1e-5)
    assert alone[-1] < alone[0]


@pytest.mark.parametrize("shape", MESHES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_mesh_needs_no_more_memory_a_card_than_one_card_does(shape):
    """At the same images a card: temporaries at most a tenth above one card's, and the gathered layers beside."""
    config = vitcore.variant("ViT-S/16", num_classes=10)
    tx = optimizer(schedule(base_lr=1e-3, total_steps=100), base_lr=1e-3)

    def temporaries(shape):
        n = shape[0] * shape[1]
        mesh = jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[:n], axis_types=(AxisType.Auto,) * 2)
        options = StepOptions(dtype=jnp.bfloat16)
        state = jax.eval_shape(make_init(config, mesh, tx, options), jax.random.key(0))
        batch = jax.ShapeDtypeStruct((64 * shape[0], 224, 224, 3), jnp.float32), jax.ShapeDtypeStruct((64 * shape[0],), jnp.int32)
        return make_train_step(config, mesh, tx, options).lower(state, *batch).compile().memory_analysis().temp_size_in_bytes  # pyright: ignore

    layers = 4 * sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(partial(vitcore.init, config=config), jax.random.key(0))))
    assert temporaries(shape) <= 1.1 * temporaries((1, 1)) + layers


# ---- whole jobs


def start(out: Path, *options: str) -> subprocess.Popen:
    """A pre-training of 400 steps. Without the flag a GPU adds in an order of its own, and two runs soon part."""
    command = f"{sys.executable} -m train.pretrain --mesh 1x1 --steps 400 --checkpoint-every 20".split()
    env = {**os.environ, "XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, "--out", str(out), *options], cwd=ROOT, env=env, **pipes)


def newest(out: Path) -> int:
    return max((int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdigit()), default=0)


def wait_for(out: Path, step: int, job: subprocess.Popen) -> None:
    for _ in range(600):
        if newest(out) >= step:
            return
        assert job.poll() is None, job.stdout.read() if job.stdout else ""
        time.sleep(0.2)
    raise AssertionError(f"no checkpoint of step {step} within two minutes")


def final(out: Path) -> dict:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(tmp_path):
    whole = start(tmp_path / "whole")
    broken = start(tmp_path / "broken", "--checkpoint-wait")
    wait_for(tmp_path / "broken", 40, broken)
    broken.kill()
    broken.wait()
    again = start(tmp_path / "broken", "--checkpoint-wait")
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said
    assert "resuming at step" in said
    assert whole.wait(300) == 0
    a, b = final(tmp_path / "whole"), final(tmp_path / "broken")
    assert a["step"] == b["step"] == 400
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


def test_a_sigterm_saves_and_ends_with_0(tmp_path):
    job = start(tmp_path / "run", "--steps", "100000", "--checkpoint-every", "50")
    wait_for(tmp_path / "run", 50, job)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0, said
    assert newest(tmp_path / "run") > 50


def test_an_export_runs_in_another_process(tmp_path):
    config = vitcore.ViTConfig(**{**vars(CONFIG), "dropout": 0.0})
    params = vitcore.init(jax.random.key(0), config)
    params["head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    vitcore.save(tmp_path / "w.npz", params, config)
    for arguments in (
        [str(tmp_path / "w.npz"), str(tmp_path / "m.stablehlo"), "--batch", "4"],
        ["--try", str(tmp_path / "m.stablehlo")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "vitcore.export", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert "images [4, 64, 64, 3] -> logits [4, 10]" in done.stdout
