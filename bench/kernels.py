"""What our kernels cost beside what others run and beside our references: cycles by the TPU compiler, or time on a device.

    python -m bench.kernels                                                 times, on the devices present
    python -m bench.kernels --target v3                                     cycles, every op at ViT-B/16 and 224 pixels
    python -m bench.kernels --target v3 v5e v6e --op attention --batch 64
    python -m bench.kernels --target v3 --whole ViT-B/16 --batch 128 --train
    python -m bench.kernels --target v3 --whole ViT-B/16 --statistics       and what looking at every head's attention costs
    python -m bench.kernels --target v3 --largest-batch ViT-B/16 --remat
    python -m bench.kernels --target v5e v6e --calibrate --batch 8 --save
    python -m bench.kernels --target v3 v5e --plan                          which kernels and tiles; compiles nothing

Cycles are compiler estimates, never measured, and of all sides by one count: each operation's own schedule (`bench.yardstick`).
XLA's cost model stands beside it as a second opinion. The bound is the FLOPs of the op's matrix
products over what the MXUs of a device do in a cycle; the share is bound over cycles. Whole models are compared with the public JAX
release's (`bench.peers.vit`) and with our reference, and the ratio is to the better of the two. Errors are against float64
(`bench.accuracy`): where no device runs an implementation it is interpreted, at a small shape. `bench.peers.attention` says how
JAX's own attention is called.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench import accuracy, calibration, edge, kernel_tables, plans, yardstick
from bench.device_study import TrialError, describe, start
from bench.options import command
from bench.peers import FLAX
from bench.reports import Program, Report
from bench.shapes import KEEPING, OPS, SHAPES, flops, model_flops, unknown
from bench.target_study import attempt_of, out_of_hbm
from bench.tpu_compiler import PROFILED, TOPOLOGIES, CompilerMissing, compile_programs

Target = Literal["v2", "v3", "v4", "v5e", "v5p", "v6e", "7x"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Cycles, bound and memory of the kernels beside XLA's own, estimated by the TPU compiler."""

    target: tuple[Target, ...] = ()
    """TPU generations; none: the devices present."""
    op: tuple[Literal["patch_embed", "attention", "attention_half", "mlp_half", "layer_norm"], ...] = OPS
    """Ops; `attention` is the part between the projections alone."""
    shape: tuple[str, ...] = ("B/16@224",)
    """Named shapes of bench/shapes.py."""
    batch: int = 64
    """Images on one core."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    whole: str | None = None
    """Instead of ops: a whole model, e.g. ViT-B/16."""
    train: bool = False
    """With --whole: the training step, not the forward pass."""
    drop_path: float = 0.0
    """With --train: stochastic depth at this rate, of our side and of XLA's; the public release has none."""
    statistics: bool = False
    """With --whole: the forward pass with and without the distance of every head and the class token's row of every block."""
    remat: bool = False
    """With --train or --largest-batch: rematerialise every block."""
    keep: bool = False
    """Of the half blocks: our kernels keep more than x for the backward pass, as a training step does where memory allows."""
    remat_every: int = 1
    """With --remat: keep every n-th block's input only, n a divisor of the blocks. 2: an eighth more arithmetic again."""
    largest_batch: str | None = None
    """Instead of ops: the largest training batch of a model on one core, which compiles as the next one does not."""
    step: int = 16
    """With --largest-batch: to a multiple of this."""
    ours_only: bool = False
    """Leave XLA's own code, JAX's attention and the errors out."""
    peers: bool = True
    """Beside attention, JAX's own: jax.nn, cuDNN on a GPU, Pallas flash and splash on a TPU. With --whole, the public JAX release's
    model."""
    errors: bool = True
    """The error of each implementation against float64 (on a target: interpreted, two images of 17 tokens)."""
    seconds: float = 1.0
    """On a device: timing of one implementation."""
    plan: bool = False
    """Print which kernels run, with which tiles and how much VMEM, and compile nothing."""
    calibrate: bool = False
    """Compare the schedule's count with the compiler's profile, kernel by kernel (v5e, v5p, v6e, 7x). Use a small batch."""
    save: bool = False
    """With --calibrate: keep the deviations in bench/calibration.json, which other tables quote."""
    json: Path | None = None
    """Write the records there, too."""

    @property
    def keeps(self) -> int:
        """`remat` of the training step."""
        return self.remat_every if self.remat else 0

    def __post_init__(self):
        if bad := [s for s in self.shape if s not in SHAPES]:
            raise ValueError(unknown("shape", bad[0], SHAPES))
        if min(self.batch, self.step, self.remat_every) < 1:
            raise ValueError(
                f"--batch, --step and --remat-every must be positive; got {self.batch}, {self.step} and {self.remat_every}"
            )
        if not self.target and (self.whole or self.largest_batch or self.calibrate):
            raise ValueError("--whole, --largest-batch and --calibrate ask the compiler: name a --target, e.g. --target v3")
        if not self.target and self.plan:
            raise ValueError("--plan prints what a TPU generation would run: name a --target, e.g. --target v3")
        if self.drop_path and not (self.whole and self.train and 0 < self.drop_path < 1):
            raise ValueError(f"--drop-path {self.drop_path}: a rate in [0, 1) is required, with --whole and --train")
        if self.statistics and (not self.whole or self.train):
            raise ValueError("--statistics is of a whole forward pass: give --whole, e.g. --whole ViT-B/16, and no --train")
        if self.calibrate and set(self.target) - set(PROFILED):
            raise ValueError(f"--calibrate needs a static profile, which exists for {', '.join(PROFILED)} only")


