"""The tables of a throughput study on the screen and, with the same columns, in Markdown.

python -m bench.tables runs/throughput/throughput.json        the study as a Markdown table
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DEVICE = (
    ("case", 34),
    ("batch", 7),
    ("images/s", 11),
    ("spread", 8),
    ("TFLOP/s", 9),
    ("of matmul", 11),
    ("largest batch", 15),
)
_TARGET = (
    ("case", 38),
    ("batch", 8),
    ("images/s", 11),
    ("kcycles/image", 15),
    ("FLOP use", 10),
    ("largest batch", 15),
    ("GiB there", 11),
)


def _columns(row: dict[str, Any]):
    return _TARGET if row["compiler_estimate"] else _DEVICE


def _case(row: dict[str, Any]) -> str:
    code = row["ops"] if row["library"] == "vitcore" else row["library"]
    moved = f" ({row['asked']})" if row["asked"] != row["size"] else ""
    mesh = f" {row['mesh']}" if row["mesh"] else ""
    if row["library"] == "vitcore" and row.get("shard", "auto") != "auto":
        mesh += f" {row['shard']}"
    rate = f" dropout {row['dropout']}" if row.get("dropout") else ""
    where = row["where"] + " " if row["compiler_estimate"] else ""
    return f"{where}{row['model']}@{row['size']}{moved} {row['mode']} {code}{mesh}{rate}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def cells(row: dict[str, Any]) -> list[str]:
    """The columns of one row as text, in the order of `columns`."""
    rate = row.get("images_per_second")
    largest = f"{row['largest_batch']:,}" if row.get("largest_batch") else "-"
    shared = [_case(row), _number(row.get("batch"), ",d"), _number(rate, ",.0f" if rate and rate >= 100 else ",.2f")]
    if row["compiler_estimate"]:
        share, cycles = row.get("flop_utilisation"), row.get("cycles_per_image")
        used = row.get("largest_bytes")
        return [
            *shared,
            _number(cycles and cycles / 1e3, ",.0f"),
            _number(share, ".0%"),
            largest,
            _number(used and used / 2**30, ".2f"),
        ]
    flops = row.get("flops_per_second")
    return [
        *shared,
        _number(row.get("spread"), ".1%"),
        _number(flops and flops / 1e12, ",.2f"),
        _number(row.get("share_of_matmul"), ".0%"),
        largest,
    ]


def header(rows: Sequence[dict[str, Any]]) -> str:
    """The line above the rows; compiler estimates are called that."""
    if not rows:
        return "no cases"
    columns = _columns(rows[0])
    title = "".join(f"{name:<{width}}" if i == 0 else f"{name:>{width}}" for i, (name, width) in enumerate(columns))
    if rows[0]["compiler_estimate"]:
        return "compiler estimate: nothing below was measured on a device\n" + title
    return title


def line(row: dict[str, Any]) -> str:
    """One row, with what went wrong or what limits it beneath where there is something to say."""
    columns = _columns(row)
    text = "".join(
        f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
        for i, (cell, (_, width)) in enumerate(zip(cells(row), columns, strict=True))
    )
    notes = [n for n in (row.get("error"), row.get("note")) if n]
    limit = row.get("limited_by")
    if limit and not row.get("largest_batch") and not row.get("error"):
        notes.append(f"largest batch: {limit}")
    compiled = row.get("compiled", "")
    if compiled.startswith("not compiled"):
        notes.append(f"torch.compile failed, run without it: {compiled}")
    return "\n".join([text, *(f"    {note[:200]}" for note in notes)])


def compared(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ours over each other code, case by case, where a run has both; one line each."""
    found = []
    for row in rows:
        rate = row.get("images_per_second")
        others = [
            r
            for r in rows
            if r is not row
            and all(r[k] == row[k] for k in ("where", "model", "size", "mode", "mesh"))
            and r.get("images_per_second")
        ]
        first = row["library"] == "vitcore" and not any(
            r["library"] == "vitcore" and rows.index(r) < rows.index(row) for r in others
        )
        if rate and others and first:
            ratios = ", ".join(
                f"{rate / r['images_per_second']:.2f} x {r['ops'] if r['library'] == 'vitcore' else r['library']}" for r in others
            )
            unit = " (compiler estimate)" if row["compiler_estimate"] else ""
            found.append(f"{row['model']}@{row['size']} {row['mode']}: {row['ops']} runs at {ratios}{unit}")
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    names = [name for name, _ in _columns(rows[0])]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" + " ---: |" * (len(names) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in rows])


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m bench.tables STUDY.json", file=sys.stderr)
        return 2
    try:
        study = json.loads(Path(sys.argv[1]).read_text())
        print(markdown(study["rows"]))
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.tables: {sys.argv[1]} is no study: {error!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
