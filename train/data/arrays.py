"""Sources whose images lie in memory, decoded."""

import numpy as np

from train.data.source import Example


class Arrays:
    """What such sources share: a `Source` but for `classes` and `augment`. images: uint8 [K, Y, X, C]. targets: int32 [K]."""

    name: str
    images: np.ndarray
    targets: np.ndarray

    decoded = True

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Example:
        return Example(self.images[index], int(self.targets[index]), self.example_name(index))

    def labels(self) -> np.ndarray:
        return self.targets

    def contents(self):
        return self.targets, self.images

    def example_name(self, index: int) -> str:
        return f"{self.name}/{index}"
