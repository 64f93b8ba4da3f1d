"""VTAB-1k: nineteen tasks of a thousand images each, one recipe for all (paper, sections 4.1 and B.1.1): `python -m train.vtab`.

    python -m train.vtab --init ViT-B_16.npz --data /data/vtab
    python -m train.vtab --init ViT-B_16.npz --sources sets.json --learning-rates 0.003 0.01 0.03
    python -m train.vtab --init runs/NAME --toys --image-size 16 --batch-size 64 --steps 100    eight tasks made of the digits

The sets are prepared beforehand: DATA/TASK/train/CLASS/*.jpg with 1000 images and DATA/TASK/val/CLASS/*.jpg, the task's test
images; or --sources FILE, {task: {"data": source, "train": split, "test": split}}, in any form that train.pretrain takes.
With several learning rates, each task is tuned with each on 800 images and measured on the other 200, and the rate that is best
on the mean of all the tasks there are is taken for all. Then every task is tuned on its 1000 and measured on its test images.

All tasks begin from the same weights: where --init is a run that goes on, from the step that was its newest at the beginning, of
which OUT/init.npz is a copy.
OUT/vtab.json is renewed after each run, and what it holds is not done again; OUT/vtab.md is the table (means by group, as in
Table 9), OUT/vtab.png the picture (as Figure 2). A task without data is named there and on the screen, and means say of how many.
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train import distributed, job, recipes
from train.files import parse_json, read_object, text_of, write_atomically
from train.job import check_claim, claim, end, guard, locked, say, stopped
from train.options import INIT_OPTIONS, TRAIN_OPTIONS, InitOptions, TrainOptions, check_init, check_numbers, parse
from train.signals import Watchdog, beat, interruptible
from train.vtab_results import TASKS, TOYS, accuracies, choose, draw, means, table, title_of


@dataclass(frozen=True, kw_only=True)
class Vtab(InitOptions, TrainOptions):
    """The nineteen tasks of VTAB-1k with one recipe."""

    init: str = ""
    """.npz, .safetensors or a run's directory. Required."""
    data: str | None = None
    """The directory of the prepared sets, one folder a task."""
    sources: str | None = None
    """A JSON file that says where each task is, instead."""
    toys: bool = False
    """Eight small tasks made of the embedded digits and two photographs, in the place of VTAB's sets."""
    tasks: tuple[str, ...] = ()
    """Some tasks only. Default: all nineteen."""
    learning_rates: tuple[float, ...] = ()
    """Default: Table 4's 0.01, and nothing to choose."""
    examples: int = 1000
    """Training images that every set must have; four fifths of them serve to choose."""
    runs: int = 1
    """Of every task at the end, with consecutive seeds."""
    steps: int | None = None
    batch_size: int | None = None
    image_size: int | None = None
    augment: Literal["inception", "digits", "none"] = "none"
    """The same for all: a flip or a crop would change the answer of the structured tasks."""
    gelu: Literal["tanh", "erf", "quick", "silu"] | None = None
    head_bias: float = 0.0
    """What the new heads' biases start at."""
    seed: int = 0
    out: str | None = None
    """Default: runs/vtab-INIT-HASH."""


def main(argv: list[str] | None = None) -> int:
    """The job. Returns the exit code."""
    words = sys.argv[1:] if argv is None else argv

    def work(stop):
        args = parse(Vtab, "train.vtab", words)
        with Watchdog(args.step_timeout):
            run(args, stop)

    return guard("train.vtab", work)


def places(args: Vtab) -> dict[str, dict[str, str]]:
    """{task: {"data", "train", "test"}} of the tasks that are asked for. ValueError for unknown ones and a bad file."""
    known = TOYS if args.toys else TASKS
    wanted = args.tasks or tuple(known)
    if unknown := [task for task in wanted if task not in known]:
        raise ValueError(f"--tasks {', '.join(unknown)}: the tasks are {', '.join(known)}")
    if (args.data is not None) + (args.sources is not None) + args.toys != 1:
        raise ValueError(
            "--data DIRECTORY or --sources FILE is required, one of them: it says where the prepared sets are (or --toys)"
        )
    if args.toys:
        return {task: {"data": f"toys:{task}", "train": "train", "test": "val"} for task in wanted}
    if args.data is not None:
        return {task: {"data": f"folder:{os.path.join(args.data, task)}", "train": "train", "test": "val"} for task in wanted}
    try:
        held = parse_json(text_of(str(args.sources)))
        good = all(
            isinstance(v, dict) and isinstance(v["data"], str) and set(v) <= {"data", "train", "test"} for v in held.values()
        )
    except (ValueError, KeyError, AttributeError):
        good, held = False, {}
    if not good or set(held) - set(TASKS):
        raise ValueError(f"--sources {args.sources}: {{task: {{data, train, test}}}} is required, for tasks of {', '.join(TASKS)}")
    absent = {"data": "", "train": "train", "test": "val"}
    return {task: absent | held.get(task, {}) for task in wanted}


