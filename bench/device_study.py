"""Images per second and largest batch on the devices present: each trial in a process of its own (`bench.trial`), so that running
out of memory, or a crash, ends that trial and nothing else.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench import edge
from bench.cases import Case
from bench.marked import records
from train.signals import of_this_process
from vitcore.flops import flops

BATCHES = {"cpu": (4, 16, 64, 256), "gpu": (128, 256, 512, 1024, 2048, 4096), "tpu": (64, 128, 256, 512, 1024, 2048)}
_START = 120.0  # seconds that a trial is given beyond its budget: imports, weights, the first compilation
_CPU_START = 8.0  # of which a CPU without anything to run needs so many
_MOST = {"cpu": 2**14, "gpu": 2**20, "tpu": 2**20}  # no larger batch is tried


class TrialError(RuntimeError):
    """A trial ended without an answer, for another reason than memory."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How cases are measured. batches: () for what suits. seconds: of timing a batch size. largest: seek it. step: sharpness of the
    largest batch, None for 1.6 %. compile: of peers."""

    batches: tuple[int, ...] = ()
    seconds: float = 1.0
    largest: bool = True
    step: int | None = None
    compile: str = "blocks"


class Clock:
    """The time that a study may take; None: as long as it takes."""

    def __init__(self, minutes: float | None):
        self.until = None if minutes is None else time.monotonic() + 60 * minutes

    def left(self) -> float:
        return float("inf") if self.until is None else self.until - time.monotonic()


def start(
    request: Any,
    *,
    seconds: float,
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
    module: str = "bench.trial",
    platform: str | None = None,
):
    """(records, error) of one trial; error is empty, or one line that says how the process ended.

    seconds: after these it is killed, and what it had said stands. tell: called with each record as it comes. module: what the
    process runs. platform: the only one that jax sees there; by default the devices present.
    """
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if platform:
        environment["JAX_PLATFORMS"] = platform
    found: list[dict[str, Any]] = []

    def line(text: str) -> None:
        for record in records(text):
            found.append(record)
            tell(record)

    return found, watched([sys.executable, "-m", module], environment, line, seconds=seconds, given=json.dumps(request))


def watched(
    command: list[str], environment: dict[str, str], line: Callable[[str], None], *, seconds: float, given: str = ""
) -> str:
    """Runs a command to its end and gives each line of its output to `line` as it comes; "", or one line that says how it failed.

    It finds our modules where this process does, and ends with it, and after so many seconds. given: to its standard input.
    """
    environment = {**environment, "PYTHONPATH": os.pathsep.join(p for p in (*sys.path, os.getcwd()) if p)}
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=of_this_process(environment),
            start_new_session=True,
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        late = threading.Event()

        def kill():
            late.set()
            end_of(child)

        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), kill)
        timer.start()
        try:
            child.stdin.write(given)
            child.stdin.close()
            for text in child.stdout:
                line(text)
            child.wait()
        finally:
            timer.cancel()
            end_of(child)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if late.is_set():
        return f"ended after {seconds:.0f} s, the time it was given"
    return "" if child.returncode == 0 else reason(child.returncode, said)


def end_of(child: subprocess.Popen) -> None:
    """Ends a child that leads a session, and whatever it started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def reason(code: int, text: str) -> str:
    """One line for a process that failed: its exception, or its signal."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (
            " (the machine's memory is used up)" if name == "SIGKILL" else f": {lines[-1][:300]}" if lines else ""
        )
    tail = next((line for line in reversed(lines) if "Error" in line.split(":")[0] or "Exception" in line.split(":")[0]), "")
    return (tail or (lines[-1] if lines else f"ended with {code}"))[:400]


def describe(mesh: str | None, dtype: str | None, *, seconds: float = 1.0) -> dict[str, Any]:
    """The devices present and their matmul rate. ValueError where they are fewer than the mesh wants."""
    found, error = start({"task": "describe", "mesh": mesh, "dtype": dtype, "seconds": seconds}, seconds=300)
    if not found:
        if error.startswith("ValueError: "):
            raise ValueError(error.removeprefix("ValueError: "))
        raise TrialError(f"the devices could not be measured: {error}")
    return found[0]


def _request(case: Case, devices: dict[str, Any], settings: Settings) -> dict[str, Any]:
    fields = asdict(case)
    same = {
        name: fields[name] for name in ("library", "model", "size", "mode", "ops", "dtype", "mesh", "remat", "shard", "dropout")
    }
    memory = devices["memory"] * devices["mesh_devices"] if devices["platform"] != "cpu" else devices["memory"]
    data = int(case.mesh.split("x")[0]) if case.mesh else 1
    return {**same, "platform": devices["platform"], "memory": memory, "compile": settings.compile, "data": data}


def measure(
    case: Case, devices: dict[str, Any], settings: Settings, *, budget: float, tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The row of one case without its largest batch: images/s at each batch size, the best of them, its share of the matmul rate.

    budget: seconds. A peer that does not compile runs as it is, and the row says why.
    """
    started = time.monotonic()
    batches = settings.batches or BATCHES.get(devices["platform"], BATCHES["gpu"])
    data = int(case.mesh.split("x")[0]) if case.mesh else 1
    batches = tuple(b * data for b in batches) if not settings.batches else batches
    request = {
        **_request(case, devices, settings),
        "task": "sweep",
        "batches": list(batches),
        "seconds": settings.seconds,
        "budget": budget,
    }
    found, error = start(request, seconds=budget + _START, tell=tell)
    sweep = [r for r in found if "batch" in r]
    how = settings.compile
    if not sweep and error and case.library != "vitcore" and how != "off":
        uncompiled = f"not compiled: {error}"
        found, error = start({**request, "compile": "off"}, seconds=budget + _START, tell=tell)
        sweep, how = [r for r in found if "batch" in r], uncompiled
    end = next((r["end"] for r in found if "end" in r), "")
    row: dict[str, Any] = {
        "device": devices["kind"],
        "compiler_estimate": False,
        "sweep": sorted(sweep, key=lambda r: r["batch"]),
        "ended": error or end,
        "error": "" if sweep else error or end,
        "swept": bool(sweep) and not error and not end.startswith("no time"),
        "seconds": time.monotonic() - started,
    }
    if case.library != "vitcore":
        row["compiled"] = how
    if not sweep:
        return row
    best = max(sweep, key=lambda r: r["images_per_second"])
    rate = flops(case.config, 1, train=case.mode == "train") * best["images_per_second"]
    return {
        **row,
        "images_per_second": best["images_per_second"],
        "spread": best["spread"],
        "batch": best["batch"],
        "flops_per_second": rate,
        "share_of_matmul": rate / (devices["matmul_flops"] * devices["mesh_devices"]),
    }


def largest(
    case: Case, row: dict[str, Any], devices: dict[str, Any], settings: Settings, *, budget: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The part of a row on the largest batch, in about `budget` seconds. Each attempt is a process; on a CPU one process compiles
    them all and compares bytes with the free memory, and the batch found runs once where there is time for it."""
    cpu = devices["platform"] == "cpu"
    if cpu and case.library != "vitcore":
        return {"largest_batch": None, "limited_by": "not sought: torch on a CPU does not say what it will take"}
    clock = Clock(budget / 60)
    request = _request(case, devices, settings)
    fastest = row.get("images_per_second") or 1.0
    most = _MOST[devices["platform"] if devices["platform"] in _MOST else "gpu"]
    seen = [edge.Attempt(batch=r["batch"], fits=True, used=r["used"]) for r in row.get("sweep", ())]
    begin = max((a.batch for a in seen), default=request["data"])

    def one_step(batch: int) -> edge.Attempt:
        tell(f"{case}: batch {batch}")
        seconds = min(_START + 5 * batch / fastest, max(5.0, clock.left()))
        found, error = start({**request, "task": "fits", "batch": batch}, seconds=seconds)
        if error.startswith("ended after"):
            raise TimeoutError(error)
        if not found:  # a process that dies at one batch and not at half of it died of its memory
            return edge.Attempt(batch=batch, fits=False, why=error)
        return edge.Attempt(batch=batch, **found[0])

    def compiled() -> edge.Edge:
        ask = {**request, "task": "edge", "start": begin, "step": settings.step, "most": most, "budget": clock.left()}
        found, error = start(ask, seconds=clock.left() + 15, tell=lambda r: tell(f"{case}: batch {r.get('tries', '')}"))
        if not found or "edge" not in found[-1]:
            raise TimeoutError(error)
        answer = found[-1]["edge"]
        return edge.Edge(**{**answer, "attempts": tuple(edge.Attempt(**a) for a in answer["attempts"])})

    def tried() -> edge.Edge:
        enough = lambda: clock.left() > 15  # noqa: E731
        unit = request["data"]
        return edge.search(one_step, start=2 * begin, known=seen, step=settings.step, unit=unit, most=most, in_time=enough)

    try:
        found = compiled() if cpu else tried()
    except TimeoutError as error:
        return {"largest_batch": None, "limited_by": f"not found in time ({error})"}
    ran = not cpu
    if cpu and found.batch and _CPU_START + 2 * found.batch / fastest < clock.left():
        with contextlib.suppress(TimeoutError):
            ran = one_step(found.batch).fits
    return {
        "largest_batch": found.batch or None,
        "beyond": found.beyond or None,
        "edge_proved": found.complete,
        "largest_ran": ran,
        "limited_by": found.why or ("no larger one is tried" if found.batch >= most else "memory" if found.complete else "time"),
        "attempts": [asdict(replace(a, why=a.why[:200])) for a in found.attempts],
    }
