"""One run of a study: its job with its directories, and its result as JSON. An interrupted one goes on from the job's files."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from train import fewshot, finetune, pretrain, vtab
from train.files import read_object
from train.job import BEGAN_FROM, model_of_run, place, say
from train.loop import Diverged
from train.meeting import Told
from train.options import parse
from train.signals import Stop, of_this_process
from train.studies import cost
from train.studies.records import MODULES, Run
from train.tuning import Finetune
from train.tuning import resolve as resolve_finetune

CLASSES: dict[str, Any] = {
    "pretrain": pretrain.Pretrain,
    "finetune": Finetune,
    "fewshot": fewshot.Fewshot,
    "vtab": vtab.Vtab,
}  # fmt: skip


def check(runs: list[Run]) -> None:
    """Raises ValueError, in one line, where the job of a run does not know its options: all are read before the first begins."""
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("two runs of this study have one name")
    for run in runs:
        try:
            if run.job == "pretrain":
                cost.resolved(run)
            elif run.job == "finetune":
                resolve_finetune(options_of(run, "x"))
            elif run.job in CLASSES:
                options_of(run, "x")
        except ValueError as error:
            raise ValueError(f"{run.name} is not to be had of {MODULES[run.job]} as it is here: {error}") from None


def options_of(run: Run, init: str) -> Any:
    """The options of a run's job. init: the directory of what it starts from. ValueError."""
    words = [*(("--init", init) if run.after else ()), *run.options]
    return parse(CLASSES[run.job], MODULES[run.job], words)


def run(run: Run, out, shared: Mapping[str, Any], stop: Stop | None) -> dict[str, Any] | None:
    """Does a run in out/runs/NAME; its result, or None where it was asked to stop.

    shared: options of every job, of the devices and the like. A result has "value", an accuracy in [0, 1], None where the run
    diverged, and "steps" taken "of_steps".
    """
    if run.job == "throughput":
        return _command(run, out / "runs" / run.name, stop)
    args = dataclasses.replace(options_of(run, str(out / "runs" / (run.after or ""))), **shared)
    if run.job != "fewshot":
        args = dataclasses.replace(args, out=str(out / "runs" / run.name))
    with contextlib.suppress(Told):  # a measurement that was asked to stop: it begins again
        try:
            if run.job == "fewshot":
                return _few(args)
            if run.job == "vtab":
                found = vtab.run(args, stop)
                return None if found is None else {"value": found["means"]["all"]["mean"], "said": args.out, "vtab": found}
            return _trained(args, run, stop)
        except Diverged as error:  # a result, too: a rate that is too large
            say(f"{run.name}: {error}")
            return {"value": None, "diverged": str(error)}
    return None


def _few(args) -> dict[str, Any]:
    found, model = fewshot.run_told(args)
    (draws,) = found.values()
    return {"value": float(np.mean(draws)), "draws": draws, BEGAN_FROM: model}


def _trained(args, run: Run, stop) -> dict[str, Any] | None:
    """Of a pre-training the best validation on its way, of a fine-tuning its last."""
    result: Any = (pretrain if run.job == "pretrain" else finetune).run(args, stop)
    if result is None or result.asked_to_stop:
        return None
    value = max(result.accuracy, result.best.accuracy) if run.job == "pretrain" else result.accuracy
    began = model_of_run(place(args.out))
    return ({} if began is None else {BEGAN_FROM: began}) | {
        "value": value if math.isfinite(value) else None, "last": result.accuracy, "count": result.count, "steps": result.steps,
        "of_steps": args.steps, "stopped_early": result.stopped_early,
    }  # fmt: skip


def _command(run: Run, folder, stop: Stop | None) -> dict[str, Any] | None:
    """A command in a process of its own, which hears of a signal; it continues by itself what its directory holds."""
    module = MODULES[run.job]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ValueError(f"{module} is not installed here")
    os.makedirs(folder, exist_ok=True)
    child = subprocess.Popen([sys.executable, "-m", module, *run.options, "--out", str(folder)], env=of_this_process(os.environ))
    try:
        while child.poll() is None:
            if stop is not None and stop.asked:
                return None
            time.sleep(0.1)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    if child.returncode:
        raise ValueError(f"{module} ended with exit code {child.returncode}: what it says stands above")
    held = read_object(place(str(folder)) / "throughput.json", cure="remove it; it is then timed again")
    return {"value": None, "rows": held.get("rows", [])}
