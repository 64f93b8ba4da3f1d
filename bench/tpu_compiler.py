"""Compiles jax functions for a TPU generation without a TPU, and says what the compiler expects of them.

    reports = compile_programs("v3", [Program(build="bench.programs:patch_embed", arguments={"shape": "B/16"})], cycles=True)

libtpu, the TPU compiler, runs on any Linux machine (`pip install 'vitcore[tpu-compiler]'`). Its failed CHECKs abort the
process, so this module compiles in a subprocess: one for a list of programs, and a fresh one for the rest after an abort. What
comes back for a program is a `Report`: bytes a core, the kernels in it, collectives, cycles; or the compiler's message in one
line.

Cycles are COMPILER ESTIMATES, never measurements. Three sources, each named in the report:
- "cost model": XLA's own `estimated_cycles` of its operations, times the trips of the loops around them (`bench.hlo`);
- "schedule": a Mosaic kernel's VLIW bundles, followed through its loops, with its DMAs at the
  HBM bandwidth (`bench.llo`); all generations;
- "profile": the compiler's static profile of a kernel (v5e, v5p, v6e, 7x). Its memory and time grow with the
  cycles: profile a few images.

A builder is `module:function`, called as function(devices, **arguments) in the subprocess, and returns (function or jitted
function, its arguments as trees of jax.ShapeDtypeStruct). Arguments without a sharding are placed on the first device.
Arguments of a builder are JSON.
"""

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import hlo, llo
from kernels.device import DEVICES

# Two by two chips of each generation: the smallest topology libtpu builds, of which one core is used.
TOPOLOGIES = {
    "v2": "v2:2x2",
    "v3": "v3:2x2",
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}
PROFILED = ("v5e", "v5p", "v6e", "7x")
_MARK = "@@vitcore-report "
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v3-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class CompilerMissing(RuntimeError):
    """libtpu is not installed."""


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
    kernels: tuple[Kernel, ...] = ()
    xla_cycles: int = 0  # cost model, all operations times their trips
    xla_top: tuple[tuple[str, int, int, str], ...] = ()  # costliest operations: name, cycles of one, trips, source
    collectives: dict[str, int] = field(default_factory=dict)  # opcode -> number in the program, times trips
    text: str = ""  # the compiled program, where asked for

    @property
    def peak_bytes(self) -> int:
        """Memory of one core while the program runs: arguments, outputs that alias none, temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes

    @property
    def cycles(self) -> int:
        """Cycles of the whole program: XLA's operations and the kernels. ValueError where a kernel was not counted."""
        for kernel in self.kernels:
            if kernel.cycles is None:
                raise ValueError(
                    f"{self.name}: kernel {kernel.name} has no cycles: {kernel.error or 'compiled without cycles=True'}"
                )
        return self.xla_cycles + sum((k.cycles or 0) * k.trips for k in self.kernels)


def compile_programs(
    target: str,
    programs: Sequence[Program],
    *,
    topology: str | None = None,
    cycles: bool = False,
    profile: bool = False,
    text: bool = False,
    seconds: float = 300.0,
    gigabytes: float = 12.0,
    progress: Callable[[Report], None] | None = None,
) -> list[Report]:
    """Compiles `programs` for `target` in a subprocess, one after the other, and reports on each, in order.

    target: "v2" "v3" "v4" "v5e" "v5p" "v6e" "7x". topology: libtpu's name of a larger slice, e.g. "v3:4x4" (32 cores). cycles:
    count the kernels by their schedules (some compile time). profile: and by the static profile, one more compilation a kernel.
    text: keep the compiled text. seconds, gigabytes: limits on one compilation. progress is called with each report as it comes.
    ValueError: unknown target. CompilerMissing: no libtpu.
    """
    if target not in TOPOLOGIES:
        raise ValueError(f"unknown TPU generation {target!r}; known: {', '.join(TOPOLOGIES)}")
    if importlib.util.find_spec("libtpu") is None:
        raise CompilerMissing(
            "libtpu not installed, so nothing can be compiled for a TPU here: pip install 'vitcore[tpu-compiler]'"
        )
    request = {"target": target, "topology": topology or TOPOLOGIES[target], "cycles": cycles, "text": text}
    reports: list[Report] = []
    while len(reports) < len(programs):
        rest = list(programs[len(reports) :])
        for report in _session(request, rest, seconds=seconds, gigabytes=gigabytes, flags=()):
            if profile and not report.error:
                report = _profiled(request, rest[0], report, seconds=seconds, gigabytes=gigabytes)
            rest = rest[1:]
            reports.append(report)
            if progress is not None:
                progress(report)
    return reports


