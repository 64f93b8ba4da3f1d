"""What our kernels cost against XLA's own code, by the compiler: no TPU needed, no number measured on one.

    python -m bench.kernels --target v3                                     every op at ViT-B/16 and 224 pixels
    python -m bench.kernels --target v3 v5e v6e --op attention --batch 64
    python -m bench.kernels --target v3 --whole ViT-B/16 --batch 128 --train
    python -m bench.kernels --target v3 --largest-batch ViT-B/16 --remat
    python -m bench.kernels --target v5e v6e --calibrate --batch 8

Cycles are compiler estimates (`bench.tpu_compiler` says from where). The bound is the FLOPs of the op's matrix products over what
the MXUs of a core do in a cycle; the share is bound over cycles.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench.shapes import OPS, SHAPES, flops, model_flops
from bench.tpu_compiler import PROFILED, TOPOLOGIES, CompilerMissing, Program, Report, compile_programs
from kernels.device import DEVICES

Target = Literal["v2", "v3", "v4", "v5e", "v5p", "v6e", "7x"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Cycles, bound and memory of the kernels beside XLA's own, estimated by the TPU compiler."""

    target: tuple[Target, ...] = ("v3",)
    """TPU generations."""
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
    remat: bool = False
    """With --train or --largest-batch: rematerialise every block."""
    largest_batch: str | None = None
    """Instead of ops: the largest training batch of a model on one core, by bisection on compilation."""
    step: int = 16
    """With --largest-batch: to a multiple of this."""
    ours_only: bool = False
    """Leave XLA's own code out."""
    calibrate: bool = False
    """Compare the schedule's count with the compiler's profile, kernel by kernel (v5e, v5p, v6e, 7x). Use a small batch."""
    json: Path | None = None
    """Write the records there, too."""

    def __post_init__(self):
        unknown = [s for s in self.shape if s not in SHAPES]
        if unknown:
            raise ValueError(f"unknown shape {unknown[0]!r}; known: {', '.join(SHAPES)}")
        if self.batch < 1 or self.step < 1:
            raise ValueError(f"--batch and --step must be positive; got {self.batch} and {self.step}")
        if self.calibrate and set(self.target) - set(PROFILED):
            raise ValueError(f"--calibrate needs a static profile, which exists for {', '.join(PROFILED)} only")


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _compile(target: str, programs: list[Program], **options: Any) -> list[Report]:
    done: list[str] = []

    def tell(report: Report) -> None:
        done.append(report.name)
        _progress(f"{target}: {len(done)} of {len(programs)} compiled, last {report.name} ({report.seconds:.0f} s)")

    reports = compile_programs(target, programs, cycles=True, progress=tell, seconds=600, **options)
    _progress("")
    return reports


def _cycles(report: Report) -> int | None:
    try:
        return None if report.error else report.cycles
    except ValueError:
        return None


def _why(report: Report) -> str:
    return report.error or next((k.error for k in report.kernels if k.error), "")


def _record(options: Kernels, target: str, what: str, work: int, ours: Report, plain: Report | None) -> dict[str, Any]:
    bound = work / DEVICES[target].flops_per_cycle
    record = {"target": target, "what": what, "batch": options.batch, "dtype": options.dtype, "bound": round(bound)}
    for name, report in (("ours", ours), ("xla", plain)):
        if report is None:
            continue
        cycles = _cycles(report)
        record[name] = {
            "cycles": cycles,
            "share_of_bound": None if not cycles else bound / cycles,
            "bytes": report.peak_bytes,
            "kernels": [asdict(k) for k in report.kernels],
            "xla_cycles": report.xla_cycles,
            "seconds_to_compile": report.seconds,
            "error": _why(report),
        }
    return record


