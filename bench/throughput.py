"""Images per second and largest batch of the paper's models: the paper's Figure 12 as a tool.

    python -m bench.throughput                                              the devices present, models that suit them
    python -m bench.throughput --models ViT-B/16 --sizes 224 384 --mode forward train --dtype bfloat16
    python -m bench.throughput --models ViT-S/16 --sizes 224 --peer timm transformers
    python -m bench.throughput --target v3 --models ViT-B/16 --ops fused reference      a TPU that nobody has: compiled only
    python -m bench.throughput --job --peer timm                            train.pretrain whole, on JPEGs, beside timm's training
    python -m bench.throughput --job --target v3 --slice 4x4                what it needs of a slice's memory and of its hosts
    python -m bench.throughput --target v3 --mesh 8x4 --models ViT-L/16 --mode train    does this step fit on that slice?
    python -m bench.throughput --target v3 --mesh auto --slice 4x4 --mode train         which mesh of that slice is the fastest?

On devices every figure is measured: batch sizes rise until throughput does not, timing is synchronised after a warm-up, the median
stands beside its spread and beside the rate of a plain matrix product in the same run; the largest batch is tried in processes of
their own. With --target nothing runs: libtpu compiles, its memory decides what fits, its cycles become images/s, and every figure
is called a compiler estimate. Results go to --out as throughput.json and .png after each case; the same command again continues.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench import job, mesh_picture, mesh_study, plots, slice_job
from bench.cases import FIGURE_12, FIGURE_12_SIZES, Case, Notebook, cases
from bench.device_study import Clock, Settings, TrialError, describe, largest, measure
from bench.mesh_study import MeshStudyOptions
from bench.options import command
from bench.peers import FLAX, TORCH
from bench.peers.on_torch import missing
from bench.tables import compared, header, line
from bench.tpu_compiler import CompilerMissing

Target = Literal["v2", "v3", "v4", "v5e", "v5p", "v6e", "7x"]
Mode = Literal["forward", "train"]
LAPTOP = ("ViT-Ti/16", "ViT-S/16"), (64, 128, 224), 3.0  # models, sizes, minutes: what a CPU answers while one waits


@dataclass(frozen=True, kw_only=True)
class Throughput(job.JobStudyOptions, MeshStudyOptions):
    """Images per second and largest batch, on the devices present or by the TPU compiler."""

    models: tuple[str, ...] = ()
    """Any names: ViT-B/16, R50x1, R50+ViT-B/16, Axial-ViT-B/32, ...; by default the paper's ten, or two small ones on a CPU."""
    sizes: tuple[int, ...] = ()
    """Input sizes in pixels; by default those of Figure 12, each moved to the nearest multiple of the patch."""
    mode: tuple[Mode, ...] = ("forward",)
    """Inference, or a whole training step with Adam."""
    ops: tuple[Literal["auto", "fused", "reference", "gpu"], ...] = ("auto",)
    """Our kernels, the plain references as XLA compiles them, or cuDNN's attention; auto: what `vitcore.apply` takes."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of activations and products; bfloat16 by default, float32 on a CPU."""
    mesh: str | None = None
    """DATAxMODEL, e.g. 8x4; one device by default. auto, with --target and --slice: all meshes of the slice, compared."""
    shard: Literal["auto", "parameters", "optimizer", "none"] = "auto"
    """Training on a mesh: what its data axis splits, as in train.pretrain."""
    batch_sizes: tuple[int, ...] = ()
    """Global batch sizes to try, in this order; by default doubling until throughput stops rising."""
    nearest: bool = False
    """Move sizes that a patch does not divide to the nearest multiple."""
    remat: bool = False
    """Training: keep only the blocks' inputs for the backward pass."""
    remat_every: int = 1
    """With --remat: keep every n-th block's input only, n a divisor of the blocks. 2: an eighth more arithmetic again."""
    target: tuple[Target, ...] = ()
    """Compile for these TPUs instead of measuring."""
    slice: str | None = None
    """With --target and --mesh: the slice by its chips, e.g. 4x4; by default the smallest that holds the mesh."""
    peer: tuple[Literal["timm", "transformers", "flax"], ...] = ()
    """The same models by others, in the same run: timm and transformers on torch, on a GPU or CPU; with --target, flax, the public
    JAX release's model."""
    peer_compile: Literal["blocks", "whole", "off"] = "blocks"
    """torch.compile of a peer's blocks (seconds), of the whole model (minutes), or none."""
    largest: bool = True
    """Seek the largest batch, too."""
    step: int | None = None
    """Largest batch to a multiple of this; 1 for the exact edge. By default to within 1.6 %."""
    minutes: float | None = None
    """Time for the whole study on devices; what does not fit in is left out and said. On a CPU 3 where no models are named."""
    seconds: float = 1.0
    """Timing of one batch size."""
    parallel: int = 2
    """Compilers at a time."""
    out: Path = Path("runs/throughput")
    """Directory of throughput.json and throughput.png."""
    fresh: bool = False
    """Begin again instead of continuing what --out holds."""
    cache: Path | None = None
    """Directory of compiled programs' reports; by default in the user's cache directory."""

    def __post_init__(self):
        positive = {
            "--sizes": self.sizes,
            "--batch-sizes": self.batch_sizes,
            "--step": (self.step,),
            "--remat-every": (self.remat_every,),
            "--parallel": (self.parallel,),
        }
        positive |= {"--minutes": (self.minutes,), "--seconds": (self.seconds,)}
        for name, values in positive.items():
            if bad := [v for v in values if v is not None and v <= 0]:
                raise ValueError(f"{name} {bad[0]}: a positive number is required")
        if self.target and (torch := [p for p in self.peer if p in TORCH]):
            raise ValueError(
                f"--peer {torch[0]} runs on a device and --target compiles for none: use --peer {FLAX}, or no --target"
            )
        if not self.target and FLAX in self.peer:
            raise ValueError(f"--peer {FLAX} is compiled for a TPU: name a --target, e.g. --target v3, or use --peer timm")
        if self.peer and self.remat:
            raise ValueError("--peer trains without rematerialisation: leave --remat out")
        if self.target and "gpu" in self.ops:
            raise ValueError("--ops gpu runs on a GPU and --target compiles for a TPU: use --ops fused reference")
        if self.slice and not self.target:
            raise ValueError("--slice belongs to --target; on devices --mesh says how many are used")
        for peer in self.peer:
            if peer in TORCH and (why := missing(peer)):
                raise ValueError(why)
        self.check_job(self.peer, self.mode)
        self.check_meshes(self.mesh, self.target, self.slice, self.peer, job=self.job)
        if self.job and self.target:
            slice_job.check(self)
        if self.peer and self.mesh not in (None, "1x1") and not self.job and (self.mode != ("train",) or self.largest):
            raise ValueError(f"--peer on several devices, --mesh {self.mesh}, trains and no more: add --mode train --no-largest")

    def chosen(self, platform: str) -> tuple[tuple[str, ...], tuple[int, ...], float | None]:
        """Models, sizes and minutes, the user's or what suits the platform."""
        models, sizes, minutes = LAPTOP if platform == "cpu" else (FIGURE_12, FIGURE_12_SIZES, None)
        if self.mesh == "auto":
            models, sizes = ("ViT-B/16",), (224,)
        return self.models or models, self.sizes or sizes, self.minutes if self.minutes or self.models else minutes


