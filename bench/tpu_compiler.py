"""Compiles jax functions for a TPU generation without a TPU, and says what the compiler expects of them.

    reports = compile_programs("v3", [Program(build="bench.programs:patch_embed", arguments={"shape": "B/16"})], cycles=True)

libtpu, the TPU compiler, runs on any Linux machine (`pip install 'vitcore[tpu-compiler]'`). Its failed CHECKs abort the
process, so this module compiles in a subprocess (`bench.compiler_child`), and in a fresh one after an abort. Where a folder is
given, or named by $VITCORE_COMPILE_CACHE, reports are cached by the program's lowered text, kernels included and line numbers not,
the versions of jax and libtpu, the topology, the options and the code that counts.
What comes back for a program is a `Report` (`bench.reports`).

Cycles are COMPILER ESTIMATES, never measurements. Three sources, each named in the report:
- "schedule": the VLIW bundles of an operation, kernel or XLA fusion, followed through its loops, with its MXUs and its DMAs at the
  HBM bandwidth (`bench.llo`); all generations. The one count of `bench.yardstick`, and what `Report.cycles` adds up;
- "cost model": XLA's own `estimated_cycles` of its operations, times the trips of the loops around them (`bench.hlo`): a second
  opinion on XLA's operations, up to four times too high for elementwise ones;
- "profile": the compiler's static profile of a kernel (v5e, v5p, v6e, 7x). Its memory and time grow with the
  cycles: profile a few images.

A builder is `module:function`, called as function(devices, **arguments) in the subprocess, and returns (function or jitted
function, its arguments as trees of jax.ShapeDtypeStruct). Arguments without a sharding are placed on the first device.
Arguments of a builder are JSON.
"""

import contextlib
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.reports import Cache, Kernel, Program, Report, describe, from_json, profiles, sources
from kernels.device import DEVICES
from train.signals import of_this_process

# Two by two chips of each generation: the smallest topology libtpu builds, of which one core is used.
TOPOLOGIES = {device.name: device.topology for device in DEVICES.values() if device.topology}
PROFILED = ("v5e", "v5p", "v6e", "7x")
MARK = "@@vitcore-report "
CACHE = "VITCORE_COMPILE_CACHE"  # names a folder of reports for whoever gives none
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v3-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


# What decides which program a builder makes: files, and folders with all that is in them.
_BUILDING = ("kernels", "vitcore", "train", "bench/programs.py", "bench/shapes.py", "bench/peers")


class CompilerMissing(RuntimeError):
    """libtpu is not installed."""


class Compiler:
    """A process with the TPU compiler in it that takes programs one at a time, and is started anew after one that killed it.

        with Compiler("v3") as compiler:
            report = compiler.compile(Program(build="bench.programs:whole_forward", arguments={...}), cycles=True)

    target: "v2" "v3" "v4" "v5e" "v5p" "v6e" "7x". topology: libtpu's name of a larger slice, e.g. "v3:4x4" (32 cores). text:
    keep the compiled text. seconds, gigabytes: limits on one compilation. cache: directory of reports; None for that of
    $VITCORE_COMPILE_CACHE, or none. whole_vmem: kernels may take all of their core's VMEM, and not only what they need.
    ValueError: unknown target. CompilerMissing: no libtpu.
    """

    def __init__(
        self,
        target: str,
        *,
        topology: str | None = None,
        text: bool = False,
        seconds: float = 300.0,
        gigabytes: float = 12.0,
        cache: Path | None = None,
        whole_vmem: bool = False,
    ):
        if target not in TOPOLOGIES:
            raise ValueError(f"unknown TPU generation {target!r}; known: {', '.join(TOPOLOGIES)}")
        if importlib.util.find_spec("libtpu") is None:
            raise CompilerMissing(
                "libtpu not installed, so nothing can be compiled for a TPU here: pip install 'vitcore[tpu-compiler]'"
            )
        if cache is None and os.environ.get(CACHE):
            cache = Path(os.environ[CACHE]).expanduser().absolute()
        self.request = {
            "target": target,
            "topology": topology or TOPOLOGIES[target],
            "text": text,
            "cache": str(cache) if cache and not text else "",
            "whole_vmem": whole_vmem,
        }
        self.limits = {"seconds": seconds, "gigabytes": gigabytes}
        self._process: _Process | None = None
        self._dumping = False  # schedules take a third of a compilation to write: a process does it where cycles are asked for
        self._cache = Cache(cache, self.request) if cache and not text else None
        self._built = ""

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def _source_key(self, program: Program) -> str:
        """Stands for the program without building it: builder, arguments and code. Empty where the code is not all ours."""
        if not program.build.startswith("bench."):
            return ""
        return f"source {program.build} {json.dumps(program.arguments, sort_keys=True)} {sources(_BUILDING)}"

    def compile(self, program: Program, *, cycles: bool = False) -> Report:
        """The report on one program; cycles: count the kernels by their schedules, too."""
        name, key = program.name or program.build, self._source_key(program) if self._cache else ""
        if key and self._cache and (known := self._cache.load(key, cycles)) is not None:
            return replace(known, name=name)
        if self._process is not None and self._dumping != cycles:
            self.close()
        if self._process is None:
            self._process, self._dumping = _Process(self.request, flags=_DUMPS if cycles else (), **self.limits), cycles
        report = self._process.ask(program, cycles)
        settled = not report.error or "RESOURCE_EXHAUSTED" in report.error
        if not self._process.alive:
            self.close()
        elif key and self._cache and settled and key == self._source_key(program):  # nobody edited the code meanwhile
            self._cache.save(key, cycles, report)
        return report


