"""The paper's way to choose: a grid on a held-out part of train, the best of it several times on all of train (appendix B.1.1).

OUT/dev/lr-0.003/    a run for each learning rate, on the dev split
OUT/final/seed-0/    the chosen rate on all of train, a run for each seed
OUT/sweep.json       everything so far, renewed after each run; runs that it holds are not done again
OUT/sweep.md, .png   the table and the picture
OUT/init.npz         where --init is a run: the step that all began from
"""

import dataclasses
import json
import logging
import os
from typing import Any

import numpy as np

from train import distributed, pinned, recipes
from train.files import read_object, write_atomically, write_picture
from train.job import check_claim, claim, locked, say, stopped
from train.tuning import dev_splits, fine_tune, identity, model_held


def dev_run(args):
    """Resolved options of a run that trains on all but the dev share of its split, and is measured on that share."""
    split, dev = dev_splits(args.split, recipes.finetune_recipe(args.recipe).dev_share)
    return dataclasses.replace(args, split=split, test_split=dev, dev=False, sweep=False, learning_rates=(), runs=1)


def model_of_sweep(out) -> dict | None:
    """Which weights the sweep in `out` was begun with, `train.pretrained.Stored.model`; None where it says nothing, or there is
    none. Every process calls it. ValueError for a damaged sweep.json."""
    return distributed.broadcast((_held(out) or {}).get("model") if distributed.rank() == 0 else None)


def sweep(args, out, session, *, extra: dict | None = None) -> dict | None:
    """Does what is left of a sweep in `out`; None where it was asked to stop.

    Returns {"model": `Session.model`, "dev": {rate: run}, "rate": the best, "final": {seed: run}, "mean", "std"}, a run being
    {"accuracy", "correct", "count", "step", "checksum"}. Of equal rates the smallest is taken; one rate is not tried first. extra:
    kept in sweep.json besides. Raises ValueError where it was begun with other weights than the session's.
    """
    first = distributed.rank() == 0
    with locked(out):
        held = _held(out) if first else None
        if first:
            check_claim(out, identity(args))
            model = model_held(out / "sweep.json", held) or session.model
            if model != session.model:  # another process began it in this moment
                raise ValueError(f"{out / 'sweep.json'} was begun with other weights in this moment: start again")
            claim(out, identity(args), json.loads(json.dumps(dataclasses.asdict(args))))
        held = distributed.broadcast(held) or {}
        summary: dict[str, Any] = {"model": session.model, "dev": {}, "final": {}} | {
            k: v for k, v in held.items() if k in ("dev", "final")
        }
        if first:
            _write(out, summary, args, extra)
            pinned.keep(out, session.stored)

        def one(kind: str, key: str, folder: str, options) -> bool:
            """One run, unless it is done; False where it was asked to stop."""
            if key in summary[kind]:
                return True
            result = fine_tune(options, out / kind / folder, session, of_study=True)
            if stopped(result, out, f" in {kind}/{folder}"):
                return False
            found = {"accuracy": result.accuracy, "correct": result.correct, "count": result.count}
            summary[kind][key] = found | session.model
            say(f"{kind}/{folder}: {result.correct} of {result.count} right, {result.accuracy:.2%}")
            if first:
                _write(out, summary, args, extra)
            return True

        dev = dev_run(args)
        if len(args.learning_rates) > 1:
            for rate in args.learning_rates:
                if not one("dev", str(rate), f"lr-{rate:g}", dataclasses.replace(dev, learning_rate=rate)):
                    return None
            rate = min(args.learning_rates, key=lambda r: (-summary["dev"][str(r)]["accuracy"], r))
        else:
            rate = args.learning_rates[0]  # nothing to choose
        whole = dataclasses.replace(dev, split=args.split, test_split=args.test_split, learning_rate=rate)
        for i in range(args.runs):
            seed = args.seed + i
            if not one("final", str(seed), f"seed-{seed}", dataclasses.replace(whole, seed=seed)):
                return None
        summary |= summarise(summary, rate)
        if first:
            _write(out, summary, args, extra)
            draw(summary, args, out / "sweep.png")
            say((out / "sweep.md").read_text().rstrip())
    return summary


def summarise(summary: dict, rate: float) -> dict:
    """The chosen rate, and mean and standard deviation (of the runs that there are, divided by their number) of the final runs."""
    values = [run["accuracy"] for run in summary["final"].values()]
    return {"rate": rate, "mean": float(np.mean(values)), "std": float(np.std(values))}


def table(summary: dict, title: str) -> str:
    """The sweep as a Markdown table."""
    lines = [f"# {title}", "", "| run | images right | accuracy |", "|---|---|---|"]
    for rate, run in summary["dev"].items():
        best = " (chosen)" if "rate" in summary and float(rate) == summary["rate"] else ""
        lines.append(f"| dev, rate {rate}{best} | {run['correct']} of {run['count']} | {run['accuracy']:.2%} |")
    for seed, run in summary["final"].items():
        lines.append(f"| test, seed {seed} | {run['correct']} of {run['count']} | {run['accuracy']:.2%} |")
    if "mean" in summary:
        lines.append(f"| test, {len(summary['final'])} runs | | {summary['mean']:.2%} +- {summary['std']:.2%} |")
    return "\n".join(lines) + "\n"


def _title(args) -> str:
    return f"{os.path.basename(args.init)} on {args.data}, recipe {args.recipe}"


def draw(summary: dict, args, path) -> None:
    """Accuracy against the learning rate on the dev split; the final runs with mean and deviation beside it."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    rates = [float(rate) for rate in summary["dev"]]
    left.plot(rates, [run["accuracy"] for run in summary["dev"].values()], "o-", color="tab:blue", clip_on=False)
    if rates:
        left.set_xscale("log")
        left.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
        left.minorticks_off()
        left.axvline(summary["rate"], color="tab:orange", linewidth=1, label=f"chosen: {summary['rate']:g}")
        left.legend(frameon=False)
    left.set(xlabel="learning rate", ylabel="accuracy", title=f"Dev split ({_title(args)})")
    finals = [run["accuracy"] for run in summary["final"].values()]
    right.plot(range(len(finals)), finals, "o", color="tab:blue", clip_on=False)
    right.axhline(summary["mean"], color="tab:orange", linewidth=1)
    right.axhspan(summary["mean"] - summary["std"], summary["mean"] + summary["std"], color="tab:orange", alpha=0.15)
    right.set_xticks(range(len(finals)), list(summary["final"]))
    right.set(xlabel="seed", title=f"Test: {summary['mean']:.2%} ± {summary['std']:.2%}")
    left.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=1))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_picture(figure, path)


def _held(out) -> dict | None:
    path = out / "sweep.json"
    if not path.exists():
        return None
    cure = "remove it; the runs beside it are then measured again"
    return read_object(path, cure=cure, holding=("dev", "final"), wrong="no sweep")


def _write(out, summary: dict, args, extra: dict | None) -> None:
    write_atomically(out / "sweep.json", json.dumps(summary | (extra or {}), indent=2) + "\n")
    write_atomically(out / "sweep.md", table(summary, _title(args)))
