"""A loss of power at any moment: a checkpoint that was whole before is there after it.

A run that saves is traced call by call, and what a disk holds is played back up to a moment, with no more than POSIX promises.
"""

import dataclasses
import inspect
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.train.fault_jobs import ROOT, environment
from tests.train.power_worker import state
from tests.train.syscalls import PowerLoss
from train import metrics
from train.checkpoint import Checkpoints, abstract
from train.data import open_source
from train.job import check_claim, place
from train.options import TrainOptions
from train.pretrain import Pretrain
from train.tuning import Finetune
from train.vtab import Vtab
from vitcore import weight_files

pytestmark = pytest.mark.faults

TRACER = ROOT / "tests/train/syscalls.py"
WORKER = ROOT / "tests/train/power_worker.py"
FILES_WORKER = ROOT / "tests/train/power_files_worker.py"


def traced(folder, keep, saves) -> PowerLoss:
    root = folder / "disk"
    (root / "ack").mkdir(parents=True)
    command = [sys.executable, WORKER, root / "runs" / "one", keep, saves]
    done = subprocess.run(
        [sys.executable, TRACER, folder / "log", root, "--", *map(str, command)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loss = PowerLoss(folder / "log", root)
    acknowledged = next(call["inode"] for call in reversed(loss.calls) if call.get("name") == str(saves) and call["op"] == "create")
    assert (root / "ack" / str(saves)).stat().st_ino == acknowledged
    assert sum(call["op"] == "remove" for call in loss.calls) > 5 * (saves - keep)  # older steps were deleted
    return loss


def after(loss, moment, folder, rng, how):
    """The newest step acknowledged before the moment, and the one that is restored after it (0: none), checked to the bit."""
    acks = [int(call["name"]) for call in loss.calls[:moment] if call["op"] == "create" and call["name"].isdigit()]
    loss.at(moment, folder, rng, how)
    out, said = folder / "runs" / "one", []
    found = 0
    if out.exists():
        if (out / "config.json").exists() or acks:
            check_claim(place(out), {"model": "small"})
        with Checkpoints(out / "checkpoints", say=said.append) as checkpoints:
            if checkpoints.begun():
                held, extra = checkpoints.restore(None, abstract(state(0)))
                found = extra["n"]
                for got, want in zip(jax.tree.leaves(held), jax.tree.leaves(state(found)), strict=True):
                    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
        if found:
            assert [line["step"] for line in metrics.read(out / "metrics.jsonl")][:found] == list(range(1, found + 1))
    shutil.rmtree(folder, ignore_errors=True)  # Orbax may be clearing away in there
    return max(acks, default=0), found


def cuts(tmp_path, keep, saves, count, seed):
    """Steps lost by each of `count` losses of power."""
    loss, rng, lost = traced(tmp_path, keep, saves), random.Random(seed), []
    first = next(i for i, call in enumerate(loss.calls) if call.get("name") == "1" and call["op"] == "create")
    for k in range(count):
        moment = rng.randint(0, len(loss.calls)) if k % 5 == 0 else rng.randint(first, len(loss.calls))
        acknowledged, found = after(loss, moment, tmp_path / f"after-{k}", rng, ("some", "none", "all")[k % 3])
        lost.append(acknowledged - found)
    print(f"{count} losses of power in {len(loss.calls)} calls, keep {keep}: {sum(n > 0 for n in lost)} lost an acknowledged step")
    return lost


@pytest.mark.parametrize("keep", [1, 2])
def test_a_loss_of_power_costs_no_checkpoint_that_was_whole(tmp_path, keep):
    """Also with keep 1, where the older step is deleted as soon as the newer one is whole."""
    assert max(cuts(tmp_path, keep, 3, 12, seed=keep)) <= 0


@pytest.mark.slow
def test_fifty_losses_of_power_cost_no_checkpoint_that_was_whole(tmp_path):
    assert max(cuts(tmp_path, 1, 6, 50, seed=7)) <= 0


def test_a_loss_of_power_costs_no_weights_and_no_packed_set_that_were_written(tmp_path):
    """What a command has said that it wrote is there; what it was about to write in its place is there whole, or not at all."""
    root, rng = tmp_path / "disk", random.Random(3)
    (root / "ack").mkdir(parents=True)
    command = [sys.executable, TRACER, tmp_path / "log", root, "--", sys.executable, FILES_WORKER, root]
    subprocess.run(list(map(str, command)), cwd=ROOT, env=environment(), check=True, timeout=300)
    loss, checked = PowerLoss(tmp_path / "log", root), 0
    for moment in [*rng.sample(range(len(loss.calls)), 14), len(loss.calls)]:
        made = [call["name"].split(".") for call in loss.calls[:moment] if call["op"] == "create"]
        acks = [(int(name[0]), name[1]) for name in made if len(name) == 2 and name[0].isdigit()]
        for how in ("none", "some", "all"):
            disk = tmp_path / "after"
            loss.at(moment, disk, rng, how)
            for kind in ("npz", "safetensors"):
                written = max((version for version, what in acks if what == kind), default=0)
                path = disk / "weights" / f"w.{kind}"
                if written or path.exists():
                    with weight_files.opened(path) as arrays:
                        assert int(arrays["a"].read()[0]) >= written
                    checked += bool(written)
            if (1, "set") in acks:
                packed = open_source(f"arrayrecord:{disk}/set", "train")
                assert len([packed[i] for i in range(0, len(packed), 40)]) > 5
            shutil.rmtree(disk)
    assert checked > 30


def test_two_checkpoints_stay_where_nobody_says_otherwise():
    """So that a newest one which is damaged, by whatever is beyond a loss of power, costs an interval and not the run."""
    found, kinds = [inspect.signature(Checkpoints).parameters["keep"].default], [TrainOptions]
    for kind in kinds:
        found.append(next(field.default for field in dataclasses.fields(kind) if field.name == "keep"))
        kinds += kind.__subclasses__()
    assert {Pretrain, Finetune, Vtab} <= {*kinds}
    assert min(found) >= 2


def test_the_playback_loses_what_is_not_synced(tmp_path):
    """Or the tests above would prove nothing: a file without a sync is empty, one in a directory without a sync has no name."""
    script = """
import os, sys
root = sys.argv[1]
def write(path, *, sync):
    with open(path, "w") as file:
        file.write("content")
        file.flush()
        if sync:
            os.fsync(file.fileno())
def sync(path):
    fd = os.open(path, os.O_RDONLY); os.fsync(fd); os.close(fd)
write(f"{root}/a", sync=True)
write(f"{root}/b", sync=False)
sync(root)
write(f"{root}/c", sync=True)
os.rename(f"{root}/a", f"{root}/d")
"""
    root = tmp_path / "disk"
    root.mkdir()
    subprocess.run([sys.executable, TRACER, tmp_path / "log", root, "--", sys.executable, "-c", script, str(root)], check=True)
    loss = PowerLoss(tmp_path / "log", root)
    want = {"none": {"a": "content", "b": ""}, "all": {"d": "content", "b": "", "c": "content"}}
    for how, files in want.items():
        loss.at(len(loss.calls), tmp_path / how, random.Random(0), how)
        assert {path.name: path.read_text() for path in (tmp_path / how).iterdir()} == files
