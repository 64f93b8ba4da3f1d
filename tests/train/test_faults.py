"""A run of one process, with something happening to it: stops, kills, damage, a full disk, bad numbers.

The rows of the fault matrix that need several processes are in test_faults_distributed.py, hostile files in test_faults_files.py.
"""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.loop
from tests.train.fault_jobs import JOB, ROOT, assert_same_checkpoint, environment, held, losses, records, start, steps, tree_of
from train import manifest, pretrain
from train.checkpoint import CheckpointError, Checkpoints, abstract
from train.job import claim, place

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the jobs in processes of their own keep their compiled programs: the later ones start in seconds."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """The runs in this process share what they compile, where all that goes into it is equal."""
    optimizers = {}

    def optimizer(full, config, make=pretrain._optimizer):
        key = (full.learning_rate, full.steps, full.warmup_steps, full.decay, full.weight_decay, full.weight_decay_form,
               full.recipe, full.model, full.first_moment)  # fmt: skip
        return optimizers.setdefault(key, make(full, config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "_optimizer", optimizer)
        for name in ("make_init", "make_train_step", "make_eval_step"):
            patch.setattr(train.loop, name, functools.cache(getattr(train.loop, name)))
        yield


def run(*options, code=0):
    assert pretrain.main([*JOB, *map(str, options)]) == code


# --- stop and resume: bit for bit -------------------------------------------------------------------------------------------

TWELVE = ["--mesh", "2x1", "--steps", "12", "--eval-every", "5", "--checkpoint-every", "4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of twelve steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(*TWELVE, "--out", out)
    return out


def at_step(monkeypatch, number, act):
    """Calls `act` when the number-th step of the run is about to be taken."""
    make = train.loop.make_train_step

    def faulty(*args):
        step, taken = make(*args), []

        def wrapped(*batch):
            taken.append(1)
            if len(taken) == number:
                act()
            return step(*batch)

        return wrapped

    monkeypatch.setattr(train.loop, "make_train_step", faulty)


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 10, 11], ids="step {}".format)
def test_stopped_and_resumed_it_is_the_unbroken_run(whole, tmp_path, monkeypatch, capsys, stop):
    """SIGTERM at step 1, at a checkpoint (4), at an epoch's edge with an evaluation due (5, 10), in mid-epoch (7), one before the
    end: losses, scores and every array of the last checkpoint are those of the run that nothing happened to."""
    at_step(monkeypatch, stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(*TWELVE, "--out", tmp_path / "run")
    assert f"asked to stop at step {stop}" in capsys.readouterr().out
    assert steps(tmp_path / "run")[-1] == stop
    monkeypatch.undo()
    run(*TWELVE, "--out", tmp_path / "run")
    assert f"resuming at step {stop} " in capsys.readouterr().out
    assert len(losses(whole)) == 12
    assert losses(tmp_path / "run") == losses(whole)
    assert_same_checkpoint(tmp_path / "run", whole, 12)


def test_dropout_and_augmentation_are_on_in_the_runs_above(whole, tmp_path):
    for k, change in enumerate((["--dropout", "0"], ["--augment", "none"])):
        run(*TWELVE, *change, "--out", tmp_path / str(k))
        assert losses(tmp_path / str(k))[0] != losses(whole)[0]


def test_every_step_draws_a_dropout_of_its_own():
    """Or a run that resumes would be bit-equal all the same: the mask is a function of the state's step, and of nothing else."""
    from train.optim import optimizer, schedule
    from train.step import StepOptions, make_init, make_train_step
    from vitcore import variant

    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1])
    tx, losses = optimizer(schedule(base_lr=1e-2, total_steps=100), base_lr=1e-2), []
    config = variant("ViT-Nano/4", image_size=8, channels=1, num_classes=10, dropout=0.1)
    start, step = make_init(config, mesh, tx, StepOptions()), make_train_step(config, mesh, tx, StepOptions())
    images = jax.random.normal(jax.random.key(2), (8, 8, 8, 1))
    for number in (3, 4, 3):
        state = start(jax.random.key(0))
        state.params["head"]["kernel"] = jax.random.normal(jax.random.key(1), state.params["head"]["kernel"].shape)
        losses.append(float(step(state._replace(step=jnp.int32(number)), images, jnp.arange(8))[1]["loss"]))
    assert losses[0] == losses[2] != losses[1]


