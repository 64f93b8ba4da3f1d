"""A source whose images, by name, are good or do something to whoever reads them: for `test_faults_suspects.py`, and its child."""

import io
import os
import signal
import time

import numpy as np
from PIL import Image

from train.data.source import Encoded


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, "PNG")
    return file.getvalue()


class Hostile:
    name, classes, augment, decoded = "hostile", ("a",), "none", False

    def __init__(self, *images: str):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def example_name(self, index: int) -> str:
        return f"{index}: {self.images[index]}"

    def labels(self):
        return np.zeros(len(self), np.int32)

    def __getitem__(self, index: int):
        raise NotImplementedError

    def encoded(self, index: int) -> Encoded:
        what = self.images[index]
        if what == "hangs":
            time.sleep(1000)
        if what == "grows":
            np.empty(2**30)  # 8 GiB, of which nothing is touched
        if what == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        return Encoded(picture()[: 40 if what == "damaged" else None], 0, self.example_name(index))
