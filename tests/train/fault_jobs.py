"""What the fault tests share: a small job, started in processes of its own, and looks at what it left."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "fault_worker.py"

# Dropout and augmentation on; an epoch is five steps; losses to the last digit in metrics.jsonl
JOB = ["--batch-size", "32", "--subset", "160", "--dropout", "0.1", "--augment", "digits", "--log-every", "1", "--polyak", "0.9",
       "--learning-rate", "0.002", "--warmup-steps", "2", "--recipe", "digits"]  # fmt: skip
PATIENCE = 240  # seconds for anything on a busy machine: not a limit that a test is about


def environment(cache=None) -> dict[str, str]:
    """Of a job: no accelerator, and its compiled programs kept where `cache` says, for the next job."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    if cache is not None:
        found |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@dataclasses.dataclass
class Job:
    """A running process of the job; its output goes to files."""

    process: subprocess.Popen
    log: Path

    @property
    def stderr(self) -> str:
        return self.log.with_suffix(".err").read_text()

    @property
    def stdout(self) -> str:
        return self.log.with_suffix(".out").read_text()

    def reach(self, text: str, seconds: float = PATIENCE) -> None:
        """Waits until the job has printed `text`; kills it if it does not, or the test is ended meanwhile."""
        deadline = time.monotonic() + seconds
        try:
            while text not in self.stderr + self.stdout:
                assert self.process.poll() is None, f"ended before {text!r}: {self.stdout}{self.stderr}"
                assert time.monotonic() < deadline, f"never came to {text!r}: {self.stdout}{self.stderr}"
                time.sleep(0.02)
        except BaseException:
            self.process.kill()
            raise

    def term(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self, timeout: float = PATIENCE) -> int:
        """Its exit code; kills it and fails when it is still there after `timeout` seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still there after {timeout} s: {self.stdout}{self.stderr}") from None


def start(folder, *options, faults=(), cache=None, name="job", mounted=None) -> Job:
    """One process of the job. faults: of fault_worker.py. mounted: where this process alone sees another file system."""
    log = Path(folder) / name
    command = [sys.executable, str(WORKER), *faults, "--", *JOB, *map(str, options)]
    if mounted is not None:
        become = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
        command = [*become, "sh", "-c", f'mount -t tmpfs none {mounted} && exec "$@"', "sh", *command]
    with open(log.with_suffix(".out"), "w") as out, open(log.with_suffix(".err"), "w") as err:
        return Job(subprocess.Popen(command, cwd=ROOT, env=environment(cache), stdout=out, stderr=err), log)


def start_two(folder, *options, faults=(), cache=None, name="rank", each=((), ())) -> list[Job]:
    """Two processes of one job. each: further options of either."""
    port = free_port()
    return [
        start(folder, "--distributed", f"localhost:{port},2,{i}", *options, *each[i], faults=faults, cache=cache, name=f"{name}{i}")
        for i in range(2)
    ]


def records(out) -> list[dict]:
    path = Path(out) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be cut short by a kill
    return [json.loads(line) for line in lines]


def losses(out) -> list[tuple]:
    """What a run computed at each step, bit for bit."""
    return [
        (line["step"], line["loss"], line["gradient_norm"], line.get("val_loss"), line.get("val_accuracy")) for line in records(out)
    ]


def steps(out) -> list[int]:
    return sorted(int(path.name) for path in (Path(out) / "checkpoints").iterdir() if path.name.isdigit())


def held(out, step: int) -> tuple[dict, dict]:
    """Every array of a checkpoint by name, and its extra without where the run lived."""
    path = Path(out) / "checkpoints" / str(step)
    tree = ocp.load(str(path), checkpointable_name="state")
    flat = {}

    def walk(name, node):
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{name}/{key}", value)
        else:
            flat[name] = np.asarray(node)

    walk("", tree)
    extra = json.loads((path / "extra" / "data.json").read_text())
    extra.pop("config")
    return flat, extra


def assert_same_checkpoint(a, b, step: int) -> None:
    (x, extra), (y, other) = held(a, step), held(b, step)
    assert x.keys() == y.keys()
    assert len(x) > 40
    for name in x:
        assert x[name].dtype == y[name].dtype, name
        np.testing.assert_array_equal(x[name], y[name], err_msg=name)
    assert extra == other


def tree_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}