def test_stopped_at_every_step(whole, tmp_path, monkeypatch):
    """A machine that is taken away each time a step is done: progress is slow, but it is progress, and the same."""
    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    for step in range(1, 6):
        run(*TWELVE, "--out", tmp_path / "run")
        assert steps(tmp_path / "run")[-1] == step
    monkeypatch.undo()
    run(*TWELVE, "--out", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)


# --- SIGTERM wherever it comes ----------------------------------------------------------------------------------------------

ENDLESS = ["--mesh", "1x1", "--steps", "100000", "--eval-every", "3", "--checkpoint-every", "3"]


@pytest.mark.parametrize(
    ("place", "fault", "stops_at", "options"),
    [
        ("compile", "say-compile", 1, []),
        ("train", "say-train@3", 3, []),
        ("eval", "say-eval", 3, []),
        ("save", "say-save", None, []),
        ("save", "say-save", None, ["--checkpoint-wait"]),
        ("data", "say-data@5", 5, []),
    ],
)
def test_sigterm_ends_it_with_a_checkpoint_wherever_it_comes(tmp_path, cache, place, fault, stops_at, options):
    """In a compilation (nothing is cached there), a step, an evaluation, a save, and while waiting for data that never come."""
    options = [*ENDLESS, *options, "--out", tmp_path / "run"]
    job = start(tmp_path, *options, faults=[fault], cache=None if place == "compile" else cache)
    job.reach(f"AT {place}")
    if place == "compile":
        time.sleep(0.5)  # the compilation takes seconds
    job.term()
    began = time.monotonic()
    assert job.end() == 0, job.stderr
    taken = time.monotonic() - began
    last = steps(tmp_path / "run")[-1]
    assert f"asked to stop at step {last}" in job.stdout
    if stops_at is not None:
        assert last == stops_at
    if "--checkpoint-wait" in options:
        assert last in (3, 4)  # with a step more, where its batch was there already
    assert records(tmp_path / "run")[-1]["step"] in (last, last - 1)  # where the evaluation was cut, the record is still due
    # a step, a save and the end of the process; compiling and a save put off by a second come on top
    assert taken < (120 if place == "compile" else 60)
    if place == "eval":
        assert "val_loss" not in json.dumps(records(tmp_path / "run"))


@pytest.mark.clock
def test_a_second_sigterm_ends_it_at_once(tmp_path, cache):
    """While the first is still being obeyed, here behind a step that never ends."""
    job = start(tmp_path, *ENDLESS, "--out", tmp_path / "run", faults=["hang@2", "say-compile@2"], cache=cache)
    job.reach("AT compile")
    job.term()
    time.sleep(1)
    assert job.process.poll() is None
    job.term()
    assert job.end(10) == 128 + signal.SIGTERM


def test_an_interrupt_while_modules_load_prints_nothing(tmp_path):
    """No traceback, whenever it comes; once the job runs, one line."""
    said = []
    for delay in (0.1, 0.4, 0.8, 1.2):
        command = [sys.executable, "-m", "train.pretrain", *ENDLESS, "--out", str(tmp_path / "run")]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        while not _imports_have_begun(process.pid):
            assert process.poll() is None
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        try:
            said.append((process.communicate(timeout=120)[1], process.returncode))
        finally:
            process.kill()
    for text, code in said:
        assert code in (-signal.SIGINT, 130)
        assert text == "" or text.startswith("train.pretrain: interrupted; "), text


def test_an_interrupt_in_the_garbage_collector_is_raised_after_it():
    """jax has a callback in there, and what a callback raises goes no further."""
    code = """
import gc, os, signal
from train.signals import check_interrupt, interruptible
interruptible()
gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGINT))
gc.collect()
gc.callbacks.clear()
try:
    check_interrupt()
except KeyboardInterrupt:
    print("raised")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("raised\n", "")


def _imports_have_begun(pid) -> bool:
    """Whether the interpreter is up and the job's module has set its signals."""
    ignored = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    started = "numpy" in Path(f"/proc/{pid}/maps").read_text()
    return started and not int(ignored[0], 16) & (1 << (signal.SIGINT - 1))


# --- SIGKILL at random moments ----------------------------------------------------------------------------------------------


