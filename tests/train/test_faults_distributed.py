"""A run of several processes on this machine, joined by jax.distributed: kills, signals, hangs, meshes, meeting."""

import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from typing import Any

import jax
import numpy as np
import pytest

import vitcore
from tests.train.fault_jobs import environment, free_port, losses, records, start, start_two, steps
from train import distributed
from train import mesh as meshes

pytestmark = pytest.mark.faults
HEARTBEAT = 10
RUN = ["--mesh", "2x1", "--eval-every", "5", "--heartbeat-timeout", HEARTBEAT, "--shutdown-timeout", "30"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """Twelve steps that two processes take undisturbed, and where each found its examples."""
    folder = tmp_path_factory.mktemp("whole")
    options = [*RUN, "--steps", "12", "--checkpoint-every", "4", "--out", folder / "run"]
    jobs = start_two(folder, *options, faults=[f"trace={folder / 'trace'}"], cache=cache)
    assert [job.end() for job in jobs] == [0, 0], jobs[0].stderr + jobs[1].stderr
    return folder


def test_two_processes_write_one_log_and_the_numbers_of_one(whole, tmp_path, cache):
    out = (whole / "rank0.out").read_text()
    assert "mesh 2x1: 2 devices simulated" in out
    assert "in 2 processes" in out
    assert "finished at step 12" in out
    said = [line for line in (whole / "rank1.out").read_text().splitlines() if "[Gloo]" not in line]
    assert said == []  # rank 0 writes the logs
    job = start(tmp_path, *RUN, "--steps", "12", "--checkpoint-every", "4", "--out", tmp_path / "run", cache=cache)
    assert job.end() == 0
    x, y = records(tmp_path / "run"), records(whole / "run")
    assert [line["step"] for line in x] == [line["step"] for line in y]
    np.testing.assert_allclose([line["loss"] for line in x], [line["loss"] for line in y], rtol=1e-5)


# --- a process that dies, fails or hangs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.clock
def test_a_rank_killed_in_mid_commit(tmp_path, whole, cache, rank):
    """That step is never offered; the other rank ends, not with 0, within heartbeat + 5 s; the job resumes, and is the unbroken
    run."""
    options = [*RUN, "--steps", "12", "--checkpoint-every", "4", "--out", tmp_path / "run"]
    jobs = start_two(tmp_path, *options, faults=[f"kill-commit@8:{rank}"], cache=cache)
    assert jobs[rank].end() == -signal.SIGKILL, jobs[rank].stderr
    began = time.monotonic()
    code = jobs[1 - rank].end(HEARTBEAT + 5)
    print(f"rank {rank} killed in mid-commit: the other ended with {code} after {time.monotonic() - began:.1f} s")
    assert code != 0
    assert steps(tmp_path / "run") == [4]
    assert any("tmp" in path.name for path in (tmp_path / "run" / "checkpoints").iterdir())  # it was in the middle of it
    jobs = start_two(tmp_path, *options, cache=cache, name="again")
    assert [job.end() for job in jobs] == [0, 0], jobs[0].stderr + jobs[1].stderr
    assert "resuming at step 4 " in jobs[0].stdout
    assert losses(tmp_path / "run") == losses(whole / "run")
    assert all(path.name.isdigit() for path in (tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.clock
def test_an_exception_on_one_rank_ends_the_job_in_seconds(tmp_path, cache, rank):
    options = [*RUN, "--steps", "100000", "--checkpoint-every", "100", "--heartbeat-timeout", "100", "--out", tmp_path / "run"]
    jobs = start_two(tmp_path, *options, faults=[f"raise@7:{rank}"], cache=cache)
    assert jobs[rank].end() == 1
    began = time.monotonic()
    code = jobs[1 - rank].end(20)  # not the heartbeat's 100
    print(f"exception on rank {rank}: the other ended with {code} after {time.monotonic() - began:.1f} s")
    assert code != 0
    assert "RuntimeError: a fault that was put here" in jobs[rank].stderr
    assert f"ends because process {rank}: error: RuntimeError: a fault that was put here" in jobs[1 - rank].stderr


@pytest.mark.clock
def test_a_hung_rank_ends_the_job_with_every_stack(tmp_path, cache):
    """Both print their stacks: the one that hangs, and the one that waits for it in a collective."""
    limit = 8  # from the sixth step on: compiling may take longer than that on a busy machine
    options = [*RUN, "--steps", "100000", "--checkpoint-every", "100", "--step-timeout", "200", "--out", tmp_path / "run"]
    jobs = start_two(tmp_path, *options, faults=["hang@7:1", f"tight{limit}@6"], cache=cache)
    jobs[1].reach("AT hang")
    began = time.monotonic()
    codes = [job.end(limit + 10) for job in jobs]
    print(f"rank 1 hung: all had ended {time.monotonic() - began:.1f} s later, the limit being {limit} s")
    assert 0 not in codes
    assert "hung for 8 s while taking step 7 (--step-timeout): the stacks of all threads follow" in jobs[1].stderr
    assert "fault_worker.py" in jobs[1].stderr
    for job in jobs:
        assert "hung for 8 s while" in job.stderr
        assert "Thread 0x" in job.stderr
        assert "train/loop.py" in job.stderr


def test_processes_that_differ_do_not_start(tmp_path, cache):
    options = [*RUN, "--steps", "12", "--out", tmp_path / "run"]
    jobs = start_two(tmp_path, *options, each=(["--seed", "0"], ["--seed", "1"]), cache=cache)
    assert set(job.end() for job in jobs) <= {1, 2}  # 1 where the other was told first
    assert (
        "the processes differ in --seed: process 1 of 2 holds another one than the rest (1, 0)" in jobs[0].stderr + jobs[1].stderr
    )
    jobs = start_two(tmp_path, *options, faults=["other-code:1"], cache=cache)
    assert set(job.end() for job in jobs) <= {1, 2}
    assert "the processes differ in code: process" in jobs[0].stderr + jobs[1].stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("each", "words"),
    [
        (lambda out: (["--out", out / "a"], ["--out", out / "b"]), "the processes differ in --out: process "),
        (lambda out: (["--eval-every", "5"], ["--eval-every", "6"]), "the processes differ in --eval-every: process "),
        (lambda out: ([], ["--subset", "96"]), "the processes differ in --subset: process "),
    ],
    ids=["out", "when to evaluate", "data"],
)
def test_options_that_would_make_one_wait_for_the_other_are_refused(tmp_path, cache, each, words):
    options = [*RUN, "--steps", "12", "--out", tmp_path / "run"]
    began = time.monotonic()
    jobs = start_two(tmp_path, *options, each=each(tmp_path), cache=cache)
    assert set(job.end() for job in jobs) <= {1, 2}
    assert words in jobs[0].stderr + jobs[1].stderr
    assert time.monotonic() - began < 120
    assert not any((tmp_path / name).exists() for name in ("run", "a", "b"))


@pytest.mark.slow
def test_a_measurement_by_processes_that_differ_does_not_begin(tmp_path, cache):
    """Weights of the same path and another content on the second host, here by a path of its own within an option that is the
    same."""
    config = vitcore.variant("ViT-Nano/4", image_size=8, channels=1, num_classes=10)
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        params = jax.jit(lambda k=k: vitcore.init(jax.random.key(k), config))()
        vitcore.save(tmp_path / str(k) / "w.npz", params, config, classes=tuple("0123456789"))
    address, jobs = f"localhost:{free_port()}", []
    for k in range(2):
        words = ["--init", "w.npz", "--data", "digits", "--mesh", "2x1", "--distributed", f"{address},2,{k}", "--out", "out"]
        jobs.append(
            subprocess.Popen(
                [sys.executable, "-m", "train.evaluate", *words],
                cwd=tmp_path / str(k),
                env=environment(cache),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [job.communicate(timeout=240)[1] for job in jobs]
    assert {job.returncode for job in jobs} <= {1, 2}
    assert "the processes differ in model: process 1 of 2" in "".join(said)
    assert not any((tmp_path / str(k) / "out").exists() for k in range(2))


def test_a_directory_that_is_not_shared_is_refused(tmp_path, cache):
    """Each process has a file system of its own mounted at the same place."""
    place = tmp_path / "disk"
    place.mkdir()
    port, jobs = free_port(), []
    for rank in range(2):
        options = [*RUN, "--steps", "12", "--out", place / "run", "--distributed", f"localhost:{port},2,{rank}"]
        jobs.append(start(tmp_path, *options, cache=cache, name=f"rank{rank}", mounted=place))
    began = time.monotonic()
    assert set(job.end() for job in jobs) <= {1, 2}
    said = jobs[0].stderr + jobs[1].stderr
    assert f"--out {place / 'run'} is not shared: process 1 of 2 does not see what process 0 writes there" in said
    assert time.monotonic() - began < 120


# --- signals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "fault", "rank"),
    [
        ("compile", "say-compile:1", 1),
        ("train", "say-train@3:1", 1),
        pytest.param("eval", "say-eval:1", 1, marks=pytest.mark.slow),
        ("save", "say-save:0", 0),
        ("data", "say-data@7:1", 0),  # the other rank waits for data that never come
        pytest.param("data", "say-data@7:1", 1, marks=pytest.mark.slow),
        pytest.param("data", "say-data@7:0", 1, marks=pytest.mark.slow),
    ],
)
def test_sigterm_to_one_rank_stops_all_at_one_step(tmp_path, cache, place, fault, rank):
    options = [*RUN[:-4], "--heartbeat-timeout", "100", "--steps", "100000", "--checkpoint-every", "4", "--out", tmp_path / "run"]
    jobs = start_two(tmp_path, *options, faults=[fault], cache=None if place == "compile" else cache)
    jobs[int(fault[-1])].reach(f"AT {place}")
    jobs[rank].term()
    assert [job.end() for job in jobs] == [0, 0], jobs[0].stderr + jobs[1].stderr
    last = steps(tmp_path / "run")[-1]
    assert f"asked to stop at step {last}" in jobs[0].stdout
    if place != "save":
        assert last == {"compile": 1, "train": 3, "eval": 5, "data": 7}[place]
    if place in ("compile", "train"):
        return  # resumes as the others do
    jobs = start_two(tmp_path, *options, faults=["say-train@2:0"], cache=cache, name="again")
    jobs[0].reach("AT train")
    jobs[0].term()
    assert [job.end() for job in jobs] == [0, 0]
    assert f"resuming at step {last} " in jobs[0].stdout
    assert steps(tmp_path / "run")[-1] == last + 2


# --- other meshes, other process counts -------------------------------------------------------------------------------------

LONG = ["--steps", "26", "--eval-every", "26", "--checkpoint-every", "26", "--heartbeat-timeout", "100"]


def on(shape: str, folder, out, *faults, cache, name):
    """26 steps, or what is left of them, on one layout: "8x1", or "2p 4x2" for two processes."""
    options = [*LONG, "--mesh", shape.removeprefix("2p "), "--out", out]
    if shape.startswith("2p"):
        return start_two(folder, *options, faults=faults, cache=cache, name=name)
    return [start(folder, *options, faults=faults, cache=cache, name=name)]


def joined(traces):
    """The traces of a run's processes as one: arrays' checksums, and the examples of each step in the order of their rows."""
    first = traces[0]
    for trace in traces[1:]:
        for key in first:
            if key.startswith("state"):
                assert first[key] == trace[key], key
    both = {key: first[key] for key in first if key.startswith("state")}
    return both | {key: np.concatenate([t[key] for t in traces], 1) for key in ("image", "label")}


def carried_on(folder, shapes, cache):
    """Six steps on the first of the shapes, ended by a signal; then the other twenty on each. Returns what each of them restored,
    which examples it used, and its losses."""
    folder.mkdir()
    jobs = on(shapes[0], folder, folder / "run", "say-train@6", cache=cache, name="begun")
    for job in jobs:
        job.reach("AT train")
    for job in jobs:
        job.term()
    assert [job.end() for job in jobs] == [0] * len(jobs), jobs[0].stderr
    assert steps(folder / "run") == [6]
    found = {}
    for shape in shapes:
        out = folder / f"on-{shape.replace(' ', '_')}"
        shutil.copytree(folder / "run", out)
        jobs = on(shape, folder, out, f"trace={out}-trace", cache=cache, name=out.name)
        assert [job.end() for job in jobs] == [0] * len(jobs), jobs[0].stderr + jobs[-1].stderr
        found[shape] = joined([dict(np.load(f"{out}-trace.{i}.npz")) for i in range(len(jobs))])
        found[shape]["loss"] = np.array([line["loss"] for line in records(out)])[-20:]
    return found


def difference(a, b) -> float:
    """The largest relative difference of the losses; the rest must be equal."""
    assert a.keys() == b.keys()
    arrays = [key for key in a if key.startswith("state")]
    assert len(arrays) > 40
    for key in arrays:
        assert a[key] == b[key], key
    assert len(a["label"]) == len(b["label"]) == len(a["loss"]) == 20
    np.testing.assert_array_equal(a["label"], b["label"])
    np.testing.assert_allclose(a["image"], b["image"], rtol=1e-12)
    return float(np.abs(b["loss"] / a["loss"] - 1).max())


def test_a_run_moves_between_meshes_and_process_counts(tmp_path, cache):
    """From 1x1 to 8x1, 4x2 and 2 processes x 4: every array byte-equal when it is loaded, the same examples in the same order, the
    next 20 losses to 1e-5."""
    others = ["8x1", "4x2", "2p 4x2"]
    found = carried_on(tmp_path / "a", ["1x1", *others], cache)
    worst = {shape: difference(found["1x1"], found[shape]) for shape in others}
    print(f"from 1x1, arrays byte-equal, the same examples, 20 losses within {worst}")
    assert max(worst.values()) < 1e-5


@pytest.mark.parametrize(
    ("here", "there"),
    [
        pytest.param("8x1", ["1x1", "4x2"], marks=pytest.mark.slow),
        pytest.param("4x2", ["8x1", "2p 4x2"], marks=pytest.mark.slow),
        pytest.param("2p 4x2", ["1x1", "4x2"], marks=pytest.mark.slow),
        pytest.param("8x1", ["2p 8x1"], marks=pytest.mark.slow),
    ],
)
def test_and_back(tmp_path, cache, here, there):
    found = carried_on(tmp_path / "a", [here, *there], cache)
    worst = {shape: difference(found[here], found[shape]) for shape in there}
    print(f"from {here}, arrays byte-equal, the same examples, 20 losses within {worst}")
    assert max(worst.values()) < 1e-5


# --- joining ----------------------------------------------------------------------------------------------------------------


def test_a_job_within_a_job_joins_once(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(distributed, "_end_with_the_others", lambda: None)
    monkeypatch.setattr(distributed.meeting, "meet", lambda *args, **kwargs: None)
    layout = distributed.Layout(name="a", address="127.0.0.1:1", count=2, index=1)
    distributed.start(layout, heartbeat=10, shutdown=10)
    monkeypatch.setattr(distributed, "_client", object)
    distributed.start(layout, heartbeat=10, shutdown=10)
    assert calls == [("127.0.0.1:1", 2, 1)]


def test_nothing_waits_in_the_store_any_more_when_a_process_has_left(monkeypatch):
    """A thread that comes back from C++ while the interpreter ends makes the exit code of a finished job that of an abort."""
    monkeypatch.setattr(distributed, "_client", object)
    monkeypatch.setattr(distributed, "_hearing", [])
    gone = threading.Event()
    monkeypatch.setattr(jax.distributed, "shutdown", gone.set)
    distributed._hear(lambda: gone.wait() and time.sleep(0.3), "waits")
    distributed.leave()
    assert not distributed._hearing[0].is_alive()


# --- which rows a process reads ---------------------------------------------------------------------------------------------


def laid_out(grid, rest: int = 1) -> Any:
    """A mesh whose devices say which process holds them, its data axis in two where `rest` says so."""
    devices = np.array([[types.SimpleNamespace(process_index=p) for p in row] for row in grid], dtype=object)
    names = ("data", "model") if rest == 1 else ("data", "rest", "model")
    devices = devices if rest == 1 else devices.reshape(-1, rest, devices.shape[1])
    return types.SimpleNamespace(devices=devices, axis_names=names, shape=dict(zip(names, devices.shape, strict=True)))


@pytest.mark.parametrize(
    ("grid", "shards"),
    [
        ([[0, 0], [0, 0], [1, 1], [1, 1]], {0: (0, 2), 1: (1, 2)}),
        ([[0, 1], [0, 1]], {0: (0, 1), 1: (0, 1)}),  # the model axis crosses the processes: both read every row
        ([[0, 1], [2, 3]], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
        ([[1], [1], [0], [0]], {1: (0, 2), 0: (1, 2)}),
        ([[0], [1], [0], [1]], "holds the rows"),
    ],
)
def test_a_process_reads_the_rows_of_its_devices(monkeypatch, grid, shards):
    for process in {p for row in grid for p in row}:
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        if isinstance(shards, str):
            with pytest.raises(ValueError, match=shards):
                meshes.data_shard(laid_out(grid))
        else:
            assert meshes.data_shard(laid_out(grid)) == shards[process]
            assert meshes.data_shard(laid_out(grid, rest=2)) == shards[process]
