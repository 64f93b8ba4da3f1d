"""Opens files from a stranger and says how each was refused and what memory that took: `python hostile_worker.py FOLDER`. An image
counts as refused where every decoder refuses it.

A process of its own, because a peak of memory is measured: Linux forgets the old one when asked to. Prints a JSON object a file.
"""

import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path

from train.data import DataError, open_source
from train.data.decode import DECODERS, read_file
from train.data.source import BadImage
from vitcore import variant
from vitcore.weight_files import WeightError
from vitcore.weights import load

CONFIG = variant("ViT-Ti/16")


def memory(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def attempt(path: Path):
    if path.suffix in (".npz", ".safetensors"):
        load(path, CONFIG)
    elif path.suffix == ".tar":
        source = open_source(f"tar:{path}", "train")
        for index in range(len(source)):
            source[index]
    else:
        data, refused = read_file(str(path)), []
        for decoder in DECODERS.values():
            try:
                decoder(data, str(path))
            except BadImage as error:
                refused.append(error)
        if len(refused) == len(DECODERS):
            raise refused[-1]


def main(folder: Path) -> None:
    for path in [
        folder / "warm.npz",
        folder / "warm.safetensors",
        folder / "warm.tar",
        folder / "warm.jpg",
        *sorted(folder.iterdir()),
    ]:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free already goes back, or the file could take it unseen
        Path("/proc/self/clear_refs").write_text("5")
        before, begun, used = memory("VmRSS"), time.monotonic(), time.process_time()
        try:
            attempt(path)
            refused, said = None, ""
        except (WeightError, DataError, ValueError, OSError) as error:
            refused, said = type(error).__name__, str(error)
        found = {"refused": refused, "said": said, "memory": memory("VmHWM") - before, "seconds": time.monotonic() - begun,
                 "cpu_seconds": time.process_time() - used}  # fmt: skip
        print(json.dumps({"file": path.name} | found), flush=True)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]))
