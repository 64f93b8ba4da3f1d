"""The paper's tables and figures, for your own data and budget: `python -m train.study NAME`.

    python -m train.study                                  the studies there are
    python -m train.study table8                           in minutes, on the embedded digits
    python -m train.study fig5 --list                      its runs and what they cost, here and at the paper's size
    python -m train.study table8 --part 3/8                the third of eight shares, in a slice of a job array
    python -m train.study table8 --scale paper --data folder:/data/jft --to folder:/data/imagenet --mesh 8x4

A study is a list of runs of train.pretrain, train.finetune, train.fewshot and so on (`train/studies/catalogue.py`); each gets its
directory in OUT/runs and leaves its result in OUT/results. The same command again goes on where it was: within a run, from its
checkpoint. What has a result is not done again. What starts from the same pre-training shares it. When every result is there,
whoever sees it writes OUT/NAME.md and OUT/NAME.png, the paper's numbers beside, marked "paper".
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from train import distributed, job, vtab_results
from train.files import make_directory, read_object, write_atomically
from train.job import check_claim, claim, end, guard, place, say
from train.options import MeshOptions, parse
from train.signals import Stop, interruptible
from train.studies import cost, execute, others, report
from train.studies.catalogue import ALIASES, STUDIES, study_of
from train.studies.records import Run, Setting, Study, part_of


@dataclass(frozen=True, kw_only=True)
class StudyOptions(MeshOptions):
    """One of the paper's tables or figures: all of its runs, its table and its picture."""

    name: Positional[str] = ""
    """table5 (fig3, fig4), fig5 (table6), table7, table8, fig8, fig9, fig2 (table9), fig12, fig13, masked. Default: lists them."""
    data: str | None = None
    """What to pre-train on. Default: the digits 0 to 4."""
    to: str | None = None
    """What to measure on, after pre-training. Default: the digits 5 to 9, or --data."""
    scale: Literal["toy", "paper"] = "toy"
    """toy: small models, minutes on two cores. paper: the paper's own models, sizes and steps."""
    budget: float = 1.0
    """Times the steps of every run."""
    vtab: str | None = None
    """Of fig2: the directory of the prepared sets, as train.vtab takes it. Default: eight toy tasks made of the digits."""
    seed: int = 0
    part: str | None = None
    """3/8: the third of eight shares of the runs, which others do beside it in the same --out."""
    list: bool = False
    """Show the runs and their cost, and run nothing."""
    out: str | None = None
    """Default: runs/study-NAME-HASH."""


def main(argv: list[str] | None = None) -> int:
    """The job. Returns the exit code."""
    given = sys.argv[1:] if argv is None else argv

    def work(stop):
        run(parse(StudyOptions, "train.study", given), stop)

    return guard("train.study", work)


def setting_of(args: StudyOptions) -> Setting:
    """What a study is made for. ValueError for values out of range."""
    if not 0 < args.budget < float("inf"):
        raise ValueError(f"--budget {args.budget}: a number above 0 is required, 1 for the study's own steps")
    if not 0 <= args.seed < 2**62:
        raise ValueError(f"--seed {args.seed}: a number from 0 to 2**62 is required")
    if args.scale == "paper" and args.data is None and not args.list:
        raise ValueError("--scale paper: --data is required, e.g. folder:PATH: the digits are for toys (--list needs none)")
    data = "digits:0-4" if args.data is None else args.data
    to = args.to or ("digits:5-9" if args.data is None else args.data)
    vtab = None if args.vtab is None else os.path.abspath(args.vtab)
    if vtab is None and args.scale == "paper" and args.list:
        vtab = "vtab"  # nothing is opened
    return Setting(toy=args.scale == "toy", data=data, to=to, budget=args.budget, seed=args.seed, vtab=vtab)


def check_data(setting: Setting) -> None:
    """ValueError where what is measured after the first training is not there: to be said before it, not hours later."""
    from train.data import open_source

    for source in dict.fromkeys((setting.data, setting.to)):
        open_source(source, "val")
    if setting.vtab is not None and not any(os.path.isdir(os.path.join(setting.vtab, task)) for task in vtab_results.TASKS):
        some = ", ".join(list(vtab_results.TASKS)[:3])
        raise ValueError(
            f"--vtab {setting.vtab}: no folder of VTAB's tasks is there ({some}, ...): see python -m train.vtab --help"
        )


