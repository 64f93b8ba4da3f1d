"""What every source of images is to the rest of the pipeline."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np


class DataError(ValueError):
    """Something is wrong with the data that a user named. The message is one line: what, where, and what to do."""


class BadImage(DataError):
    """One image cannot be read or decoded. A run goes on without it; see `pipeline.train_batches`."""


class Example(NamedTuple):
    """One labelled image. image: uint8 [Y, X, C], C 1 or 3. label: index into the source's classes. name: for people and logs."""

    image: np.ndarray
    label: int
    name: str


class Encoded(NamedTuple):
    """An example as it is stored. data: an image file's content, or what `decode` takes."""

    data: bytes
    label: int
    name: str


class Source(Protocol):
    """A sequence of examples with random access. It must pickle (worker processes get a copy) and be safe to read from threads.

    name: what a log calls it. classes: the label names, in label order. augment: the entry of AUGMENTATIONS that suits it.
    decoded: True where examples lie in memory as pixels; False where they are files to decode, which `encoded` then gives.
    """

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def augment(self) -> str: ...

    @property
    def decoded(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example at `index`, 0 <= index < len(self). Raises BadImage, naming it, where it cannot be read."""
        ...

    def labels(self) -> np.ndarray:
        """int32 [len(self)]: every label, without decoding an image."""
        ...

    def example_name(self, index: int) -> str:
        """The name that `self[index]` has, without decoding it."""
        ...


def contents(source: Any) -> Iterable[bytes | np.ndarray]:
    """What tells a set of images from another, cheaply: names and sizes, not pixels. By default all there is: labels."""
    if hasattr(source, "contents"):
        return source.contents()
    return (source.labels(),)


class LeftOut:
    """What lies among the images and is not read: {what it is: how many, and the first few by name}."""

    NAMED = 5

    def __init__(self, found: Mapping[str, tuple[int, tuple[str, ...]]] | None = None):
        self.found = dict(found or {})

    def add(self, what: str, name: str) -> None:
        count, names = self.found.get(what, (0, ()))
        self.found[what] = (count + 1, (*names, name) if len(names) < self.NAMED else names)

    def __add__(self, other: "LeftOut") -> "LeftOut":
        sum_ = LeftOut(self.found)
        for what, (count, names) in other.found.items():
            before, first = sum_.found.get(what, (0, ()))
            sum_.found[what] = (before + count, (*first, *names)[: self.NAMED])
        return sum_

    def __bool__(self) -> bool:
        return bool(self.found)

    @property
    def count(self) -> int:
        return sum(count for count, _ in self.found.values())

    def line(self) -> str:
        """ "7 left out: 4 .txt, 3 hidden"."""
        kinds = sorted(self.found.items(), key=lambda item: -item[1][0])
        return f"{self.count:,} left out: " + ", ".join(f"{count:,} {what}" for what, (count, _) in kinds)


def said(name: str) -> str:
    """A name as it can be printed and written anywhere: bytes of it that are no UTF-8 as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few of `names` for a message of one line."""
    names = [said(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