def _compile(target: str, programs: list[Program], **options: Any) -> list[Report]:
    done: list[str] = []

    def tell(report: Report) -> None:
        done.append(report.name)
        kernel_tables.progress(f"{target}: {len(done)} of {len(programs)} compiled, last {report.name} ({report.seconds:.0f} s)")

    reports = compile_programs(target, programs, cycles=True, progress=tell, seconds=600, **options)
    kernel_tables.progress("")
    return reports


def _names(options: Kernels, build: str, op: str | None) -> list[tuple[str, Any]]:
    """Whose code is compiled: (name in the record, the builder's `kernels`)."""
    names: list[tuple[str, Any]] = [("ours", True), *(() if options.ours_only else (("xla", False),))]
    if options.peers and not options.ours_only and options.whole and not options.drop_path:
        names.append((FLAX, FLAX))
    if options.peers and not options.ours_only and op == "attention" and build.endswith(":op_alone"):
        names += [(name, name) for name in kernel_tables.ATTENTION]
    return names


def _pairs(options: Kernels, target: str, jobs: list[tuple[str, int, str, dict]]) -> list[dict]:
    """Records of (what, FLOPs, builder, arguments): ours, XLA's and JAX's own."""
    sides = [_names(options, build, arguments.get("op")) for _, _, build, arguments in jobs]
    programs = [
        Program(build=build, arguments={**arguments, "kernels": side}, name=f"{what} {'XLA' if name == 'xla' else name}")
        for (what, _, build, arguments), names in zip(jobs, sides, strict=True)
        for name, side in names
    ]
    wanted = options.errors and not options.ours_only and any(build.endswith(":op_alone") for _, _, build, _ in jobs)
    heading = f"{'error ours / XLA':>20}" if wanted else ""
    print(f"{target}, batch {options.batch}, {options.dtype}: cycles (compiler estimate)\n{kernel_tables.HEADER}{heading}")
    reports = iter(_compile(target, programs))
    errors: dict[int, dict[str, Any]] = {}
    if wanted:
        kernel_tables.progress(f"{target}: errors against float64, interpreted")
        errors = accuracy.of_jobs(target, jobs, sides)
        kernel_tables.progress("")
    records = []
    for i, ((what, work, _, _), names) in enumerate(zip(jobs, sides, strict=True)):
        found = {name: next(reports) for name, _ in names}
        ours, plain = found.pop("ours"), found.pop("xla", None)
        records.append(kernel_tables.record_of(target, what, work, ours, plain, found, batch=options.batch, dtype=options.dtype))
        if i in errors:
            records[-1] |= {
                "errors": errors[i],
                "errors_at": f"interpreted, {accuracy.IMAGES} images of {accuracy.PATCHES} x {accuracy.PATCHES} patches",
            }
        print(kernel_tables.line(records[-1]), flush=True)
    if errors:
        print(
            f"errors: largest difference from float64 over the largest value, interpreted at {accuracy.IMAGES} images of 17 tokens"
        )
    return records


