"""What every source of images is to the rest of the pipeline."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

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


class EncodedSource:
    """What sources of image files share: they give `encoded`, and have `__getitem__` from it."""

    augment = "inception"
    decoded = False

    def encoded(self, index: int) -> Encoded:
        """The example as it is stored. Raises BadImage where it cannot be read, DataError where more than one image is lost."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        from train.data.decode import decode_bytes

        data, label, name = self.encoded(index)
        return Example(decode_bytes(data, name), label, name)


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few of `names` for a message of one line."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
