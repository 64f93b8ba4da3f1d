"""CIFAR-10 and CIFAR-100 in the binary version: a folder with data_batch_1.bin ... and test_batch.bin, or train.bin and test.bin.

A record is one label byte (CIFAR-100: the coarse label, then the fine one, which is used) and 3072 bytes of a 32x32 image, plane
after plane. Held out is the test set, as "test" or "val"; a part of train to choose by is train[98%:].
"""

import glob
import os
from dataclasses import dataclass, field

import numpy as np

from train.data.arrays import Arrays
from train.data.files import open_regular, read_text
from train.data.source import DataError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True, kw_only=True)
class Cifar(Arrays):
    """One split. images: uint8 [K, 32, 32, 3]. targets: int32 [K], the labels."""

    name: str
    classes: tuple[str, ...]
    images: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)

    augment = "inception"


def open_cifar(rest: str, split: str) -> Cifar:
    """Raises DataError for a folder without the files, files that are cut short, and labels that are none."""
    if not rest:
        raise DataError("the source 'cifar' needs a path; write 'cifar:PATH' with the .bin files of the binary version")
    if split not in ("train", "val", "test"):
        raise DataError(f"split is {split!r}; the source 'cifar' has the splits 'train' and 'test', which is also called 'val'")
    hundred = os.path.exists(os.path.join(rest, "train.bin"))
    pattern = (
        ("train.bin" if hundred else "data_batch_*.bin") if split == "train" else ("test.bin" if hundred else "test_batch.bin")
    )
    files = sorted(glob.glob(os.path.join(glob.escape(rest), pattern)))
    if not files:
        raise DataError(f"no file fits {os.path.join(rest, pattern)}; cifar:PATH needs the .bin files of the binary version")
    if split == "train" and not hundred and len(files) != 5:
        have = ", ".join(os.path.basename(file) for file in files)
        raise DataError(f"{rest} holds {have} of data_batch_1.bin to data_batch_5.bin; restore the others")
    labels, record = (2 if hundred else 1), (2 if hundred else 1) + PIXELS
    parts = []
    for file in files:
        if (size := os.path.getsize(file)) % record or not size:
            raise DataError(
                f"{file} has {size:,} bytes, no multiple of the {record} of a record; it is cut short or of another version"
            )
        with open_regular(file) as opened:
            parts.append(np.fromfile(opened, np.uint8).reshape(-1, record))
    rows = np.concatenate(parts)
    targets = rows[:, labels - 1].astype(np.int32)
    classes = _classes(os.path.join(rest, "fine_label_names.txt" if hundred else "batches.meta.txt"), 100 if hundred else 10)
    if (largest := int(targets.max())) >= len(classes):
        raise DataError(
            f"{rest} has a label {largest} with {len(classes)} classes; are these the .bin files of the binary version?"
        )
    images = np.ascontiguousarray(rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Cifar(name=f"cifar:{rest}/{split}", classes=classes, images=images, targets=targets)


def _classes(path: str, count: int) -> tuple[str, ...]:
    """The names in `path`, one a line; numbers where it is missing, as the label files are often left behind."""
    if (text := read_text(path, "the class names")) is None:
        return tuple(str(k) for k in range(count))
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) != count:
        raise DataError(f"{path} has {len(names)} class names, not {count}; restore it, or remove it to have numbers")
    return names