def _line(record: dict[str, Any]) -> str:
    ours, plain = record["ours"], record.get("xla")

    def cycles(side):
        return "-" if side is None else f"{side['cycles']:,}" if side["cycles"] else "failed"

    ratio = f"{plain['cycles'] / ours['cycles']:.2f}" if plain and plain["cycles"] and ours["cycles"] else "-"
    share = f"{ours['share_of_bound']:.0%}" if ours["share_of_bound"] else "-"
    each = f"{ours['cycles'] / record['batch']:,.0f}" if ours["cycles"] else "-"
    memory = f"{ours['bytes'] / 2**20:,.0f}" + (f" / {plain['bytes'] / 2**20:,.0f}" if plain else "")
    cells = (record["what"], cycles(ours), each, cycles(plain), ratio, f"{record['bound']:,}", share, memory)
    text = "{:<36}{:>14}{:>12}{:>14}{:>7}{:>14}{:>7}{:>18}".format(*cells)
    problems = [f"  {name}: {side['error']}" for name, side in (("ours", ours), ("xla", plain)) if side and side["error"]]
    return "\n".join([text, *problems])


_HEADER = "{:<36}{:>14}{:>12}{:>14}{:>7}{:>14}{:>7}{:>18}".format(
    "", "ours", "an image", "XLA", "XLA/o.", "MXU bound", "share", "MiB ours / XLA"
)


def _pairs(options: Kernels, target: str, jobs: list[tuple[str, int, str, dict]]) -> list[dict]:
    """Records of (what, FLOPs, builder, arguments), ours and XLA's."""
    sides = (True,) if options.ours_only else (True, False)
    programs = [
        Program(build=build, arguments={**arguments, "kernels": side}, name=f"{what} {'ours' if side else 'XLA'}")
        for what, _, build, arguments in jobs
        for side in sides
    ]
    print(f"{target}, batch {options.batch}, {options.dtype}: cycles (compiler estimate)\n{_HEADER}")
    reports = _compile(target, programs)
    records = []
    for i, (what, work, _, _) in enumerate(jobs):
        ours, plain = reports[i * len(sides)], reports[i * len(sides) + 1] if len(sides) == 2 else None
        records.append(_record(options, target, what, work, ours, plain))
        print(_line(records[-1]), flush=True)
    return records


def ops(options: Kernels, target: str) -> list[dict]:
    """Each op at each named shape, forward, and forward and backward."""
    jobs = []
    for shape in options.shape:
        for op in options.op:
            for backward in (False, True):
                arguments = {"op": op, "shape": shape, "batch": options.batch, "dtype": options.dtype, "backward": backward}
                work = flops(op, SHAPES[shape].config, options.batch, backward=backward)
                what = f"{op} {shape} {'fwd+bwd' if backward else 'fwd'}"
                jobs.append((what, work, "bench.programs:one_op", arguments))
    return _pairs(options, target, jobs)


def whole(options: Kernels, target: str) -> list[dict]:
    """A whole forward pass or training step."""
    from bench.programs import _config

    arguments = {"model": options.whole, "batch": options.batch, "dtype": options.dtype}
    if options.train:
        arguments["remat"] = options.remat
    work = model_flops(_config(options.whole or "", None), options.batch, train=options.train)
    what = f"{options.whole} {'train step' + (', remat' if options.remat else '') if options.train else 'forward'}"
    build = "bench.programs:train_step" if options.train else "bench.programs:whole_forward"
    records = _pairs(options, target, [(what, work, build, arguments)])
    for record in records:
        print(_breakdown(record), flush=True)
    return records


def _breakdown(record: dict[str, Any]) -> str:
    """Where the cycles of our program go: each kernel with its calls, its stalls and its fullest units, and XLA's operations."""
    ours = record["ours"]
    lines = []
    for k in sorted(ours["kernels"], key=lambda k: -(k["cycles"] or 0) * k["trips"]):
        if not k["cycles"] or not k["schedule"]:
            continue
        units = sorted(k["schedule"]["units"].items(), key=lambda u: -u[1])[:4]
        full = "  ".join(f"{name} {used:.0%}" for name, used in units)
        stalled = k["schedule"]["stalls"] / k["cycles"]
        lines.append(f"  {k['kernel']:<34}{k['cycles']:>12,} x {k['trips']:<5}{f'waits {stalled:.0%}':>10}   slots: {full}")
    return "\n".join([*lines, f"  {'operations of XLA':<34}{ours['xla_cycles']:>12,}"])