def entries(out):
    """What stands beside whole steps in a run's directory: saves under way, files about to be put in place."""
    left = {path.name for path in out.glob("*.tmp")}
    return left | {path.name for path in (out / "checkpoints").iterdir() if not path.name.isdigit()}


def killed_and_resumed(folder, cache, times, seed, *, wait):
    """Kills the same run again and again, half of the times while it starts, else while it trains, saves and cleans up. Checks
    after each kill that the start after the kill before it had resumed, lost no more than it may, and left nothing behind.
    wait: --checkpoint-wait. Returns the steps that each resumption lost, and how many kills hit a save."""
    folder.mkdir()
    rng, out, every = random.Random(seed), folder / "run", 10
    options = ["--mesh", "1x1", "--steps", "1000000", "--eval-every", "25", "--checkpoint-every", every, "--keep", "2",
               "--out", out, *["--checkpoint-wait"] * wait]  # fmt: skip
    lost, in_saves, debris, saving, newest = [], 0, set(), False, 0

    def killed(job, done):
        """done: steps before this job. Looks at what it did and what it leaves."""
        nonlocal saving, debris
        job.process.kill()
        job.process.wait()
        assert "rror" not in job.stderr, job.stderr
        assert "put aside" not in job.stdout, job.stdout
        if "resuming at step" in job.stdout:
            resumed = int(job.stdout.split("resuming at step ")[1].split()[0])
            lost.append(done - resumed)
            # Nothing that was whole is lost; and a save waits for the one before it to be whole, so that the first step after
            # it finds one interval on disk and the other at worst under way.
            assert resumed == newest, (done, resumed, newest)
            assert resumed >= (done - 1) // every * every - every, (done, resumed, saving)
            if wait:  # no step is taken while a save is under way
                assert done - resumed <= every, (done, resumed, saving)
            if steps(out)[-1] > resumed:  # a save comes after the clean-up
                assert not debris & entries(out), debris
                debris = set()
        debris |= entries(out)
        rows = [line["step"] for line in records(out)]
        assert rows == list(range(1, len(rows) + 1))
        saving = any("tmp" in name for name in entries(out) if not name.endswith(".tmp"))
        return saving

    for k in range(times):
        done, newest = len(records(out)), max(steps(out), default=0) if k else 0
        job = start(folder, *options, cache=cache)
        if k % 4 == 2:
            time.sleep(rng.uniform(0.0, 6.0))  # modules, and what comes next on a machine that is fast
        else:
            job.reach("resuming at step" if k else "ops:")
            resumed = int(job.stdout.split("resuming at step ")[1].split()[0]) if k else 0
            while (k == 0 or k % 4) and not (out / "checkpoints" / str(resumed + every)).exists():
                assert job.process.poll() is None, job.stderr
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 1.5))  # compiling, where k is a multiple of 4; else steps, saves, clean-ups
        assert job.process.poll() is None, job.stderr
        in_saves += killed(job, done)
    done, newest = len(records(out)), max(steps(out), default=0)
    job = start(folder, *options, faults=[f"say-train@{2 * every}"], cache=cache)
    job.reach("AT train")
    killed(job, done)
    job = start(folder, *options, faults=["say-train@2"], cache=cache)
    job.reach("AT train")
    job.term()
    assert job.end() == 0
    assert entries(out) == set()
    return lost, in_saves


def killed_both_ways(tmp_path, cache, times, seed):
    """`times` kills of a run whose saves go on beside its steps, and as many of one with --checkpoint-wait. Returns how many
    resumptions were seen."""
    seen = 0
    for wait in (False, True):
        lost, in_saves = killed_and_resumed(tmp_path / f"wait-{wait}", cache, times, seed + wait, wait=wait)
        how = "with --checkpoint-wait" if wait else "with saves beside the steps"
        print(f"{times} kills {how}, {in_saves} in a save; steps lost by {len(lost)} resumptions: {lost}, of an interval of 10")
        seen += len(lost)
    return seen


def test_killed_at_random_moments_it_resumes(tmp_path, cache):
    assert killed_both_ways(tmp_path, cache, 2, seed=1) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_fifty_times_it_resumes_fifty_times(tmp_path, cache):
    assert killed_both_ways(tmp_path, cache, 25, seed=2) >= 38  # the others were killed before they came to that


