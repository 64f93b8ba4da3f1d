"""The lines that `bench.kernels` prints, and the records behind them."""

import sys
from dataclasses import asdict
from typing import Any

from bench import calibration, yardstick
from bench.peers import FLAX
from bench.reports import Report
from kernels.device import gpu


def progress(text: str) -> None:
    """A line on a terminal that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def cycles_of(report: Report) -> int | None:
    try:
        return None if report.error else report.cycles
    except ValueError:
        return None


def why(report: Report) -> str:
    return report.error or next((k.error for k in report.kernels if k.error), "")


def record_of(
    target: str, what: str, work: int, ours: Report, plain: Report | None, others: dict[str, Report], *, batch: int, dtype: str
) -> dict[str, Any]:
    bound = work / yardstick.flops_per_cycle(target)
    record = {"target": target, "what": what, "batch": batch, "dtype": dtype, "bound": round(bound)}
    for name, report in (("ours", ours), ("xla", plain), *others.items()):
        if report is None:
            continue
        cycles = cycles_of(report)
        record[name] = {
            "cycles": cycles,
            "share_of_bound": None if not cycles else bound / cycles,
            "bytes": report.peak_bytes,
            "kernels": [asdict(k) for k in report.kernels],
            "model_cycles": None if report.error else report.model_cycles,
            "split": yardstick.split(report.lines),
            "lines": [asdict(line) for line in report.lines],
            "seconds_to_compile": report.seconds,
            "error": why(report),
            "note": "" if report.error else calibration.note(target, report),
        }
    return record


def line(record: dict[str, Any]) -> str:
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
    for name in OTHERS:
        if (other := record.get(name)) is not None:
            against = f"{other['cycles'] / ours['cycles']:.2f}" if other["cycles"] and ours["cycles"] else "-"
            each = f"{other['cycles'] / record['batch']:,.0f}" if other["cycles"] else "-"
            row = f"  {name:<34}{'':>14}{each:>12}{cycles(other):>14}{against:>7}{'':>14}{'':>7}{other['bytes'] / 2**20:>18,.0f}"
            lines.append(row + _error_cell(record, name))
    sides = [(name, record[name]) for name in ("ours", "xla", *OTHERS) if name in record]
    lines += [f"  {name}: {side[why][:300]}" for name, side in sides for why in ("error", "note") if side[why]]
    return "\n".join(lines)


ATTENTION = ("jax.nn", "flash", "splash")  # on a TPU; cuDNN is a GPU's
OTHERS = (*ATTENTION, FLAX)


def _error_cell(record: dict[str, Any], *names: str) -> str:
    known = record.get("errors", {})
    cells = [f"{known[n]:.1e}" if isinstance(known.get(n), float) else "-" for n in names]
    return f"{' / '.join(cells):>20}" if known else ""


HEADER = "{:<36}{:>14}{:>12}{:>14}{:>7}{:>14}{:>7}{:>18}".format(
    "", "ours", "an image", "XLA", "XLA/o.", "MXU bound", "share", "MiB ours / XLA"
)


def breakdown(record: dict[str, Any]) -> str:
    """Where the cycles of each side go, operation by operation, and how ours stand to the better of the others."""
    sides = [(name, record[name]) for name in ("ours", FLAX, "xla") if name in record and record[name]["cycles"]]
    text = []
    for name, side in sides:
        found = [yardstick.Line(**line) for line in side["lines"]]
        text.append(f"{WHOSE[name]}, cycles an image\n{yardstick.table(found, images=record['batch'])}")
        text.append(f"  {side['model_cycles'] / record['batch']:>12,.0f} where XLA's operations are counted by its cost model")
    if len(sides) > 1 and sides[0][0] == "ours":
        best, other = min(sides[1:], key=lambda s: s[1]["cycles"])
        ratio = other["cycles"] / sides[0][1]["cycles"]
        text.append(f"ours run at {ratio:.2f} x {WHOSE[best]}, both by this count {calibration.margin(record['target'])}")
    return "\n".join(text)


WHOSE = {"ours": "our kernels", "xla": "our reference", FLAX: "the public JAX release's model"}


def on_platform(platform: str, op: str) -> list[str]:
    """Implementations that a device of this platform runs."""
    names = {"tpu": ["ours"], "gpu": [] if op == "attention" else ["gpu"]}.get(platform, [])
    names.append("reference")
    if op == "attention":
        names += ["jax.nn", *{"gpu": ["cudnn"], "tpu": ["flash", "splash"]}.get(platform, [])]
    return names


def of_peak(device: dict[str, Any], dtype: str) -> str:
    """What part of a card's peak its matmul rate is, where the card is in the table of devices."""
    card = gpu(device["kind"]) if device["platform"] == "gpu" and dtype == "bfloat16" else None
    return f", {device['matmul_flops'] / card.peak_flops:.0%} of the {card.name}'s peak" if card else ""


def measured(r: dict[str, Any]) -> str:
    what = f"{r['op']} {r['shape']} {'fwd+bwd' if r['backward'] else 'fwd'}"
    if "median" not in r:
        return f"{what:<36}{r['name']:<12}failed: {r['failed'][:150]}"
    error = f"{r['error']:.1e}" if isinstance(r.get("error"), float) else "-"
    return (
        f"{what:<36}{r['name']:<12}{r['median'] * 1e3:>10.3f}{r['spread']:>9.1%}{r['flops_per_second'] / 1e12:>10.2f}"
        f"{r['share_of_matmul']:>11.0%}{error:>11}"
    )
