"""`bench.data --cores 1 2 4 8`: images/s of the pipeline by the cores it may use, beside torch's DataLoader with as many workers.

Each row is measured on that many cores of this machine, to which this process and those that it starts are held, with as many
reading processes as a run has that feeds a GPU or TPU. "of bare" is the rate over what a process on each of those cores decodes
and crops with nothing around it, all at once; "of one" over (cores x what one core does while the others rest), which no program
can have where two cores are the halves of one, or slow down together. Packed: the same photographs in ArrayRecord shards, their
shorter side 256 (`python -m train.data.pack SRC DST --shorter-side 256`).
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.data_parts import SIDE, bare, decoders_here, torch_batches, write_photographs
from train import build
from train.data import open_source, train_batches
from train.data.pack import Pack, pack

BATCH = 128
HEADER = f"{'cores':>5s} {'source, decoder':32s} {'workers':>7s} {'images/s':>9s} {'of bare':>7s} {'of one':>7s} {'x torch':>8s}"
_TOGETHER = 120.0  # seconds that the processes of a measurement wait for each other


def check(cores: tuple[int, ...]) -> None:
    """Raises ValueError for more cores than there are, or fewer than one."""
    here = build.cores()
    if bad := [n for n in cores if not 1 <= n <= here]:
        raise ValueError(f"--cores {bad[0]}: 1 to {here}, the cores here, are required")


def rate(batches: Iterator[Any], seconds: float, drain: int) -> float:
    """Images/s, after `drain` batches have emptied what was read ahead."""
    for _ in range(drain):
        next(batches)
    begun, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - begun) < seconds or count < 3:
        next(batches)
        count += 1
    return count * BATCH / taken


def curve(cores: tuple[int, ...], seconds: float, root: Path, images: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows, said as they come. Every core of this process is its own again afterwards."""
    write_photographs(root / "folder", images, 500, 375)
    folder = f"folder:{root / 'folder'}"
    source = open_source(folder, "train")
    (root / "packed").mkdir()
    pack(source, str(root / "packed"), "train", Pack(src="", dst="", workers=build.cores(), shorter_side=256))
    specs = {"folder": folder, "packed 256": f"arrayrecord:{root / 'packed'}"}
    kinds = [(name, decoder) for decoder in decoders_here(say) for name in specs]
    mine = sorted(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []

    def all_at_once(count: int) -> dict[tuple[str, str], float]:
        found = bare_at_once([(specs[name], decoder) for name, decoder in kinds], count, seconds)
        told = ", ".join(f"{name} {decoder} {rate:,.0f}" for (name, decoder), rate in zip(kinds, found, strict=True))
        say(f"{count:5d} bare, all cores at once: {told}")
        return dict(zip(kinds, found, strict=True))

    try:
        os.sched_setaffinity(0, mine[:1])
        alone = all_at_once(1)
        say(HEADER)
        for count in cores:
            os.sched_setaffinity(0, mine[:count])
            together = alone if count == 1 else all_at_once(count)
            torch = _torch(source, count, seconds, say)
            for name, decoder in kinds:
                workers = build.reading_processes(None, source, platform="gpu")
                found = _ours(specs[name], decoder, workers, seconds)
                row = {"cores": count, "source": name, "decoder": decoder, "workers": workers, "images_per_second": found}
                of_bare, of_one = found / together[name, decoder], found / (count * alone[name, decoder])
                rows.append(row | {"share": of_bare, "of_one": of_one, "torch": torch})
                ratio = f"{found / torch:8.2f}" if torch else ""
                say(f"{count:5d} {name + ' ' + decoder:32s} {workers:7d} {found:9,.0f} {of_bare:7.0%} {of_one:7.0%} {ratio}")
    finally:
        os.sched_setaffinity(0, mine)
    return rows


def bare_at_once(kinds: list[tuple[str, str]], processes: int, seconds: float) -> list[float]:
    """Images/s that so many processes decode and crop together, with nothing around it: one for each (source's name, decoder)."""
    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, initializer=_wait_for, initargs=(begin,)) as pool:
        return [sum(pool.map(_bare, *zip(*[(*kind, seconds)] * processes, strict=True))) for kind in kinds]


_begin: Any = None  # the barrier of a process of `bare_at_once`


def _wait_for(begin) -> None:
    global _begin
    _begin = begin


def _bare(spec: str, decoder: str, seconds: float) -> float:
    """What one process of `bare_at_once` does: images/s."""
    work = bare(open_source(spec, "train"), decoder, 1, 16)
    work(32)
    _begin.wait(_TOGETHER)  # each process has one of these tasks, for none goes on before all have come
    count, begun = 0, time.perf_counter()
    while (taken := time.perf_counter() - begun) < seconds:
        work(32)
        count += 32
    return count / taken


def _ours(spec: str, decoder: str, workers: int, seconds: float) -> float:
    batches = train_batches(
        open_source(spec, "train"), image_size=SIDE, channels=3, batch_size=BATCH, seed=0, augment="inception", workers=workers,
        decoder=decoder, pixels="uint8",
    )  # fmt: skip
    try:
        return rate(batches, seconds, 2 * max(workers, 4))
    finally:
        batches.close()


def _torch(source, workers: int, seconds: float, say) -> float | None:
    try:
        loader = torch_batches([source.example_name(i) for i in range(len(source))], workers, BATCH)
    except ImportError:
        return None
    found = rate(loader, seconds, 2 * workers + 1)
    say(f"{workers:5d} {'torch, Pillow, float32':32s} {workers:7d} {found:9,.0f}")
    return found
