"""`bench.throughput --target v3 --mesh auto`: the meshes of a slice, compared by the TPU compiler. All figures are its estimates.

A mesh's step takes the cycles of a core's own operations (`bench.yardstick`), and where its program waits for a collective what the
links need for it at the published rates (`bench.links`): a collective that is started and done later costs what is left of it once
the operations in between are done. The rates are peaks, and latency is left out, so communication is a lower bound.

All factorisations DATAxMODEL are compared that the model and the batch allow; of the best, the other settings of --shard too. The
blocks of a ViT are all alike, so two depths are compiled and the model's is extrapolated, for time and memory; what a step keeps
for its backward pass is that of the whole model. --depths without numbers compiles whole models.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench import links, slices, yardstick
from bench.cases import Case, Notebook
from bench.ratios import extrapolated
from bench.reports import Program, Report, default_cache
from bench.target_study import SYSTEM, out_of_hbm, program_of, too_much
from bench.tpu_compiler import Compiler
from kernels.device import DEVICES
from train.mesh import parse
from train.shards import choose
from vitcore import ViTConfig
from vitcore.flops import flops
from vitcore.sharding import MeshShape, check_mesh

BATCH = 4096  # the paper's pre-training
FILE = "meshes.json"
_SECONDS = 1800.0
_SHARDS = ("optimizer", "parameters", "none")


@dataclass(frozen=True, kw_only=True)
class MeshStudyOptions:
    """The meshes of a slice, compared."""

    devices: int | None = None
    """With --mesh auto: devices to lay out; by default all of --slice."""
    depths: tuple[int, ...] = (2, 3)
    """With --mesh auto: two depths at which a ViT is compiled, from which its own is extrapolated; none: it is compiled whole."""

    def check_meshes(
        self, mesh: str | None, targets: tuple[str, ...], chips: str | None, peers: tuple[str, ...], *, job: bool
    ) -> None:
        """Raises ValueError for what does not fit."""
        if self.depths and (len(self.depths) != 2 or not 0 < self.depths[0] < self.depths[1]):
            raise ValueError(
                f"--depths {' '.join(map(str, self.depths))}: two rising depths are required, e.g. --depths 2 3, or none"
            )
        if mesh != "auto":
            if self.devices is not None:
                raise ValueError("--devices belongs to --mesh auto: give that, or leave it out")
            if self.depths != (2, 3) and not (job and targets):
                raise ValueError("--depths belongs to --mesh auto and to --job --target: give one of them, or leave it out")
            return
        if not targets:
            raise ValueError("--mesh auto asks the TPU compiler: name a --target and a slice, e.g. --target v3 --slice 4x4")
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"--devices {self.devices}: a positive number is required")
        if not self.devices and not chips:
            raise ValueError("--mesh auto wants to know the slice: add --slice, e.g. --slice 4x4, or --devices 32")
        if peers:
            raise ValueError(f"--peer {peers[0]} runs on one core and --mesh auto compares meshes: leave one of them out")


def meshes(config, devices: int, batch: int) -> tuple[list[MeshShape], list[str]]:
    """(the meshes of so many devices that a model and a global batch allow, long data axes first, why the others are left out)."""
    found, left = [], []
    for model in range(1, devices + 1):
        if devices % model:
            continue
        shape = MeshShape(devices // model, model)
        try:
            check_mesh(config, shape)
        except ValueError as error:
            left.append(f"{shape.data}x{model}: {str(error).split(' of the ')[0]}")
            continue
        if batch % shape.data:
            left.append(f"{shape.data}x{model}: {batch} images do not divide over {shape.data}")
            continue
        found.append(shape)
    return found, left


def programs(case: Case, batch: int, depths: tuple[int, ...]) -> list[tuple[int, Program]]:
    """(depth, program) of a case: two to extrapolate from, or its own alone."""
    whole, config = program_of(case, batch), case.config
    depth = config.depth if isinstance(config, ViTConfig) else 0
    depths = tuple(d * max(1, case.remat) for d in depths)  # whole groups of blocks
    if not depths or depth <= depths[-1]:
        return [(depth, whole)]
    plan = {"whole_plan": True} if case.mode == "train" else {}
    return [(d, replace(whole, arguments={**whole.arguments, **plan, "depth": d}, name=f"{whole.name}, depth {d}")) for d in depths]


def compiled(case: Case, batch: int, compiler: Compiler, depths: tuple[int, ...], tell=lambda _: None) -> list[tuple[int, Report]]:
    """(depth, report) of a case's programs, up to the first that does not compile. tell: hears of each before."""
    found = []
    for depth, program in programs(case, batch, depths):
        tell(f"{case} {case.mesh}: {program.name.rpartition(', ')[2]}")
        found.append((depth, compiler.compile(program, cycles=True)))
        if found[-1][1].error:
            break
    return found


