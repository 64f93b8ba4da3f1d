"""What every job does about signals, its parent, its directory and what it begins from; without a training step."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcore
from tests.train.fault_jobs import ROOT, environment
from train.checkpoint import CheckpointError, Checkpoints, abstract
from train.files import write_atomically
from train.job import JobOptions, locked, place, say
from train.pretrained import open_pretrained
from train.signals import Stop

pytestmark = pytest.mark.faults


def python(code, *arguments, **more):
    """A process that obeys a hangup, also where the tests were started with nohup, unless `preexec_fn` says otherwise."""
    more.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT, env=environment() | more.pop("env", {}), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
    )  # fmt: skip


SAVES = """
    import sys, time
    from train.job import guard
    def work(stop):
        print("ready", flush=True)
        while not stop.asked:
            time.sleep(0.05)
        print("saved", flush=True)
    sys.exit(guard("a job", work, saves=sys.argv[1] == "saves"))
    """


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("how", ["saves", "saves nothing"])
def test_the_first_signal_is_obeyed(number, how):
    """By a job that saves, and by one that has nothing to save."""
    job = python(SAVES, how)
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(number)
    out, err = job.communicate(timeout=30)
    if how == "saves":
        assert (out, err, job.returncode) == ("saved\n", "", 0)
    else:
        assert (out, job.returncode) == ("", 128 + signal.SIGTERM)
        assert err == "a job: asked to stop: ended, nothing is left half-written\n"


def test_a_job_that_saves_nothing_hears_nothing_before_it_is_ended():
    """It would otherwise say in that moment that all is well, and end with code 0."""
    asked, done = [], threading.Event()

    def at_once():
        asked.append(stop.asked)
        done.set()

    with Stop(at_once) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert done.wait(10)
    assert asked == [False]


def test_a_hangup_that_the_caller_ignores_is_ignored():
    """As nohup starts a job."""
    job = python(SAVES, "saves", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    assert job.communicate(timeout=30)[0] == "saved\n"


IDLE = {  # ways in which a worker does not look at its parent
    "waiting": "time.sleep(1000)",
    "holding the lock": "ctypes.PyDLL(None).sleep(1000)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("how", IDLE)
def test_worker_processes_end_when_their_parent_is_killed(how):
    """Within ten seconds, however busy they are, as with an image on which the decoder hangs."""
    code = """
        import ctypes, multiprocessing, os, signal, sys, time
        import train
        def work(queue):
            import train
            time.sleep(1)
            queue.put(multiprocessing.current_process().pid)
            time.sleep(0.5)
            IDLE
        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            for _ in range(2):
                context.Process(target=work, args=(queue,), daemon=True).start()
            print(queue.get(), queue.get(), flush=True)
            time.sleep(1000)
        """
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"workers-{os.getpid()}.py"
    path.write_text(textwrap.dedent(code).replace("IDLE", IDLE[how]))
    job = subprocess.Popen([sys.executable, path], cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE)
    try:
        assert job.stdout is not None
        workers = [int(pid) for pid in job.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(1)
        job.kill()
        job.wait()
        deadline = time.monotonic() + 10
        while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [pid for pid in workers if alive(pid)] == []
    finally:
        job.kill()
        path.unlink()


def ended(pids, seconds=10) -> bool:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(alive(pid) for pid in pids)


def test_a_process_that_a_job_starts_ends_with_it_and_clears_up(tmp_path):
    """As the compilers of bench do; what it starts itself has another parent."""
    code = """
        import os, subprocess, sys, time
        from train.signals import of_this_process
        child = "import os, sys, time; from train.signals import before_the_end; before_the_end(lambda: os.unlink(sys.argv[1])); "
        child += "assert 'VITCORE_PARENT' not in os.environ; print('up', flush=True); time.sleep(1000)"
        words, where = [sys.executable, "-c", child, sys.argv[1]], of_this_process(os.environ)
        process = subprocess.Popen(words, env=where, start_new_session=True)
        print(process.pid, flush=True)
        time.sleep(1000)
        """
    (tmp_path / "left").touch()
    job = python(code, tmp_path / "left")
    assert job.stdout is not None
    lines = {job.stdout.readline().strip() for _ in range(2)}
    (pid,) = [int(line) for line in lines if line != "up"]
    job.kill()
    job.wait()
    assert ended([pid])
    assert not (tmp_path / "left").exists()


@pytest.mark.parametrize("how", [how for how in IDLE if how != "waiting"])
def test_a_process_that_a_job_starts_ends_with_it_whatever_holds_it_up(how):
    """As the one in which the images that were in hand are decoded again."""
    child = f"import ctypes, os, signal, sys, time, train; time.sleep(1); print('up', flush=True); {IDLE[how]}"
    code = """
        import os, subprocess, sys, time
        from train.signals import of_this_process
        words = [sys.executable, "-c", sys.argv[1]]
        process = subprocess.Popen(words, env=of_this_process(os.environ), start_new_session=True)
        print(process.pid, flush=True)
        time.sleep(1000)
        """
    job = python(code, child)
    assert job.stdout is not None
    lines = {job.stdout.readline().strip() for _ in range(2)}
    (pid,) = [int(line) for line in lines if line != "up"]
    time.sleep(0.5)
    job.kill()
    job.wait()
    try:
        assert ended([pid])
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_command_of_bench_ends_at_the_first_signal(tmp_path):
    """And leaves no folder of images that it has made."""
    code = """
        import dataclasses, os, sys, time
        from bench.options import command
        from train.signals import before_the_end
        @dataclasses.dataclass
        class Options:
            pass
        def job(options):
            before_the_end(lambda: os.unlink(left))
            print("ready", flush=True)
            time.sleep(1000)
        left = sys.argv.pop()
        sys.exit(command(Options, "bench.any", job, interrupted="the same command continues"))
        """
    (tmp_path / "left").touch()
    job = python(code, tmp_path / "left")
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.terminate()
    assert job.communicate(timeout=30)[1].strip() == "bench.any: asked to stop; the same command continues"
    assert job.returncode == 143
    assert not (tmp_path / "left").exists()


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGTERM, 143, ""), (signal.SIGINT, 130, "vitcore.weights: interrupted\n")]
)
def test_a_command_that_reads_a_run_leaves_no_weights_behind(tmp_path, number, code, words):
    """Nor the process that writes them to a temporary file, also where the command is killed."""
    slow = """
        import os, sys, time
        import vitcore.runs, vitcore.weights
        from vitcore.command_line import end
        child = "import os, sys, time, train; print(os.getpid(), flush=True); time.sleep(1000)"
        run = vitcore.runs.subprocess.run
        vitcore.runs.subprocess.run = lambda command, env, **_: run([sys.executable, "-c", child], env=env)
        end("vitcore.weights", lambda: vitcore.weights.main(["show", sys.argv[1]]))
        """
    (tmp_path / "run").mkdir()
    (tmp_path / "tmp").mkdir()
    for signal_, left in ((number, 0), (signal.SIGKILL, 1)) if number == signal.SIGTERM else ((number, 0),):
        job = python(slow, tmp_path / "run", env={"TMPDIR": str(tmp_path / "tmp")})
        assert job.stdout is not None
        child = int(job.stdout.readline())
        assert len(list((tmp_path / "tmp").iterdir())) == 1
        job.send_signal(signal_)
        assert job.communicate(timeout=30)[1] == (words if signal_ == number else "")
        assert job.returncode == (code if signal_ == number else -signal.SIGKILL)
        assert ended([child])
        assert len(list((tmp_path / "tmp").iterdir())) == left


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_compiler_ends_with_its_study(tmp_path, number):
    """In the middle of a compilation of more than ten seconds."""
    words = ["--target", "v3", "--models", "ViT-L/16", "--sizes", "384", "--mode", "train", "--out", tmp_path, "--cache", tmp_path]
    job = subprocess.Popen(
        [sys.executable, "-m", "bench.throughput", *map(str, words)], cwd=ROOT, env=environment() | {"TMPDIR": str(tmp_path)}
    )
    try:
        children: list[int] = []
        deadline = time.monotonic() + 120
        while not any(tmp_path.glob("vitcore-tpu-*/dumps/*.*")):  # the compiler's first files: it is at work
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
        children += [int(k) for t in Path(f"/proc/{job.pid}/task").iterdir() for k in (t / "children").read_text().split()]
        assert children
        job.send_signal(number)
        assert job.wait(10) == (143 if number == signal.SIGTERM else -9)
        assert ended(children)
        assert not any(tmp_path.glob("vitcore-tpu-*"))
    finally:
        job.kill()


HANGS = """
    import sys, time
    import train.data.{name} as module
    from train.data.job import run_job
    module.{what} = lambda *_: time.sleep(1000)
    sys.exit(run_job(module.{options}, module.run, "train.data.{name}"))
    """


@pytest.mark.parametrize(
    ("name", "options", "what", "words", "doing"),
    [
        ("pack", "Pack", "_image", ["digits", "O", "--splits", "val"], "packing "),
        ("dedup", "Dedup", "phash", ["digits", "--against", "digits", "--out", "O"], "hashing "),
    ],
)
def test_a_job_on_data_that_hangs_ends(tmp_path, name, options, what, words, doing):
    words = [str(tmp_path) if word == "O" else word for word in words]
    job = python(HANGS.format(name=name, options=options, what=what), *words, "--workers", 1, "--step-timeout", 4)
    _, err = job.communicate(timeout=100)
    assert job.returncode == 1
    assert f"hung for 4 s while {doing}" in err
    assert "(--step-timeout): the stacks of all threads follow" in err


def alive(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_time_in_which_the_process_was_stopped_does_not_count():
    code = """
        import time
        from train.signals import Watchdog
        with Watchdog(4) as watchdog:
            watchdog.beat("working")
            print("ready", flush=True)
            time.sleep(1.5)
            print("done", flush=True)
        """
    job = python(code)
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGSTOP)
    time.sleep(6)  # more than the watchdog's four, less than twice that
    job.send_signal(signal.SIGCONT)
    out, err = job.communicate(timeout=60)
    assert (out, err, job.returncode) == ("done\n", "", 0)


def test_one_watchdog_within_another():
    """The inner one watches; the outer one begins anew when the inner one has gone."""
    code = """
        import time
        from train.signals import Watchdog, beat
        with Watchdog(2):
            with Watchdog(1000):
                time.sleep(4)
            print("inner done", flush=True)
            beat("hanging")
            time.sleep(100)
        """
    job = python(code)
    out, err = job.communicate(timeout=60)
    assert (out, job.returncode) == ("inner done\n", 1)
    assert err.startswith("hung for 2 s while hanging (--step-timeout)")


def test_output_that_nobody_reads_changes_nothing():
    code = """
        import sys, time
        from train.job import end, guard, say
        def work(stop):
            time.sleep(1)
            for k in range(10000):
                say("a line that nobody reads")
            open(sys.argv[1], "w").close()
        end(guard("a job", work))
        """
    for closed in ("stdout", "both"):
        done = Path(os.environ.get("TMPDIR", "/tmp")) / f"done-{os.getpid()}"
        job = python(code, done)
        assert job.stdout is not None
        assert job.stderr is not None
        job.stdout.close()
        if closed == "both":
            job.stderr.close()
        assert job.wait(60) == 0
        done.unlink()


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)], ids=str)
def test_no_file_takes_the_place_of_a_stream_that_is_closed(tmp_path, closed):
    """What C++ code prints would go into a checkpoint."""
    code = """
        import os, sys
        from train.job import end, guard
        def work(stop):
            with open(sys.argv[1], "w") as file:
                file.flush()
                for number in 1, 2:
                    os.write(number, b"as a library in C++ does")
                file.write("ours")
        end(guard("a job", work))
        """

    def close():
        for descriptor in closed:
            os.close(descriptor)

    words = [sys.executable, "-c", textwrap.dedent(code), tmp_path / "file"]
    assert subprocess.run(words, cwd=ROOT, env=environment(), preexec_fn=close, timeout=100).returncode == 0
    assert (tmp_path / "file").read_text() == "ours"


# --- the directory ----------------------------------------------------------------------------------------------------------


def test_no_link_is_followed_for_the_lock_or_for_what_is_about_to_be_written(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=r"\.lock is a symbolic link"), locked(place(tmp_path / "run")):
        pass
    (tmp_path / "run" / "config.json.tmp").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "run" / "config.json", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "run" / "config.json").read_text() == "new"
    assert not (tmp_path / "run" / "config.json").is_symlink()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", "x")
        with Checkpoints(tmp_path / "c") as checkpoints:
            checkpoints.save(1, {"w": jnp.ones(3)}, {})
    finally:
        os.umask(before)
    files = [tmp_path / "file", *(path for path in (tmp_path / "c").rglob("*") if path.is_file())]
    assert len(files) > 8
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


@pytest.mark.parametrize("name", ["set [1]", "[a", "a*", "b?", "c\\d"])
def test_a_name_that_would_lose_checkpoints_is_refused_at_once(tmp_path, name):
    """Orbax looks for what its processes have written by a pattern made of the path."""
    with pytest.raises(ValueError, match="for a pattern, and loses what it writes"):
        Checkpoints(tmp_path / name / "checkpoints")
    with pytest.raises(ValueError, match=r"--out .*: a path without \[, "):
        place(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_no_utf_8_is_refused_at_once(capsys):
    """Orbax's part in C++ takes none: the first save would fail, a whole interval later."""
    with pytest.raises(ValueError, match=r"--out run\\xff: a path in UTF-8 is required"):
        place(os.fsdecode(b"run\xff"))
    say(f"folder:{os.fsdecode(bytes([0xC3]))}: of images it may be")
    assert capsys.readouterr().out == "folder:\\xc3: of images it may be\n"