def _all(options: Throughput, where: str, platform: str, dtype: str, auto: str) -> list[Case]:
    models, sizes, _ = options.chosen(platform)
    move = options.nearest or not options.sizes
    same: dict[str, Any] = dict(
        dtype=dtype, mesh=options.mesh, slice=options.slice, remat=options.remat_every if options.remat else 0,
        shard=options.shard, dropout=options.dropout,
    )  # fmt: skip
    ops = tuple(auto if o == "auto" else o for o in options.ops)
    return cases(where=where, models=models, sizes=sizes, modes=options.mode, ops=ops, peers=options.peer, move=move, **same)


def _about(**more: Any) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("jax", "libtpu", "torch", "timm", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"command": "python -m bench.throughput " + " ".join(sys.argv[1:]), "versions": versions, **more}


def on_devices(options: Throughput) -> list[dict[str, Any]]:
    """Measures every case on the devices present: all throughputs first, then largest batches while there is time."""
    from tqdm import tqdm

    # what the user misspelled, before anything is measured; the dtype of the rows follows from the device
    _all(options, "device", "cpu" if not options.models else "gpu", "float32", "auto")
    devices = describe(options.mesh, options.dtype, seconds=options.seconds)
    if "fused" in options.ops and devices["platform"] == "cpu":
        raise ValueError("--ops fused: a CPU has no kernels, use --ops reference; or --target to ask the TPU compiler")
    todo = _all(options, "device", devices["platform"], devices["dtype"], devices["auto"])
    clock = Clock(options.chosen(devices["platform"])[2])
    settings = Settings(
        batches=options.batch_sizes,
        seconds=options.seconds,
        largest=options.largest,
        step=options.step,
        compile=options.peer_compile,
    )
    rate = devices["matmul_flops"] / 1e12
    print(
        f"{devices['mesh_devices']} of {devices['count']} x {devices['kind']}, {devices['dtype']}; a matrix product of "
        f"{devices['matmul_side']}^3 runs at {rate:,.2f} TFLOP/s (spread {devices['matmul_spread']:.0%})"
    )
    identity = {**asdict(settings), "device": devices["kind"], "jax": devices["jax"]}
    notebook = Notebook(options.out, about=_about(device=devices), settings=identity, fresh=options.fresh)
    fresh = [case for case in todo if notebook.kept(case) is None]
    _say_kept(todo, fresh)
    with tqdm(total=len(fresh) * (1 + options.largest), unit="case", file=sys.stderr, disable=None) as bar:
        found: list[tuple[Case, dict[str, Any]]] = []
        for i, case in enumerate(fresh):
            bar.set_description(str(case))
            # of a CPU's time the largest batches get their part; an accelerator's is for throughput first
            share = 0.55 if options.largest and devices["platform"] == "cpu" else 1.0
            budget = min(600.0, max(5.0, clock.left() / (len(fresh) - i) * share))
            row = notebook.swept(case)
            if row is None:
                row = measure(case, devices, settings, budget=budget, tell=lambda r: bar.set_postfix_str(_short(r)))
            found.append((case, row))
            notebook.add(case, {**row, "complete": row["swept"] and not options.largest})
            bar.update()
        if options.largest:
            _largest(found, devices, settings, clock, notebook, bar)
    order = {notebook.key(case): i for i, case in enumerate(todo)}
    notebook.rows.sort(key=lambda row: order[row["key"]])
    notebook.save()
    return notebook.rows


