"""What is in a source, and what augmentation makes of it: `python -m train.data.inspect SRC`.

    python -m train.data.inspect folder:PATH --split val --out val.png
    python -m train.data.inspect tar:DATA/{split}-*.tar --sample 5000

Prints counts, classes, sizes and the images that cannot be read; of a packed set the checksums are verified, too. The picture has a
row for each of some images: the image whole, as evaluation sees it, and as the first epochs of a run with this seed see it.
"""

import hashlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

from train.data import AUGMENTATIONS, PREPROCESSES, open_source
from train.data.arrayrecord import read_manifest
from train.data.augment import AUTHORS, Images, sides
from train.data.decode import decode_pillow
from train.data.job import run_job
from train.data.sampling import uniforms
from train.data.source import BadImage, DataError, LeftOut, Source, said

TILE = 144  # side of a picture in the sheet, in pixels
EPOCHS = 6
LISTED = 20  # bad images and classes printed; the rest is counted


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Count, measure and draw a source of images."""

    src: tyro.conf.Positional[str]
    """The source, as train.pretrain's --data."""
    split: str = "train"
    sample: int | None = None
    """Read this many images, evenly spread, instead of all."""
    out: str = "inspect.png"
    """The contact sheet."""
    rows: int = 8
    """Images on the sheet."""
    image_size: int = 224
    augment: Literal["inception", "digits", "none"] | None = None
    """Default: what suits the source."""
    preprocess: Literal["resize", "resize-center", "center"] = "resize"
    seed: int = 0
    threads: int = min(16, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What reading told. heights, widths, sizes (bytes; empty where the source is decoded): int [K]. bad: one line each."""

    heights: np.ndarray
    widths: np.ndarray
    sizes: np.ndarray
    bad: list[str]


def run(args: Inspect) -> None:
    for option in ("sample", "rows", "image_size", "threads"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value}: a positive number is required")
    if Image.registered_extensions().get(Path(args.out).suffix.lower()) not in Image.SAVE:  # said before images are read
        raise ValueError(f"--out {args.out}: a name that ends in the form of a picture is required, as in --out inspect.png")
    source = open_source(args.src, args.split)
    for line in (*describe(source), *checksums(source)):
        print(line, flush=True)
    count = min(len(source), args.sample or len(source))
    found = read(source, np.linspace(0, len(source) - 1, count).astype(int), args.threads)
    for line in measured(found, count):
        print(line)
    if len(found.bad) == count:
        raise DataError(f"not one of the {count} images read is whole: nothing to draw")
    sheet(source, args).save(args.out)
    print(f"{args.out}: {args.rows} images, each whole, as evaluation sees it, and in epochs 0 to {EPOCHS - 1} of seed {args.seed}")


def describe(source: Source) -> Iterable[str]:
    """Lines on counts and classes."""
    counts = np.bincount(source.labels(), minlength=len(source.classes))
    yield f"{source.name}: {len(source):,} images, {len(source.classes):,} classes"
    yield f"images of a class: {counts.min():,} to {counts.max():,}, median {int(np.median(counts)):,}"
    shown = np.argsort(-counts, kind="stable")[:LISTED]
    yield "largest: " + ", ".join(f"{source.classes[k]} {counts[k]:,}" for k in shown)
    if empty := [name for name, n in zip(source.classes, counts, strict=True) if n == 0]:
        yield f"without an image: {len(empty):,} classes, {', '.join(empty[:LISTED])}"
    left_out = getattr(source, "left_out", LeftOut())
    if left_out:
        yield left_out.line()
    for what, (count, names) in left_out.found.items():
        yield f"  {what}: {', '.join(names)}{f' and {count - len(names):,} more' if count > len(names) else ''}"


def checksums(source: Any) -> Iterable[str]:
    """Verifies the shards of a packed set; nothing for other sources. Raises DataError for the first that differs."""
    if not source.name.startswith("arrayrecord:") or not hasattr(source, "paths"):
        return
    folder = Path(source.paths[0]).parent
    manifest = read_manifest(str(folder / f"{Path(source.paths[0]).name.partition('-')[0]}.json")) or {"shards": []}
    for shard in manifest["shards"]:
        with open(folder / shard["file"], "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                raise DataError(
                    f"the shard {folder / shard['file']} is not what was packed (SHA-256 differs); restore it, or pack again"
                )
    yield f"checksums: all {len(manifest['shards'])} shards are as they were packed"


def read(source: Any, indices: np.ndarray, threads: int) -> Found:
    """Reads and decodes the images at `indices`."""

    def one(index: int) -> tuple[int, int, int] | str:
        try:
            if source.decoded:
                return *sides(source[index].image), 0
            data, _, name = source.encoded(index)
            return *sides(decode_pillow(data, name)), len(data)
        except BadImage as error:
            return str(error)

    with ThreadPoolExecutor(threads) as pool:
        results = list(tqdm(pool.map(one, indices.tolist()), total=len(indices), unit=" images", disable=None))
    good = np.array([r for r in results if not isinstance(r, str)], np.int64).reshape(-1, 3)
    sizes = good[:, 2] if not source.decoded else good[:0, 2]
    return Found(heights=good[:, 0], widths=good[:, 1], sizes=sizes, bad=[r for r in results if isinstance(r, str)])


def measured(found: Found, count: int) -> Iterable[str]:
    """Lines on sizes and bad images."""
    if len(found.heights):
        ranges = [
            f"{what} {int(v.min()):,} to {int(v.max()):,}, median {int(np.median(v)):,}"
            for what, v in (("height", found.heights), ("width", found.widths), ("bytes", found.sizes))
            if len(v)
        ]
        yield "; ".join(ranges)
        common = Counter(zip(found.widths.tolist(), found.heights.tolist(), strict=True)).most_common(3)
        yield "most common: " + ", ".join(f"{w}x{h} ({n:,})" for (w, h), n in common)
    yield f"bad images: {len(found.bad):,} of {count:,} read ({len(found.bad) / count:.2%})"
    yield from found.bad[:LISTED]
    if len(found.bad) > LISTED:
        yield f"and {len(found.bad) - LISTED:,} more"


def sheet(source: Source, args: Inspect) -> Image.Image:
    """The contact sheet: a row an image, of those that can be read, evenly spread over the source."""
    name = args.augment or source.augment
    augmentation, preprocess = AUGMENTATIONS[name], PREPROCESSES[args.preprocess]
    rows = []
    for index in np.unique(np.linspace(0, len(source) - 1, 4 * args.rows).astype(int)).tolist():
        try:
            rows.append((index, source[index]))
        except BadImage:
            continue
    rows = [rows[k] for k in np.unique(np.linspace(0, len(rows) - 1, args.rows).astype(int))]
    header, gap = 16, 4
    titles = ["whole", args.preprocess, *(f"{name}, epoch {e}" for e in range(EPOCHS))]
    height = header + len(rows) * (TILE + header + gap)
    page = Image.new("RGB", (len(titles) * (TILE + gap), height), "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        draw.text((column * (TILE + gap) + 2, 2), title, fill="black")
    for row, (index, example) in enumerate(rows):
        top = header + row * (TILE + header + gap)
        draw.text((2, top), said(f"{index}: {source.classes[example.label]}, {example.name[-120:]}"), fill="black")
        whole = Image.fromarray(example.image[:, :, 0] if example.image.shape[2] == 1 else example.image).convert("RGB")
        scale = TILE / max(whole.size)
        small = (max(1, round(whole.width * scale)), max(1, round(whole.height * scale)))
        page.paste(whole.resize(small, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC), (0, top + header))
        seen = [preprocess([example.image], args.image_size, 3)]
        for epoch in range(EPOCHS):
            draws = uniforms(args.seed, np.array([epoch]), np.array([index]), augmentation.draws(AUTHORS))
            images: Images = [example.image]
            seen.append(augmentation.apply(images, draws, args.image_size, 3))
        for column, image in enumerate(seen, 1):
            pixels = np.rint((image[0] + 1) * 127.5).astype(np.uint8)
            page.paste(Image.fromarray(pixels).resize((TILE, TILE)), (column * (TILE + gap), top + header))
    return page


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    sys.exit(run_job(Inspect, run, "train.data.inspect"))
