"""What is written beside runs: `python power_files_worker.py FOLDER`. Weights, three times under their names, and a packed set;
a file FOLDER/ack/N.WHAT says that one is written."""

import sys
from pathlib import Path

import numpy as np

from train.data import pack
from train.files import make_directory
from vitcore import weight_files

VERSIONS = 3


def main(folder: Path) -> None:
    make_directory(folder / "weights")
    for version in range(1, VERSIONS + 1):
        for kind in ("npz", "safetensors"):
            weight_files.write(folder / "weights" / f"w.{kind}", {"a": np.full(1000, version, np.float32)}, {"of": str(version)})
            (folder / "ack" / f"{version}.{kind}").touch()
    pack.run(pack.Pack(src="digits:0-1", dst=str(folder / "set"), splits=("train",), shard_images=150, workers=1))
    (folder / "ack" / "1.set").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