def _largest(found, devices, settings, clock, notebook: Notebook, bar) -> None:
    """The second pass: largest batches, written into the rows that the first has made."""
    rows = {row["key"]: row for row in notebook.rows}
    for i, (case, row) in enumerate(found):
        bar.set_description(f"{case}: largest batch")
        if not row.get("images_per_second"):
            more: dict[str, Any] = {"largest_batch": None, "limited_by": "did not run"}
        elif clock.left() < 10:
            more = {"largest_batch": None, "limited_by": "not sought: no time left"}
        else:
            budget = clock.left() / (len(found) - i)
            more = largest(case, row, devices, settings, budget=budget, tell=bar.set_description)
        done = row["swept"] and "time" not in str(more.get("limited_by"))
        rows[notebook.key(case)].update(more, complete=done)
        notebook.save()
        bar.update()


def _short(record: dict[str, Any]) -> str:
    return f"batch {record['batch']}: {record['images_per_second']:,.1f} images/s" if "batch" in record else ""


def _say_kept(todo: list[Case], fresh: list[Case]) -> None:
    if len(fresh) < len(todo):
        print(f"{len(todo) - len(fresh)} of {len(todo)} cases are there from an earlier run and kept (--fresh measures them again)")


def on_targets(options: Throughput) -> list[dict[str, Any]]:
    """Compiles every case for every target."""
    from bench.target_study import study

    todo: Callable[[str], list[Case]] = lambda target: _all(options, target, "tpu", options.dtype or "bfloat16", "fused")  # noqa: E731
    compare = mesh_study.study if options.mesh == "auto" else study
    return compare(options, [case for target in options.target for case in todo(target)], about=_about(compiler_estimate=True))


def run(options: Throughput) -> list[dict[str, Any]]:
    """The study that the options ask for: prints its table, writes its files, returns its rows."""
    started = time.monotonic()
    if options.job:
        return slice_job.study(options, _about) if options.target else job.study(options, _about)
    rows = on_targets(options) if options.target else on_devices(options)
    if options.mesh == "auto":
        file, draw = options.out / mesh_study.FILE, mesh_picture.pictures
    else:
        print("\n".join([header(rows), *(line(row) for row in rows), *compared(rows)]))
        file, draw = options.out / "throughput.json", plots.pictures
    try:
        made = draw([row for row in rows if row.get("images_per_second") or row.get("largest_batch")], options.out)
    except ImportError:
        print(f"matplotlib is not installed here, so nothing is drawn: python -m bench.plots {file} draws it where it is")
        made = []
    print(f"{len(rows)} cases in {time.monotonic() - started:.0f} s; {', '.join(map(str, [file, *made]))}")
    return rows


def main() -> int:
    def study(options: Throughput) -> int:
        return 1 if any(row.get("error") for row in run(options)) else 0

    again = "the same command continues with what is there"
    return command(Throughput, "bench.throughput", study, (CompilerMissing, TrialError), interrupted=again)


if __name__ == "__main__":
    sys.exit(main())
