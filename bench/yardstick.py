"""One yardstick for every operation of a compiled TPU program, whoever wrote it: the cycles of its own schedule.

The cycles of an operation, XLA fusion or kernel, are those of its walk through the bundles the compiler dumped for it (`bench.llo`:
issue, delays, busy MXUs, waits for DMAs), or the bytes of its DMAs over the HBM's rate where that is larger. So both sides of a
comparison are counted alike, and nothing counts as zero: an operation without a schedule of its own is counted by XLA's cost
model or by its bytes in HBM, whichever is larger, and the line says so. XLA's cost model is kept beside as a second opinion.

Left out: what runs beside the core and is waited for elsewhere (asynchronous copies, collectives), and the gaps between operations.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import llo
from bench.hlo import Operation, collective
from kernels.device import DEVICES

# TensorCores that one jax device is made of; XLA splits its operations over them, and a kernel is counted on one.
CORES = {"v5p": 2}
_FULL = 0.6  # of an operation's cycles: above, the busiest MXU is what bounds it


@dataclass(frozen=True, kw_only=True)
class Line:
    """Operations of a program that run the same code. All cycles and bytes are of one run on one core; there are `trips` runs.

    name: of a kernel its `name=`, of XLA's the instruction. kind: "kernel" or the HLO opcode. cycles: the yardstick. source:
    "schedule", "bytes" or "cost model", where the cycles come from. bound: "MXU", "HBM" or "other", what they are made of.
    detail: the unit used most. mxu: cycles that its busiest MXU works. bytes: moved over HBM. model: XLA's cost model (0 for a
    kernel). error: why it has no schedule. schedule: the `bench.llo.Count`, of kernels.
    """

    name: str
    kind: str
    trips: int
    cycles: int
    source: str
    bound: str
    detail: str = ""
    mxu: int = 0
    bytes: int = 0
    model: int = 0
    origin: str = ""  # jax's name of what it computes
    shape: str = ""
    error: str = ""
    schedule: dict[str, Any] | None = None

    @property
    def total(self) -> int:
        return self.cycles * self.trips


def flops_per_cycle(target: str) -> int:
    """FLOPs of bfloat16 products that a jax device of this generation does in a cycle: of all its cores."""
    return DEVICES[target].flops_per_cycle * CORES.get(target, 1)


class _Dumps:
    """The schedules in a folder of dumps, each walked once."""

    def __init__(self, folder: Path, target: str):
        self.target, self.bandwidth = target, DEVICES[target].hbm_bytes_per_cycle
        self.files: dict[str, Path] = {}
        self.tables: dict[str, Path] = {}
        for file in folder.glob("*-final*"):
            found = re.match(r"\d+-(.+)-\d+-(final_bundles|final_hlo-static-per-bundle-utilization)\.txt$", file.name)
            if found:
                (self.files if found[2] == "final_bundles" else self.tables).setdefault(found[1], file)
        self.known: dict[str, llo.Count | str] = {}

    def count(self, name: str) -> llo.Count | str:
        """The count, or why there is none."""
        if name not in self.known:
            try:
                file, table = self.files[name], self.tables.get(name)
                self.known[name] = llo.count(file, table, target=self.target, bytes_per_cycle=self.bandwidth)
            except llo.ScheduleError as error:
                self.known[name] = str(error)
        return self.known[name]


def _schedules(operations: Sequence[Operation], dumps: _Dumps) -> dict[str, str]:
    """Operation -> the name under which its code was dumped: its own, or that of one with the same code.

    Of those with the same key, else of the same kind, result and jax name (of kernels: the name of the kernel).
    """

    def alike(op: Operation) -> tuple[str, str, str]:
        return op.kind, op.shape, op.kernel if op.kind == "kernel" else op.source.rsplit("/", 1)[-1]

    own = {op.name: next((n for n in (op.name, *op.aliases) if n in dumps.files), "") for op in operations}
    exact, near = {}, {}
    for op in operations:
        if own[op.name]:
            exact.setdefault(op.key, own[op.name])
            near.setdefault(alike(op), own[op.name])
    return {op.name: own[op.name] or exact.get(op.key, "") or near.get(alike(op), "") for op in operations}


def _detail(count: llo.Count) -> str:
    unit, share = max(count.units.items(), key=lambda u: u[1], default=("", 0.0))
    return f"{unit} {share:.0%}" if unit else ""


def _line(op: Operation, found: llo.Count | str, rate: float) -> Line:
    blank: dict[str, Any] = dict(kind=op.kind, trips=op.trips, model=op.cycles, origin=op.source, shape=op.shape)
    name = op.kernel if op.kind == "kernel" else op.name
    if isinstance(found, str):
        floor = round(op.moved / rate)
        source = "cost model" if op.cycles > floor else "bytes"
        bound = "other" if source == "cost model" else "HBM"
        return Line(name=name, cycles=max(op.cycles, floor), source=source, bound=bound, bytes=op.moved, error=found, **blank)
    floor = round(found.dma_bytes / rate)
    cycles = max(found.cycles, floor)
    if found.mxu_busy >= _FULL * cycles and found.mxu_busy >= floor:
        bound = "MXU"
    else:
        bound = "HBM" if floor >= _FULL * cycles else "other"
    kernel = asdict(found) if op.kind == "kernel" else None
    measured: dict[str, Any] = dict(mxu=found.mxu_busy, bytes=found.dma_bytes, detail=_detail(found), schedule=kernel)
    return Line(name=name, cycles=cycles, source="schedule", bound=bound, **measured, **blank)


def counts(operations: Sequence[Operation], folder: Path, target: str) -> dict[str, llo.Count | str]:
    """Operation -> the count of its schedule, or why there is none; of operations with one code, one walk.

    operations: `bench.hlo.operations` of a program. folder: the dumps of its compilation.
    """
    dumps = _Dumps(folder, target)
    names = _schedules(operations, dumps)
    return {op: dumps.count(name) if name else "the compiler dumped no schedule for it" for op, name in names.items()}


def cycles(op: Operation, found: llo.Count | str, target: str) -> int:
    """Cycles of all runs of an operation. found: as `counts` has it."""
    return _line(op, found, DEVICES[target].hbm_bytes_per_cycle).total


def lines(operations: Sequence[Operation], counted: dict[str, llo.Count | str], target: str) -> tuple[Line, ...]:
    """What a program costs, operation by operation, the costliest first; those of one code and cost are one line."""
    merged: dict[tuple, Line] = {}
    for op in operations:
        if collective(op.kind):
            continue
        line = _line(op, counted[op.name], DEVICES[target].hbm_bytes_per_cycle)
        if not line.cycles:
            continue
        same = (line.kind, line.name if op.kind == "kernel" else "", op.shape, line.cycles, line.bytes, line.model)
        before = merged.get(same)
        merged[same] = line if before is None else replace(before, trips=before.trips + line.trips)
    return tuple(sorted(merged.values(), key=lambda line: -line.total))


def total(found: Sequence[Line]) -> int:
    """Cycles of the whole program by the yardstick."""
    return sum(line.total for line in found)


def split(found: Sequence[Line]) -> dict[str, int]:
    """Cycles by what bounds them: "MXU", "HBM", "other"; and "uncounted": those of them that have no schedule of their own."""
    shares: dict[str, int] = dict.fromkeys(("MXU", "HBM", "other"), 0)
    for line in found:
        shares[line.bound] += line.total
    return {**shares, "uncounted": sum(line.total for line in found if line.source != "schedule")}


def table(found: Sequence[Line], *, images: int | None = None, most: int = 20) -> str:
    """The costliest operations as text: kernels and XLA's in one list; below, the split by what bounds them. images: that the
    program works on, by which cycles are divided; None: cycles are the whole program's."""
    whole, what_of = max(1, total(found)), "in all" if images is None else "an image"
    images = images or 1
    head = f"  {'cycles':>12}{'share':>7}  {'operation':<34}{'cycles x runs':>20}  {'bound':<6}{'MXU':>5}"
    rows = [f"{head}{'fullest unit':>15}{'cost model':>13}"]
    for line in found[:most]:
        runs = f"{line.cycles:,} x {line.trips}"
        what = line.name if line.kind == "kernel" else f"{line.name} ({line.origin.rsplit('/', 1)[-1]})"
        model = f"{line.model:,}" if line.model else "-"
        cells = f"{line.total / images:>12,.0f}{line.total / whole:>7.1%}  {what[:33]:<34}{runs:>20}  {line.bound:<6}"
        rest = f"{line.mxu / max(1, line.cycles):>5.0%}{line.detail:>15}{model:>13}"
        rows.append(cells + rest + ("" if line.source == "schedule" else f"  by its {line.source}"))
    if len(found) > most:
        left = found[most:]
        rows.append(f"  {total(left) / images:>12,.0f}{total(left) / whole:>7.1%}  {len(left)} others")
    parts = split(found)
    shares = ", ".join(f"{parts[name] / whole:.0%} {name}" for name in ("MXU", "HBM", "other"))
    without = f"; {parts['uncounted'] / whole:.1%} without a schedule" if parts["uncounted"] else ""
    rows.append(f"  {whole / images:>12,.0f} cycles {what_of} (compiler estimate): {shares}{without}")
    return "\n".join(rows)
