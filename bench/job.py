"""`bench.throughput --job`: images/s of a whole training job, ours beside timm's, on one folder of JPEGs, in one run.

Ours is `python -m train.pretrain` in a process of its own, with its own defaults but for what is compared, and its rate is read off
its records and the times of its lines. timm's is `bench.peers.timm_job`: its loader with 4 workers, as its script has it, and
tuned: as many workers as cores, pinned memory, fused AdamW, compiled blocks. On a mesh of several devices it runs under torch's
DDP, a process a card. All of them evaluate and save at the same steps; the clock starts at the first of these, when all is
compiled.

"images/s" is of the whole run, evaluations and saves with it; "steps alone" without them.

Where a call of a machine is too short for all of them, each may have one of its own, and this prints their table:

    python -m bench.throughput --job --only tuned --out tuned      and so with ours and timm
    python -m bench.job ours/job.json timm/job.json tuned/job.json
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from bench.cases import write_json
from bench.data_parts import write_photographs
from bench.device_study import TrialError, describe, start, watched
from bench.peers.on_torch import free_port
from train.signals import before_the_end

WORKERS = 4  # of timm's training script by default
_BATCH = {"cpu": 16}  # images a device; on others 256
_TINY = "ViT-Ti/16"


@dataclass(frozen=True, kw_only=True)
class JobStudyOptions:
    """A whole training job, measured."""

    job: bool = False
    """Measure whole jobs instead: train.pretrain beside timm's training (--peer timm) on a folder of JPEGs. With --target: what a
    job needs of a slice's memory and of its hosts, by the compiler."""
    data: Path | None = None
    """With --job: a folder with train/CLASS/ and val/CLASS/. Default: photographs made for the purpose."""
    images: int = 4096
    """With --job, without --data: training images to make, 500 x 375; an eighth as many to validate on."""
    steps: int | None = None
    """With --job: steps of each run. Default: an epoch and a fifth, 30 at least."""
    every: int | None = None
    """With --job: steps between evaluations, and saves. Default: a third of the run."""
    only: tuple[Literal["ours", "timm", "tuned"], ...] = ()
    """With --job: run these alone, ours, timm as its script has it or tuned. python -m bench.job FILES prints the table of the
    job.json of several calls. Default: ours, and with --peer timm all."""
    dropout: float = 0.0
    """Training: rate, of peers too."""

    def check_job(self, peers: tuple[str, ...], modes: tuple[str, ...]) -> None:
        """Raises ValueError for what does not fit."""
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: a rate in [0, 1) is required")
        if self.dropout and not self.job and modes != ("train",):
            raise ValueError(f"--dropout {self.dropout} belongs to training: add --mode train")
        if not self.job:
            for name, default in (("data", None), ("steps", None), ("every", None), ("images", 4096), ("only", ())):
                if getattr(self, name) != default:
                    raise ValueError(f"--{name} belongs to --job: give that, or leave it out")
            return
        for name in ("images", "steps", "every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value}: a positive number is required")
        if other := [peer for peer in peers if peer != "timm"]:
            raise ValueError(f"--peer {other[0]} has no training script: --job compares with --peer timm")
        if (peers or {*self.only} - {"ours"}) and find_spec("torchvision") is None:
            raise ValueError("--job with timm needs torchvision, whose transforms timm's loader uses: pip install torchvision")
        if self.data is not None and (lacking := [s for s in ("train", "val") if not (self.data / s).is_dir()]):
            raise ValueError(f"--data {self.data} has no {lacking[0]}/: a folder with train/CLASS/ and val/CLASS/ is required")


