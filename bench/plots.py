"""The picture of a throughput study, as the paper's Figure 12: images/s over input size on the left, largest batch on the right.

    python -m bench.plots runs/throughput/throughput.json        draws the PNG beside it again

Log axes, one colour a model, one line style for each code (ours fused, ours on the references, a peer), one row of panels for each
kind of pass; of one size bars, with their numbers. Figures from the TPU compiler are called that in the picture's title.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import mesh_picture

_STYLES = {"fused": "-", "gpu": "-", "xla": ":", "reference": "--", "timm": "-.", "transformers": ":"}
_MARKERS = {"fused": "o", "gpu": "o", "xla": "v", "reference": "s", "timm": "^", "transformers": "D"}


def _groups(rows: Sequence[dict[str, Any]], *names: str) -> dict[tuple, list[dict[str, Any]]]:
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[n] for n in names), []).append(row)
    return found


def _code(row: dict[str, Any]) -> str:
    return row["ops"] if row["library"] == "vitcore" else row["library"]


def _name(code: str) -> str:
    return {
        "fused": "our kernels",
        "gpu": "our ops on a GPU",
        "auto": "ours",
        "reference": "reference ops",
        "xla": "ResNets (XLA)",
    }.get(code, code)


def _panel(axes, rows, value: str, colours: dict[str, Any]) -> None:
    """One panel: a line for each model and code, the value over the input size."""
    sizes = sorted({row["asked"] for row in rows})
    for model, colour in colours.items():
        for code in dict.fromkeys(_code(r) for r in rows):
            points = sorted((r["asked"], r[value]) for r in rows if r["model"] == model and _code(r) == code and r.get(value))
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, _STYLES.get(code, "-"), marker=_MARKERS.get(code, "o"), color=colour, markersize=5, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(s) for s in sizes])
    axes.minorticks_off()
    _ticks(axes, [r[value] for r in rows if r.get(value)])
    axes.grid(True, alpha=0.3)
    axes.set_xlabel("input size [px]")


def _bars(axes, rows, value: str, colours: dict[str, Any]) -> None:
    """One panel of one input size: a bar for each model and code, the first on top."""
    found = [r for model in colours for r in rows if r["model"] == model and r.get(value)][::-1]
    several = len({_code(r) for r in rows}) > 1
    names = [r["model"] + (f", {_name(code) if (code := _code(r)) != 'xla' else 'XLA'}" if several else "") for r in found]
    places = range(len(found))
    drawn = axes.barh(places, [r[value] for r in found], color=[colours[r["model"]] for r in found], height=0.7)
    axes.bar_label(drawn, [f"{r[value]:,.0f}" for r in found], padding=3, fontsize=9)
    axes.set_yticks(places, names)
    axes.margins(x=0.15)  # room for the numbers
    axes.grid(True, axis="x", alpha=0.3)


def _ticks(axes, values: list[float]) -> None:
    """Plain numbers at 1, 2 and 5 of every decade that the values reach; at 1 alone where those would be many."""
    if not values:
        return
    low, high = min(values) / 1.4, max(values) * 1.4
    axes.set_ylim(low, high)
    mantissas = (1, 2, 5) if high / low < 3000 else (1,)
    if high / low < 6:
        mantissas = (1, 1.5, 2, 3, 4, 5, 6, 8)
    at = [m * 10.0**e for e in range(-3, 9) for m in mantissas if low <= m * 10.0**e <= high]
    axes.set_yticks(at, [f"{t:,.0f}" if t >= 1 else f"{t:g}" for t in at])


def picture(rows: Sequence[dict[str, Any]], *, title: str):
    """The matplotlib figure of the rows of one device or target. Rows without a figure leave a gap."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    kinds = _groups(rows, "mode", "mesh")
    models = list(dict.fromkeys(r["model"] for r in rows))
    codes = list(dict.fromkeys(_code(r) for r in rows))
    colours = {m: colormaps["tab10" if len(models) <= 10 else "tab20"](i % 20) for i, m in enumerate(models)}
    columns = 2 if any(r.get("largest_batch") for r in rows) else 1  # an empty panel says nothing
    figure = Figure(figsize=(1.5 + 4.75 * columns, 0.9 + 4.2 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(kinds), columns, squeeze=False)
    sizes = {row["asked"] for row in rows}
    panel = _panel if len(sizes) > 1 else _bars
    for (left, *rest), ((mode, mesh), some) in zip(grid, kinds.items(), strict=True):
        estimate = some[0]["compiler_estimate"]
        what = {"forward": "inference", "train": "training"}[mode] + (f", mesh {mesh}" if mesh else "")
        panel(left, some, "images_per_second", colours)
        (left.set_ylabel if len(sizes) > 1 else left.set_xlabel)("images/s" + (", compiler estimate" if estimate else ""))
        what += f", {sizes.copy().pop()} px" if len(sizes) == 1 else ""
        left.set_title(f"{what}: peak images/s")
        for right in rest:
            panel(right, some, "largest_batch", colours)
            (right.set_ylabel if len(sizes) > 1 else right.set_xlabel)("images" + (", by the compiler" if estimate else ""))
            right.set_title(f"{what}: largest batch" + (" a core" if estimate and not mesh else ""))
            if not any(r.get("largest_batch") for r in some):
                right.text(0.5, 0.5, "not found", transform=right.transAxes, ha="center", va="center", color="grey")
    if len(sizes) == 1:  # each bar has its name beside it
        figure.suptitle(title, fontsize=12)
        return figure
    handles = [Line2D([], [], color=c, linewidth=2.5, label=m) for m, c in colours.items()]
    if len(codes) > 1:
        style: dict[str, Any] = {c: dict(linestyle=_STYLES.get(c, "-"), marker=_MARKERS.get(c, "o"), markersize=5) for c in codes}
        handles += [Line2D([], [], color="black", label=_name(c), **style[c]) for c in codes]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(7 if columns > 1 else 4, len(handles)), frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=12)
    return figure


def pictures(rows: Sequence[dict[str, Any]], folder: Path, *, stem: str = "throughput") -> list[Path]:
    """One PNG for each device or target among the rows, drawn into `folder`."""
    made = []
    places = _groups(rows, "where", "dtype")
    for (where, dtype), some in places.items():
        estimate = some[0]["compiler_estimate"]
        place = (
            f"TPU{where} (compiler estimate, not measured)"
            if estimate
            else next((r["device"] for r in some if "device" in r), where)
        )
        path = folder / (f"{stem}.png" if len(places) == 1 else f"{stem}-{where}.png")
        largest = " and largest batch" if any(row.get("largest_batch") for row in some) else ""
        drawn = picture(some, title=f"Throughput{largest}: {place}, {dtype}")
        drawn.savefig(path, dpi=130)
        drawn.clear()
        made.append(path)
    return made


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m bench.plots STUDY.json", file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    try:
        rows = json.loads(path.read_text())["rows"]
        draw = mesh_picture.pictures if any("exposed_seconds" in row for row in rows) else pictures
        made = draw(rows, path.parent, stem=path.stem)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.plots: {path} cannot be drawn: {error!r}", file=sys.stderr)
        return 2
    print("\n".join(map(str, made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
