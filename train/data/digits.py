"""The embedded default: scikit-learn's handwritten digits, 1797 grey images of 8x8, real and without a download."""

from dataclasses import dataclass

import numpy as np

from train.data.arrays import Arrays
from train.data.select import of_classes
from train.data.source import DataError, Source

HELD_OUT_EVERY = 5  # of each class, in the order of the file, every fifth image is for validation


@dataclass(frozen=True, kw_only=True)
class Digits(Arrays):
    """One split of the digits. images: uint8 [K, 8, 8, 1]. numbers: int [K], places in the full set."""

    split: str
    images: np.ndarray
    targets: np.ndarray
    numbers: np.ndarray

    classes = tuple("0123456789")
    augment = "digits"

    @property
    def name(self) -> str:
        return f"digits/{self.split}"

    def contents(self):
        return self.targets, self.numbers, self.images

    def example_name(self, index: int) -> str:
        return f"digits/{self.numbers[index]}"


def open_digits(rest: str, split: str) -> Source:
    """`load`, or some of its classes as `select.of_classes` reads them: "0-4"."""
    digits = load(split)
    return of_classes(digits, rest) if rest else digits


def load(split: str) -> Digits:
    """The "train" (four fifths) or "val" (one fifth) split: stratified, the same for every seed and library version."""
    if split not in ("train", "val"):
        raise DataError(f"split is {split!r}; the source 'digits' has the splits 'train' and 'val'")
    from sklearn.datasets import load_digits  # here: scikit-learn takes a second to import and other sources do without

    flat, target = load_digits(return_X_y=True)
    images, labels = np.asarray(flat).reshape(-1, 8, 8), np.asarray(target, np.int32)
    rank = np.zeros(len(labels), np.int64)
    for label in range(10):
        of_class = np.flatnonzero(labels == label)
        rank[of_class] = np.arange(len(of_class))
    held_out = rank % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    numbers = np.flatnonzero(held_out if split == "val" else ~held_out)
    pixels = np.rint(images[numbers] * (255 / 16)).astype(np.uint8)[..., None]  # the file counts ink from 0 to 16
    return Digits(split=split, images=pixels, targets=labels[numbers], numbers=numbers)
