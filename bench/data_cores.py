"""`bench.data --cores 1 2 4 8`: images/s of the pipeline by the cores it may use, beside torch's DataLoader with as many workers.

Each row is measured on that many cores of this machine, to which this process and those that it starts are held, with as many
reading processes as a run has that feeds a GPU or TPU. "share of bare" is the rate over (cores x what one core decodes and crops
with nothing around it). Packed: the same photographs in ArrayRecord shards, their shorter side 256
(`python -m train.data.pack SRC DST --shorter-side 256`).
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.data_parts import SIDE, bare, decoders_here, timed, torch_batches, write_photographs
from train import build
from train.data import open_source, train_batches
from train.data.pack import Pack, pack

BATCH = 128
HEADER = f"{'cores':>5s} {'source, decoder':32s} {'workers':>7s} {'images/s':>9s} {'share of bare':>13s} {'x torch':>8s}"


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
    decoders = decoders_here(say)
    alone, mine = {}, sorted(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    try:
        os.sched_setaffinity(0, mine[:1])
        for name, spec in specs.items():
            for decoder in decoders:
                run, some = bare(open_source(spec, "train"), decoder, 1, 16), min(images, 256)
                timed(lambda run=run: run(32))
                alone[name, decoder] = some / timed(lambda run=run, some=some: run(some))
        say("one core, bare: " + ", ".join(f"{name} {decoder} {found:,.0f}" for (name, decoder), found in alone.items()))
        say(HEADER)
        for count in cores:
            os.sched_setaffinity(0, mine[:count])
            torch = _torch(source, count, seconds, say)
            for (name, decoder), one in alone.items():
                workers = build.reading_processes(None, source, platform="gpu")
                found = _ours(specs[name], decoder, workers, seconds)
                row = {"cores": count, "source": name, "decoder": decoder, "workers": workers, "images_per_second": found}
                rows.append(row | {"share": found / (count * one), "torch": torch})
                ratio = f"{found / torch:8.2f}" if torch else ""
                say(f"{count:5d} {name + ' ' + decoder:32s} {workers:7d} {found:9,.0f} {found / (count * one):13.0%} {ratio}")
    finally:
        os.sched_setaffinity(0, mine)
    return rows


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