@pytest.mark.parametrize("name", ["50 %", "ä {b} 'c'", "two\nlines"])
def test_any_other_name_will_do(tmp_path, name):
    state = {"w": jnp.arange(3.0)}
    with Checkpoints(tmp_path / name / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"n": step})
        assert checkpoints.restore(None, abstract(state))[1] == {"n": 3}


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again_by_itself(tmp_path, how):
    state = {"w": jnp.arange(3.0)}
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert not checkpoints.begun()
        checkpoints.save(1, state, {})
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.begun()
    (tmp_path / "c").rename(tmp_path / "elsewhere")
    if how == "empty":
        (tmp_path / "c").mkdir()
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(CheckpointError, match="has held checkpoints and holds none now: put them back") as error:
            checkpoints.begun()
        (tmp_path / "c.begun").unlink()  # as the line says
        assert str(tmp_path / "c.begun") in str(error.value)
        assert not checkpoints.begun()


# --- what a job begins from, and with ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    config = vitcore.ViTConfig(image_size=8, patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=2, num_classes=2)
    params = vitcore.init(jax.random.key(0), config)
    vitcore.save(tmp_path / "good.safetensors", params, config)
    assert open_pretrained(str(tmp_path / "good.safetensors")).config.width == 16
    params["head"]["bias"] = params["head"]["bias"].at[1].set(value)
    vitcore.save(tmp_path / "bad.safetensors", params, config)
    with pytest.raises(ValueError, match=r"numbers of head\.bias are NaN or infinite"):
        open_pretrained(str(tmp_path / "bad.safetensors"))


