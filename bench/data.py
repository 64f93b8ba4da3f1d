# pyright: reportMissingImports=false
"""How fast images come: `python -m bench.data`. Sources and decoders beside torch's DataLoader, on the same files, in one run.

    python -m bench.data                    decode + inception crop + flip + batch: images/s, ratio to torch, overhead above bare
    python -m bench.data --cores 1 2 4 8    the default pipeline by cores, from a folder and packed (bench/data_cores.py)
    python -m bench.data --index 1000000    start-up with so many files in class folders, and the memory it takes

The photographs are those that scikit-learn ships, cropped and resized to JPEGs of ImageNet's usual size. All contenders take turns,
several rounds of it, so that a machine busy with other work slows all of them; a ratio is the median of the rounds' ratios. Each
turn first empties what was read ahead. "bare" is the same work, image by image, in as many plain threads, with nothing around it.
The contender of torch is a DataLoader with as many workers and torchvision's transforms (RandomResizedCrop, flip, ToTensor,
Normalize) written on Pillow; it yields float32, as "float32" rows do, where ours otherwise leave the normalisation to the device.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import data_cores
from bench.data_parts import SIDE, bare, decoders_here, timed, torch_batches, write_photographs
from train.data import open_source, train_batches
from train.data.decode import DECODERS
from train.data.job import run_job
from train.signals import before_the_end


@dataclass(frozen=True, kw_only=True)
class Options:
    """Throughput of the data pipeline beside torch's DataLoader; or, with --index, its start-up."""

    images: int = 256
    """JPEGs to make."""
    width: int = 500
    height: int = 375
    batch_size: int = 32
    batches: int = 8
    """Timed in each turn."""
    rounds: int = 7
    threads: int = 2
    """Threads of ours, and workers of torch's."""
    sources: tuple[str, ...] = ("folder", "tar", "arrayrecord", "parquet")
    cores: tuple[int, ...] = ()
    """Measure on so many cores instead, 1 2 4 8, with as many reading processes as a run takes there."""
    seconds: float = 3.0
    """With --cores: of each measurement."""
    index: int | None = None
    """Measure the start-up with this many files instead."""


# --- the set ----------------------------------------------------------------------------------------------------------------


def other_forms(root: Path, sources: tuple[str, ...]) -> dict[str, str]:
    """The set in root/folder in every form of `sources`: {name: spec}."""
    import io
    import tarfile

    from train.data.pack import Pack, pack

    specs = {"folder": f"folder:{root / 'folder'}"}
    source = open_source(specs["folder"], "train")
    found = [source.encoded(i) for i in range(len(source))]  # type: ignore[attr-defined]
    for form in sources:
        place = root / form
        if form == "folder":
            continue
        place.mkdir()
        specs[form] = f"{form}:{place}"
        if form == "tar":
            with tarfile.open(place / "train-0.tar", "w") as tar:
                for k, (data, label, _) in enumerate(found):
                    for name, content in ((f"{k}.jpg", data), (f"{k}.cls", str(label).encode())):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        elif form == "arrayrecord":
            pack(source, str(place), "train", Pack(src="", dst="", workers=1))
        elif form == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            images = [{"bytes": data, "path": None} for data, _, _ in found]
            table = pa.table({"image": images, "label": [label for _, label, _ in found]})
            pq.write_table(table, place / "train-0.parquet", row_group_size=100)
        else:
            raise ValueError(f"--sources {form}: folder, tar, arrayrecord and parquet can be measured")
    return {form: specs[form] for form in sources}


# --- contenders: each an endless iterator over batches ----------------------------------------------------------------------


def turn(batches: Iterator[Any], drain: int, count: int) -> float:
    """Seconds of `count` batches, after `drain` batches have emptied what was read ahead."""
    for _ in range(drain):
        next(batches)
    begun = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - begun


def measure(options: Options, root: Path, say: Callable[[str], None]) -> dict[str, list[float]]:
    """{contender: images/s in each round}."""
    write_photographs(root / "folder", options.images, options.width, options.height)
    specs = other_forms(root, options.sources)
    folder = open_source(f"folder:{root / 'folder'}", "train")
    decoders = decoders_here(say)

    contenders: dict[str, Callable[[int], float]] = {}  # name -> seconds of so many batches
    closing = []

    def ours(spec: str, **settings: Any) -> Callable[[int], float]:
        batches = train_batches(
            open_source(spec, "train"), image_size=SIDE, channels=3, batch_size=options.batch_size, seed=0, augment="inception",
            threads=options.threads, **settings,
        )  # fmt: skip
        closing.append(batches.close)
        return lambda count: turn(batches, 5, count)

    for decoder in decoders:
        run = bare(folder, decoder, options.threads, 16)
        contenders[f"bare {decoder}"] = lambda count, run=run: timed(lambda: run(count * options.batch_size))
        for form, spec in specs.items():
            contenders[f"{form} {decoder}"] = ours(spec, decoder=decoder, pixels="uint8")
    contenders["folder pillow float32"] = ours(f"folder:{root / 'folder'}", decoder="pillow")
    if "simplejpeg" in decoders:
        contenders["folder simplejpeg float32"] = ours(f"folder:{root / 'folder'}", decoder="simplejpeg")
    try:
        loader = torch_batches([folder.example_name(i) for i in range(len(folder))], options.threads, options.batch_size)
        contenders["torch"] = lambda count: turn(loader, 2 * options.threads + 1, count)
    except ImportError as error:
        say(f"torch is not installed ({error}): no ratios to its DataLoader; pip install 'vitcore[peers]'")

    rates: dict[str, list[float]] = {name: [] for name in contenders}
    try:
        for number in range(options.rounds + 1):
            for name, seconds in contenders.items():
                taken = seconds(options.batches)
                if number:  # the first round only warms up
                    rates[name].append(options.batches * options.batch_size / taken)
                time.sleep(0.3)  # until it has read ahead again: the next one is not to pay for that
    finally:
        for close in closing:
            close()
    return rates


