"""Our whole models against what people run: cycles an image of both by the one count, and their ratio, as a table.

    python -m bench.ratios --target v3 v5e v6e                              forward, ViT-B/16, 128 images
    python -m bench.ratios --target v3 --model ViT-B/16 ViT-L/16 --mode train --batch 32
    python -m bench.ratios --target v3 --model ViT-H/14 --depths 2 3        the peer from two depths: marked with a star

A compiler estimate, each operation by its own schedule (`bench.yardstick`). The peer is the public JAX release's model
(`bench.peers.vit`), whose blocks XLA compiles one by one: minutes for a large model. So the peer may be compiled at two depths, and
a block's cycles, their difference, multiplied; ours is always compiled whole. Beside the ratio stands the one of the older method,
in which XLA's operations are counted by its cost model and kernels by their schedules: two counts, which do not compare.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench import calibration
from bench.options import command
from bench.peers import FLAX
from bench.reports import Program, Report
from bench.tpu_compiler import Compiler, CompilerMissing
from vitcore.families import variant

Target = Literal["v2", "v3", "v4", "v5e", "v5p", "v6e", "7x"]


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Cycles an image of our whole models and of the public JAX release's, by one count."""

    target: tuple[Target, ...] = ("v3",)
    """TPU generations."""
    model: tuple[str, ...] = ("ViT-B/16",)
    """Models, at 224 pixels unless their name says otherwise."""
    mode: tuple[Literal["forward", "train"], ...] = ("forward",)
    """Inference, or a whole training step with Adam."""
    batch: int = 128
    """Images on one core."""
    depths: tuple[int, ...] = ()
    """Two depths at which the peer is compiled, e.g. 2 3, and extrapolated to the model's; by default it is compiled whole."""
    reference: bool = False
    """Our reference operations, too: the ratio is then to the better of the two."""
    cache: Path | None = None
    """Directory of compiled programs' reports, so that a table that was interrupted goes on; none by default."""
    json: Path | None = None
    """Write the rows there, too."""

    def __post_init__(self):
        if self.depths and (len(self.depths) != 2 or not 0 < self.depths[0] < self.depths[1]):
            raise ValueError(f"--depths {' '.join(map(str, self.depths))}: two rising depths are required, e.g. --depths 2 3")
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch}: a positive number is required")
        for model in self.model:
            variant(model)


def extrapolated(small: float, large: float, depths: tuple[int, int], depth: int) -> float:
    """What a model of `depth` equal blocks costs, from what two smaller ones cost."""
    block = (large - small) / (depths[1] - depths[0])
    return small + (depth - depths[0]) * block


def _counts(report: Report) -> tuple[float, float]:
    """Cycles by the yardstick and by the older method. RuntimeError where the program did not compile or was not counted."""
    if report.error:
        raise RuntimeError(report.error)
    return report.cycles, report.model_cycles


def _side(compiler: Compiler, options: Ratios, model: str, mode: str, kernels: bool | str) -> tuple[float, float]:
    """(cycles, cycles by the older method) an image of one side."""

    def at(depth: int | None) -> tuple[float, float]:
        arguments: dict[str, Any] = dict(model=model, batch=options.batch, kernels=kernels)
        if depth is not None:
            arguments["depth"] = depth
        build = "bench.programs:train_step" if mode == "train" else "bench.programs:whole_forward"
        name = f"{model} {mode} {'ours' if kernels is True else 'reference' if kernels is False else kernels}"
        return _counts(compiler.compile(Program(build=build, arguments=arguments, name=name), cycles=True))

    if kernels == FLAX and options.depths:
        few, many = options.depths
        pairs = zip(at(few), at(many), strict=True)
        found = tuple(extrapolated(a, b, (few, many), variant(model).depth) for a, b in pairs)
    else:
        found = at(None)
    return found[0] / options.batch, found[1] / options.batch


def row(compiler: Compiler, options: Ratios, target: str, model: str, mode: str) -> dict[str, Any]:
    """One line of the table; an error where a side did not compile."""
    found: dict[str, Any] = {"target": target, "model": model, "mode": mode, "batch": options.batch, "star": bool(options.depths)}
    sides = {"ours": True, FLAX: FLAX, **({"reference": False} if options.reference else {})}
    for name, kernels in sides.items():
        try:
            found[name], found[f"{name} older"] = _side(compiler, options, model, mode, kernels)
        except (RuntimeError, ValueError) as error:
            found["error"] = f"{name}: {error}"[:300]
            return found
    found["peer"] = min((n for n in sides if n != "ours"), key=lambda n: found[n])
    found["ratio"] = found[found["peer"]] / found["ours"]
    found["ratio older"] = found[f"{found['peer']} older"] / found["ours older"]
    return found


HEADER = f"{'':<34}{'ours':>10}{'peer':>11}  {'':<10}{'ratio':>6}{'older method':>24}"


def line(found: dict[str, Any]) -> str:
    """A row as text: thousands of cycles an image."""
    what = f"{found['target']} {found['model']} {found['mode']} {found['batch']}"
    if "error" in found:
        return f"{what:<34}{found['error']}"
    peer, star = found["peer"], "*" if found["star"] and found["peer"] == FLAX else ""
    older = f"{found['ours older'] / 1e3:,.0f} / {found[f'{peer} older'] / 1e3:,.0f} = {found['ratio older']:.2f}"
    cells = f"{what:<34}{found['ours'] / 1e3:>10,.0f}{f'{found[peer] / 1e3:,.0f}{star}':>11}"
    return f"{cells}  {peer:<10}{found['ratio']:>6.2f}{older:>24}"


def run(options: Ratios) -> list[dict[str, Any]]:
    """Prints the table and returns its rows."""
    print("thousands of cycles an image (compiler estimate), both sides by one count; ratio: ours are so many times faster")
    print(HEADER)
    rows = []
    for target in options.target:
        with Compiler(target, seconds=1800, gigabytes=16, cache=options.cache) as compiler:
            for mode in options.mode:
                for model in options.model:
                    rows.append(row(compiler, options, target, model, mode))
                    print(line(rows[-1]), flush=True)
        print(f"{target} {calibration.margin(target)}")
    if options.depths:
        print(f"* extrapolated from depths {options.depths[0]} and {options.depths[1]}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def main() -> int:
    return command(Ratios, "bench.ratios", lambda options: int(any("error" in r for r in run(options))), (CompilerMissing,))


if __name__ == "__main__":
    sys.exit(main())
