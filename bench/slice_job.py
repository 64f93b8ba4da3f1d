"""`bench.throughput --job --target v3 --slice 4x4`: what a training job needs of a slice and its hosts, by the TPU compiler.

    python -m bench.throughput --job --target v5e --slice 4x8 --models ViT-B/16 ViT-L/16

The programs are those that `train.pretrain` runs, its training step and its evaluation, at one global batch (--batch-sizes, 4,096
by default) on all devices of the slice, or on --mesh. Memory of a device: the step's; the state, which stays, beside the
temporaries of an evaluation; and three batches of bytes that are on their way (`train.memory`). A save takes nothing of it: arrays
go to the host from where they lie. The two programs take turns, so together is the larger one and what is on its way.

What a host has to feed is the slice's images/s over its hosts. What it decodes: its cores, two hardware threads each, times what
one core decodes and crops with nothing around it. All is the compiler's estimate but the decoding, which was measured elsewhere.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bench import mesh_study, slices
from bench.cases import Case, write_json
from bench.reports import Program, Report, default_cache
from bench.target_study import SYSTEM, out_of_hbm
from bench.tpu_compiler import Compiler
from kernels.device import DEVICES
from train.memory import BESIDE
from train.mesh import parse
from vitcore.sharding import MeshShape, check_mesh

# Images/s that one core decodes and crops, JPEGs of 500 x 375 to 224 pixels (`bench.data`, "bare", on a server with 32 cores;
# LOG.md, 2026-11-25 to -27).
DECODES = {"pillow": 488, "simplejpeg": 639}
PIPELINE = 6500  # images/s that the default pipeline reached on 32 cores: the process that joins batches was the limit


def check(options) -> None:
    """Raises ValueError for options that do not go with --job --target."""
    for name, default in (("data", None), ("steps", None), ("every", None), ("images", 4096), ("only", ()), ("peer", ())):
        if getattr(options, name) != default:
            raise ValueError(f"--{name} is of a job that runs, and --target compiles only: leave one of them out")
    if options.mesh == "auto":
        raise ValueError("--job is of one mesh: run --mesh auto without --job first, then give the best")
    if options.slice is None and options.mesh is None:
        raise ValueError("--job --target wants to know the slice: add --slice, e.g. --slice 4x4")


def _cases(options, target: str) -> list[tuple[Case, int, str]]:
    """(case, global batch, topology) of every model and size. ValueError where one does not suit the slice."""
    found = []
    for model in options.models or ("ViT-B/16",):
        for size in options.sizes or (224,):
            shape = parse(options.mesh) if options.mesh else MeshShape(slices.cores(target, slices.known(target, options.slice)), 1)
            topology, _ = slices.topology(target, shape.data * shape.model, options.slice)
            case = Case(
                where=target, model=model, size=size, asked=size, mode="train", dtype=options.dtype or "bfloat16", ops="fused",
                remat=options.remat_every if options.remat else 0, slice=options.slice, dropout=options.dropout,
            )  # fmt: skip
            check_mesh(case.config, shape)
            for batch in options.batch_sizes or (mesh_study.BATCH,):
                if batch % shape.data:
                    raise ValueError(f"--batch-sizes {batch} is not divisible by the data axis of {shape.data}: use a multiple")
                found.append((mesh_study.resolved(case, shape, options.shard), batch, topology))
    return found


def needs(case: Case, batch: int, step: list[tuple[int, Report]], evaluation: Report, topology: str) -> dict[str, Any]:
    """The row of a job. step: (depth, report) as `mesh_study.row_of` takes them. RuntimeError where a program did not compile."""
    if evaluation.error:
        raise RuntimeError(evaluation.error)
    chips, mesh = slices.along(topology), parse(case.mesh or "1x1")
    row = mesh_study.row_of(case, batch, step, chips)
    state = round(mesh_study.at_depth(case, step, lambda r: r.alias_bytes))
    rows, columns = case.config.image_shape
    images = batch // mesh.data * rows * columns * case.config.channels
    held = state + evaluation.temporary_bytes + evaluation.output_bytes + images
    together = max(row["bytes"], held) + BESIDE * images
    host = slices.HOSTS[case.where]
    hosts = max(1, mesh.data * mesh.model // (host.chips * slices.devices_per_chip(case.where)))
    return row | {
        "state_bytes": state,
        "step_bytes": row["bytes"],
        "evaluation_bytes": held,
        "beside_bytes": BESIDE * images,
        "save_bytes": 0,
        "together_bytes": together,
        "limit_bytes": round(DEVICES[case.where].hbm_bytes - SYSTEM),
        "fits": together <= DEVICES[case.where].hbm_bytes - SYSTEM,
        "hosts": hosts,
        "host": host._asdict(),
        "needs": row["images_per_second"] / hosts,
        "decodes": {decoder: rate * host.threads // 2 for decoder, rate in DECODES.items()},
    }


def measure(case: Case, batch: int, compiler: Compiler, depths: tuple[int, ...]) -> dict[str, Any]:
    """The row of a case; an error in one line where a program does not compile."""
    row = {"compiler_estimate": True, "error": "", "topology": compiler.request["topology"], "batch": batch}
    try:
        evaluation = compiler.compile(evaluation_of(case, batch))
        found = mesh_study.compiled(case, batch, compiler, depths)
        return row | needs(case, batch, found, evaluation, compiler.request["topology"])
    except RuntimeError as error:
        what = "does not fit a device: fewer --batch-sizes, or --remat" if out_of_hbm(str(error)) else str(error)[:300]
        return row | {"error": what}


def evaluation_of(case: Case, batch: int) -> Program:
    """The evaluation step of a case."""
    mesh = parse(case.mesh or "1x1")
    return Program(
        build="bench.programs:eval_step",
        arguments={
            "model": case.model, "batch": batch, "data": mesh.data, "axis": mesh.model, "dtype": case.dtype,
            "image_size": case.size, "shard": case.shard,
        },
        name=f"{case}, evaluation of {batch}",
    )  # fmt: skip


# --- the study and its table ---------------------------------------------------------------------------------------------------

_GIB = ("state", "step", "evaluation", "beside", "together", "limit")
HEADER = (
    f"{'model':<14}{'mesh':>7} {'images/s':>9}" + "".join(f"{name:>12}" for name in _GIB) + "  GiB a device\n"
    f"{'':<14}{'':>7} {'':>9}{'hosts':>12}{'needs':>12}" + "".join(f"{name:>12}" for name in DECODES) + "  images/s a host"
)


def line(row: dict[str, Any]) -> str:
    """One job: memory, and below it what a host has to feed and what it decodes."""
    head = f"{row['model']:<14}{row['mesh']:>7} "
    if row["error"]:
        return f"{head}{row['error']}"
    memory = "".join(f"{row[f'{name}_bytes'] / 2**30:>12.2f}" for name in _GIB)
    decodes = "".join(f"{n:>12,.0f}" for n in row["decodes"].values())
    said = "" if row["fits"] else "  does not fit"
    if row["needs"] > row["decodes"]["pillow"]:
        said += "  more than Pillow decodes: packed images of 256 pixels, or simplejpeg"
    elif row["needs"] > PIPELINE:
        said += f"  more than the {PIPELINE:,} that the pipeline has reached in one process: a process a device, or packed images"
    return (
        f"{head}{row['images_per_second']:>9,.0f}{memory}\n{'':<22}{'':>9}{row['hosts']:>12}{row['needs']:>12,.0f}{decodes}{said}"
    )


def study(options, about: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of every target and model: prints each as it comes, writes them to job.json in --out."""
    todo = [case for target in options.target for case in _cases(options, target)]
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for target in options.target:
        host = slices.HOSTS[target]
        print(f"{target}, compiler estimate; a host has {host.chips} chips and {host.threads} hardware threads ({host.source});")
        print(f"a core decodes {', '.join(f'{n} images/s with {d}' for d, n in DECODES.items())} (measured)\n{HEADER}", flush=True)
        for case, batch, topology in (plan for plan in todo if plan[0].where == target):
            started = time.monotonic()
            cache = options.cache or default_cache()
            with Compiler(target, topology=topology, seconds=1800.0, gigabytes=24, cache=cache) as compiler:
                row = asdict(case) | measure(case, batch, compiler, options.depths)
            rows.append({**row, "seconds": time.monotonic() - started})
            print(line(row), flush=True)
            write_json(options.out / "job.json", {"about": about(compiler_estimate=True), "rows": rows})
    print(options.out / "job.json")
    return rows
