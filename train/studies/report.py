"""A study's table and picture: our results, and the paper's numbers beside them, marked "paper"."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from train.files import write_picture
from train.studies.records import Run, Setting, Study

MEASURES = {"fewshot": "5-shot linear", "finetune": "fine-tuned"}
SECONDS = "inference, milliseconds an image"
Row = dict[str, Any]


def rows_of(runs: list[Run], results: Mapping[str, Row], costs: Mapping[str, float]) -> list[Row]:
    """A row for each pre-training: its place in the study, its exaFLOPs, the best validation on its way, what was measured, and the
    "images/s" of its model where a run of the study times them."""
    timed = [row for run in runs for row in results[run.name].get("rows", ())]
    speeds = {row["model"]: row["images_per_second"] for row in timed if row.get("images_per_second")}
    out = []
    for run in runs:
        if run.job != "pretrain":
            continue
        # a run that stopped early took fewer steps than were planned
        planned, taken = results[run.name].get("of_steps"), results[run.name].get("steps")
        share = taken / planned if planned and taken else 1.0
        row = dict(run.at) | {"exaFLOPs": share * costs[run.name] / 1e18, "steps": taken, "validation": results[run.name]["value"]}
        row |= {other.job: results[other.name]["value"] for other in runs if other.after == run.name and other.job in MEASURES}
        out.append(row | ({"images/s": speeds.get(run.at["model"])} if timed else {}))
    return out


def table(study: Study, rows: list[Row], setting: Setting, lines: Iterable[str] = ()) -> str:
    """Markdown: our rows, the paper's number in those that are its own, then its other rows. lines: said below."""
    keys = [key for key in rows[0] if key not in (*MEASURES, "validation", "steps", "exaFLOPs", "images/s")] if rows else []
    measured = [job for job in MEASURES if any(job in row for row in rows)]
    beside, others = _joined(study, rows, keys)
    where = f"pre-trained on {setting.data}, measured on {setting.to}"
    speed = ["images/s"] if study.speed else []
    heads = [*keys, "steps", "exaFLOPs", *speed, "validation", *(MEASURES[job] for job in measured)]
    heads += [f"paper ({study.paper_what})"] if any(v is not None for v in beside) else []
    out = [f"# {study.title}", "", f"Ours, {where}; budget {setting.budget:g}, seed {setting.seed}.", ""]
    out += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row, paper in zip(rows, beside, strict=True):
        cells = [_cell(row[key]) for key in keys] + [str(row["steps"] or ""), f"{row['exaFLOPs']:.3g}"]
        cells += [f"{row[key]:,.0f}" if row.get(key) else "" for key in speed]
        cells += [_percent(row.get(key)) for key in ("validation", *measured)]
        cells += [_percent(paper)] if any(v is not None for v in beside) else []
        out.append("| " + " | ".join(cells) + " |")
    if others:
        columns = [key for key in others[0] if key != "paper"]
        out += ["", f"The paper's own: {study.paper_what}.", ""]
        out += ["| " + " | ".join([*columns, "paper"]) + " |", "|" + "---|" * (len(columns) + 1)]
        out += ["| " + " | ".join([*(_cell(row[key]) for key in columns), _percent(row["paper"])]) + " |" for row in others]
    return "\n".join([*out, "", *([study.note, ""] if study.note else []), *lines]).rstrip() + "\n"


def _joined(study: Study, rows: list[Row], keys: list[str]) -> tuple[list[float | None], list[Row]]:
    """The paper's number of each of our rows, None where it has none; its rows that are none of ours."""

    def same(ours: Row, theirs: Row) -> bool:
        return all(key in theirs and theirs[key] == ours[key] for key in keys)

    beside = [next((p["paper"] for p in study.paper if same(row, p)), None) for row in rows]
    return beside, [p for p in study.paper if not any(same(row, p) for row in rows)]


def _cell(value) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value) -> str:
    return "" if value is None else f"{value:.2%}"


# --- the picture --------------------------------------------------------------------------------------------------------------