def compile_programs(
    target: str,
    programs: Sequence[Program],
    *,
    cycles: bool = False,
    profile: bool = False,
    progress: Callable[[Report], None] | None = None,
    **options: Any,
) -> list[Report]:
    """Compiles `programs` for `target` in a subprocess, one after the other, and reports on each, in order.

    cycles: count the kernels by their schedules (some time). profile: and by the static profile, one more compilation a kernel.
    progress is called with each report as it comes. options: those of `Compiler`.
    """
    reports: list[Report] = []
    with Compiler(target, **options) as compiler:
        for program in programs:
            report = compiler.compile(program, cycles=cycles)
            if profile and not report.error:
                report = _profiled(compiler, program, report)
            reports.append(report)
            if progress is not None:
                progress(report)
    return reports


# ---- the parent: one subprocess, watched

_DUMPS = ("--xla_jf_dump_to={dumps}", "--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_pass_label_regex=.*final.*")


class _Process:
    """One compiler process. `ask` answers for a program; after an answer that killed it, `alive` is False."""

    def __init__(self, request: dict, *, flags: Sequence[str], seconds: float, gigabytes: float):
        self.target = request["target"]
        self.folder = tempfile.TemporaryDirectory(prefix="vitcore-tpu-")
        self.dumps = Path(self.folder.name) / "dumps"
        (self.dumps / "profile").mkdir(parents=True)
        arguments = " ".join(flag.replace("{dumps}", str(self.dumps)) for flag in flags)
        environment = {**os.environ, **_ENVIRONMENT, "LIBTPU_INIT_ARGS": arguments}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (*sys.path, os.getcwd()) if p)
        self.errors = open(Path(self.folder.name) / "stderr", "w+b")  # noqa: SIM115
        self.child = subprocess.Popen(
            [sys.executable, "-m", "bench.compiler_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=of_this_process(environment),
            start_new_session=True,
        )
        self.alive = True
        self.watch = _Watch(self.child, seconds=seconds, gigabytes=gigabytes)
        self._write({**request, "dumps": str(self.dumps)})

    def _write(self, value: dict) -> None:
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; `ask` says of what
            self.child.stdin.write(json.dumps(value).encode() + b"\n")
            self.child.stdin.flush()

    def ask(self, program: Program, cycles: bool) -> Report:
        assert self.child.stdout is not None
        self.watch.begin()
        try:
            self._write({"program": asdict(program), "cycles": cycles})
            for raw in self.child.stdout:
                line = raw.decode(errors="replace")
                if line.startswith(MARK):
                    return from_json(json.loads(line[len(MARK) :]))
        finally:
            self.watch.rest()
        self.alive = False
        self.child.wait()
        self.errors.seek(0)
        why = self.watch.reason or _crash(self.errors.read().decode(errors="replace"), self.child.returncode)
        return Report(name=program.name or program.build, target=self.target, error=why, kernels=profiles(self.dumps))

    def end(self) -> None:
        self.watch.stop()
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout, self.errors):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.folder.cleanup()


class _Watch:
    """Kills a subprocess that takes too long for one program, or too much memory."""

    def __init__(self, child: subprocess.Popen, *, seconds: float, gigabytes: float):
        import threading

        self.child, self.seconds, self.gigabytes = child, seconds, gigabytes
        self.reason = ""
        self.since = float("inf")  # no program is being compiled
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def begin(self) -> None:
        self.since = time.monotonic()

    def rest(self) -> None:
        self.since = float("inf")

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


# ---- the static profile


def _profiled(compiler: Compiler, program: Program, report: Report) -> Report:
    """The report with its kernels' cycles from the static profile: one compilation for each differently named kernel.

    A kernel whose profile fails keeps the cycles of its schedule, and says why.
    """
    if report.target not in PROFILED:
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
        again = {**compiler.request, "text": False, "cache": "", "profile": True}
        process = _Process(again, flags=flags, **compiler.limits)
        result = process.ask(program, False)
        process.end()
        match = next((k for k in result.kernels if k.name == kernel.name and k.source == "profile"), None)
        why = result.error or "the compiler wrote no profile for it"
        found[kernel.name] = match or replace(kernel, error=f"no static profile: {why}")
    kernels = tuple(replace(found[k.name], kernel=k.kernel, trips=k.trips, schedule=k.schedule) for k in report.kernels)
    return replace(report, kernels=kernels)


# ---- by hand: python -m bench.tpu_compiler v3 my_module:build '{"batch": 8}' [--profile]


def _main(arguments: list[str]) -> int:
    usage = 'usage: python -m bench.tpu_compiler TARGET MODULE:BUILDER [\'{"json": "arguments"}\'] [--profile]'
    profile = "--profile" in arguments
    words = [a for a in arguments if a != "--profile"]
    if len(words) not in (2, 3):
        print(usage, file=sys.stderr)
        return 2
    try:
        program = Program(build=words[1], arguments=json.loads(words[2]) if len(words) == 3 else {})
        report = compile_programs(words[0], [program], cycles=True, profile=profile)[0]
    except (ValueError, CompilerMissing) as error:
        print(f"bench.tpu_compiler: {error}", file=sys.stderr)
        return 2
    print(describe(report))
    return 1 if report.error else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