def at_depth(case: Case, found: list[tuple[int, Report]], of: Callable[[Report], float]) -> float:
    """A figure of a case's model, from the reports at the depths that were compiled."""
    values = [of(report) for _, report in found]
    if len(found) == 1:
        return values[0]
    return extrapolated(values[0], values[1], (found[0][0], found[1][0]), getattr(case.config, "depth", 0))


def row_of(case: Case, batch: int, found: list[tuple[int, Report]], chips: tuple[int, ...]) -> dict[str, Any]:
    """The figures of a case from the reports at its depths. RuntimeError where a program did not compile."""
    for _, report in found:
        if report.error:
            raise RuntimeError(report.error)

    at = partial(at_depth, case, found)
    mesh = parse(case.mesh or "1x1")
    seconds = [links.played(report.timeline, case.where, chips) for _, report in found]
    of = {id(report): played for (_, report), played in zip(found, seconds, strict=True)}
    compute = at(lambda r: r.cycles) / DEVICES[case.where].clock_hz
    exposed = max(0.0, at(lambda r: of[id(r)].exposed))
    kinds = sorted({kind for _, report in found for kind in report.collectives})
    cores = mesh.data * mesh.model
    work = flops(case.config, batch, train=case.mode == "train") / cores
    used = round(at(lambda r: r.peak_bytes))
    return {
        "batch": batch,
        "shard_chosen": case.shard,
        "compute_seconds": compute,
        "communication_seconds": max(0.0, at(lambda r: of[id(r)].communication)),
        "exposed_seconds": exposed,
        "images_per_second": batch / (compute + exposed),
        "efficiency": compute / (compute + exposed),
        "flop_utilisation": work / ((compute + exposed) * DEVICES[case.where].clock_hz * yardstick.flops_per_cycle(case.where)),
        "bytes": used,
        "fits": used <= DEVICES[case.where].hbm_bytes - SYSTEM,
        "collectives": {kind: round(at(lambda r: r.collectives.get(kind, 0))) for kind in kinds},  # noqa: B023
        "collective_bytes": {kind: round(at(lambda r: r.collective_bytes.get(kind, 0))) for kind in kinds},  # noqa: B023
        "depths": [depth for depth, _ in found] if len(found) > 1 else [],
    }


def measure(case: Case, batch: int, compiler: Compiler, depths: tuple[int, ...], tell) -> dict[str, Any]:
    """The row of a case; what does not fit or compile is said in it."""
    started, topology = time.monotonic(), compiler.request["topology"]
    row: dict[str, Any] = {"compiler_estimate": True, "complete": True, "error": "", "topology": topology, "batch": batch}
    row["shard_chosen"] = case.shard
    found = compiled(case, batch, compiler, depths, tell)
    try:
        row |= row_of(case, batch, found, slices.along(topology))
    except (RuntimeError, ValueError) as error:
        if out_of_hbm(str(error)):
            row |= {"fits": False, "bytes": too_much(str(error))[0] or None, "images_per_second": None}
        else:
            row |= {"error": str(error)[:400], "complete": False}  # tried again next time
    return {**row, "seconds": time.monotonic() - started}


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of most images/s among those that fit; None where none does."""
    fitting = [row for row in rows if row.get("fits") and row.get("images_per_second")]
    return max(fitting, key=lambda row: row["images_per_second"], default=None)


# --- the study -----------------------------------------------------------------------------------------------------------------


def resolved(case: Case, shape: MeshShape, shard: str) -> Case:
    """The case on a mesh, with what --shard means for the whole model there; where nothing can be split, none."""
    import jax.numpy as jnp

    if case.mode != "train":
        how = "auto"
    else:
        how = choose(shard, case.config, shape, jnp.dtype(case.dtype)) if shape.data > 1 else "none"
    return replace(case, mesh=f"{shape.data}x{shape.model}", shard=how)


def study(options, todo: list[Case], *, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of every case on every mesh; prints as they come. ValueError before anything is compiled, where nothing suits."""
    from tqdm import tqdm

    plans = []
    for case in todo:
        count = options.devices or slices.cores(case.where, slices.known(case.where, options.slice))
        topology, _ = slices.topology(case.where, count, options.slice)
        for batch in options.batch_sizes or (BATCH,):
            shapes, left = meshes(case.config, count, batch)
            if not shapes:
                raise ValueError(f"{case.model}, {batch} images: no mesh of {count} devices suits ({'; '.join(left)})")
            plans.append((case, batch, topology, shapes, left))
    settings = {"depths": options.depths}
    notebook = Notebook(options.out, about=about, settings=settings, fresh=options.fresh, file=FILE)
    each = len(_SHARDS) - 1 if options.shard == "auto" and "train" in options.mode else 0
    with tqdm(total=sum(len(p[3]) + each for p in plans), unit="mesh", file=sys.stderr, disable=None) as bar:
        for case, batch, topology, shapes, left in plans:
            _compare(options, notebook, case, batch, topology, shapes, left, bar)
    return notebook.rows


