"""Reading a run changes nothing in it, also while it goes on: exports, evaluations, few-shot measurements, fine-tunings."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.saved
import vitcore
from tests.train.fault_jobs import ROOT, environment, start, steps, tree_of
from train.checkpoint import CheckpointError, Checkpoints, Damaged, abstract
from train.pretrained import open_pretrained
from train.saved import SavedSteps
from vitcore import weight_about

pytestmark = pytest.mark.faults

ENDLESS = ["--mesh", "1x1", "--steps", "100000", "--eval-every", "100000", "--checkpoint-every", "3"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def half_written(out) -> list[Path]:
    return [path for path in (out / "checkpoints").iterdir() if "orbax-checkpoint-tmp" in path.name]


def reach_nth(job, text, number):
    """Waits until the job has printed `text` so many times."""
    job.reach(text)
    deadline = time.monotonic() + 120
    while job.stderr.count(text) < number:
        assert job.process.poll() is None, job.stderr
        assert time.monotonic() < deadline, job.stderr
        time.sleep(0.01)


def test_a_model_is_read_from_a_run_in_the_middle_of_a_save(tmp_path, cache):
    """Each save is held up for a second behind its arrays. What is half-written is still there after the read, or has become whole;
    the run goes on to its orderly end."""
    out = tmp_path / "run"
    job = start(tmp_path, *ENDLESS, "--out", out, faults=["say-save"], cache=cache)
    read = 0
    for number in (2, 3, 4):
        reach_nth(job, "AT save", number)
        before = half_written(out)
        found = open_pretrained(str(out))
        read += len(before) == 1 and (before[0].exists() or (out / "checkpoints" / before[0].name.split(".")[0]).exists())
        assert "step" in found.about
    job.term()
    assert job.end() == 0, job.stderr
    assert "rror" not in job.stderr, job.stderr
    assert read >= 2  # a read may come late on a busy machine
    assert len(steps(out)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_job_that_reads_leaves_a_live_run_alone(tmp_path, cache):
    """The jobs as a user starts them, each in the middle of a save."""
    out, number = tmp_path / "run", 1
    trainer = start(tmp_path, *ENDLESS, "--out", out, faults=["say-save"], cache=cache)
    jobs = {
        "pretrained": [str(out), str(tmp_path / "model.npz")],
        "evaluate": ["--init", str(out), "--data", "digits", "--out", str(tmp_path / "evaluation")],
        "fewshot": ["--init", str(out), "--data", "digits", "--out", str(tmp_path / "fewshot")],
        "finetune": ["--init", str(out), "--data", "digits", "--steps", "2", "--mesh", "1x1", "--out", str(tmp_path / "tuned")],
    }
    for name, options in jobs.items():
        number = trainer.stderr.count("AT save") + 2
        reach_nth(trainer, "AT save", number)
        command = [sys.executable, "-m", f"train.{name}", *options]
        done = subprocess.run(command, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, (name, done.stderr)
        assert trainer.process.poll() is None, (name, trainer.stderr)
    trainer.term()
    assert trainer.end() == 0, trainer.stderr
    assert "rror" not in trainer.stderr


# --- damage, seen by a reader -----------------------------------------------------------------------------------------------


def small(step):
    return {"params": {"w": jnp.full((64, 8), float(step))}, "step": jnp.int32(step)}


@pytest.fixture
def three(tmp_path):
    """Checkpoints of steps 1 to 3."""
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small(step), {"n": step})
    return tmp_path / "c"


def flip(folder):
    file = max((path for path in (folder / "state").rglob("d/*") if path.is_file()), key=os.path.getsize)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


def test_a_reader_takes_the_newest_good_step_and_renames_nothing(three):
    flip(three / "3")
    before, said = tree_of(three), []
    reader = SavedSteps(three, say=said.append)
    step, state, extra = reader.load()
    assert step == extra["n"] == 2
    assert float(np.asarray(state["params"]["w"]).max()) == 2.0
    _, extra = reader.restore(None, abstract(small(0)))
    assert extra["n"] == 2
    assert len(said) == 2
    assert "is not what was written (checksum): passed over" in said[0]
    with pytest.raises(Damaged, match=r"3 is damaged"):
        reader.load(3)
    flip(three / "2")
    flip(three / "1")
    before = tree_of(three)
    with pytest.raises(Damaged, match=r"none of the 3 checkpoints there is good. Nothing was changed"):
        reader.load()
    assert tree_of(three) == before
    assert sorted(os.listdir(three)) == ["1", "2", "3"]


def test_a_step_under_the_number_of_another_is_damaged(three):
    """A copy put back under a wrong name would pass for a step that it is not, every checksum of it being right."""
    shutil.copytree(three / "2", three / "9")
    said = []
    assert SavedSteps(three, say=said.append).load()[0] == 3
    assert "9 holds step 2: it has been copied or renamed" in said[0]
    with Checkpoints(three, keep=9, say=said.append) as checkpoints:
        assert checkpoints.restore(None, abstract(small(0)))[1] == {"n": 3}
        checkpoints.save(4, small(4), {"n": 4})
    assert sorted(os.listdir(three)) == ["1", "2", "3", "4", "9.damaged"]


def test_a_reader_clears_no_half_written_step_away(three):
    shutil.copytree(three / "3", three / "4.orbax-checkpoint-tmp")
    before = tree_of(three)
    assert SavedSteps(three).load()[0] == 3
    time.sleep(0.5)  # Orbax clears away in the background
    assert tree_of(three) == before


def test_a_reader_makes_no_directory(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint in .*; it has none"):
        SavedSteps(tmp_path / "nothing").load()
    assert os.listdir(tmp_path) == []


def test_a_step_that_the_run_deletes_under_the_reader_gives_way_to_a_newer_one(three, monkeypatch):
    """The run keeps two: what was the newest when the reader looked is gone when it reads."""
    shutil.move(three / "3", three.parent / "3")
    verify, calls = train.saved._verify, []

    def meanwhile(path):
        if not calls:
            shutil.rmtree(three / "2")
            shutil.rmtree(three / "1")
            shutil.move(three.parent / "3", three / "3")
        calls.append(path)
        verify(path)

    monkeypatch.setattr(train.saved, "_verify", meanwhile)
    said = []
    assert SavedSteps(three, say=said.append).load()[0] == 3
    assert said == []
    assert [os.path.basename(path) for path in calls] == ["2", "3"]


@pytest.mark.parametrize("owner", [False, True], ids=["reader", "run"])
@pytest.mark.parametrize("what", ["state/MANIFEST.json", "extra/data.json", "state"])
def test_a_file_without_permission_is_no_damage(owner, what):
    """Neither put aside nor passed over: whoever may read it goes on from there."""
    folder = Path(tempfile.mkdtemp())  # pytest's own is closed to other users
    root = os.geteuid() == 0
    try:
        with Checkpoints(folder / "c") as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, small(step), {"n": step})
        if root:
            for path in [folder, *folder.rglob("*")]:
                os.chown(path, 65534, 65534)
            os.seteuid(65534)  # root reads everything
        closed = folder / "c" / "2" / what
        closed.chmod(0)
        reader = (Checkpoints if owner else SavedSteps)(folder / "c")
        with pytest.raises(CheckpointError, match="Permission denied") as error:
            reader.restore(None, abstract(small(0)))
        assert not isinstance(error.value, Damaged)
        assert str(folder / "c" / "2") in str(error.value)
        assert "\n" not in str(error.value)
        closed.chmod(0o755)
        assert sorted(os.listdir(folder / "c")) == ["1", "2"]
        assert SavedSteps(folder / "c").load()[0] == 2
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)


def test_too_many_open_files_is_no_damage(three):
    """What a process cannot do now says nothing of the files."""
    code = """
