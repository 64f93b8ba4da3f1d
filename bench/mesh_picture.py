"""The picture of a comparison of meshes: a step's time on each, own work and waiting for collectives, and a core's memory.

python -m bench.plots runs/throughput/meshes.json        draws the PNG beside it again
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels.device import DEVICES


def _name(row: dict[str, Any]) -> str:
    return row["mesh"] + (f"\n{row['shard']}" if row["mode"] == "train" else "")


def _panels(left, right, some: Sequence[dict[str, Any]]) -> None:
    """Time and memory of the meshes of one model and batch."""
    at, names = range(len(some)), [_name(row) for row in some]
    work = [1e3 * row["compute_seconds"] for row in some]
    waiting = [1e3 * row["exposed_seconds"] for row in some]
    best = max((r for r in some if r["fits"]), key=lambda r: r["images_per_second"], default=None)
    left.bar(at, work, color=["tab:blue" if row is best else "lightsteelblue" for row in some], label="own work")
    left.bar(at, waiting, bottom=work, color="tab:orange", label="waiting for collectives")
    for i, row in enumerate(some):
        left.text(i, work[i] + waiting[i], f"{row['images_per_second']:,.0f}/s", ha="center", va="bottom", fontsize=8)
    first = some[0]
    left.set_title(
        f"{first['model']}@{first['size']} {first['mode']} {first['ops']}, {first['batch']:,} images, {first['topology']}",
        fontsize=10,
    )
    left.set_ylabel("ms a step, compiler estimate")
    left.margins(y=0.12)
    right.bar(at, [row["bytes"] / 2**30 for row in some], color="tab:green")
    right.axhline(DEVICES[first["where"]].hbm_bytes / 2**30, color="black", linewidth=1, linestyle="--", label="HBM")
    right.set_title("memory of a core", fontsize=10)
    right.set_ylabel("GiB, by the compiler")
    for axes in (left, right):
        axes.set_xticks(at, names, fontsize=8)
        axes.grid(True, axis="y", alpha=0.3)
        axes.legend(fontsize=8)


def picture(rows: Sequence[dict[str, Any]]):
    """The matplotlib figure: a line of two panels for each model, size, mode, batch and slice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = ("where", "model", "size", "mode", "batch", "topology", "remat", "ops")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    figure = Figure(figsize=(11, 0.6 + 3.4 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    for (left, right), some in zip(figure.subplots(len(groups), 2, squeeze=False), groups.values(), strict=True):
        _panels(left, right, some)
    figure.suptitle("Meshes of a slice (compiler estimate, link rates as published, not measured)", fontsize=11)
    return figure


def pictures(rows: Sequence[dict[str, Any]], folder: Path, *, stem: str = "meshes") -> list[Path]:
    """One PNG of the rows that have figures, drawn into `folder`."""
    if not (some := [row for row in rows if row.get("images_per_second")]):
        return []
    path = folder / f"{stem}.png"
    drawn = picture(some)
    drawn.savefig(path, dpi=130)
    drawn.clear()
    return [path]