@pytest.mark.parametrize("wait", [False, True])
def test_with_checkpoint_wait_a_save_is_whole_before_the_next_step(tmp_path, monkeypatch, wait):
    """What bounds the loss above, without chance: the manifest of every save is late, and each step looks what there is."""
    write, make, late = manifest.write, train.loop.make_train_step, []

    def slow(directory):
        time.sleep(0.5)
        write(directory)

    def looking(*args):
        step = make(*args)

        def wrapped(state, *batch):
            due = int(state.step) // 4 * 4
            if due and steps(tmp_path / "run")[-1:] != [due]:
                late.append(due)
            return step(state, *batch)

        return wrapped

    monkeypatch.setattr(manifest, "write", slow)
    monkeypatch.setattr(train.loop, "make_train_step", looking)
    run(*TWELVE, "--out", tmp_path / "run", *["--checkpoint-wait"] * wait)
    assert wait == (not late), late  # without it the steps go on meanwhile
    assert steps(tmp_path / "run") == [4, 8, 12]


def test_a_claim_cut_short_is_none(tmp_path, monkeypatch):
    """Killed while config.json is written, a run starts in its directory as if that had not been."""
    out = place(tmp_path / "run")

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            claim(out, {"seed": 1}, {"seed": 1})
    assert os.listdir(out) == []
    (out / "config.json.tmp").write_text('{"see')  # what a kill leaves
    claim(out, {"seed": 1}, {"seed": 1})
    assert os.listdir(out) == ["config.json"]


# --- damage -----------------------------------------------------------------------------------------------------------------


def small_state(value):
    key = jax.random.key(value)
    return {"params": {"kernel": jax.random.normal(key, (64, 32)), "bias": jnp.full(7, float(value))}, "step": jnp.int32(value)}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "c"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small_state(step), {"n": step})
    return folder