def draw(study: Study, rows: list[Row], setting: Setting, path) -> None:
    """A panel for each thing that was measured, and one of the paper's numbers, where it prints any; to a PNG."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    panels: list[tuple[str, list[Row], str, str, bool]] = [
        (f"{MEASURES[job]} on {setting.to}", [row for row in rows if row.get(job) is not None], job, study.x, False)
        for job in MEASURES
        if any(job in row for row in rows)
    ]
    if study.speed:  # each a second time, along what an image takes
        timed = [row | {SECONDS: 1e3 / row["images/s"]} for row in rows if row.get("images/s")]
        panels += [(title, timed, job, SECONDS, False) for title, _, job, _, _ in panels if timed]
    if study.paper:
        sets = [row for row in study.paper if row.get("set", "average") == "average"]
        panels.append((f"paper: {study.paper_what}", sets, "paper", study.paper_x, True))
    figure = Figure(figsize=(1.5 + 4.6 * len(panels), 4.8), dpi=120, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, some, value, x, theirs) in zip(grid, panels, strict=True):
        lines = list(dict.fromkeys(row.get(study.line or "", "") for row in some))
        if some and all(isinstance(row[x], (int, float)) for row in some):
            _curves(axes, study, some, x, value, lines, theirs)
        else:
            _bars(axes, study, some, x, value, lines, theirs)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
        cut = " (the axis is cut)" if axes.patches else ""
        axes.set(title=title, ylabel=f"accuracy{cut}", xlabel=x if x == SECONDS else study.xlabel or x)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if study.line and lines:
            axes.legend(frameon=False, fontsize=8, title=study.line + (" (paper)" if theirs else ""), title_fontsize=8)
    shown = f"pre-trained on {setting.data}, budget {setting.budget:g}"
    apart = "; " if len(panels) > 1 else "\n"  # beside one panel a line that long is cut
    figure.suptitle(f"{study.title}{apart}ours: {shown}", fontsize=11)
    write_picture(figure, path)


def _colours(lines: list) -> Callable[[Any], Any]:
    from matplotlib import colormaps

    return lambda line: colormaps["tab10"](lines.index(line) % 10)


def _curves(axes, study: Study, rows: list[Row], x: str, value: str, lines: list, theirs: bool) -> None:
    """A line for each value of the study's column; what is "base" belongs to every line. The paper's points are hollow."""
    colour = _colours(lines)
    shared = [row for row in rows if row.get(study.line or "") == "base"]
    for line in lines:
        own = [row for row in rows if row.get(study.line or "", "") == line]
        points = sorted((row[x], row[value]) for row in (own if line == "base" else [*own, *shared]))
        style: dict[str, Any] = dict(
            color="black" if line == "base" else colour(line), markersize=7 if theirs or line == "base" else 5
        )
        style |= {"markerfacecolor": "none", "linestyle": "--"} if theirs else {}
        axes.plot(*zip(*points, strict=True), marker="D" if line == "base" else "o", label=str(line), linewidth=1.4, **style)
    if study.log:
        axes.set_xscale("log")
    values = sorted({row[x] for row in rows})
    if study.log and len(values) <= 5:  # few enough to name each
        axes.set_xticks(values, [_short(v) for v in values])
        axes.minorticks_off()


def _bars(axes, study: Study, rows: list[Row], x: str, value: str, lines: list, theirs: bool) -> None:
    """Bars by name, those of one line in one colour; the paper's are hatched. The axis begins below the smallest."""
    names = list(dict.fromkeys(row[x] for row in rows))
    colour, width = _colours(lines), 0.8 / max(1, len(lines))
    for i, line in enumerate(lines):
        for row in (row for row in rows if row.get(study.line or "", "") == line):
            place = names.index(row[x]) + (i - (len(lines) - 1) / 2) * width
            first = not any(text == str(line) for text in axes.get_legend_handles_labels()[1])
            label = str(line) if first else None
            look: dict[str, Any] = (
                {"facecolor": "none", "edgecolor": colour(line), "hatch": "//"} if theirs else {"color": colour(line)}
            )
            axes.bar(place, row[value], width, label=label, **look)
            axes.text(place, row[value], f"{100 * row[value]:.1f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(names)), [str(name) for name in names], rotation=30 if len(names) > 3 else 0)
    if rows:
        low, high = min(row[value] for row in rows), max(row[value] for row in rows)
        room = max(high - low, 0.02)
        axes.set_ylim(max(0.0, low - room), min(1.05, high + 0.25 * room))


def _short(value: float) -> str:
    """A number on an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}" if value >= 1e-3 else f"{value:.3g}"