def test_a_transfer_guard_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("JAX_TRANSFER_GUARD", "log")
    JobOptions().check_job()
    monkeypatch.setenv("JAX_TRANSFER_GUARD", "disallow")
    with pytest.raises(ValueError, match=r"JAX_TRANSFER_GUARD=disallow: .*: unset it"):
        JobOptions().check_job()
    monkeypatch.delenv("JAX_TRANSFER_GUARD")
    monkeypatch.setenv("JAX_DISABLE_JIT", "1")
    with pytest.raises(ValueError, match=r"JAX_DISABLE_JIT: .*: unset it"):
        JobOptions().check_job()


def test_settings_that_are_for_other_programs_change_nothing():
    code = """
        import jax, jax.numpy as jnp
        from train.job import JobOptions
        JobOptions(distributed="off").join()
        print((jnp.ones((2, 3)) + jnp.ones(3) + jnp.int8(1)).dtype, jnp.arange(3).dtype)
        print(jax.random.normal(jax.random.key(0), (2,))[0])
        """
    strict = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_ENABLE_X64": "1"}
    strict |= {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment() | strict,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.split()[:2] == ["float32", "int32"], done.stderr
    assert float(done.stdout.split()[2]) == pytest.approx(1.6226422, abs=1e-6)  # JAX's own default


@pytest.mark.parametrize(("platform", "words"), [("nonsense", "nonsense"), ("cuda", "")])
def test_a_platform_that_is_not_there_is_one_line(platform, words):
    code = """
        import jax
        from train.job import end, guard
        end(guard("a job", lambda stop: jax.devices()))
        """
    job = python(code, env={"JAX_PLATFORMS": platform})
    said = job.communicate(timeout=100)[1].splitlines()
    assert job.returncode == 2
    assert len(said) == 1, said
    assert said[0].startswith(f"a job: error: JAX finds no device (JAX_PLATFORMS: {platform}): ")
    assert words in said[0]


@pytest.mark.parametrize(
    ("module", "setting"),
    [
        ("train.pretrain", "JAX_DEFAULT_DEVICE=cpu:7"),
        ("train.data.pack", "JAX_NUM_CPU_DEVICES=two"),
        ("vitcore.weights", "JAX_DEFAULT_DEVICE=nonsense"),
        ("bench.flops", "JAX_NUM_CPU_DEVICES=two"),
    ],
)
def test_a_setting_that_jax_refuses_is_one_line(module, setting):
    """JAX reads them as it is imported, before a command can catch anything."""
    name, _, value = setting.partition("=")
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment() | {name: value}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"error: JAX refuses a setting of the environment ({name}" in done.stderr.replace("JAX_PLATFORMS ", "")
    assert value in done.stderr


def test_processes_agree_on_the_precision_of_products(monkeypatch):
    """Which the environment sets, host by host."""
    asked = {}
    monkeypatch.setattr("train.distributed.agree", lambda **what: asked.update(what))
    with jax.default_matmul_precision("float32"):
        JobOptions(distributed="off").join()
    assert asked == {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}


@pytest.mark.parametrize("job", ["evaluate", "fewshot"])
def test_processes_of_a_measurement_agree_on_options_images_and_weights(tmp_path, monkeypatch, job):
    """Two hosts with other weights under one path would compute with half of each, and say nothing."""
    config = vitcore.variant("ViT-Nano/4", image_size=8, channels=1, num_classes=10)
    params = jax.jit(lambda: vitcore.init(jax.random.key(0), config))()
    vitcore.save(tmp_path / "w.npz", params, config, classes=tuple("0123456789"))
    module, asked = importlib.import_module(f"train.{job}"), {}

    def agree(**what):
        asked.update(what)
        if "model" in what:
            raise ValueError("far enough")

    monkeypatch.setattr("train.distributed.agree", agree)
    monkeypatch.setattr("train.distributed.count", lambda: 2)
    options = {"evaluate": "Evaluate", "fewshot": "Fewshot"}[job]
    args = getattr(module, options)(init=str(tmp_path / "w.npz"), mesh="2x1", distributed="off")
    with pytest.raises(ValueError, match="far enough"):
        module.run(args)
    assert {"--init", "--data", "--batch-size", "--dtype", "code", "versions", "images", "model"} <= asked.keys()
    assert asked["model"]["checksum"]
    assert "--threads" not in asked  # each host's own