def damages(path: Path):
    """(name, function that damages a file): bits flipped in five places, cut at three, zeroed whole and in a block, gone."""
    size = path.stat().st_size

    def flip(at, bit=1):
        def act(file):
            data = bytearray(file.read_bytes())
            data[at] ^= 1 << bit
            file.write_bytes(bytes(data))

        return act

    for k in range(5):
        yield f"flip {k}/4", flip((size - 1) * k // 4, bit=k % 8)
    for cut in {0, size // 2, size - 1}:
        yield f"cut to {cut}", lambda file, cut=cut: os.truncate(file, cut)
    yield "zero", lambda file: file.write_bytes(bytes(size))
    yield "zero a block", lambda file: file.write_bytes(bytes(min(size, 16)) + file.read_bytes()[16:])
    yield "longer", lambda file: file.write_bytes(file.read_bytes() + b"\0")
    yield "delete", lambda file: file.unlink()
    yield "a directory instead", lambda file: (file.unlink(), file.mkdir())


def test_no_damage_to_any_file_is_silent(two_steps, tmp_path, monkeypatch):
    """Each file of the last step, each damage: what comes back is bit-identical, or the step is put aside and the one before it is
    loaded."""
    monkeypatch.setattr(manifest, "_CHUNK", 100)  # so that these files, as larger ones, are read in several
    target, cases, aside = abstract(small_state(0)), 0, 0
    bits = {step: {k: np.asarray(v) for k, v in small_state(step)["params"].items()} for step in (1, 2)}
    files = sorted(path.relative_to(two_steps / "2") for path in (two_steps / "2").rglob("*") if path.is_file())
    data = 0
    for file in files:
        for name, damage in damages(two_steps / "2" / file):
            folder = tmp_path / str(cases)
            shutil.copytree(two_steps, folder)
            damage(folder / "2" / file)
            said = []
            with Checkpoints(folder, say=said.append) as checkpoints:
                assert checkpoints.begun()
                state, extra = checkpoints.restore(None, target)
                step = extra["n"]
                for key, want in bits[step].items():
                    np.testing.assert_array_equal(np.asarray(state["params"][key]), want, err_msg=f"{name}: {file}")
                assert int(state["step"]) == step
                names = set(os.listdir(folder))
                if step == 1:
                    aside += 1
                    assert len(said) == 1, (file, name)
                    assert "put aside as 2.damaged" in said[0], (file, name)
                    assert "\n" not in said[0]
                    assert names == {"1", "2.damaged"}, (file, name)
                    checkpoints.save(2, small_state(2), {"n": 2})  # and its place is free again
                    checkpoints.wait()
                    assert checkpoints.steps() == (1, 2)
                else:
                    assert said == [], (file, name)
                    assert names == {"1", "2"}, (file, name)
            data += "/d/" in str(file) and step == 1
            cases += 1
            shutil.rmtree(folder)
    print(f"{cases} cases of damage in {len(files)} files: 0 silent; {aside} put aside, {cases - aside} bit-identical")
    assert cases >= 100
    assert data >= 20  # every damage to the arrays themselves is found
    assert aside > cases * 0.6


def test_a_step_put_aside_twice_keeps_both(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "c")
    for name in ("2.damaged", "2.damaged-2"):
        os.truncate(tmp_path / "c" / "2" / "extra" / "data.json", 1)
        with Checkpoints(tmp_path / "c", say=print) as checkpoints:
            _, extra = checkpoints.restore(None, abstract(small_state(0)))
            assert extra == {"n": 1}
            assert (tmp_path / "c" / name).is_dir()
            checkpoints.save(2, small_state(2), {"n": 2})


def test_a_step_asked_for_by_name_is_verified_too(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "c")
    os.truncate(tmp_path / "c" / "1" / "extra" / "data.json", 1)
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(CheckpointError, match=r"1 is damaged: extra/data.json has 1 byte"),
    ):
        checkpoints.restore(1, abstract(small_state(0)))
    assert sorted(os.listdir(tmp_path / "c")) == ["1", "2"]


def test_a_manifest_names_no_file_outside(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / manifest.MANIFEST).write_text(json.dumps({"files": {"../secret": [1, 2363233923]}}))
    assert manifest.faults(tmp_path / "part") == ["MANIFEST.json is damaged (ValueError)"]


def test_every_checkpoint_bad_is_an_error_and_nothing_is_touched(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for step in steps(out):
        for file in (out / "checkpoints" / str(step) / "state").rglob("d/*"):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 4
            file.write_bytes(bytes(data))
    before = tree_of(out)
    run(*TWELVE, "--out", out, code=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none of the 3 checkpoints there is good. Nothing was changed" in error
    assert tree_of(out) == before
    # and where only steps put aside are left, that is no start at zero either
    for step in steps(out):
        (out / "checkpoints" / str(step)).rename(out / "checkpoints" / f"{step}.damaged")
    before = tree_of(out)
    run(*TWELVE, "--out", out, code=2)
    assert "holds damaged checkpoints only (12.damaged, 4.damaged, 8.damaged)" in capsys.readouterr().err
    assert tree_of(out) == before


def test_the_last_checkpoint_bad_the_run_goes_on_from_the_one_before(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    os.truncate(next((out / "checkpoints" / "12" / "state" / "d").iterdir()), 7)
    run(*TWELVE, "--out", out)
    printed = capsys.readouterr().out
    assert "has 7 bytes" in printed
    assert "put aside as 12.damaged" in printed
    assert "resuming at step 8 " in printed
    assert losses(out) == losses(whole)
    assert_same_checkpoint(out, whole, 12)


# --- a full disk ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_shows_within_an_interval_and_the_last_good_step_loads(tmp_path, cache):
    """On a tmpfs of 10 MB, which holds four checkpoints; with more room the run goes on. The path is so long that tensorstore's
    error, which names it twice, has to be cut."""
    disk = tmp_path / ("a-long-name-" * 12) / "disk"
    disk.mkdir(parents=True)
    job = [sys.executable, "-m", "train.pretrain", *JOB, "--mesh", "1x1", "--steps", "60", "--eval-every", "60",
           "--checkpoint-every", "4", "--keep", "9", "--out", str(disk / "run")]  # fmt: skip
    script = f"""
        mount -t tmpfs -o size=10m none {disk} || exit 1
        {" ".join(job)}
        echo "exit: $?"
        echo "steps:" $(ls {disk}/run/checkpoints)
        echo "taken: $(wc -l < {disk}/run/metrics.jsonl)"
        mount -o remount,size=200m {disk}
        {" ".join(job)}
        echo "exit: $?"
        """
    become = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
    done = subprocess.run(
        [*become, "bash", "-c", textwrap.dedent(script)],
        env=environment(cache),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert "exit: " in done.stdout, done.stderr
    first, after = done.stdout.split("taken: ")
    error = [line for line in done.stderr.splitlines() if line.startswith("train.pretrain: error: ")]
    assert len(error) == 1, done.stderr
    assert "No space left on device" in error[0]
    assert "exit: 2" in first
    whole = sorted(int(name) for name in first.split("steps:")[1].split() if name.isdigit())
    taken, failed = int(after.split()[0]), int(error[0].split("/checkpoints/")[1].split(":")[0])
    assert failed == whole[-1] + 4
    assert failed <= taken <= failed + 4  # the error shows within an interval of the save
    assert f"resuming at step {whole[-1]} " in after
    assert "finished at step 60" in after
    assert "exit: 0" in after


# --- numbers that are none --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [[], ["--accumulate", "2", "--first-moment", "bfloat16", "--mesh", "2x2"]], ids=["plain", "parts"]
)
def test_a_batch_of_nan_changes_nothing_and_is_counted(tmp_path, monkeypatch, capsys, options):
    """Parameters, optimizer and average of the step after it are bit for bit those of the step before."""
    make, states = train.loop.make_train_step, {}

    def faulty(*args):
        step = make(*args)

        def wrapped(state, image, label):
            number = int(state.step) + 1
            states[number - 1] = jax.tree.map(np.array, state._replace(step=None))
            return step(state, image * float("nan") if number == 3 else image, label)

        return wrapped

    monkeypatch.setattr(train.loop, "make_train_step", faulty)
    run(*TWELVE[2:], "--mesh", "2x1", *options, "--out", tmp_path / "run")
    for before, after in zip(jax.tree.leaves(states[2]), jax.tree.leaves(states[3]), strict=True):
        assert before.tobytes() == after.tobytes()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[11]))
    assert any(a.tobytes() != b.tobytes() for a, b in zip(jax.tree.leaves(states[3]), jax.tree.leaves(states[4]), strict=True))
    lines = records(tmp_path / "run")
    assert [line.get("skipped") for line in lines] == [None, None] + [1] * 10
    assert lines[2]["loss"] is None
    # the schedule goes by updates: the step after the skipped one has the rate that this one would have had
    assert lines[3]["learning_rate"] == lines[2]["learning_rate"]
    printed = capsys.readouterr().out
    assert "step 3: loss nan, gradient norm nan: skipped (1 in a row, 1 in all)" in printed
    assert "1 steps were skipped" in printed


def test_a_gradient_that_overflows_is_skipped_too(tmp_path, monkeypatch):
    """A finite loss with an infinite gradient norm."""
    from train.optim import optimizer, schedule
    from train.step import StepOptions, make_init, make_train_step
    from vitcore import variant

    config = variant("ViT-Nano/4", image_size=8, channels=1, num_classes=10, representation_size=None)
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1])
    tx = optimizer(schedule(base_lr=1e-2, total_steps=100), base_lr=1e-2)
    state = make_init(config, mesh, tx, StepOptions())(jax.random.key(0))
    state.params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (64, 10)) * 1e30  # squares of such gradients overflow
    before = jax.tree.map(np.array, state)
    images = jax.random.normal(jax.random.key(2), (8, 8, 8, 1))
    after, metrics = make_train_step(config, mesh, tx, StepOptions())(state, images, jnp.arange(8))
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["gradient_norm"])
    assert not metrics["finite"]
    assert int(after.step) == int(before.step) + 1
    for a, b in zip(jax.tree.leaves(after._replace(step=0)), jax.tree.leaves(before._replace(step=0)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_so_many_bad_steps_in_a_row_end_the_run_with_a_checkpoint_and_a_reason(tmp_path, monkeypatch, capsys):
    make = train.loop.make_train_step
    bad = [2, 3, 5, 6, 7]  # never three in a row before step 7

    def faulty(*args):
        step = make(*args)
        return lambda state, image, label: step(state, image * (float("nan") if int(state.step) + 1 in bad else 1.0), label)

    monkeypatch.setattr(train.loop, "make_train_step", faulty)
    run(*TWELVE, "--bad-steps", 3, "--out", tmp_path / "run", code=2)
    captured = capsys.readouterr()
    assert "error: 3 steps in a row had no finite loss and gradient, the last of them step 7" in captured.err
    assert captured.err.count("\n") == 1
    assert "step 6: loss nan, gradient norm nan: skipped (2 in a row, 4 in all)" in captured.out
    assert steps(tmp_path / "run")[-1] == 7
    arrays, extra = held(tmp_path / "run", 7)
    assert extra["skipped"] == 5
    assert all(np.isfinite(array).all() for array in arrays.values())
    bad.clear()
    run(*TWELVE, "--bad-steps", 3, "--out", tmp_path / "run")  # and goes on from there
    assert "resuming at step 7 " in capsys.readouterr().out
    assert records(tmp_path / "run")[-1]["skipped"] == 5


# --- the watchdog -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["time.sleep(1000)", "ctypes.PyDLL(None).sleep(1000)"], ids=["waiting", "holding the lock"])
@pytest.mark.clock
def test_a_hang_prints_every_stack_and_ends(how):
    """Also where the thread that hangs holds the interpreter's lock, so that no Python code can run."""
    code = f"""
        import ctypes, threading, time
        from train.signals import Watchdog
        def the_other_thread():
            time.sleep(1000)
        threading.Thread(target=the_other_thread, daemon=True).start()
        with Watchdog(2) as watchdog:
            for step in range(10):
                watchdog.beat(f"taking step {{step}}")
                time.sleep(0.3)
            print("survived", flush=True)
            {how}
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "survived\n"
    assert done.returncode == 1
    assert "Thread 0x" in done.stderr
    assert "the_other_thread" in done.stderr
    assert "<module>" in done.stderr
    if "time" in how:
        assert done.stderr.startswith("hung for 2 s while taking step 9 (--step-timeout): the stacks of all threads follow")


# --- another model ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.clock
@pytest.mark.parametrize("fault", ["stop-eval", "hang-eval"])
def test_the_watchdog_in_an_evaluation(tmp_path, cache, fault):
    """The limit is 4 s there. Time in which the process is stopped does not count; a batch that hangs ends it."""
    options = ["--mesh", "1x1", "--steps", "3", "--eval-every", "1", "--checkpoint-every", "1", "--out", tmp_path / "run"]
    job = start(tmp_path, *options, faults=[fault], cache=cache)
    job.reach("AT evaluation")
    began = time.monotonic()
    if fault == "stop-eval":
        assert job.end() == 0, job.stderr
        assert time.monotonic() - began > 8
        assert [line["step"] for line in records(tmp_path / "run")] == [1, 2, 3]
    else:
        assert job.end(60) == 1
        assert "hung for 4 s while evaluating after step 1 (--step-timeout)" in job.stderr
        assert "in evaluate" in job.stderr


def test_a_checkpoint_of_another_model_or_optimizer_names_the_leaf(whole):
    from train.optim import optimizer, schedule, sgd
    from train.step import StepOptions, make_init
    from vitcore import variant

    rate = schedule(base_lr=1e-2, total_steps=100)
    adam, mesh = (
        optimizer(rate, base_lr=1e-2, weight_decay=0.1),
        jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1]),
    )
    cases = [
        (dict(width=32, mlp_dim=64), adam, 0.9, "expected float32[4, 32], found float32[4, 64]"),
        (dict(depth=3), adam, 0.9, "expected float32[3, "),
        (dict(), sgd(rate), 0.9, "opt_state/"),
        (dict(), optimizer(rate, base_lr=1e-2, first_moment="bfloat16"), 0.9, "bfloat16"),
        (dict(), adam, 0.0, "average/"),
        (dict(num_classes=11), adam, 0.9, "average/head/bias: expected float32[11], found float32[10]"),
    ]
    for change, tx, polyak, words in cases:
        config = variant("ViT-Nano/4", **dict(image_size=8, channels=1, num_classes=10, representation_size=64) | change)
        state = make_init(config, mesh, tx, StepOptions(polyak=polyak))(jax.random.key(0))
        before = tree_of(whole / "checkpoints")
        with (
            Checkpoints(whole / "checkpoints") as checkpoints,
            pytest.raises(ValueError, match="another model or optimizer") as error,
        ):
            checkpoints.restore(None, abstract(state))
        assert words in str(error.value)
        assert "found" in str(error.value)
        assert "\n" not in str(error.value)
        assert tree_of(whole / "checkpoints") == before  # not damage: nothing is put aside
