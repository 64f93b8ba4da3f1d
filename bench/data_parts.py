# pyright: reportMissingImports=false
"""What the studies of input have in common: photographs to read, bare decoding, torch's DataLoader, and a clock."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.data import AUGMENTATIONS, DataError
from train.data.augment import AUTHORS
from train.data.decode import DECODERS, check_decoder
from train.data.sampling import uniforms

SIDE = 224


def write_photographs(root: Path, count: int, width: int, height: int, split: str = "train") -> None:
    """Class folders of `count` JPEGs in root/split: random crops of the two photographs, quality 90."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for k in range(count):
        photo = photos[k % 2]
        share = rng.uniform(0.6, 1)
        w, h = share * photo.width, share * photo.height
        left, top = rng.uniform(0, photo.width - w), rng.uniform(0, photo.height - h)
        picture = photo.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
        place = root / split / ("china", "flower")[k % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{k:05d}.jpg", quality=90)


def decoders_here(say: Callable[[str], None]) -> list[str]:
    """The decoders that are installed; says why the fast one is not among them."""
    try:
        check_decoder("simplejpeg")
    except DataError as error:
        say(f"no fast path here: {error}")
        return ["pillow"]
    return ["pillow", "simplejpeg"]


def bare(source: Any, decoder: str, threads: int, batch_size: int) -> Callable[[int], None]:
    """A function that does the work of so many images, in plain threads, each image by itself: what no pipeline can do without."""
    inception = AUGMENTATIONS["inception"]
    draws = uniforms(0, np.zeros(4096), np.arange(4096), inception.draws(AUTHORS))

    def work(first: int, count: int) -> None:
        for start in range(first, first + count, batch_size):
            rows = [(start + k) % len(source) for k in range(batch_size)]
            some = [DECODERS[decoder](source.encoded(i)[0], "") for i in rows]
            inception.apply(some, draws[np.array(rows) % 4096], SIDE, 3, np.uint8)

    def run(count: int) -> None:
        share = count // threads
        pool = [threading.Thread(target=work, args=(k * share, share)) for k in range(threads)]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()

    return run


def torch_batches(files: list[str], workers: int, batch_size: int) -> Iterator[Any]:
    """torch's DataLoader over the files, with torchvision's transforms written on Pillow. ImportError where torch is missing."""
    import math
    import random

    import torch
    from torch.utils.data import DataLoader, Dataset

    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)

    def box(width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * random.uniform(0.05, 1)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        return 0, 0, width, height

    class Files(Dataset):
        def __len__(self) -> int:
            return 10**6  # no epoch ends while it is timed

        def __getitem__(self, index: int):
            with open(files[index % len(files)], "rb") as file:
                picture = Image.open(file).convert("RGB")
            picture = picture.crop(box(*picture.size)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            if random.random() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
            return pixels.sub_(mean).div_(std), index % 2

    return iter(DataLoader(Files(), batch_size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True))


# --- the measurement --------------------------------------------------------------------------------------------------------


def timed(run: Callable[[], None]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun
