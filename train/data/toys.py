"""Small tasks made of what scikit-learn brings, in the place of VTAB's sets where those are not to be had: `toys:TASK`.

Grey images of 16x16, made anew and alike each time from the digits 5 to 9 and from two photographs, a temple and a flower. They are
no benchmark, and nobody else has numbers of them. Test images come from held-out digits and from the other half of each photograph
than training images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from train.data import digits
from train.data.arrays import Arrays
from train.data.source import DataError

SIDE = 16
EXAMPLES = {"train": 1000, "val": 350}  # VTAB-1k's number to train on
NUMBERS = range(5, 10)
PHOTOGRAPHS = ("china.jpg", "flower.jpg")


@dataclass(frozen=True, kw_only=True)
class Toy(Arrays):
    """One split of one task. images: uint8 [K, 16, 16, 1]. targets: int32 [K]."""

    name: str
    classes: tuple[str, ...]
    images: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)

    augment = "none"


class Material:
    """What the images of one split are made of. of: {number: its digits, uint8 [K, 8, 8]}."""

    def __init__(self, split: str, rng: np.random.Generator):
        found = digits.load(split)
        self.split, self.rng = split, rng
        self.of = {number: rng.permutation(found.images[found.targets == number, :, :, 0]) for number in NUMBERS}
        self.given = dict.fromkeys(NUMBERS, 0)

    def digit(self, number: int | None = None) -> np.ndarray:
        """uint8 [8, 8]: one of a number, or of any; none again before all of its number were given."""
        number = NUMBERS[self.rng.integers(len(NUMBERS))] if number is None else number
        self.given[number] += 1
        return self.of[number][self.given[number] % len(self.of[number])]

    def crop(self, photograph: int, side: int = SIDE) -> np.ndarray:
        """uint8 [side, side]: of the left half of a photograph to train on, of the right one to test."""
        whole = _photograph(PHOTOGRAPHS[photograph])
        half = whole.shape[1] // 2
        y, x = self.rng.integers(whole.shape[0] - side + 1), self.rng.integers(half - side + 1)
        x += 0 if self.split == "train" else half
        return whole[y : y + side, x : x + side]


@lru_cache
def _photograph(name: str) -> np.ndarray:
    """uint8 [427, 640]: the mean of its channels."""
    from sklearn.datasets import load_sample_image

    return np.rint(np.asarray(load_sample_image(name), np.float32).mean(-1)).astype(np.uint8)


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


def _placed(image: np.ndarray, y: int, x: int, onto: np.ndarray | None = None) -> np.ndarray:
    """uint8 [16, 16]: an image at a place of a black one, or over another, the lighter pixel of the two."""
    out = np.zeros((SIDE, SIDE), np.uint8) if onto is None else onto.copy()
    part = out[y : y + len(image), x : x + len(image)]
    np.maximum(part, image, out=part)
    return out


def _anywhere(have: Material, image: np.ndarray) -> np.ndarray:
    y, x = have.rng.integers(SIDE - len(image) + 1, size=2)
    return _placed(image, int(y), int(x))


# --- the tasks: (what there is, label) -> an image uint8 [16, 16] ---------------------------------------------------------------


def _digit(have: Material, label: int) -> np.ndarray:
    """14 pixels wide, anywhere."""
    return _anywhere(have, _resized(have.digit(NUMBERS[label]), 14))


def _on_photograph(have: Material, label: int) -> np.ndarray:
    behind = have.crop(int(have.rng.integers(2))) // 2
    return _placed(_resized(have.digit(NUMBERS[label]), SIDE), 0, 0, behind)


def _which_photograph(have: Material, label: int) -> np.ndarray:
    return have.crop(label)


def _blur(have: Material, label: int) -> np.ndarray:
    """Shrunk to 16, 8 or 4 pixels, and made large again."""
    sharp = have.crop(int(have.rng.integers(2)))
    return _resized(_resized(sharp, SIDE >> label), SIDE)


def _count(have: Material, label: int) -> np.ndarray:
    """One to four digits, each in a quarter of its own."""
    out = np.zeros((SIDE, SIDE), np.uint8)
    for quarter in have.rng.permutation(4)[: label + 1]:
        out = _placed(have.digit(), 8 * int(quarter // 2), 8 * int(quarter % 2), out)
    return out


def _place(have: Material, label: int) -> np.ndarray:
    return _placed(have.digit(), 4 * (label // 3), 4 * (label % 3))


def _turn(have: Material, label: int) -> np.ndarray:
    return _resized(np.rot90(have.digit(), label), SIDE)


def _size(have: Material, label: int) -> np.ndarray:
    """8, 11 or 14 pixels wide, anywhere."""
    return _anywhere(have, _resized(have.digit(), 8 + 3 * label))


# name: (classes, how an image of a class is made)
MAKERS: dict[str, tuple[tuple[str, ...], Callable[[Material, int], np.ndarray]]] = {
    "digits": (tuple(map(str, NUMBERS)), _digit),
    "digits-on-photographs": (tuple(map(str, NUMBERS)), _on_photograph),
    "photographs": (("temple", "flower"), _which_photograph),
    "blur": (("1", "2", "4"), _blur),
    "count": (("1", "2", "3", "4"), _count),
    "place": (tuple(f"{y} {x}" for y in ("top", "middle", "bottom") for x in ("left", "middle", "right")), _place),
    "turn": (("0", "90", "180", "270"), _turn),
    "size": (("8", "11", "14"), _size),
}


def open_toys(rest: str, split: str) -> Toy:
    """Raises DataError for an unknown task or split."""
    if rest not in MAKERS:
        raise DataError(f"the source 'toys' has no task {rest!r}; write toys:TASK, one of {', '.join(MAKERS)}")
    if split not in EXAMPLES:
        raise DataError(f"split is {split!r}; the source 'toys' has the splits {' and '.join(map(repr, EXAMPLES))}")
    return _made(rest, split)


@lru_cache(maxsize=32)  # a job opens a set several times
def _made(task: str, split: str) -> Toy:
    classes, make = MAKERS[task]
    rng = np.random.Generator(np.random.Philox(key=[list(MAKERS).index(task), list(EXAMPLES).index(split)]))
    have = Material(split, rng)
    targets = rng.permutation(np.arange(EXAMPLES[split], dtype=np.int32) % len(classes))
    images = np.stack([make(have, int(label)) for label in targets])[..., None]
    return Toy(name=f"toys/{task}/{split}", classes=classes, images=images, targets=targets)