def part_asked(part: str | None) -> tuple[int, int]:
    """(3, 8) of "3/8"; (1, 1) of None. ValueError for another form."""
    one, slash, of = (part or "1/1").partition("/")
    if not (slash and one.isdigit() and of.isdigit() and 1 <= int(one) <= int(of)):
        raise ValueError(f"--part {part}: PART/PARTS is required, from 1/{of or 8} to {of or 8}/{of or 8}, e.g. 3/8")
    return int(one), int(of)


def run(args: StudyOptions, stop: Stop | None = None) -> None:
    """What is left of a study, or of a part of it; then, if nothing is, its table and picture."""
    if not args.name:
        say("\n".join(_named()))
        return
    study, setting, (part, parts) = study_of(args.name), setting_of(args), part_asked(args.part)
    runs = study.runs(setting)
    execute.check(runs)
    costs = cost.of_runs(runs, setting)
    mine = part_of(runs, costs, part, parts)
    at_scale = _at_scale(study)
    if args.list:
        say("\n".join([*_listed(study, mine, costs, part, parts), *at_scale]))
        return
    if study.name != "fig12":  # which opens none
        check_data(setting)
    args.join()
    who = _identity(study, setting, args, runs)
    out = job.directory(args.out, f"study-{study.name}", who)
    _claim(out, who, args)
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(MeshOptions)}
    shown = "" if args.part is None else f", part {part} of {parts}"
    say(f"{study.title}: {len(mine)} of {len(runs)} runs{shown}; {out}")
    for i, one in enumerate(mine, 1):
        if _result(out, one.name) is not None:
            continue
        if one.after and not (out / "runs" / one.after / "config.json").exists():
            gone = f"{out / 'runs' / one.after}, which {one.name} starts from, is gone"
            raise ValueError(f"{gone}: remove {_place_of(out, one.after)}; it is then trained again")
        say(f"--- {i} of {len(mine)}: {one.name} ({one.job})")
        before = _cpu_seconds()
        try:
            result = execute.run(one, out, options, stop)
        except ValueError as error:
            raise ValueError(f"{one.name}: {error}") from error
        if result is None:
            say(f"asked to stop in {one.name}: the same command goes on there; {out}")
            return
        if distributed.rank() == 0:
            result |= {"cpu_seconds": round(_cpu_seconds() - before, 1)}  # since it was last taken up
            write_atomically(_place_of(out, one.name), json.dumps(result, indent=2) + "\n")
        if stop is not None and stop.asked:
            say(f"asked to stop after {one.name}: the same command goes on behind it; {out}")
            return
    conclude(study, runs, setting, costs, out, at_scale)


def conclude(study: Study, runs: list[Run], setting: Setting, costs: Mapping[str, float], out, at_scale: list[str]) -> None:
    """Table and picture, if every run has its result; otherwise says how many have. On process 0."""
    if distributed.rank() != 0:
        return
    results: dict[str, Any] = {run.name: _result(out, run.name) for run in runs}
    missing = [name for name, result in results.items() if result is None]
    if missing:
        say(
            f"{len(runs) - len(missing)} of {len(runs)} runs are done; the last part to end makes the table, or this without --part"
        )
        return
    with _alone(out):
        if runs[0].at and any(run.job in report.MEASURES for run in runs):
            rows = report.rows_of(runs, results, costs)
            write_atomically(out / "rows.json", json.dumps(rows, indent=2) + "\n")
            text = report.table(study, rows, setting, at_scale)
            report.draw(study, rows, setting, out / f"{study.name}.png")
        else:  # another job's own table and picture
            text = others.table(study, results, setting, at_scale)
            others.draw(study, runs, results, setting, out)
        write_atomically(out / f"{study.name}.md", text)
    say(text.rstrip())
    spent = sum(result.get("cpu_seconds", 0.0) for result in results.values())
    say(f"{spent:,.0f} CPU-seconds here, all runs together: at best {spent / 120:.1f} minutes of two cores")
    say(f"{out / f'{study.name}.md'}")