def ops(options: Kernels, target: str) -> list[dict]:
    """Each op at each named shape, forward, and forward and backward."""
    jobs = []
    for shape in options.shape:
        for op in options.op:
            for backward in (False, True):
                arguments = {"op": op, "shape": shape, "batch": options.batch, "dtype": options.dtype, "backward": backward}
                keep = options.keep and op in KEEPING
                arguments |= {"keep": True} if keep else {}
                work = flops(op, SHAPES[shape].config, options.batch, backward=backward)
                what = f"{op} {shape} {'fwd+bwd' if backward else 'fwd'}{', keeps' if keep else ''}"
                jobs.append((what, work, "bench.programs:op_alone", arguments))
    return _pairs(options, target, jobs)


def whole(options: Kernels, target: str) -> list[dict]:
    """A whole forward pass or training step."""
    from bench.programs import _config

    arguments = {"model": options.whole, "batch": options.batch, "dtype": options.dtype}
    config = _config(options.whole or "", None)
    if options.drop_path and not hasattr(config, "drop_path"):
        raise ValueError(f"--drop-path {options.drop_path}: {options.whole} is a ResNet, which has no stochastic depth")
    if options.train:
        arguments |= {"remat": options.keeps} | ({"drop_path": options.drop_path} if options.drop_path else {})
    work = model_flops(config, options.batch, train=options.train)
    beside = ", remat" * options.remat + f", drop path {options.drop_path:g}" * bool(options.drop_path)
    what = f"{options.whole} {'train step' + beside if options.train else 'forward'}"
    build = "bench.programs:train_step" if options.train else "bench.programs:whole_forward"
    records = _pairs(options, target, [(what, work, build, arguments)])
    for record in records:
        print(kernel_tables.breakdown(record), flush=True)
    return records


def statistics(options: Kernels, target: str) -> list[dict]:
    """A whole forward pass, alone and with the statistics of every block's attention."""
    arguments = {"model": options.whole, "batch": options.batch, "dtype": options.dtype}
    builds = {"forward": "bench.programs:whole_forward", "forward with statistics": "bench.programs:forward_with_statistics"}
    reports = _compile(target, [Program(build=build, arguments=arguments, name=name) for name, build in builds.items()])
    found = {report.name: kernel_tables.cycles_of(report) for report in reports}
    print(f"{target}, {options.whole}, batch {options.batch}, {options.dtype}: cycles an image (compiler estimate)")
    for report in reports:
        cycles = found[report.name]
        print(
            f"{report.name:<36}{f'{cycles / options.batch:,.0f}' if cycles else 'failed: ' + kernel_tables.why(report)[:300]:>12}"
        )
    plain, looked = found.values()
    if plain and looked:
        print(yardstick.table(reports[1].lines, images=options.batch))
        print(f"distances and class rows of all blocks add {looked / plain - 1:.1%}", flush=True)
    record = {"target": target, "what": "statistics", "batch": options.batch, "dtype": options.dtype, "cycles": found}
    return [{**record, "ours": {"error": "; ".join(filter(None, map(kernel_tables.why, reports)))}}]


def largest_batch(options: Kernels, target: str, *, kernels: bool) -> dict:
    """The largest multiple of `step` images whose training step compiles for one core. RuntimeError if not memory is what fails."""
    tried: dict[int, Report] = {}

    def attempt(batch: int) -> edge.Attempt:
        arguments = {"model": options.largest_batch, "batch": batch, "dtype": options.dtype}
        arguments |= {"kernels": kernels, "remat": options.keeps}
        kernel_tables.progress(f"{target}: {options.largest_batch}, batch {batch} ...")
        report = compile_programs(target, [Program(build="bench.programs:train_step", arguments=arguments)], seconds=600)[0]
        tried[batch] = report
        if report.error and not out_of_hbm(report.error):
            raise RuntimeError(f"{target}, batch {batch}: {report.error}")
        return attempt_of(report, batch)

    found = edge.search(attempt, start=options.batch, step=options.step)
    kernel_tables.progress("")
    record = {"target": target, "model": options.largest_batch, "remat": options.keeps, "kernels": kernels}
    record |= {"batch": found.batch, "beyond": found.beyond}
    whose = "ours" if kernels else "XLA"
    used = f"{tried[found.batch].peak_bytes / 2**30:.2f} GiB" if found.batch else "nothing fits"
    remat = ", every block rematerialised" if options.remat else ""
    remat += f", the input of every {options.remat_every}. kept" if options.keeps > 1 else ""
    print(
        f"{target}, one core, {options.largest_batch} training step{remat}, {whose}: batch {found.batch} ({used}); "
        f"{found.beyond} does not fit; {len(tried)} compilations",
        flush=True,
    )
    return record