def _compare(options, notebook: Notebook, case: Case, batch: int, topology: str, shapes, left: list[str], bar) -> None:
    """The meshes of one model and batch: its table, and the best."""
    rate = links.LINKS[case.where]
    bar.write(
        f"{case}, {batch:,} images, {topology} (compiler estimate): {rate.ports} links a chip of {rate.rate / 1e9:g} GB/s each way "
        f"({rate.source}); latency left out"
    )
    if left:
        bar.write(f"  left out: {'; '.join(left)}")
    if options.depths and isinstance(case.config, ViTConfig):
        bar.write(f"  extrapolated to {case.config.depth} blocks from {options.depths[0]} and {options.depths[1]}")
    bar.write(HEADER)
    cases = list(dict.fromkeys(resolved(case, shape, options.shard) for shape in shapes))
    rows: list[dict[str, Any]] = []
    with Compiler(
        case.where, topology=topology, seconds=_SECONDS, gigabytes=24, cache=options.cache or default_cache()
    ) as compiler:

        def one(at: Case) -> None:
            row = notebook.kept(at, batch=batch)
            if row is None:
                row = measure(at, batch, compiler, options.depths, bar.set_description)
                row = notebook.add(at, row, batch=batch)
            rows.append(row)
            bar.write(line(row))
            bar.update()

        for at in cases:
            one(at)
        best = best_of(rows)
        if best and options.shard == "auto" and case.mode == "train" and not best["mesh"].startswith("1x"):
            for how in _SHARDS:
                if how != best["shard"]:
                    one(replace(case, mesh=best["mesh"], shard=how))
    bar.write(verdict(rows))


# --- the table -----------------------------------------------------------------------------------------------------------------

HEADER = (
    f"{'mesh':>8} {'shard':<11}{'images/s':>10}{'compute ms':>12}{'collectives ms':>16}{'exposed ms':>12}{'efficiency':>12}"
    f"{'FLOP use':>10}{'GiB a core':>12}"
)


def line(row: dict[str, Any]) -> str:
    """One mesh."""
    shard = row["shard"] if row["mode"] == "train" else "-"
    head = f"{row['mesh']:>8} {shard:<11}"
    if row["error"]:
        return f"{head}{row['error'][:200]}"
    used = f"{row['bytes'] / 2**30:.2f}" if row.get("bytes") else "-"
    if row.get("images_per_second") is None:
        return f"{head}{'-':>10}{'-':>12}{'-':>16}{'-':>12}{'-':>12}{'-':>10}{used:>12}  does not fit"
    cells = f"{row['images_per_second']:>10,.0f}{row['compute_seconds'] * 1e3:>12,.1f}{row['communication_seconds'] * 1e3:>16,.2f}"
    cells += f"{row['exposed_seconds'] * 1e3:>12,.2f}{row['efficiency']:>12.1%}{row['flop_utilisation']:>10.0%}{used:>12}"
    return head + cells + ("" if row["fits"] else "  does not fit")


def verdict(rows: list[dict[str, Any]]) -> str:
    """The best mesh and how far behind the others are."""
    best = best_of(rows)
    if best is None:
        return "  no mesh fits: fewer images, --remat, or a larger slice"
    others = [r for r in rows if r.get("images_per_second") and (r["mesh"], r["shard"]) != (best["mesh"], best["shard"])]

    def behind(r) -> str:
        shard = f" {r['shard']}" if r["mesh"] == best["mesh"] else ""
        return f"{r['mesh']}{shard} {r['images_per_second'] / best['images_per_second']:.2f}"

    shard = f" --shard {best['shard']}" if best["mode"] == "train" and not best["mesh"].startswith("1x") else ""
    tail = f" (others, of its rate: {', '.join(map(behind, others))})" if others else ""
    memory = f"{best['bytes'] / 2**30:.2f} GiB a core"
    return f"  best: --mesh {best['mesh']}{shard}, {best['images_per_second']:,.0f} images/s, {memory}{tail}"
