"""What train.vtab finds: its tasks, the rate that is best for all, means, table and picture."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from train.files import write_picture

# name here: (name in the paper, group), in the order of Table 9
TASKS = {
    "caltech101": ("Caltech101", "Natural"),
    "cifar100": ("CIFAR-100", "Natural"),
    "dtd": ("DTD", "Natural"),
    "flowers102": ("Flowers102", "Natural"),
    "pets": ("Pets", "Natural"),
    "sun397": ("Sun397", "Natural"),
    "svhn": ("SVHN", "Natural"),
    "camelyon": ("Camelyon", "Specialized"),
    "eurosat": ("EuroSAT", "Specialized"),
    "resisc45": ("Resisc45", "Specialized"),
    "retinopathy": ("Retinopathy", "Specialized"),
    "clevr-count": ("Clevr-Count", "Structured"),
    "clevr-dist": ("Clevr-Dist", "Structured"),
    "dmlab": ("DMLab", "Structured"),
    "dspr-loc": ("dSpr-Loc", "Structured"),
    "dspr-ori": ("dSpr-Ori", "Structured"),
    "kitti-dist": ("KITTI-Dist", "Structured"),
    "snorb-azim": ("sNORB-Azim", "Structured"),
    "snorb-elev": ("sNORB-Elev", "Structured"),
}
# Of --toys, `train/data/toys.py`: their groups are what VTAB's are about, and nobody else has numbers of them.
TOYS = {
    "digits": ("Digits", "Natural"),
    "digits-on-photographs": ("Digits on photographs", "Natural"),
    "photographs": ("Which photograph", "Specialized"),
    "blur": ("Blur", "Specialized"),
    "count": ("Count", "Structured"),
    "place": ("Place", "Structured"),
    "turn": ("Quarter turns", "Structured"),
    "size": ("Size", "Structured"),
}
GROUPS = ("Natural", "Specialized", "Structured")


def tasks_of(result: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The tasks that a result is of, {name: (name to show, group)}."""
    return TOYS if result.get("toys") else TASKS


def choose(dev: dict, tasks: list[str], rates) -> float:
    """The learning rate with the best mean over the tasks; of equal ones the smallest."""
    if len(rates) == 1:
        return rates[0]
    mean = {rate: np.mean([dev[task][f"lr-{rate:g}"]["accuracy"] for task in tasks]) for rate in rates}
    return min(rates, key=lambda rate: (-mean[rate], rate))


def accuracies(final: dict, rate: float) -> dict[str, float]:
    """{task: mean accuracy of its runs with this rate}."""
    found = {
        task: [one["accuracy"] for key, one in runs.items() if key.startswith(f"lr-{rate:g}-")] for task, runs in final.items()
    }
    return {task: float(np.mean(found[task])) for task in (*TASKS, *TOYS) if found.get(task)}


def means(done: Mapping[str, float], tasks: Mapping[str, tuple[str, str]]) -> dict[str, dict]:
    """{group or "all": {"mean", "tasks", "of"}}: means over those of the tasks that were done."""
    out = {}
    for group in (*GROUPS, "all"):
        members = [task for task, (_, g) in tasks.items() if group in (g, "all")]
        values = [done[task] for task in members if task in done]
        out[group] = {"mean": float(np.mean(values)) if values else None, "tasks": len(values), "of": len(members)}
    return out


def title_of(result: Mapping[str, Any]) -> str:
    return "Eight toy tasks (not VTAB)" if result.get("toys") else "VTAB-1k"


def table(result: dict, init: str) -> str:
    """The results so far as a Markdown table."""
    lines = [f"# {title_of(result)}, {init}", "", "| group | task | accuracy |", "|---|---|---|"]
    done = accuracies(result["final"], result["rate"]) if "rate" in result else {}
    for task, (name, group) in tasks_of(result).items():
        if task in done:
            lines.append(f"| {group} | {name} | {done[task]:.2%} |")
        elif task in result["missing"]:
            lines.append(f"| {group} | {name} | no data: {result['missing'][task]} |")
    for group, one in result.get("means", {}).items():
        if one["tasks"]:
            of = "" if one["tasks"] == one["of"] else f" ({one['tasks']} of {one['of']} tasks)"
            lines.append(f"| {group} | mean{of} | {one['mean']:.2%} |")
    return "\n".join(lines) + "\n"


# --- the picture --------------------------------------------------------------------------------------------------------------

COLORS = {"Natural": "tab:green", "Specialized": "tab:red", "Structured": "tab:blue", "all": "tab:gray"}


def draw(result: dict, path, title: str, paper: Mapping[str, tuple[float, ...]] | None = None) -> None:
    """A panel of the means, all and by group (Figure 2), and one with every task's bar; a task without data has a cross. To a PNG.

    paper: {model: Table 9's row in percent}; its points are hollow, in the same panels where the tasks are VTAB's and below them
    where they are toys."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    rows = 2 if paper and result.get("toys") else 1
    figure = Figure(figsize=(12, 4.8 * rows), dpi=120, layout="constrained")
    grid: Any = figure.subplots(rows, 2, width_ratios=(1, 3), sharey=True, squeeze=False)
    _ours(grid[0, 0], grid[0, 1], result, title)
    if paper:
        _papers(grid[-1, 0], grid[-1, 1], paper, alone=rows == 2)
    for axes in grid.flat:
        axes.set(ylim=(0, 1.05), ylabel="accuracy")
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_picture(figure, path)


def _ours(left, right, result: dict, title: str) -> None:
    tasks, done = tasks_of(result), accuracies(result["final"], result["rate"])
    for i, group in enumerate(("all", *GROUPS)):
        if (one := result["means"][group])["tasks"]:
            left.bar(i, one["mean"], color=COLORS[group])
            left.text(i, one["mean"], f"{100 * one['mean']:.1f}", ha="center", va="bottom")
    for i, (task, (_, group)) in enumerate(tasks.items()):
        if task in done:
            right.bar(i, done[task], color=COLORS[group])
        else:
            right.plot(i, 0.02, "x", color="black", clip_on=False)
    _names(left, right, tasks, result["means"])
    left.set_title("Means")
    right.set_title(title)


def _papers(left, right, paper: Mapping[str, tuple[float, ...]], *, alone: bool) -> None:
    """Hollow points of Table 9, a mark for each model."""
    for mark, (model, values) in zip("oDs^v", paper.items(), strict=False):
        done = {task: value / 100 for task, value in zip(TASKS, values, strict=True)}
        mean = means(done, TASKS)
        look: dict[str, Any] = dict(marker=mark, linestyle="none", markerfacecolor="none", color="black", label=f"{model} (paper)")
        left.plot(range(4), [mean[group]["mean"] for group in ("all", *GROUPS)], **look)
        right.plot(range(len(done)), list(done.values()), **look)
        if alone:
            _names(left, right, TASKS, mean)
            left.set_title("Means (paper)")
            right.set_title("paper: VTAB-1k, Table 9")
    right.legend(frameon=False, fontsize=8, loc="lower left")


def _names(left, right, tasks: Mapping[str, tuple[str, str]], mean: Mapping[str, dict]) -> None:
    """The axes along which the bars stand, and how they are coloured."""
    from matplotlib.ticker import PercentFormatter

    sizes = [mean[group] for group in ("all", *GROUPS)]
    left.set_xticks(range(4), [f"{g}\n{one['tasks']} of {one['of']}" for g, one in zip(("all", *GROUPS), sizes, strict=True)])
    left.tick_params(axis="x", labelsize=8)
    right.set_xticks(range(len(tasks)), [name for name, _ in tasks.values()], rotation=60, ha="right")
    for text, (_, group) in zip(right.get_xticklabels(), tasks.values(), strict=True):
        text.set_color(COLORS[group])
    left.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
