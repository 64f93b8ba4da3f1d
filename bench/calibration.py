"""How far the schedule's count of a kernel is from the compiler's own static profile, and what to say where it is far.

`python -m bench.kernels --target v5e v6e --calibrate --save` makes the table beside this file (`calibration.json`): generation,
kernel, deviation, schedule / profile - 1. A figure whose kernels were off by more than TRUSTED says so.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from bench import yardstick

TRUSTED = 0.15
FILE = Path(__file__).with_name("calibration.json")


@cache
def table() -> dict[str, dict[str, float]]:
    """Generation -> kernel name -> deviation; empty where nothing was calibrated."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def save(records: list[dict[str, Any]]) -> None:
    """Puts deviations of `bench.kernels --calibrate` into the table: of a kernel seen at several shapes, the largest. What was
    known of kernels that are not among the records stays."""
    found = {target: dict(kernels) for target, kernels in table().items()}
    for r in records:
        found.setdefault(r["target"], {}).pop(r["kernel"], None)
    for r in records:
        off, kernels = r["schedule"] / r["profile"] - 1, found[r["target"]]
        if abs(off) >= abs(kernels.get(r["kernel"], 0.0)):
            kernels[r["kernel"]] = round(off, 4)
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    table.cache_clear()


# How far the count of a whole program may be off, by the operations of docs/yardstick.md against the static profile where there is
# one (v5e, v6e); of v3, which has none, from XLA's own cost model of its products, with which it agrees to within a tenth.
_MARGINS = {"v3": "+-10 %", "v5e": "-5 to +10 %", "v6e": "-15 to +10 %"}


def margin(target: str) -> str:
    """The error bar of a headline, in brackets."""
    known = _MARGINS.get(target)
    return f"(error bar of the count {known})" if known else "(a generation whose count was not checked)"


def note(target: str, report) -> str:
    """What to say beside the cycles of `report`: kernels that weigh in it and were off by more than TRUSTED. Empty if none."""
    weight = {k.kernel: (k.cycles or 0) * k.trips for k in report.kernels if k.source == "schedule"}
    known = table().get(target, {})
    total = max(1, yardstick.total(report.lines), sum(weight.values()))
    bad = [
        f"{name} {known[name]:+.0%}"
        for name, cycles in weight.items()
        if abs(known.get(name, 0)) > TRUSTED and cycles > 0.05 * total
    ]
    return f"cycles of kernels counted by their schedule, which is off the compiler's profile here: {', '.join(bad)}" if bad else ""