def largest_batch(options: Kernels, target: str, *, kernels: bool) -> dict:
    """The largest multiple of `step` images whose training step compiles for one core. RuntimeError if not memory is what fails."""
    tried: dict[int, Report] = {}

    def fits(batch: int) -> bool:
        arguments = {
            "model": options.largest_batch,
            "batch": batch,
            "dtype": options.dtype,
            "kernels": kernels,
            "remat": options.remat,
        }
        _progress(f"{target}: {options.largest_batch}, batch {batch} ...")
        report = compile_programs(target, [Program(build="bench.programs:train_step", arguments=arguments)], seconds=600)[0]
        tried[batch] = report
        if report.error and "RESOURCE_EXHAUSTED" not in report.error and "out of memory" not in report.error.lower():
            raise RuntimeError(f"{target}, batch {batch}: {report.error}")
        return not report.error

    step, low, high = options.step, 0, options.batch
    while fits(high):
        low, high = high, 2 * high
    low, high = low // step, -(-high // step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    _progress("")
    record = {"target": target, "model": options.largest_batch, "remat": options.remat, "kernels": kernels, "batch": low * step}
    whose = "ours" if kernels else "XLA"
    used = f"{tried[low * step].peak_bytes / 2**30:.2f} GiB" if low * step in tried else "nothing fits"
    remat = ", every block rematerialised" if options.remat else ""
    print(f"{target}, one core, {options.largest_batch} training step{remat}, {whose}: batch {low * step} ({used})", flush=True)
    return record


def calibrate(options: Kernels, target: str) -> list[dict]:
    """The schedule's count against the static profile of the same kernels, and the deviation."""
    jobs = [
        Program(
            build="bench.programs:one_op",
            arguments={"op": op, "shape": shape, "batch": options.batch, "dtype": options.dtype, "backward": True},
            name=f"{op} {shape}",
        )
        for shape in options.shape
        for op in options.op
    ]
    print(f"{target}, batch {options.batch}, {options.dtype}: cycles of a kernel by its schedule and by the compiler's profile")
    records = []
    for report in _compile(target, jobs, profile=True):
        if report.error:
            print(f"{report.name}: {report.error}")
        for kernel in report.kernels:
            if kernel.schedule is None or kernel.source != "profile" or not kernel.cycles:
                print(f"{report.name}: {kernel.name}: {kernel.error[:160] or 'the compiler profiled it as nothing'}")
                continue
            counted = kernel.schedule["cycles"]
            records.append(
                {"target": target, "what": report.name, "kernel": kernel.name, "schedule": counted, "profile": kernel.cycles}
            )
            off = counted / kernel.cycles - 1
            print(f"{report.name + ' ' + kernel.name:<70}{counted:>12,}{kernel.cycles:>12,}{off:>+8.1%}", flush=True)
    return records


def run(options: Kernels) -> list[dict]:
    """Prints the tables that the options ask for and returns their records."""
    records: list[dict] = []
    for target in options.target:
        assert target in TOPOLOGIES
        if options.calibrate:
            records += calibrate(options, target)
        elif options.largest_batch:
            records += [largest_batch(options, target, kernels=side) for side in ((True,) if options.ours_only else (True, False))]
        elif options.whole:
            records += whole(options, target)
        else:
            records += ops(options, target)
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return records


def main() -> int:
    import tyro

    try:
        records = run(tyro.cli(Kernels))
    except (ValueError, CompilerMissing, RuntimeError) as error:
        print(f"bench.kernels: {error}", file=sys.stderr)
        return 2
    failed = [r for r in records if r.get("ours", {}).get("error")]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
