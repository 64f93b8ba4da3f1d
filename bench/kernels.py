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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench import calibration, edge, plans, yardstick
from bench.accuracy import IMAGES, PATCHES
from bench.device_study import TrialError, describe, start
from bench.options import command
from bench.peers import FLAX
from bench.shapes import KEEPING, OPS, SHAPES, flops, model_flops, unknown
from bench.target_study import attempt_of, out_of_hbm
from bench.tpu_compiler import PROFILED, TOPOLOGIES, CompilerMissing, Program, Report, compile_programs
from kernels.device import gpu

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
        if self.statistics and (not self.whole or self.train):
            raise ValueError("--statistics is of a whole forward pass: give --whole, e.g. --whole ViT-B/16, and no --train")
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


def _record(
    options: Kernels, target: str, what: str, work: int, ours: Report, plain: Report | None, others: dict[str, Report]
) -> dict[str, Any]:
    bound = work / yardstick.flops_per_cycle(target)
    record = {"target": target, "what": what, "batch": options.batch, "dtype": options.dtype, "bound": round(bound)}
    for name, report in (("ours", ours), ("xla", plain), *others.items()):
        if report is None:
            continue
        cycles = _cycles(report)
        record[name] = {
            "cycles": cycles,
            "share_of_bound": None if not cycles else bound / cycles,
            "bytes": report.peak_bytes,
            "kernels": [asdict(k) for k in report.kernels],
            "model_cycles": None if report.error else report.model_cycles,
            "split": yardstick.split(report.lines),
            "lines": [asdict(line) for line in report.lines],
            "seconds_to_compile": report.seconds,
            "error": _why(report),
            "note": "" if report.error else calibration.note(target, report),
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
    lines = [text + _error_cell(record, "ours", "xla")]
    for name in _OTHERS:
        if (other := record.get(name)) is not None:
            against = f"{other['cycles'] / ours['cycles']:.2f}" if other["cycles"] and ours["cycles"] else "-"
            each = f"{other['cycles'] / record['batch']:,.0f}" if other["cycles"] else "-"
            row = f"  {name:<34}{'':>14}{each:>12}{cycles(other):>14}{against:>7}{'':>14}{'':>7}{other['bytes'] / 2**20:>18,.0f}"
            lines.append(row + _error_cell(record, name))
    sides = [(name, record[name]) for name in ("ours", "xla", *_OTHERS) if name in record]
    lines += [f"  {name}: {side[why][:300]}" for name, side in sides for why in ("error", "note") if side[why]]
    return "\n".join(lines)


_ATTENTION = ("jax.nn", "flash", "splash")  # on a TPU; cuDNN is a GPU's
_OTHERS = (*_ATTENTION, FLAX)


def _error_cell(record: dict[str, Any], *names: str) -> str:
    known = record.get("errors", {})
    cells = [f"{known[n]:.1e}" if isinstance(known.get(n), float) else "-" for n in names]
    return f"{' / '.join(cells):>20}" if known else ""


_HEADER = "{:<36}{:>14}{:>12}{:>14}{:>7}{:>14}{:>7}{:>18}".format(
    "", "ours", "an image", "XLA", "XLA/o.", "MXU bound", "share", "MiB ours / XLA"
)


def _names(options: Kernels, build: str, op: str | None) -> list[tuple[str, Any]]:
    """Whose code is compiled: (name in the record, the builder's `kernels`)."""
    names: list[tuple[str, Any]] = [("ours", True), *(() if options.ours_only else (("xla", False),))]
    if options.peers and not options.ours_only and options.whole:
        names.append((FLAX, FLAX))
    if options.peers and not options.ours_only and op == "attention" and build.endswith(":op_alone"):
        names += [(name, name) for name in _ATTENTION]
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
    print(f"{target}, batch {options.batch}, {options.dtype}: cycles (compiler estimate)\n{_HEADER}{heading}")
    reports = iter(_compile(target, programs))
    errors = _errors(options, target, jobs, sides)
    records = []
    for i, ((what, work, _, _), names) in enumerate(zip(jobs, sides, strict=True)):
        found = {name: next(reports) for name, _ in names}
        ours, plain = found.pop("ours"), found.pop("xla", None)
        records.append(_record(options, target, what, work, ours, plain, found))
        if i in errors:
            records[-1] |= {"errors": errors[i], "errors_at": f"interpreted, {IMAGES} images of {PATCHES} x {PATCHES} patches"}
        print(_line(records[-1]), flush=True)
    if errors:
        print(f"errors: largest difference from float64 over the largest value, interpreted at {IMAGES} images of 17 tokens")
    return records


def _errors(options: Kernels, target: str, jobs, sides) -> dict[int, dict[str, Any]]:
    """Job -> implementation -> error against float64, or why there is none. In a process on the CPU: nothing runs on a TPU."""
    if not options.errors or options.ours_only:
        return {}
    asked, places = [], []
    for i, ((_, _, build, arguments), names) in enumerate(zip(jobs, sides, strict=True)):
        if not build.endswith(":op_alone"):
            continue
        for name, _ in names:
            same = {key: arguments[key] for key in ("op", "shape", "dtype", "backward", "keep") if key in arguments}
            asked.append({**same, "name": "reference" if name == "xla" else name, "target": target})
            places.append((i, name))
    if not asked:
        return {}
    _progress(f"{target}: {len(asked)} errors against float64, interpreted")
    answers, problem = start(asked, seconds=60.0 * len(asked), module="bench.accuracy", platform="cpu")
    _progress("")
    found: dict[int, dict[str, Any]] = {}
    for k, (i, name) in enumerate(places):
        answer = answers[k] if k < len(answers) else {"failed": problem}
        found.setdefault(i, {})[name] = answer.get("error", answer.get("failed"))
    return found


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
    if options.train:
        arguments["remat"] = options.keeps
    work = model_flops(_config(options.whole or "", None), options.batch, train=options.train)
    what = f"{options.whole} {'train step' + (', remat' if options.remat else '') if options.train else 'forward'}"
    build = "bench.programs:train_step" if options.train else "bench.programs:whole_forward"
    records = _pairs(options, target, [(what, work, build, arguments)])
    for record in records:
        print(_breakdown(record), flush=True)
    return records


def statistics(options: Kernels, target: str) -> list[dict]:
    """A whole forward pass, alone and with the statistics of every block's attention."""
    arguments = {"model": options.whole, "batch": options.batch, "dtype": options.dtype}
    builds = {"forward": "bench.programs:whole_forward", "forward with statistics": "bench.programs:forward_with_statistics"}
    reports = _compile(target, [Program(build=build, arguments=arguments, name=name) for name, build in builds.items()])
    found = {report.name: _cycles(report) for report in reports}
    print(f"{target}, {options.whole}, batch {options.batch}, {options.dtype}: cycles an image (compiler estimate)")
    for report in reports:
        cycles = found[report.name]
        print(f"{report.name:<36}{f'{cycles / options.batch:,.0f}' if cycles else 'failed: ' + _why(report)[:300]:>12}")
    plain, looked = found.values()
    if plain and looked:
        print(yardstick.table(reports[1].lines, images=options.batch))
        print(f"distances and class rows of all blocks add {looked / plain - 1:.1%}", flush=True)
    record = {"target": target, "what": "statistics", "batch": options.batch, "dtype": options.dtype, "cycles": found}
    return [{**record, "ours": {"error": "; ".join(filter(None, map(_why, reports)))}}]


def _breakdown(record: dict[str, Any]) -> str:
    """Where the cycles of each side go, operation by operation, and how ours stand to the better of the others."""
    sides = [(name, record[name]) for name in ("ours", FLAX, "xla") if name in record and record[name]["cycles"]]
    text = []
    for name, side in sides:
        found = [yardstick.Line(**line) for line in side["lines"]]
        text.append(f"{_WHOSE[name]}, cycles an image\n{yardstick.table(found, images=record['batch'])}")
        text.append(f"  {side['model_cycles'] / record['batch']:>12,.0f} where XLA's operations are counted by its cost model")
    if len(sides) > 1 and sides[0][0] == "ours":
        best, other = min(sides[1:], key=lambda s: s[1]["cycles"])
        ratio = other["cycles"] / sides[0][1]["cycles"]
        text.append(f"ours run at {ratio:.2f} x {_WHOSE[best]}, both by this count {calibration.margin(record['target'])}")
    return "\n".join(text)


_WHOSE = {"ours": "our kernels", "xla": "our reference", FLAX: "the public JAX release's model"}


def largest_batch(options: Kernels, target: str, *, kernels: bool) -> dict:
    """The largest multiple of `step` images whose training step compiles for one core. RuntimeError if not memory is what fails."""
    tried: dict[int, Report] = {}

    def attempt(batch: int) -> edge.Attempt:
        arguments = {
            "model": options.largest_batch,
            "batch": batch,
            "dtype": options.dtype,
            "kernels": kernels,
            "remat": options.keeps,
        }
        _progress(f"{target}: {options.largest_batch}, batch {batch} ...")
        report = compile_programs(target, [Program(build="bench.programs:train_step", arguments=arguments)], seconds=600)[0]
        tried[batch] = report
        if report.error and not out_of_hbm(report.error):
            raise RuntimeError(f"{target}, batch {batch}: {report.error}")
        return attempt_of(report, batch)

    found = edge.search(attempt, start=options.batch, step=options.step)
    _progress("")
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


def _local(platform: str, op: str) -> list[str]:
    """Implementations that a device of this platform runs."""
    names = {"tpu": ["ours"], "gpu": [] if op == "attention" else ["gpu"]}.get(platform, [])
    names.append("reference")
    if op == "attention":
        names += ["jax.nn", *{"gpu": ["cudnn"], "tpu": ["flash", "splash"]}.get(platform, [])]
    return names


def _of_peak(device: dict[str, Any], dtype: str) -> str:
    """What part of a card's peak its matmul rate is, where the card is in the table of devices."""
    card = gpu(device["kind"]) if device["platform"] == "gpu" and dtype == "bfloat16" else None
    return f", {device['matmul_flops'] / card.peak_flops:.0%} of the {card.name}'s peak" if card else ""


def on_devices(options: Kernels) -> list[dict]:
    """Every op at each named shape, timed on the device present beside its matmul rate, with errors against float64."""
    device = describe(None, options.dtype, seconds=options.seconds)
    rate, platform = device["matmul_flops"], device["platform"]
    print(
        f"{device['kind']}, batch {options.batch}, {options.dtype}: measured; a matrix product of {device['matmul_side']}^3 runs "
        f"at {rate / 1e12:,.2f} TFLOP/s{_of_peak(device, options.dtype)}"
    )
    if platform == "cpu":
        print("a CPU has no kernels of ours: the reference stands for them (--target counts them by the TPU compiler)")
    print(f"{'':<36}{'':<12}{'ms':>10}{'spread':>9}{'TFLOP/s':>10}{'of matmul':>11}{'error':>11}")
    records = []
    for shape in options.shape:
        for op in options.op:
            for backward in (False, True):
                for name in _local(platform, op):
                    request = dict(op=op, shape=shape, name=name, batch=options.batch, dtype=options.dtype, backward=backward)
                    _progress(f"{op} {shape} {name}")
                    found, problem = start({**request, "seconds": options.seconds}, seconds=600, module="bench.kernel_trial")
                    _progress("")
                    work = flops(op, SHAPES[shape].config, options.batch, backward=backward)
                    record = {"device": device["kind"], "measured": True, **request, **(found[0] if found else {"failed": problem})}
                    if "median" in record:
                        record |= {"flops_per_second": work / record["median"], "share_of_matmul": work / record["median"] / rate}
                    records.append(record)
                    print(_measured(record), flush=True)
    return records


def _measured(r: dict[str, Any]) -> str:
    what = f"{r['op']} {r['shape']} {'fwd+bwd' if r['backward'] else 'fwd'}"
    if "median" not in r:
        return f"{what:<36}{r['name']:<12}failed: {r['failed'][:150]}"
    error = f"{r['error']:.1e}" if isinstance(r.get("error"), float) else "-"
    return (
        f"{what:<36}{r['name']:<12}{r['median'] * 1e3:>10.3f}{r['spread']:>9.1%}{r['flops_per_second'] / 1e12:>10.2f}"
        f"{r['share_of_matmul']:>11.0%}{error:>11}"
    )


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
        return 1 if any(r.get("ours", {}).get("error") for r in run(options)) else 0

    return command(Kernels, "bench.kernels", job, (CompilerMissing, TrialError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
