"""Fine-tune a ViT: `python -m train.finetune`.

    python -m train.finetune --init ViT-B_16.npz --data folder:/data/cifar100 --recipe cifar100
    python -m train.finetune --init ViT-B_16.npz --data folder:/data/cifar100 --recipe cifar100 --sweep
    python -m train.finetune --init runs/NAME --data digits:5-9 --learning-rate 0.1

A recipe (paper Table 4, `train/recipes.py`) supplies what is not said. The whole pre-training head gives way to a linear one that
starts at zero; the position embedding is fitted to the new resolution. One run trains on --split and is measured on --test-split;
with --dev it trains on all but the recipe's share of --split and is measured on that share. --sweep does what the paper does: every
learning rate of the grid on the dev split, the best one then on all of --split, three times, with other seeds.

A run leaves what pre-training leaves, and resumes likewise. A sweep is a directory of runs with sweep.json, sweep.md and sweep.png;
each of its runs resumes, and those that are done are not done again. All of them begin from the same weights: where --init is a run
that goes on, from the step that was its newest when the sweep began.
"""

import sys
from pathlib import Path

from train import code, distributed, job, pinned
from train import sweep as sweeps
from train.job import end, guard, locked, say, stopped
from train.options import parse
from train.signals import Stop, Watchdog, interruptible
from train.tuning import Finetune, fine_tune, identity, prepare


def directory(args: Finetune):
    """Where the run lives: --out, or runs/finetune-INIT-RECIPE-HASH."""
    named = {key: value for key, value in identity(args).items() if key != "mixup" or value}  # as before there was MixUp here
    return job.directory(args.out, f"finetune-{Path(args.init).stem}-{args.recipe}", named)


# --- the job ----------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The job. Returns the exit code: 0, or 2 with one line on stderr for whatever a user can mend."""
    words = sys.argv[1:] if argv is None else argv

    def work(stop):
        args = parse(Finetune, "train.finetune", words)
        with Watchdog(args.step_timeout):
            run(args, stop)

    return guard("train.finetune", work)


def run(args: Finetune, stop: Stop | None = None):
    """Fine-tune, or sweep, as `args` say. The Result of a run, or the summary of a sweep; None where it was asked to stop."""
    full, session = prepare(args, stop)
    out = directory(full)
    if full.sweep and (model := sweeps.model_of_sweep(out)) not in (None, session.model):
        full, session = prepare(args, stop, pinned.begin(out, args.init, model))
    distributed.agree(
        configuration=identity(full),
        code=code.digest(),
        versions=code.versions(),
        model=[session.pretrained.about, session.model],
    )
    say(f"{session.pretrained.about} on {full.data}, {full.split}; {session.where}; recipe {full.recipe}; {out}")
    if full.sweep:
        return sweeps.sweep(full, out, session)
    if full.dev:
        full = sweeps.dev_run(full)
    with locked(out):
        result = fine_tune(full, out, session)
    if stopped(result, out):
        return None
    say(
        f"finished at step {result.steps}: {result.correct} of {result.count} images of {full.test_split} right, "
        f"{result.accuracy:.2%}; {out / 'curves.png'}"
    )
    return result


if __name__ == "__main__":
    interruptible()
    end(main())