import jax, os, resource, sys
from train.saved import CheckpointError, Damaged, SavedSteps
reader = SavedSteps(sys.argv[1])
reader.load()
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    print("read", reader.load()[0])
except CheckpointError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(three)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("CheckpointError "), (done.stdout, done.stderr)
    assert "Too many open files" in done.stdout
    assert sorted(os.listdir(three)) == ["1", "2", "3"]


def test_two_contents_of_a_step_have_two_digests(tmp_path):
    found = set()
    for k in range(2):
        with Checkpoints(tmp_path / str(k)) as checkpoints:
            checkpoints.save(1, jax.tree.map(lambda w, k=k: w + k, small(1)), {})
        found.add(SavedSteps(tmp_path / str(k)).digest(1))
    assert len(found) == 2


def a_run(directory):
    """A run at step 4, as far as readers of its model look."""
    config = vitcore.variant("ViT-Nano/4", image_size=8, num_classes=3, representation_size=None)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(4, {"params": jax.jit(lambda: vitcore.init(jax.random.key(0), config))()}, {})
    (directory / "config.json").write_text(json.dumps({"vit": dataclasses.asdict(config)}))


@pytest.mark.parametrize("what", ["config.json", "checkpoints/4/state/MANIFEST.json", "checkpoints/4/state/_METADATA"])
def test_a_pipe_in_place_of_a_file_of_a_run_is_not_waited_for(tmp_path, what):
    """A pipe that nobody writes to: of the run's description an error, of a checkpoint's files damage."""
    a_run(tmp_path)
    (tmp_path / what).unlink()
    os.mkfifo(tmp_path / what)
    code = f"from train.pretrained import open_pretrained; open_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "no regular file" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("what", ["config.json", "checkpoints/4/state/MANIFEST.json", "checkpoints/4/extra/data.json"])
def test_a_file_of_a_run_that_is_nested_without_end_is_damaged(tmp_path, what):
    """JSON of brackets alone makes Python's reader raise RecursionError, which is none of the errors of files."""
    a_run(tmp_path)
    (tmp_path / what).write_text("[" * 100_000)
    with pytest.raises((ValueError, Damaged), match=r"is damaged|nested too deep"):
        open_pretrained(str(tmp_path))


def test_weights_whose_description_is_nested_without_end_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nested too deep"):
        weight_about.read(str(tmp_path / "a.safetensors"), {weight_about.KEY: "[" * 100_000})