def study(options: Any, about: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows: prints each as it comes, writes them to job.json in --out. `options` are a `bench.throughput.Throughput`."""
    devices = describe(options.mesh or _all_devices(), options.dtype, seconds=options.seconds)
    platform, cards = devices["platform"], devices["mesh_devices"]
    models = options.models or (_TINY if platform == "cpu" else "ViT-B/16",)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitcore-job-")))
        before_the_end(lambda: shutil.rmtree(work, ignore_errors=True))
        data = options.data
        if data is None:
            begun = time.perf_counter()
            data = make(work / "images", options.images)
            print(f"{options.images} JPEGs made in {time.perf_counter() - begun:.0f} s", flush=True)
        count = sum(len(files) for _, _, files in os.walk(data / "train"))
        print(f"{cards} of {devices['count']} x {devices['kind']}, {devices['cores']} cores, {count} training images", flush=True)
        print(HEADER, flush=True)
        for model in models:
            for size in options.sizes or (32 if platform == "cpu" else 224,):
                batch = (options.batch_sizes or (_BATCH.get(platform, 256) * cards,))[0]
                plan = _plan(options, model, size, batch, cards, count, devices["dtype"], data)
                for name, run in _contenders(options, plan, devices["cores"], work):
                    row = {"name": name, "model": model, "size": size, "batch": batch, "cards": cards, "steps": plan["steps"]}
                    try:
                        row |= run()
                    except TrialError as error:
                        row |= {"error": str(error)}
                    rows.append(row)
                    print(line(row), flush=True)
                    write_json(options.out / "job.json", {"about": about(device=devices, data=str(options.data)), "rows": rows})
        for text in compared(rows):
            print(text)
    print(options.out / "job.json")
    return rows


def _all_devices() -> str | None:
    """None where one device is meant: `describe` then counts them, and a run without --mesh takes all."""
    found = describe(None, None, seconds=0.1)
    return f"{found['count']}x1" if found["platform"] != "cpu" else None


def _plan(options, model: str, size: int, batch: int, cards: int, count: int, dtype: str, data: Path) -> dict[str, Any]:
    """What all contenders do."""
    if count < batch:
        raise ValueError(f"{count} training images are no batch of {batch}: fewer --batch-sizes, or more images")
    if batch % cards:
        raise ValueError(f"--batch-sizes {batch} does not divide over {cards} devices: use a multiple")
    steps = options.steps or max(30, -(-6 * count // (5 * batch)))
    every = options.every or max(1, steps // 3)
    if steps <= every:
        raise ValueError(f"--steps {steps}: more than {every} are required, the first of which only warm up: see --every")
    return {
        "model": model, "size": size, "batch": batch, "cards": cards, "steps": steps, "every": every,
        "dtype": dtype, "dropout": options.dropout, "data": str(data),
    }  # fmt: skip


def _contenders(options, plan: dict[str, Any], cores: int, work: Path):
    seconds = 60 * (options.minutes or 60)
    sides = options.only or (("ours", "timm", "tuned") if "timm" in options.peer else ("ours",))
    if "ours" in sides:
        yield "vitcore", lambda: ours(plan, ["--mesh", options.mesh] if options.mesh else [], work, seconds)
    for side, name, workers in (("timm", "timm", WORKERS), ("tuned", "timm, tuned", max(1, cores // plan["cards"]))):
        if side in sides:
            request = {**plan, "workers": workers, "tuned": side == "tuned"}
            yield name, lambda request=request: theirs(request, seconds)


def make(root: Path, count: int) -> Path:
    """A folder of `count` photographs to train on and an eighth as many to validate on, of two classes. 512 are drawn; the others
    are the same files under other names, which a loader cannot know and a disk's cache does."""
    for split, wanted in (("train", count), ("val", max(2, count // 8))):
        drawn = min(wanted, 512)
        write_photographs(root, drawn, 500, 375, split=split)
        for place in sorted((root / split).iterdir()):
            files = sorted(place.iterdir())
            for k in range(len(files), wanted // 2):
                os.link(files[k % len(files)], place / f"{k:06d}-again.jpg")
    return root


# --- ours ---------------------------------------------------------------------------------------------------------------------


def ours(plan: dict[str, Any], words: list[str], work: Path, seconds: float) -> dict[str, Any]:
    """A run of `train.pretrain`: its rates, and what it said of the devices' waiting. Raises TrialError where it fails."""
    out = work / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "train.pretrain", "--recipe", "imagenet", "--out", str(out)]
    command += ["--data", f"folder:{plan['data']}"]
    for name in ("model", "batch", "size", "steps", "dtype", "dropout"):
        command += [{"batch": "--batch-size", "size": "--image-size"}.get(name, f"--{name}"), str(plan[name])]
    for name in ("eval", "checkpoint", "log"):
        command += [f"--{name}-every", str(plan["every"])]
    lines = _lines([*command, *words], seconds)
    records = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out, ignore_errors=True)
    begun = next(when for when, text in lines if text.split()[:2] == ["step", str(plan["every"])])
    ended = next(when for when, text in lines if text.startswith("finished at step"))
    images = (plan["steps"] - plan["every"]) * plan["batch"]
    taken, before = 0.0, plan["every"]
    for record in records:
        if record["step"] > plan["every"]:
            taken += (record["step"] - before) * plan["batch"] / record["images_per_second"]
            before = record["step"]
    said = [text for _, text in lines if any(word in text for word in ("waited for images", "beside the steps"))]
    return {"whole": images / (ended - begun), "training": images / taken, "loss": records[-1]["loss"], "said": said}


def _lines(command: list[str], seconds: float) -> list[tuple[float, str]]:
    """The lines of a job and when they came. TrialError where it fails."""
    lines: list[tuple[float, str]] = []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    error = watched(command, environment, lambda text: lines.append((time.perf_counter(), text.rstrip())), seconds=seconds)
    if error:
        raise TrialError(error)
    return lines


# --- timm's -------------------------------------------------------------------------------------------------------------------


def theirs(request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A run of timm's. Raises TrialError where it fails."""
    found, error = start({**request, "port": free_port()}, seconds=seconds, module="bench.peers.timm_job")
    if error or not found or "whole" not in found[-1]:
        reached = f" (step {found[-1]['step']} of {request['steps']} was its last word)" if found else ""
        raise TrialError((error or "it ended without a word") + reached)
    return {**found[-1], "workers": request["workers"], "tuned": request["tuned"]}


# --- the table ----------------------------------------------------------------------------------------------------------------

HEADER = f"{'job':36s} {'cards':>5s} {'batch':>6s} {'images/s':>9s} {'steps alone':>12s} {'last loss':>10s}"


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    name = f"{row['model']}@{row['size']} {row['name']}" + (f", {row['workers']} workers" if "workers" in row else "")
    if "error" in row:
        return f"{name:36s} {row['cards']:5d} {row['batch']:6d} {row['error']}"
    said = "".join(f"\n    {text}" for text in row.get("said", ()))
    return f"{name:36s} {row['cards']:5d} {row['batch']:6d} {row['whole']:9,.1f} {row['training']:12,.1f} {row['loss']:10.3f}{said}"


_ALIKE = ("model", "size", "batch", "cards", "steps")


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """Ours over timm's, of the same model, size, batch, cards and steps."""
    found = []
    for row in rows:
        same = [r for r in rows if all(r.get(key) == row.get(key) for key in _ALIKE)]
        others = [r for r in same if r["name"].startswith("timm") and "whole" in r]
        if row["name"].startswith("vitcore") and "whole" in row and others:
            ratios = ", ".join(f"{row['whole'] / other['whole']:.2f} x {other['name']}" for other in others)
            found.append(f"{row['model']}@{row['size']}: {row['name']} runs at {ratios}")
    return found


def main(paths: list[str]) -> str:
    """Prints the table of several job.json together. Returns "", or one line that says what is wrong with one of them."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            rows += json.loads(Path(path).read_text())["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"bench.job: {path} is no job.json of bench.throughput --job ({type(error).__name__}: {error})"
    for text in (HEADER, *map(line, rows), *compared(rows)):
        print(text)
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["job.json"]))