# --- what it costs ------------------------------------------------------------------------------------------------------------


def _named() -> list[str]:
    also = {name: [other for other, of in ALIASES.items() if of == name] for name in STUDIES}
    lines = [f"  {' '.join([name, *also[name]]):<20s} {study.title}" for name, study in STUDIES.items()]
    return ["python -m train.study NAME, one of", *lines]


def _listed(study: Study, mine: list[Run], costs: Mapping[str, float], part: int, parts: int) -> list[str]:
    """The runs with their command lines and FLOPs."""
    lines = [f"{study.title}: {len(mine)} runs" + ("" if parts == 1 else f" in part {part} of {parts}")]
    for one in mine:
        after = f" --init {one.after}" if one.after else ""
        flops = f"{costs[one.name]:.2e} FLOPs" if costs[one.name] else "no training"
        lines.append(f"  {one.name}: {flops}: {execute.MODULES[one.job]}{after} {' '.join(one.options)}")
    return [*lines, f"in all {sum(costs[one.name] for one in mine):.2e} FLOPs of training"]


def _at_scale(study: Study) -> list[str]:
    """What the study would cost with the paper's models on JFT, in a line."""
    setting = Setting(toy=False, data="folder:jft", to="folder:imagenet", vtab="vtab")
    runs = study.runs(setting)
    try:
        total = sum(cost.of_runs(runs, setting).values())
    except ValueError:
        return []
    if not total:
        return ["At the paper's size it trains nothing; it times and compiles."]
    days = cost.core_days(total)
    return [
        f"At the paper's size ({len(runs)} runs): {total / 1e18:,.0f} exaFLOPs of training; estimated: {days:,.0f} core-days on "
        f"TPUv3, at the {cost.V3_FLOPS / 1e12:.1f} TFLOP/s a core that the TPU compiler's schedule gives ViT-B/16's step."
    ]


# --- the directory of a study -------------------------------------------------------------------------------------------------


def _identity(study: Study, setting: Setting, args: StudyOptions, runs: list[Run]) -> dict[str, Any]:
    """What makes a study's results what they are: all that is run, and in which numbers."""
    what = json.dumps([[run.name, run.job, run.after, list(run.options)] for run in runs], sort_keys=True)
    return {
        "study": study.name, "scale": args.scale, "data": setting.data, "to": setting.to, "budget": setting.budget,
        "seed": setting.seed, "dtype": args.dtype, "runs": hashlib.sha256(what.encode()).hexdigest()[:12],
    }  # fmt: skip


def _claim(out, who: dict, args: StudyOptions) -> None:
    """The directory of a study, which parts that begin together make once."""
    if distributed.rank() == 0:
        place(str(out))
        check_claim(out, who)
        for folder in (out, out / "runs", out / "results"):
            make_directory(folder)
        with _alone(out):
            if not (out / "config.json").exists():
                claim(out, who, who | {"options": dataclasses.asdict(args)})
            check_claim(out, who)
    distributed.broadcast(None)


@contextlib.contextmanager
def _alone(out):
    """One process after the other, of those that share a study's directory on one file system. On gs:// each file is whole."""
    if "://" in str(out):
        yield
        return
    with open(out / ".turn", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cpu_seconds() -> float:
    """Of this process, all its threads, and of those it began that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _place_of(out, name: str):
    return out / "results" / f"{name}.json"


def _result(out, name: str) -> dict | None:
    """A run's result, if there is one; the same for every process of a job. ValueError for a damaged file."""
    path, found = _place_of(out, name), None
    if distributed.rank() == 0 and path.exists():
        cure = "remove it; that run is then measured again"
        found = read_object(path, cure=cure)
        if not isinstance(found.get("value", ""), float | int | None):
            raise ValueError(f"{path} is damaged (it has no value): {cure}")
    return distributed.broadcast(found)


if __name__ == "__main__":
    interruptible()
    end(main())