def compile_targets(
    targets: Sequence[str], programs: Sequence[Program], *, parallel: int = 1, **options
) -> dict[str, list[Report]]:
    """`compile_programs` for several generations, `parallel` subprocesses at a time."""
    with ThreadPoolExecutor(parallel) as pool:
        return dict(zip(targets, pool.map(lambda t: compile_programs(t, programs, **options), targets), strict=True))


# ---- the parent: one subprocess, watched


def _session(request: dict, programs: list[Program], *, seconds: float, gigabytes: float, flags: Sequence[str]):
    """Yields the reports of one subprocess: all of `programs`, or up to and including the one that killed it."""
    with tempfile.TemporaryDirectory(prefix="vitcore-tpu-") as folder:
        dumps = Path(folder) / "dumps"
        (dumps / "profile").mkdir(parents=True)
        arguments = list(flags)
        if request["cycles"]:
            arguments += [
                f"--xla_jf_dump_to={dumps}",
                "--xla_jf_dump_llo_text=true",
                "--xla_jf_dump_llo_pass_label_regex=.*final.*",
            ]
        arguments = [a.replace("{dumps}", str(dumps)) for a in arguments]
        environment = {**os.environ, **_ENVIRONMENT, "LIBTPU_INIT_ARGS": " ".join(arguments)}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (*sys.path, os.getcwd()) if p)
        body = json.dumps({**request, "dumps": str(dumps), "programs": [asdict(p) for p in programs]})
        with open(Path(folder) / "stderr", "w+b") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", "bench.tpu_compiler", "--child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(body.encode())
            child.stdin.close()
            watch = _Watch(child, seconds=seconds, gigabytes=gigabytes)
            done = 0
            try:
                for raw in child.stdout:
                    line = raw.decode(errors="replace")
                    if line.startswith(_MARK):
                        watch.again()
                        done += 1
                        yield _from_json(json.loads(line[len(_MARK) :]))
                child.wait()
            finally:
                watch.stop()
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            if done < len(programs):
                errors.seek(0)
                why = watch.reason or _crash(errors.read().decode(errors="replace"), child.returncode)
                program = programs[done]
                report = Report(name=program.name or program.build, target=request["target"], error=why)
                yield replace(report, kernels=_profiles(dumps))


