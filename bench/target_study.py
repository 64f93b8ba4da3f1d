"""Images per second and largest batch of TPUs that are not there, by the TPU compiler. Every figure is a compiler estimate.

A case is a handful of compilations. Cycles: batch sizes double from some 12,000 tokens a core until images/s stop rising; a layer's
cycles are multiplied by the layers, so depth costs nothing. Bytes come with them; they are nearly affine in the batch, and two of
them predict the largest batch, which is then compiled, as is the next one, which must fail.

What the cycles leave out: the host, the feeding of images, and on a mesh the collectives, whose number and bytes stand in the row.
"""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

from bench import calibration, edge, slices, yardstick
from bench.cases import Case, Notebook
from bench.peers import FLAX
from bench.reports import Program, Report, default_cache
from bench.timing import RISE
from bench.tpu_compiler import TOPOLOGIES, Compiler
from kernels.device import DEVICES
from train.mesh import parse
from vitcore.flops import flops
from vitcore.sharding import MeshShape, check_mesh

_TOKENS = 64 * 197  # of a core, where the sweep begins: below, XLA keeps whole activations in VMEM and looks better than it is
_DOUBLINGS = 3
SYSTEM = 0.5 * 2**30  # HBM that a program cannot have; the compiler's message says it exactly once one does not fit
_TOO_MUCH = re.compile(r"\(([\d.]+)([GMK])\) exceeds available HBM \(([\d.]+)([GMK])\)|Used ([\d.]+)([GMK]) of ([\d.]+)([GMK]) hbm")
_SECONDS = 900.0


class CannotCompile(RuntimeError):
    """The compiler failed on a batch for another reason than memory."""


def _mesh(case: Case) -> MeshShape:
    return parse(case.mesh) if case.mesh else MeshShape(1, 1)


def program_of(case: Case, batch: int) -> Program:
    """The program of a case at a global batch."""
    mesh = _mesh(case)
    common: dict[str, Any] = dict(
        model=case.model,
        batch=batch,
        dtype=case.dtype,
        kernels=FLAX if case.library == FLAX else case.ops == "fused",
        image_size=case.size,
    )
    if case.library == FLAX:  # on one core, whatever the mesh is called
        build = "bench.programs:train_step" if case.mode == "train" else "bench.programs:whole_forward"
    elif case.mode == "train":
        build, common = "bench.programs:train_step", {**common, "remat": case.remat, "shard": case.shard}
        common |= {"data": mesh.data, "axis": mesh.model, "dropout": case.dropout}
    elif case.mesh:
        build, common = "bench.programs:mesh_forward", {**common, "data": mesh.data, "axis": mesh.model}
    else:
        build = "bench.programs:whole_forward"
    return Program(build=build, arguments=common, name=f"{case}, batch {batch}")


