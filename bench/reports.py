"""What the TPU compiler said of a program, and where that is kept.

A `Program` names a builder; `Report` is the answer: bytes a core, kernels, collectives, cycles by the one count, or the compiler's
message in one line. A `Cache` holds reports in a folder, by all that decides them. `bench.tpu_compiler` makes them.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import links, yardstick


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to compile: `build` is "module:function", `arguments` are its JSON keyword arguments, `name` labels the report."""

    build: str
    arguments: dict[str, Any] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A Mosaic kernel of a program: one call costs `cycles` (None where it was not counted), and there are `trips` calls.

    name: of the instruction in the program. kernel: the `name=` of its pallas_call.
    """

    name: str
    kernel: str = ""
    trips: int
    cycles: int | None = None
    source: str = ""  # "schedule" or "profile"
    schedule: dict[str, Any] | None = None  # bench.llo.Count
    error: str = ""  # why there are no cycles


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler said about one program. Bytes are per core; `error` is empty if it compiled, else one line."""

    name: str
    target: str
    error: str = ""
    seconds: float = 0.0
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    temporary_bytes: int = 0
    live_bytes: int = 0  # the most that live at one time, by the compiler's own assignment of buffers
    kernels: tuple[Kernel, ...] = ()
    lines: tuple[yardstick.Line, ...] = ()  # every operation by the one count, where cycles were asked for
    xla_cycles: int = 0  # cost model, all operations times their trips
    xla_top: tuple[tuple[str, int, int, str], ...] = ()  # costliest operations: name, cycles of one, trips, source
    collectives: dict[str, int] = field(default_factory=dict)  # opcode -> number in the program, times trips
    collective_bytes: dict[str, int] = field(default_factory=dict)  # opcode -> bytes a core sends or receives, times trips
    timeline: tuple[links.Event, ...] = ()  # work and collectives in a core's order, where cycles were asked for, on a mesh
    cached: bool = False  # compiled before, in another run
    text: str = ""  # the compiled program, where asked for

    @property
    def peak_bytes(self) -> int:
        """Memory of one core while the program runs: what the compiler holds against the core's HBM, else the sum of the parts."""
        return self.live_bytes or self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes

    @property
    def cycles(self) -> int:
        """Cycles of the whole program by the yardstick. ValueError where a kernel, or nothing at all, was counted."""
        for kernel in self.kernels:
            if kernel.cycles is None:
                raise ValueError(
                    f"{self.name}: kernel {kernel.name} has no cycles: {kernel.error or 'compiled without cycles=True'}"
                )
        if not self.lines:
            raise ValueError(f"{self.name}: no operation has cycles: compiled without cycles=True")
        return yardstick.total(self.lines)

    @property
    def model_cycles(self) -> int:
        """As tools counted that knew no schedule of XLA's: its operations by its cost model, kernels by their schedules."""
        return self.xla_cycles + sum((k.cycles or 0) * k.trips for k in self.kernels)


def from_json(record: dict) -> Report:
    kernels = tuple(Kernel(**k) for k in record.pop("kernels"))
    top = tuple(tuple(x) for x in record.pop("xla_top"))
    lines = tuple(yardstick.Line(**line) for line in record.pop("lines"))
    events = links.from_json(record.pop("timeline", ()))
    return Report(**record, kernels=kernels, lines=lines, xla_top=top, timeline=events)


def profiles(dumps: Path) -> tuple[Kernel, ...]:
    """Kernels and fusions found in the profile folder of a session that may have aborted after writing them."""
    found = []
    for file in sorted((dumps / "profile").glob("*.textproto")):
        record = file.read_text()
        name, cycles = re.search(r'hlo_op_name: "([^"]+)"', record), re.search(r"estimated_cycles: (\d+)", record)
        if name and cycles:
            found.append(Kernel(name=name[1], trips=1, cycles=int(cycles[1]), source="profile"))
    return tuple(found)


def describe(report: Report) -> str:
    """The report as a few lines for a person."""
    if report.error:
        return f"{report.target} {report.name}: {report.error}"
    lines = [f"{report.target} {report.name}: {report.peak_bytes / 2**20:.1f} MiB a core, compiled in {report.seconds:.1f} s"]
    if report.lines:
        lines.append(yardstick.table(report.lines))
        lines.append(f"  XLA operations by their cost model: {report.xla_cycles:,} cycles")
    for kernel in report.kernels:
        if kernel.source == "profile" or kernel.error:
            counted = "not counted" if kernel.cycles is None else f"{kernel.cycles:,} cycles (compiler estimate, {kernel.source})"
            lines.append(f"  kernel {kernel.name} x {kernel.trips}: {counted} {kernel.error}".rstrip())
    if report.collectives:
        lines.append(f"  collectives {report.collectives}")
    return "\n".join(lines)


# What decides how a program is counted, file by file.
_COUNTING = (
    "train/mesh.py",  # options of the compiler, which a program's text does not hold
    "bench/hlo.py",
    "bench/llo.py",
    "bench/bundles.py",
    "bench/yardstick.py",
    "bench/links.py",
    "bench/compiler_child.py",
    "kernels/device.py",
)


class Cache:
    """Reports on disk, by the program's lowered text and all else that decides what the compiler says and how it is counted.

    folder: where. request: target, topology and whole_vmem. A report with cycles also answers who asked for none. A file holds the
    digest of a report and the report, and is put in place whole; one that is damaged is no answer, and the next report replaces it.
    """

    def __init__(self, folder: Path, request: dict):
        self.folder = folder
        asked = [request["target"], request["topology"], request.get("whole_vmem", False), os.environ.get("XLA_FLAGS", "")]
        parts = [*asked, *map(_version, ("jax", "jaxlib", "libtpu", "optax")), sources(_COUNTING)]
        self.machine = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _file(self, digest: str, cycles: bool) -> Path:
        key = hashlib.sha256(f"{self.machine} {digest}".encode()).hexdigest()[:32]
        return self.folder / f"{key}-{'cycles' if cycles else 'bytes'}.json"

    def load(self, digest: str, cycles: bool) -> Report | None:
        for file in (self._file(digest, True), *(() if cycles else (self._file(digest, False),))):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                stated, text = file.read_text().split("\n", 1)
                if stated == hashlib.sha256(text.encode()).hexdigest():
                    return replace(from_json(json.loads(text)), cached=True)
        return None

    def save(self, digest: str, cycles: bool, report: Report) -> None:
        text, file = json.dumps(asdict(report)), self._file(digest, cycles)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")  # another process may be writing the same report
        part.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        os.replace(part, file)


def default_cache() -> Path:
    """The user's cache directory: $XDG_CACHE_HOME or ~/.cache, then vitcore/compiler."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitcore" / "compiler"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def sources(names: Sequence[str]) -> str:
    """A digest of source files."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for name in names:
        place = root / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            if file.is_file():
                digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
