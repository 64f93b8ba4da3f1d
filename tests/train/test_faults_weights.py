"""Every job that reads weights, as a user calls it, on weights that hold NaN: one line names the leaf; taken where that is said."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import train.loop
import vitcore
from tests.train.fault_jobs import ROOT, environment
from train import evaluate, fewshot, finetune, pretrain, pretrained, vtab
from train.checkpoint import Checkpoints
from vitcore import export, inspect, weights

pytestmark = pytest.mark.faults

CONFIG = vitcore.variant("ViT-Nano/4", image_size=8, channels=1, num_classes=10, representation_size=None, depth=1)
LEAF = "encoderblock_0/LayerNorm_0/scale"  # of the release's layout


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A file and a run of weights of which one is NaN."""
    folder = tmp_path_factory.mktemp("bad")
    params = jax.tree.map(np.array, jax.jit(lambda: vitcore.init(jax.random.key(0), CONFIG))())
    params["blocks"]["norm1"]["scale"][0, 3] = np.nan
    vitcore.save(folder / "w.npz", params, CONFIG)
    with Checkpoints(folder / "run" / "checkpoints") as checkpoints:
        checkpoints.save(7, {"params": jax.tree.map(jax.numpy.asarray, params)}, {})
    (folder / "run" / "config.json").write_text(json.dumps({"vit": dataclasses.asdict(CONFIG)}))
    return folder


HERE, NANO = ["--mesh", "1x1"], ["--model", "ViT-Nano/4"]
JOBS = {
    "evaluate": (evaluate.main, ["--init", "W", *HERE, "--split", "val[:8]", "--out", "O"]),
    "fewshot": (fewshot.main, ["--init", "W", *HERE, "--shots", "1", "--seeds", "1", "--test-split", "val[:8]"]),
    "finetune": (finetune.main, ["--init", "W", *HERE, "--image-size", "8", "--out", "O"]),
    "vtab": (vtab.main, ["--init", "W", *HERE, "--image-size", "8", "--out", "O", "--sources", "S", "--examples", "431"]),
    "pretrain": (pretrain.main, ["--init", "W", *HERE, *NANO, "--depth", "1", "--representation-size", "0", "--out", "O"]),
    "pretrained": (pretrained.main, ["R", "O.npz"]),
    "weights": (weights.main, ["convert", "W", "O.safetensors"]),
    "look": (inspect.main, ["W", "--out", "O"]),
    "export": (export.main, ["W", "O.stablehlo"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_weights_for_which_there_is_no_room_leave_what_was_there(tmp_path, kind):
    """A file may have a megabyte here: the second does not fit. safetensors makes an error of its own kind of that."""
    code = """
import os, resource, signal, sys
import numpy as np
from vitcore import weight_files
weight_files.write(sys.argv[1], {"a": np.full(1000, 1, np.float32)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    weight_files.write(sys.argv[1], {"a": np.full(10**6, 2, np.float32)})
except OSError as error:
    print(str(error).count("\\n"), "File too large" in str(error))
with weight_files.opened(sys.argv[1]) as arrays:
    print(arrays["a"].read()[0], os.listdir(os.path.dirname(sys.argv[1])))
"""
    path = tmp_path / f"w.{kind}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.stdout == f"0 True\n1.0 ['w.{kind}']\n", done.stderr


@pytest.mark.parametrize("job", JOBS)
def test_weights_that_hold_nan_are_refused_by_the_name_of_the_leaf(bad, tmp_path, monkeypatch, capfd, job):
    def trained(run, say, **_):
        run.batches.close()
        return train.loop.Result(1, 1, 0.5, 1, 2, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", trained)
    (tmp_path / "s.json").write_text(json.dumps({"dtd": {"data": "digits:0-2", "train": "train[:1000]", "test": "val"}}))
    known = {"W": bad / "w.npz", "R": bad / "run", "S": tmp_path / "s.json"}
    main, words = JOBS[job]
    words = [str(tmp_path / word) if word[:1] == "O" else str(known.get(word, word)) for word in words]
    assert main(words) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert ("blocks/norm1/scale" if job == "pretrained" else LEAF) in said
    assert "--allow-nonfinite" in said
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("s.json", ".lock")]
    assert left == []
    assert main([*words, "--allow-nonfinite"]) == 0