class _Watch:
    """Kills a subprocess that takes too long for one program, or too much memory."""

    def __init__(self, child: subprocess.Popen, *, seconds: float, gigabytes: float):
        import threading

        self.child, self.seconds, self.gigabytes = child, seconds, gigabytes
        self.reason = ""
        self.since = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def again(self) -> None:
        self.since = time.monotonic()

    def stop(self) -> None:
        self.over.set()
        self.thread.join()

    def _resident(self) -> float:
        try:
            pages = int(Path(f"/proc/{self.child.pid}/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**30

    def _run(self) -> None:
        while not self.over.wait(0.25):
            if time.monotonic() - self.since > self.seconds:
                self.reason = f"not compiled within {self.seconds:.0f} s; raise the limit or compile a smaller shape"
            elif self._resident() > self.gigabytes:
                self.reason = (
                    f"the compiler took more than {self.gigabytes:g} GB of memory; raise the limit or compile a smaller shape"
                )
            if self.reason:
                self.child.kill()
                return


def _crash(errors: str, code: int | None) -> str:
    """The line that says why a subprocess died: a failed CHECK of libtpu, a Python error, or the signal."""
    for pattern in (r"^F\d{4} .*?\] (.*)$", r"^((?:\w+\.)*\w*(?:Error|Exception|Missing)\b.*)$"):
        found = re.findall(pattern, errors, re.M)
        if found:
            return f"the compiler aborted: {found[-1][:500]}"
    lines = [line for line in errors.splitlines() if line.strip()]
    return f"the compiler process ended with {code}: {lines[-1][:300] if lines else 'no message'}"


def _from_json(record: dict) -> Report:
    kernels = tuple(Kernel(**k) for k in record.pop("kernels"))
    top = tuple(tuple(x) for x in record.pop("xla_top"))
    return Report(**record, kernels=kernels, xla_top=top)


# ---- the static profile


def _profiles(dumps: Path) -> tuple[Kernel, ...]:
    """Kernels and fusions found in the profile folder of a session that may have aborted after writing them."""
    found = []
    for file in sorted((dumps / "profile").glob("*.textproto")):
        record = file.read_text()
        name, cycles = re.search(r'hlo_op_name: "([^"]+)"', record), re.search(r"estimated_cycles: (\d+)", record)
        if name and cycles:
            found.append(Kernel(name=name[1], trips=1, cycles=int(cycles[1]), source="profile"))
    return tuple(found)


def _profiled(request: dict, program: Program, report: Report, *, seconds: float, gigabytes: float) -> Report:
    """The report with its kernels' cycles from the static profile: one compilation for each differently named kernel.

    A kernel whose profile fails keeps the cycles of its schedule, and says why.
    """
    if request["target"] not in PROFILED:
        return report
    found: dict[str, Kernel] = {}
    for kernel in report.kernels:
        if kernel.name in found:
            continue
        flags = (
            "--xla_jf_dump_to={dumps}",
            "--xla_jf_dump_static_llo_profile_to={dumps}/profile",
            f"--xla_jf_dump_only_matching_hlo={kernel.name}",
        )
        again = {**request, "cycles": False, "text": False, "profile": True}
        result = next(iter(_session(again, [program], seconds=seconds, gigabytes=gigabytes, flags=flags)))
        match = next((k for k in result.kernels if k.name == kernel.name and k.source == "profile"), None)
        why = result.error or "the compiler wrote no profile for it"
        found[kernel.name] = match or replace(kernel, error=f"no static profile: {why}")
    kernels = tuple(replace(found[k.name], kernel=k.kernel, trips=k.trips, schedule=k.schedule) for k in report.kernels)
    return replace(report, kernels=kernels)


# ---- the child: compiles, one report a line


def _child() -> None:
    request = json.load(sys.stdin)
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    devices = topologies.get_topology_desc(topology_name=request["topology"], platform="tpu").devices
    for record in request["programs"]:
        report = _compile(Program(**record), devices, request)
        print(_MARK + json.dumps(asdict(report)), flush=True)


def _compile(program: Program, devices, request: dict) -> Report:
    import jax

    name = program.name or program.build
    started = time.monotonic()
    try:
        module, function = program.build.split(":")
        fn, arguments = getattr(importlib.import_module(module), function)(devices, **program.arguments)
        jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
        compiled = jitted.lower(*_placed(arguments, devices[0])).compile()
    except Exception as error:  # the compiler's message is the result: it is reported, not hidden
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return Report(name=name, target=request["target"], error=message[:1500], seconds=time.monotonic() - started)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None  # what only a backend other than XLA's may leave out
    seconds = time.monotonic() - started
    operations = hlo.operations(text)
    xla = [op for op in operations if op.kind != "kernel"]
    ours = [op for op in operations if op.kind == "kernel"]
    kernels = tuple(_kernel(op, [other for other in ours if _twins(op, other)], request) for op in ours)
    if request.get("profile"):
        kernels = _profiles(Path(request["dumps"]))
    _clear(Path(request["dumps"]))
    collectives: dict[str, int] = {}
    for op in xla:
        opcode = op.kind.removesuffix("-start")
        if opcode in hlo.COLLECTIVES:
            collectives[opcode] = collectives.get(opcode, 0) + op.trips
    top = sorted(xla, key=lambda op: -op.cycles * op.trips)[:12]
    return Report(
        name=name,
        target=request["target"],
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        kernels=kernels,
        xla_cycles=sum(op.cycles * op.trips for op in xla),
        xla_top=tuple((op.name, op.cycles, op.trips, op.source) for op in top if op.cycles),
        collectives=collectives,
        text=text if request["text"] else "",
    )


def _placed(arguments, device):
    """The argument trees with every leaf that names no sharding placed on `device`."""
    import jax

    here = jax.sharding.SingleDeviceSharding(device)

    def place(leaf):
        if getattr(leaf, "sharding", None) is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    return jax.tree.map(place, arguments)


def _twins(a: hlo.Operation, b: hlo.Operation) -> bool:
    """Calls of one kernel with the same result: the compiler emits, and dumps, such code once."""
    return (a.kernel, a.shape) == (b.kernel, b.shape)


def _kernel(op: hlo.Operation, twins: list[hlo.Operation], request: dict) -> Kernel:
    blank = Kernel(name=op.name, kernel=op.kernel, trips=op.trips)
    if not request["cycles"]:
        return blank
    folder = Path(request["dumps"])
    found = None
    for name in (op.name, *(twin.name for twin in twins)):
        schedules = [f for f in folder.glob(f"*-{name}-*-final_bundles.txt") if "schedule-analysis" not in f.name]
        if schedules:
            utilization = next(iter(folder.glob(f"*-{name}-*-final_hlo-static-per-bundle-utilization.txt")), None)
            found = schedules[0], utilization
            break
    if found is None:
        return replace(blank, error="the compiler dumped no schedule for it")
    bandwidth = DEVICES[request["target"]].hbm_bytes_per_cycle
    try:
        count = llo.count(*found, target=request["target"], bytes_per_cycle=bandwidth)
    except llo.ScheduleError as error:
        return replace(blank, error=str(error))
    return replace(blank, cycles=count.cycles, source="schedule", schedule=asdict(count))


def _clear(folder: Path) -> None:
    for file in folder.glob("*.*"):
        if file.is_file():
            file.unlink()


# ---- by hand: python -m bench.tpu_compiler v3 my_module:build '{"batch": 8}' [--profile]


def describe(report: Report) -> str:
    """The report as a few lines for a person."""
    if report.error:
        return f"{report.target} {report.name}: {report.error}"
    lines = [f"{report.target} {report.name}: {report.peak_bytes / 2**20:.1f} MiB a core, compiled in {report.seconds:.1f} s"]
    lines.append(f"  XLA operations {report.xla_cycles:,} cycles (compiler estimate, cost model)")
    lines += [f"    {cycles:>12,} x {trips:<4} {name} {source}" for name, cycles, trips, source in report.xla_top]
    for kernel in report.kernels:
        counted = "not counted" if kernel.cycles is None else f"{kernel.cycles:,} cycles (compiler estimate, {kernel.source})"
        lines.append(f"  kernel {kernel.name} x {kernel.trips}: {counted}{' ' + kernel.error if kernel.error else ''}")
        if kernel.schedule:
            count = dict(kernel.schedule)
            units = "  ".join(f"{unit} {share:.0%}" for unit, share in count.pop("units").items())
            lines.append("    schedule: " + "  ".join(f"{key} {value:,}" for key, value in count.items()))
            lines.append("    slots in use: " + units)
    if report.collectives:
        lines.append(f"  collectives {report.collectives}")
    return "\n".join(lines)


def _main(arguments: list[str]) -> int:
    usage = 'usage: python -m bench.tpu_compiler TARGET MODULE:BUILDER [\'{"json": "arguments"}\'] [--profile]'
    profile = "--profile" in arguments
    words = [a for a in arguments if a != "--profile"]
    if len(words) not in (2, 3):
        print(usage, file=sys.stderr)
        return 2
    program = Program(build=words[1], arguments=json.loads(words[2]) if len(words) == 3 else {})
    try:
        report = compile_programs(words[0], [program], cycles=True, profile=profile)[0]
    except (ValueError, CompilerMissing) as error:
        print(error, file=sys.stderr)
        return 2
    print(describe(report))
    return 1 if report.error else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        _child()
    else:
        sys.exit(_main(sys.argv[1:]))
