"""Finds the fastest tiles of the Hopper products (`kernels/hopper/product.py`) on the card that is present, beside XLA's.

    python -m bench.tune                                  the products of ViT-B/16 and ViT-L/16, printed
    python -m bench.tune --models ViT-H/14 --save         and the best of each into kernels/hopper/table.py

A line is a product with its epilogue: microseconds of the best tiles, the rate, the tiles, and what XLA takes for the same product
and epilogue. Every candidate is timed several times in turn, the median counts: a card's clock falls with its temperature.
"""

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

import vitcore
from bench.options import command
from kernels.attention.hopper.plan import not_hopper
from kernels.hopper import table
from kernels.hopper.epilogue import Epilogue
from kernels.hopper.plan import READS, Tiles, memory
from train.files import write_atomically

SHARED = 227 * 1024 - 1024  # bytes of a block's shared memory, less what barriers take
EPILOGUES = {
    "plain": Epilogue(),
    "gelu": Epilogue(bias=True, gelu="tanh"),
    "kept": Epilogue(bias=True, gelu="tanh", keep=True),
    "residual": Epilogue(bias=True, residual=1.0),
    "slope": Epilogue(slope="tanh"),
}


@dataclass(frozen=True, kw_only=True)
class Tune:
    """The fastest tiles of the Hopper products on the card that is present."""

    models: tuple[str, ...] = ("ViT-B/16", "ViT-L/16")
    """Whose products."""
    rows: int = 25_344
    """Tokens: 128 images of 198."""
    rounds: int = 5
    """Timings of each candidate."""
    save: bool = False
    """Keep the best of each in kernels/hopper/table.py, with those of other products that are there."""
    out: Path = Path(table.__file__)
    """The table's file."""

    def __post_init__(self):
        if min(self.rows, self.rounds) < 1:
            raise ValueError(f"--rows and --rounds must be positive; got {self.rows} and {self.rounds}")
        for name in self.models:
            vitcore.variant(name)  # raises for a name that is none


def products(config) -> list[tuple[str, int, int, bool]]:
    """(kind, K, N, turned) of a model's products that ours may take; w turned or not is the same tiles."""
    d, f = config.width, config.mlp_dim
    halves = [("gelu", d, f, False), ("kept", d, f, False), ("residual", f, d, False), ("slope", d, f, True)]
    return [*halves, ("residual", d, d, False), ("plain", d, d, False), ("plain", 3 * d, d, True)]


def candidates(kind: str, n: int) -> list[Tiles]:
    """Tiles that divide n columns and fit shared memory, the deepest ring of each form."""
    slots = [(1, 1), (2, 2)] if kind in READS else [(1, 2), (1, 4)]
    forms = [(128, 128, True), (128, 192, True), (128, 256, False)]
    found = []
    for rows, columns, alternate in forms:
        through_ring = [(0, 2)] if kind in READS and not alternate else []
        for given, made in slots + through_ring if n % columns == 0 else ():
            for cluster in (1, 2):
                rings = (Tiles(rows, columns, stages, cluster, alternate, given, made) for stages in (6, 5, 4, 3))
                found += [t for t in rings if memory(t, kind) <= SHARED][:1]
    return list(dict.fromkeys(found))


def _arrays(kind: str, rows: int, k: int, n: int, turned: bool) -> list:
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, beside = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((rows, k), (n, k) if turned else (k, n), (rows, n)), strict=True)
    )
    e = EPILOGUES[kind]
    return [x, w * k**-0.5, jnp.ones(n) if e.bias else None, beside if e.beside else None]


def _xla(kind: str, turned: bool) -> Callable:
    def run(x, w, bias, beside):
        e = EPILOGUES[kind]
        y = x @ (w.T if turned else w)
        if e.slope:
            h, pull = jax.vjp(jax.nn.gelu, beside)
            return y * pull(jnp.ones_like(y))[0], h
        y = y if bias is None else y + bias.astype(y.dtype)
        if e.gelu:
            return (jax.nn.gelu(y), y) if e.keep else jax.nn.gelu(y)
        return y if beside is None else y + beside

    return run


def _microseconds(f: Callable, arrays: list, least: float = 0.01) -> float:
    n = 4
    while True:
        began = time.perf_counter()
        for _ in range(n):
            out = f(*arrays)
        jax.block_until_ready(out)
        if (spent := time.perf_counter() - began) >= least:
            return spent / n * 1e6
        n *= 2


def tune(options: Tune) -> dict[tuple[str, int, int], tuple]:
    """Best tiles of every product, printed as they are found."""
    from kernels.hopper.product import product

    todo = dict.fromkeys(p for name in options.models for p in products(vitcore.variant(name)))
    found = {}
    print(
        f"{jax.devices()[0].device_kind}, {options.rows} rows, bfloat16; microseconds\n{'':<28}{'ours':>8}{'TFLOP/s':>9}{'XLA':>8}"
    )
    for kind, k, n, turned in todo:
        arrays = _arrays(kind, options.rows, k, n, turned)

        def ours(t, kind=kind, turned=turned, arrays=arrays):
            return jax.jit(lambda *a: product(*a, e=EPILOGUES[kind], t=t, turned=turned)).lower(*arrays).compile()

        tried = candidates(kind, n)
        with ThreadPoolExecutor(8) as pool:
            programs = list(pool.map(ours, tried))
        programs.append(jax.jit(_xla(kind, turned)).lower(*arrays).compile())
        rounds = [[_microseconds(f, arrays) for f in programs] for _ in range(1 + options.rounds)][1:]
        *times, xla = (statistics.median(column) for column in zip(*rounds, strict=True))
        best = min(range(len(tried)), key=times.__getitem__)
        rate = 2e-6 * options.rows * k * n / times[best]
        print(f"{kind:<10}{f'{k} x {n}':<18}{times[best]:>8.1f}{rate:>9.0f}{xla:>8.1f}  {astuple(tried[best])}", flush=True)
        found[kind, k, n] = astuple(tried[best])
    return found


def text(card: str, entries: dict[tuple[str, int, int], tuple]) -> str:
    """The table's file with these entries."""
    lines = "".join(f'    ("{kind}", {k}, {n}): {fields!r},\n' for (kind, k, n), fields in entries.items())
    return f'"""{table.__doc__}"""\n\nCARD = "{card}"\nTABLE = {{\n{lines}}}\n'


def main() -> int:
    def job(options: Tune) -> int:
        if (why := not_hopper()) is not None:
            raise ValueError(why)
        found = tune(options)
        if options.save:
            write_atomically(options.out, text(jax.devices()[0].device_kind, {**table.TABLE, **found}))
        return 0

    return command(Tune, "bench.tune", job, (OSError,))


if __name__ == "__main__":
    sys.exit(main())