def run(args: Vtab, stop=None) -> dict | None:
    """All tasks that are not done; what vtab.json holds, or None where it was asked to stop."""
    from train import pinned
    from train.tuning import Finetune, dev_splits, fine_tune, model_held, prepare

    check_init(args.init)
    check_numbers(args)
    _ = args.told  # raises ValueError
    if args.runs < 1 or args.examples < 5:
        raise ValueError(f"--runs {args.runs}, --examples {args.examples}: at least 1 and 5 are required")
    where, named = places(args), TOYS if args.toys else TASKS
    recipe = recipes.finetune_recipe("vtab")
    rates = args.learning_rates or recipe.base_lrs
    args.join()
    job.agree(args)
    out, first = directory(args), distributed.rank() == 0
    who = identity(args)
    with locked(out):
        if first:
            check_claim(out, who)
        held: dict[str, Any] = distributed.broadcast(_held(out) if first else None) or {}
        result: dict[str, Any] = {"model": {}, "dev": held.get("dev", {}), "final": held.get("final", {}), "missing": {}}
        if args.toys:
            result["toys"] = True
        there = [task for task in where if _there(task, where[task], args, result["missing"])]
        for task, reason in result["missing"].items():
            say(f"{named[task][0]} has no data: {reason}")
        if not there:
            raise ValueError(f"none of the {len(where)} tasks has data, the first because {next(iter(result['missing'].values()))}")
        stored = pinned.begin(out, args.init, model_held(out / "vtab.json", held))  # of a run that goes on, as it was then
        result["model"] = stored.model
        distributed.agree(model=stored.model)

        def options(task: str, **changes) -> Finetune:
            at = where[task]
            base = dict(
                init=args.init, data=at["data"], split=at["train"], test_split=at["test"], recipe="vtab", steps=args.steps,
                batch_size=args.batch_size, image_size=args.image_size, augment=args.augment, gelu=args.gelu,
                head_bias=args.head_bias, seed=args.seed, **{name: getattr(args, name) for name in (*INIT_OPTIONS, *TRAIN_OPTIONS)},
            )  # fmt: skip
            return Finetune(**(base | changes))  # pyright: ignore[reportArgumentType]

        def one(kind: str, task: str, key: str, finetune: Finetune) -> bool:
            """One run, unless it is done; False where it was asked to stop."""
            if key in result[kind].get(task, {}):
                return True
            beat(f"preparing {kind}, {task}")
            full, session = prepare(finetune, stop, stored)
            found = fine_tune(full, out / kind / task / key, session, of_study=True)
            if stopped(found, out, f" in {kind}/{task}"):
                return False
            one = {"accuracy": found.accuracy, "correct": found.correct, "count": found.count}
            result[kind].setdefault(task, {})[key] = one | stored.model
            say(f"{kind}, {named[task][0]}, {key}: {found.correct} of {found.count} right, {found.accuracy:.2%}")
            if first:
                _write(out, result, args)
            return True

        if not held:
            prepare(options(there[0]), stop, stored)  # what is wrong with the model is said before anything is claimed
        if first:
            claim(out, who, dataclasses.asdict(args))
            _write(out, result, args)
            pinned.keep(out, stored)
        if len(rates) > 1:
            for task in there:
                train, dev = dev_splits(where[task]["train"], recipe.dev_share)
                for rate in rates:
                    if not one("dev", task, f"lr-{rate:g}", options(task, split=train, test_split=dev, learning_rate=rate)):
                        return None
        rate = choose(result["dev"], there, rates)
        result["rate"] = rate
        for task in there:
            for seed in range(args.seed, args.seed + args.runs):
                if not one("final", task, f"lr-{rate:g}-seed-{seed}", options(task, learning_rate=rate, seed=seed)):
                    return None
        result["means"] = means(accuracies(result["final"], rate), named)
        if first:
            _write(out, result, args)
            draw(result, out / "vtab.png", f"{title_of(result)}: {os.path.basename(args.init.rstrip('/'))}")
            say((out / "vtab.md").read_text().rstrip())
            say(f"{out / 'vtab.png'}")
    return result


def directory(args: Vtab):
    """--out, or runs/vtab-INIT-HASH."""
    return job.directory(args.out, f"vtab-{Path(args.init).stem}", identity(args))


def identity(args: Vtab) -> dict:
    """What makes the results what they are: not which tasks, where it runs, or how many seeds have been asked for."""
    names = "init data sources learning_rates examples steps batch_size image_size augment gelu head_bias dtype seed"
    told = {name: getattr(args, name) for name in (*INIT_OPTIONS, "toys") if getattr(args, name)}  # a study of before had none
    return json.loads(json.dumps({name: getattr(args, name) for name in names.split()} | told))


def _there(task: str, at: dict[str, str], args: Vtab, missing: dict[str, str]) -> bool:
    """Whether a task's images are there, as many as there should be; otherwise why not, into `missing`."""
    from train.data import DataError, open_source

    try:
        if not at["data"]:
            raise DataError(f"{args.sources} does not say where they are")
        train, test = (open_source(at["data"], at[split]) for split in ("train", "test"))
        if len(train) != args.examples:
            raise DataError(f"{train.name} has {len(train)} images, VTAB-1k's {args.examples} are required")
        if not len(test):
            raise DataError(f"{test.name} has no images")
    except DataError as error:
        missing[task] = str(error)
        return False
    return True


def _held(out) -> dict | None:
    path = out / "vtab.json"
    if not path.exists():
        return None
    cure = "remove it; the runs beside it are then measured again"
    return read_object(path, cure=cure, holding=("dev", "final"), wrong="no results")


def _write(out, result: dict, args: Vtab) -> None:
    write_atomically(out / "vtab.json", json.dumps(result, indent=2) + "\n")
    write_atomically(out / "vtab.md", table(result, args.init))


if __name__ == "__main__":
    interruptible()
    end(main())
