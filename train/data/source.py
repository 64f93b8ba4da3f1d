"""What every source of images is to the rest of the pipeline."""

from typing import NamedTuple, Protocol

import numpy as np


class DataError(ValueError):
    """Something is wrong with the data that a user named. The message is one line: what, where, and what to do."""


class Example(NamedTuple):
    """One labelled image. image: uint8 [Y, X, C], C 1 or 3. label: index into the source's classes. name: for people and logs."""

    image: np.ndarray
    label: int
    name: str


class Source(Protocol):
    """A sequence of examples with random access. It must pickle (worker processes get a copy) and be safe to read from threads.

    name: what a log calls it. classes: the label names, in label order. augment: the entry of AUGMENTATIONS that suits it.
    decoded: True where reading is a look-up in memory; the pipeline then reads a whole batch in one thread.
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
        """The example at `index`, 0 <= index < len(self). Raises DataError, naming it, where it cannot be read."""
        ...