def calibrate(options: Kernels, target: str) -> list[dict]:
    """The schedule's count against the static profile of the same kernels, and the deviation.

    Twice, since each profile knows only some of what a kernel may do: v5e's does not know the DMAs from arrays that XLA keeps in
    VMEM, which it does where a kernel may not take all there is; v6e's refuses a kernel that may.
    """
    jobs = [
        Program(
            build="bench.programs:op_alone",
            arguments={"op": op, "shape": shape, "batch": options.batch, "dtype": options.dtype, "backward": True},
            name=f"{op} {shape}",
        )
        for shape in options.shape
        for op in options.op
    ]
    print(f"{target}, batch {options.batch}, {options.dtype}: cycles of a kernel by its schedule and by the compiler's profile")
    records = []
    for whole in (False, True):
        for report in _compile(target, jobs, profile=True, whole_vmem=whole):
            what = report.name + " in the whole VMEM" * whole
            if report.error:
                print(f"{what}: {report.error}")
            for kernel in report.kernels:
                if kernel.schedule is None or kernel.source != "profile" or not kernel.cycles:
                    print(f"{what}: {kernel.name}: {kernel.error[:160] or 'the compiler profiled it as nothing'}")
                    continue
                counted = kernel.schedule["cycles"]
                records.append(dict(target=target, what=what, kernel=kernel.kernel, schedule=counted, profile=kernel.cycles))
                off = counted / kernel.cycles - 1
                far = "  more than 15 % off: trust its schedule less" if abs(off) > calibration.TRUSTED else ""
                print(f"{what + ' ' + kernel.name:<80}{counted:>12,}{kernel.cycles:>12,}{off:>+8.1%}{far}", flush=True)
    return records


def on_devices(options: Kernels) -> list[dict]:
    """Every op at each named shape, timed on the device present beside its matmul rate, with errors against float64."""
    device = describe(None, options.dtype, seconds=options.seconds)
    rate, platform = device["matmul_flops"], device["platform"]
    print(
        f"{device['kind']}, batch {options.batch}, {options.dtype}: measured; a matrix product of {device['matmul_side']}^3 runs "
        f"at {rate / 1e12:,.2f} TFLOP/s{kernel_tables.of_peak(device, options.dtype)}"
    )
    if platform == "cpu":
        print("a CPU has no kernels of ours: the reference stands for them (--target counts them by the TPU compiler)")
    print(f"{'':<36}{'':<12}{'ms':>10}{'spread':>9}{'TFLOP/s':>10}{'of matmul':>11}{'error':>11}")
    records = []
    for shape in options.shape:
        for op in options.op:
            for backward in (False, True):
                for name in kernel_tables.on_platform(platform, op):
                    request = dict(op=op, shape=shape, name=name, batch=options.batch, dtype=options.dtype, backward=backward)
                    kernel_tables.progress(f"{op} {shape} {name}")
                    found, problem = start({**request, "seconds": options.seconds}, seconds=600, module="bench.kernel_trial")
                    kernel_tables.progress("")
                    work = flops(op, SHAPES[shape].config, options.batch, backward=backward)
                    record = {"device": device["kind"], "measured": True, **request, **(found[0] if found else {"failed": problem})}
                    if "median" in record:
                        record |= {"flops_per_second": work / record["median"], "share_of_matmul": work / record["median"] / rate}
                    records.append(record)
                    print(kernel_tables.measured(record), flush=True)
    return records


def run(options: Kernels) -> list[dict]:
    """Prints the tables that the options ask for and returns their records."""
    records: list[dict] = []
    if options.plan:
        records = plans.show(options.target, options.op, options.shape, options.batch, options.dtype, keep=options.keep)
    elif not options.target:
        records = on_devices(options)
    for target in () if options.plan else options.target:
        assert target in TOPOLOGIES
        if options.calibrate:
            records += calibrate(options, target)
            if options.save:
                calibration.save(records)
        elif options.largest_batch:
            records += [largest_batch(options, target, kernels=side) for side in ((True,) if options.ours_only else (True, False))]
        elif options.statistics:
            records += statistics(options, target)
        elif options.whole:
            records += whole(options, target)
        else:
            records += ops(options, target)
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return records


def main() -> int:
    def job(options: Kernels) -> int:
        return int(any(r.get("ours", {}).get("error") for r in run(options)))

    return command(Kernels, "bench.kernels", job, (CompilerMissing, TrialError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
