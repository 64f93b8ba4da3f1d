"""Transfer, end to end, on a laptop: `python -m train.transfer`, or `make transfer`.

A small ViT is pre-trained on the handwritten digits 0 to 4. Then the digits 5 to 9, which it has never seen, are learned from it:

    few-shot      ridge regression on its frozen tokens, 1, 5, 10 and 25 images a digit, beside the same on the pixels. Behind
                  which block is chosen on a held-out tenth of train: the last ones know what they were taught, and little else
    fine-tuning   the paper's protocol: a head of zeros, SGD, the learning rate chosen on a held-out tenth, then all of train

Each is measured on the held-out digits 5 to 9. Prints a line for each and leaves transfer.png and transfer.json beside the runs, in
--out. The same command again resumes, or says that all is done.
"""

import dataclasses
import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from train import distributed, recipes
from train import mesh as meshes
from train.files import write_atomically, write_picture
from train.job import JobOptions, end, guard, place, say
from train.options import parse

MODEL = "ViT-Nano/4"
SEEN, UNSEEN = "digits:0-4", "digits:5-9"
DRAWS = 20  # of few shots: a single draw of five images a digit says little
DROPOUT = 0.1  # in fine-tuning: 98 % of the digits 5 to 9 after 600 steps, where without it are 96 to 97 %, after 300 as after 800
MARGIN = 0.02  # by which five shots from the features must beat the pixels


@dataclass(frozen=True, kw_only=True)
class Transfer(JobOptions):
    """Pre-train on the digits 0 to 4, transfer to the digits 5 to 9."""

    mesh: str = "1x1"
    out: str = "runs/transfer"
    seed: int = 0
    """Of the pre-training; fine-tuning takes this and the following ones."""
    pretrain_steps: int = 1500
    finetune_steps: int = 600
    runs: int = 3
    """Of fine-tuning with the chosen rate."""
    draws: int = DRAWS
    """Of few shots, which are averaged."""


def main(argv: list[str] | None = None) -> int:
    """The job. Returns the exit code."""
    words = sys.argv[1:] if argv is None else argv

    def work(stop):
        run(parse(Transfer, "train.transfer", words), stop)

    return guard("train.transfer", work)


def run(args: Transfer, stop=None) -> dict | None:
    """All of it; what transfer.json holds, or None where it was asked to stop."""
    from train import finetune, pretrain

    if min(args.pretrain_steps, args.finetune_steps, args.runs, args.draws) < 1:
        raise ValueError("--pretrain-steps, --finetune-steps, --runs and --draws: positive numbers are required")
    args.join()
    meshes.prepare(meshes.parse(args.mesh))  # before the first job asks for devices
    out = place(args.out)
    common: dict[str, Any] = {field.name: getattr(args, field.name) for field in dataclasses.fields(JobOptions)} | {
        "mesh": args.mesh
    }
    say("--- pre-training on the digits 0 to 4")
    pretrain.run(
        pretrain.Pretrain(
            model=MODEL, data=SEEN, recipe="digits", representation_size=0, steps=args.pretrain_steps, seed=args.seed,
            out=str(out / "pretrain"), keep=1, **common,
        ),
        stop,
    )  # fmt: skip
    if stop is not None and stop.asked:
        return None
    say("--- few-shot: ridge regression, digits 5 to 9")
    shots = few_shots(args, str(out / "pretrain"))
    say("--- fine-tuning on the digits 5 to 9")
    summary = finetune.run(
        finetune.Finetune(
            init=str(out / "pretrain"), data=UNSEEN, recipe="digits", sweep=True, steps=args.finetune_steps, runs=args.runs,
            dropout=DROPOUT, seed=args.seed, out=str(out / "finetune"), eval_every=max(1, args.finetune_steps // 5),
            checkpoint_every=max(1, args.finetune_steps // 2), **common,
        ),
        stop,
    )  # fmt: skip
    if summary is None:
        return None
    assert isinstance(summary, dict)
    result = {"fewshot": shots, "finetune": {key: summary[key] for key in ("rate", "mean", "std", "final")}}
    if distributed.rank() == 0:
        write_atomically(out / "transfer.json", json.dumps(result, indent=2) + "\n")
        draw(result, out / "transfer.png")
    for line in (*describe(result), out / "transfer.png"):
        say(str(line))
    return result


def few_shots(args: Transfer, init: str) -> dict:
    """{"features", "representation" or "pixels": {shots: [accuracies, one a draw]}, "blocks": {block: accuracy of five shots on
    the dev split}}."""
    from train import fewshot
    from train.tuning import dev_splits
    from vitcore import variant

    train, dev = dev_splits("train", recipes.DIGITS_FINETUNE.dev_share)
    common: dict[str, Any] = dict(data=UNSEEN, seeds=args.draws, mesh=args.mesh)
    blocks = {}
    for block in range(1, variant(MODEL, image_size=8).depth + 1):
        options = fewshot.Fewshot(
            init=init, features="tokens", block=block, train_split=train, test_split=dev, shots=(5,), **common
        )  # fmt: skip
        blocks[block] = float(np.mean(fewshot.run(options)[5]))
    best = max(blocks, key=lambda block: (blocks[block], -block))
    found: dict = {"blocks": {str(block): value for block, value in blocks.items()}}
    for name, options in {
        "features": fewshot.Fewshot(init=init, features="tokens", block=best, **common),
        "representation": fewshot.Fewshot(init=init, features="representation", **common),
        "pixels": fewshot.Fewshot(features="pixels", **common),
    }.items():
        found[name] = {str(k): values for k, values in fewshot.run(options).items()}
    return found


def describe(result: dict) -> list[str]:
    """The figures in words."""
    lines = []
    for k, values in result["fewshot"]["features"].items():
        baseline = result["fewshot"]["pixels"][k]
        margin = np.mean(values) - np.mean(baseline)
        lines.append(
            f"{k}-shot, digits 5 to 9: {np.mean(values):.2%} from the features, {np.mean(baseline):.2%} from the pixels: "
            f"{100 * margin:+.2f} points"
        )
    tuned = result["finetune"]
    lines.append(f"fine-tuned, digits 5 to 9: {tuned['mean']:.2%} +- {tuned['std']:.2%} in {len(tuned['final'])} runs")
    return lines


def draw(result: dict, path: epath.Path) -> None:
    """Accuracy against the number of images a digit, from features and from pixels, and the fine-tuned model's; to a PNG."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    for what, color, label in (("features", "tab:blue", "frozen tokens"), ("pixels", "tab:gray", "pixels")):
        found = result["fewshot"][what]
        shots = [int(k) for k in found]
        means, deviations = (np.array([f(v) for v in found.values()]) for f in (np.mean, np.std))
        axes.plot(shots, means, "o-", color=color, label=f"ridge regression on {label}")
        axes.fill_between(shots, means - deviations, means + deviations, color=color, alpha=0.15, linewidth=0)
    tuned = result["finetune"]
    axes.axhline(tuned["mean"], color="tab:orange", label=f"fine-tuned on all of train: {tuned['mean']:.2%} ± {tuned['std']:.2%}")
    axes.set_xscale("log")
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set(xlabel="training images of each digit", ylabel="held-out digits 5 to 9 right", ylim=(None, 1.0))
    axes.set_title("Pre-trained on the digits 0 to 4, transferred to 5 to 9")
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    write_picture(figure, path)


if __name__ == "__main__":
    end(main())