def ratio(rates: dict[str, list[float]], name: str, to: str) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[to], strict=True))


def report(rates: dict[str, list[float]]) -> list[str]:
    """A table: images/s (median), ratio to torch, overhead above bare work of the same decoder."""
    lines = [f"{'source, decoder':30s} {'images/s':>9s} {'x torch':>8s} {'above bare':>11s}"]
    for name, values in rates.items():
        decoder = next((d for d in DECODERS if d in name), None)
        torch = f"{ratio(rates, name, 'torch'):8.2f}" if "torch" in rates and name != "torch" else f"{'':8s}"
        own = decoder is not None and not name.startswith("bare")
        above = f"{ratio(rates, f'bare {decoder}', name) - 1:11.1%}" if own else ""
        lines.append(f"{name:30s} {statistics.median(values):9.0f} {torch} {above}")
    return lines


# --- start-up ---------------------------------------------------------------------------------------------------------------

# VmHWM, not getrusage: Linux lets a new process inherit the peak of the one that started it.
_START = """
import json, re, sys, time

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024

begun = time.perf_counter()
from train.data import open_source, train_batches
from train.data.sampling import epoch_order
imported, memory = time.perf_counter(), peak()
source = open_source(sys.argv[1], "train")
opened = time.perf_counter()
name = source.example_name(int(epoch_order(len(source), 0, 0)[0]))
ordered = time.perf_counter()
found = {"files": len(source), "import_s": imported - begun, "open_s": opened - imported, "order_s": ordered - opened}
print(json.dumps({**found, "import_mb": memory, "peak_mb": peak(), "name": name}))
"""


def start_up(root: Path, count: int) -> dict[str, Any]:
    """Opening a set of `count` files in 1000 class folders, whose names and sizes each opening lists: here, and in a new process.
    The files of a class are links to one: an opening reads none of them."""
    each = -(-count // 1000)
    for k in range(1000):
        place = root / "set" / "train" / f"n{k:08d}"
        place.mkdir(parents=True)
        first = place / f"n{k:08d}_000000.JPEG"
        first.write_bytes(b"x")
        for i in range(1, each):
            os.link(first, place / f"n{k:08d}_{i:06d}.JPEG")
    environment = {**os.environ, "VITCORE_CACHE": str(root / "cache")}
    begun = time.perf_counter()
    open_source(f"folder:{root / 'set'}", "train")
    built = time.perf_counter() - begun
    command = [sys.executable, "-c", _START, f"folder:{root / 'set'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {"build_s": built, **json.loads(done.stdout)}


def run(options: Options) -> None:
    for name in ("images", "width", "height", "batch_size", "batches", "rounds", "threads", "index"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: a positive number is required")
    if options.cores:
        data_cores.check(options.cores)
    root = Path(tempfile.mkdtemp(prefix="vitcore-bench-"))
    before_the_end(lambda: shutil.rmtree(root, ignore_errors=True))
    try:
        if options.index is not None:
            found = start_up(root, options.index)
            print(
                f"{found['files']:,} files: import {found['import_s']:.2f} s, open {found['open_s']:.2f} s, "
                f"order of an epoch {found['order_s']:.2f} s; memory at most {found['peak_mb']:.0f} MB, the imports alone "
                f"{found['import_mb']:.0f} MB; the index was made in {found['build_s']:.1f} s"
            )
            return
        os.environ["VITCORE_CACHE"] = str(root / "cache")
        if options.cores:
            data_cores.curve(options.cores, options.seconds, root, options.images, lambda line: print(line, flush=True))
            return
        print(
            f"{options.images} JPEGs of {options.width}x{options.height}, {options.threads} threads or workers, "
            f"{options.rounds} rounds; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
            flush=True,
        )
        rates = measure(options, root, lambda line: print(line, flush=True))
        print("\n".join(report(rates)))
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB; load {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run_job(Options, run, "bench.data"))