def first_batch(case: Case) -> int:
    """Global batch at which the sweep begins: a power of two of images a core, some _TOKENS tokens."""
    each = max(1, _TOKENS // case.tokens)
    return (1 << (each.bit_length() - 1)) * _mesh(case).data


def out_of_hbm(error: str) -> bool:
    """Whether a compilation failed because the program does not fit the core's memory."""
    text = error.lower()
    return "resource_exhausted" in text and ("hbm" in text or "memory space" in text) and "vmem" not in text


def too_much(error: str) -> tuple[int, int]:
    """(bytes a program needs, bytes it may have) as the message of one that does not fit says it; zeros where it does not."""
    found = _TOO_MUCH.search(error)
    if found is None:
        return 0, 0
    need, unit, have, other = (g for g in found.groups() if g is not None)
    size = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(float(need) * size[unit]), int(float(have) * size[other])


def attempt_of(report: Report, batch: int) -> edge.Attempt:
    """What a compilation says of a batch, for `edge.search`.

    A program far too large is refused before its buffers share memory: what it is then said to need is no measure.
    """
    need, have = too_much(report.error)
    used = 0 if "HLO temporaries" in report.error else need or report.peak_bytes
    limit = have or int(DEVICES[report.target].hbm_bytes - SYSTEM)
    return edge.Attempt(batch=batch, fits=not report.error, used=used, limit=limit, why=report.error)


class _Study:
    """The compilations of one case."""

    def __init__(self, case: Case, compiler: Compiler, tell):
        self.case, self.compiler, self.tell = case, compiler, tell
        self.mesh = _mesh(case)
        self.device = DEVICES[case.where]
        self.reports: dict[int, Report] = {}
        self.compiled = 0

    def compile(self, batch: int, *, cycles: bool) -> Report:
        self.tell(f"{self.case}: batch {batch}")
        report = self.compiler.compile(program_of(self.case, batch), cycles=cycles)
        self.compiled += not report.cached
        self.reports[batch] = report
        return report

    def attempt(self, batch: int) -> edge.Attempt:
        report = self.reports.get(batch) or self.compile(batch, cycles=False)
        smaller = any(b < batch and not r.error for b, r in self.reports.items())
        if report.error and not out_of_hbm(report.error) and not smaller:
            raise CannotCompile(report.error)
        return attempt_of(report, batch)

    def rate(self, report: Report, batch: int) -> dict[str, Any]:
        """images/s and what they cost, from the cycles of one core, all of which work at once."""
        share = batch / self.mesh.data
        seconds = report.cycles / self.device.clock_hz
        work = flops(self.case.config, batch, train=self.case.mode == "train") / (self.mesh.data * self.mesh.model)
        return {
            "batch": batch,
            "images_per_second": batch / seconds,
            "cycles": report.cycles,
            "cycles_per_image": report.cycles / share,
            "kernel_cycles": sum(line.total for line in report.lines if line.kind == "kernel"),
            "model_cycles": report.model_cycles,
            "split": yardstick.split(report.lines),
            "flop_utilisation": work / (report.cycles * yardstick.flops_per_cycle(self.case.where)),
            "bytes": report.peak_bytes,
            "collectives": report.collectives,
            "collective_bytes": report.collective_bytes,
        }

    def sweep(self, batches: tuple[int, ...]) -> list[dict[str, Any]]:
        """images/s at growing batches, until they stop rising or do not fit. CannotCompile where the first one fails."""
        first = first_batch(self.case)
        found: list[dict[str, Any]] = []
        for batch in batches or [first << i for i in range(_DOUBLINGS + 1)]:
            report = self.compile(batch, cycles=True)
            if report.error and not found and not batches and out_of_hbm(report.error) and batch > self.mesh.data:
                return self.sweep(tuple(b for b in (batch // 8, batch // 4, batch // 2) if b % self.mesh.data == 0 and b))
            if report.error and out_of_hbm(report.error):
                break
            if report.error:
                raise CannotCompile(report.error)
            found.append(self.rate(report, batch))
            rates = [r["images_per_second"] for r in found]
            if not batches and len(rates) > 1 and rates[-1] < RISE * max(rates[:-1]):
                break
        return found


def _limit(report: Report) -> str:
    """What fills a core's memory at the largest batch."""
    state = report.argument_bytes / 2**30
    other = report.temporary_bytes / 2**30
    return f"memory: {state:.2f} GiB of arguments (weights, optimizer, images) and {other:.2f} GiB of temporaries on a core"


def study_case(case: Case, compiler: Compiler, options, tell) -> dict[str, Any]:
    """The row of one case."""
    started = time.monotonic()
    work = _Study(case, compiler, tell)
    row: dict[str, Any] = {"compiler_estimate": True, "complete": True, "error": "", "topology": compiler.request["topology"]}
    try:
        sweep = work.sweep(options.batch_sizes)
        if sweep:
            best = max(sweep, key=lambda r: r["images_per_second"])
            row |= {**best, "sweep": sweep, "note": calibration.note(case.where, work.reports[best["batch"]])}
        else:
            row["note"] = "the smallest batch does not fit"
        if options.largest:
            row |= _largest(work, options.step)
    except (CannotCompile, ValueError) as error:
        row |= {"error": str(error)[:400], "complete": False}  # tried again next time
    if case.mesh and not row["error"]:
        row["note"] = "; ".join(filter(None, [row.get("note"), _collectives(row)]))
    return {**row, "compilations": work.compiled, "seconds": time.monotonic() - started}


def _collectives(row: dict[str, Any]) -> str:
    each = [
        f"{n} {kind} ({row['collective_bytes'].get(kind, 0) / 2**20:,.1f} MiB)" for kind, n in row.get("collectives", {}).items()
    ]
    return f"a core's collectives in a step: {', '.join(each) or 'none'}; their time is not in the images/s" if each else ""


def _largest(work: _Study, step: int | None) -> dict[str, Any]:
    known = [work.attempt(batch) for batch in work.reports]
    unit = work.mesh.data
    found = edge.search(work.attempt, start=first_batch(work.case), known=known, step=step, unit=unit, most=2**24 * unit)
    here = work.reports.get(found.batch)
    limit = _limit(here) if here else f"memory: not even batch {found.beyond} fits"
    if found.why and not out_of_hbm(found.why):
        limit = f"the compiler, not memory: {found.why[:250]}"
    return {
        "largest_batch": found.batch or None,
        "largest_per_core": found.batch // work.mesh.data or None,
        "beyond": found.beyond or None,
        "edge_proved": found.complete,
        "largest_bytes": here.peak_bytes if here else None,
        "largest_argument_bytes": here.argument_bytes if here else None,
        "largest_temporary_bytes": here.temporary_bytes if here else None,
        "beyond_error": work.reports[found.beyond].error[:300] if found.beyond in work.reports else "",
        "limited_by": limit,
        "attempts": [{"batch": a.batch, "fits": a.fits, "bytes": a.used} for a in found.attempts],
    }


def study(options, todo: list[Case], *, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Every case, `options.parallel` compilers at a time; rows are kept on disk as they come.

    ValueError before anything is compiled, where a mesh does not suit its slice or a model its mesh.
    """
    from tqdm import tqdm

    where = {}
    for case in todo:
        mesh = _mesh(case)
        name, _ = slices.topology(case.where, mesh.data * mesh.model, case.slice)
        where[case] = name if case.mesh or case.slice else TOPOLOGIES[case.where]
        check_mesh(case.config, mesh)
        if bad := [b for b in options.batch_sizes if b % mesh.data]:
            raise ValueError(
                f"--batch-sizes {bad[0]} is not divisible by the data axis of {case.mesh}: use a multiple of {mesh.data}"
            )
    settings = {"batches": options.batch_sizes, "largest": options.largest, "step": options.step}
    notebook = Notebook(options.out, about=about, settings=settings, fresh=options.fresh)
    fresh = [case for case in todo if notebook.kept(case) is None]
    if len(fresh) < len(todo):
        print(f"{len(todo) - len(fresh)} of {len(todo)} cases are there from an earlier run and kept (--fresh compiles them again)")
    # made here, so that a missing libtpu is said once and at once
    names = sorted({(case.where, where[case]) for case in fresh})
    idle: dict[tuple[str, str], Queue[Compiler]] = {name: Queue() for name in names}
    cache = options.cache or default_cache()
    made = [Compiler(t, topology=n, seconds=_SECONDS, cache=cache) for t, n in names for _ in range(options.parallel)]
    for compiler in made:
        idle[compiler.request["target"], compiler.request["topology"]].put(compiler)
    order = {case: i for i, case in enumerate(todo)}
    with tqdm(total=len(fresh), unit="case", file=sys.stderr, disable=None) as bar, ThreadPoolExecutor(options.parallel) as pool:

        def one(case: Case) -> None:
            queue = idle[case.where, where[case]]
            compiler = queue.get()
            try:
                row = study_case(case, compiler, options, bar.set_description)
            finally:
                queue.put(compiler)
            with bar.get_lock():
                if not stopped:  # a compiler that was closed has nothing to say
                    notebook.add(case, row)
                bar.update()

        stopped: list[bool] = []
        try:
            list(pool.map(one, fresh))
        except BaseException:
            stopped.append(True)
            pool.shutdown(wait=False, cancel_futures=True)
            for compiler in made:
                compiler.close()
            raise
    for compiler in made:
        compiler.close()
    keys = {notebook.key(case): i for case, i in order.items()}
    notebook.rows.sort(key=lambda row: keys[row["key"]])
    notebook.save()
    return notebook.rows
