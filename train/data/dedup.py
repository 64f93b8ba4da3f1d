"""Near-duplicates of test images, found in a training set: `python -m train.data.dedup SRC --against TEST... --out DIR`.

    python -m train.data.dedup folder:PATH --against folder:PATH cifar:OTHER --out dedup
    python -m train.pretrain --data folder:PATH ...      on the split train[without=dedup/removed.json]

The paper's pre-training sets are freed of what is in the downstream test sets, so that no score comes from what was trained on. Two
images are taken for one where their perceptual hashes (imagehash's phash: 64 bits of the coarsest cosine components of the
brightness) differ in at most --distance bits. That survives scaling, recompression, colour and a little noise or cropping; not
mirroring, nor a cut to a part. DIR gets removed.json (what to leave out, and each pair) and pairs.png (the pairs, to be looked at).
"""

import json
import logging
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

from train.data import open_source
from train.data.job import check_timeout, run_job
from train.data.source import BadImage, DataError, Source, said
from train.files import make_directory, write_atomically
from train.signals import Watchdog, beat

TILE = 160
CHUNK = 256  # images that a process hashes at a time
BLOCK = 2**24  # pairs compared at a time: 128 MB


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Find the images of a source that are near-duplicates of test images, so that a run can leave them out."""

    src: tyro.conf.Positional[str]
    """The training set, as train.pretrain's --data."""
    against: tuple[str, ...]
    """The test sets: SOURCE, for its split val, or SOURCE@SPLIT."""
    out: str = "dedup"
    """Folder of the report."""
    split: str = "train"
    distance: int = 6
    """Bits of 64 in which near-duplicates may differ. On photographs: 0 finds copies, 6 what was rescaled or recompressed."""
    pairs: int = 40
    """Pairs to draw, those farthest apart first: they are the doubtful ones."""
    workers: int = max(1, os.cpu_count() or 1)
    step_timeout: int = 1800
    """Seconds without an image after which every thread's stack is printed and it ends; 0 for never."""


def run(args: Dedup) -> None:
    _imagehash()  # is it there?
    check_timeout(args.step_timeout)
    with Watchdog(args.step_timeout):
        _run(args)


def _run(args: Dedup) -> None:
    if not 0 <= args.distance < 32:
        raise ValueError(f"--distance {args.distance}: 0 to 31 of 64 bits are required")
    if args.workers < 1 or args.pairs < 1 or not args.against:
        raise ValueError("--workers, --pairs: positive numbers, and --against: at least one test set, are required")
    source = open_source(args.src, args.split)
    tests = []
    for spec in args.against:
        name, _, split = spec.partition("@")
        tests.append(open_source(name, split or "val"))
    hashes, bad = hash_all(source, args.workers)
    best, which = np.full(len(source), 65, np.uint8), np.zeros((len(source), 2), np.int64)
    for number, test in enumerate(tests):
        others, _ = hash_all(test, args.workers)
        near, index = nearest(hashes, others, own=_own_places(source, test))
        closer = near < best
        best[closer] = near[closer]
        which[closer] = np.stack([np.full(closer.sum(), number), index[closer]], axis=1)
    removed = np.flatnonzero(best <= args.distance)
    found = [
        {
            "name": source.example_name(int(i)),
            "index": int(i),
            "like": tests[which[i, 0]].example_name(int(which[i, 1])),
            "set": tests[which[i, 0]].name,
            "distance": int(best[i]),
        }
        for i in removed
    ]
    out = Path(args.out)
    make_directory(out)
    report = {
        "source": source.name,
        "images": len(source),
        "not_readable": len(bad),
        "against": {test.name: len(test) for test in tests},
        "hash": "imagehash.phash, 64 bits",
        "distance": args.distance,
        "by_distance": np.bincount(best[removed], minlength=args.distance + 1).tolist() if len(removed) else [],
        "removed": [pair["name"] for pair in found],
        "pairs": found,
    }
    write_atomically(out / "removed.json", json.dumps(report, indent=1) + "\n")
    against = ", ".join(f"{test.name} ({len(test):,})" for test in tests)
    print(f"{source.name}: {len(found):,} of {len(source):,} images are within {args.distance} bits of one in {against}")
    if bad:
        print(f"{len(bad):,} images could not be read, so they are not compared; train.data.inspect lists them")
    if found:
        drawn = sorted(range(len(found)), key=lambda k: (-found[k]["distance"], k))[: args.pairs]
        draw(source, tests, [(found[k], int(which[removed[k], 0]), int(which[removed[k], 1])) for k in drawn]).save(
            out / "pairs.png"
        )
        print(f"{out / 'pairs.png'}: {len(drawn)} pairs, the farthest first")
    print(f"{out / 'removed.json'}: train on the split {args.split}[without={out / 'removed.json'}]")


# --- hashes -----------------------------------------------------------------------------------------------------------------


def hash_all(source: Source, workers: int) -> tuple[np.ndarray, list[int]]:
    """uint64 [K], and the indices of those that cannot be read (their hash is 0 and means nothing: see `nearest`)."""
    parts = [(source, start, min(len(source), start + CHUNK)) for start in range(0, len(source), CHUNK)]
    with tqdm(total=len(source), unit=" images", desc=f"hashing {source.name[-40:]}", disable=None) as bar:
        hashes, bad = [], []

        def take(part: tuple[np.ndarray, list[int]]) -> None:
            beat(f"hashing {source.name}")
            hashes.append(part[0])
            bad.extend(part[1])
            bar.update(len(part[0]))

        if workers == 1 or len(parts) < 4 * workers:  # processes take seconds to start
            for part in parts:
                take(_hash_part(part))
        else:
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                try:
                    for part in pool.map(_hash_part, parts):
                        take(part)
                except BrokenProcessPool as error:
                    raise DataError(f"a process that hashes {source.name} was killed: fewer --workers take less memory") from error
    return np.ma.masked_array(np.concatenate(hashes), mask=np.isin(np.arange(len(source)), bad)), bad


def _hash_part(part: tuple[Source, int, int]) -> tuple[np.ndarray, list[int]]:
    source, start, stop = part
    hashes, bad = np.zeros(stop - start, np.uint64), []
    for k, index in enumerate(range(start, stop)):
        beat(f"hashing {source.example_name(index)}")
        try:
            pixels = source[index].image
        except BadImage:
            bad.append(index)
            continue
        hashes[k] = phash(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    return hashes, bad


def phash(picture: Image.Image) -> int:
    """imagehash's perceptual hash as one number of 64 bits."""
    bits = _imagehash().phash(picture).hash.reshape(-1)
    return int(np.packbits(bits).view(">u8")[0])


def _own_places(source: Source, test: Source) -> np.ndarray | None:
    """int64 [K]: where each image of `source` stands in `test`, -1 where it does not; None where the two share no image. No image
    is a duplicate of itself."""
    places = {test.example_name(i): i for i in range(len(test))}
    found = np.array([places.get(source.example_name(i), -1) for i in range(len(source))], np.int64)
    return found if (found >= 0).any() else None


def nearest(hashes: np.ndarray, others: np.ndarray, own: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """For each of `hashes` [K] the smallest number of bits in which one of `others` [M] differs, uint8 [K], and which, int64 [K].

    Every pair is compared, by exclusive or: 0.2 s for 10**8 pairs. What is masked (not readable) is far from everything: 65. own:
    `_own_places`; where the two are one set, an image is compared with those before it: of two that are alike, the first stays.
    """
    one_set = own is not None and len(own) == len(others) and bool((own >= 0).all())
    missing, missing_others = np.ma.getmaskarray(hashes), np.ma.getmaskarray(others)
    a, b = np.ma.getdata(hashes), np.ma.getdata(others)
    best, index = np.full(len(a), 65, np.uint8), np.zeros(len(a), np.int64)
    b_at = np.flatnonzero(~missing_others)
    rows = max(1, BLOCK // max(1, len(b_at)))
    for start in range(0, len(a) if len(b_at) else 0, rows):
        beat("comparing")
        differing = np.bitwise_count(a[start : start + rows, None] ^ b[b_at][None, :])
        if own is not None:
            at = own[start : start + rows, None]
            differing[(at >= 0) & ((b_at >= at) if one_set else (b_at == at))] = 65
        closest = differing.argmin(axis=1)
        best[start : start + rows] = np.take_along_axis(differing, closest[:, None], 1)[:, 0]
        index[start : start + rows] = b_at[closest]
    best[missing] = 65
    return best, index


def _imagehash() -> Any:
    try:
        import imagehash
    except ImportError as error:
        raise DataError(f"imagehash is not installed ({error}); pip install 'vitcore[dedup]'") from error
    return imagehash


# --- the picture ------------------------------------------------------------------------------------------------------------


def draw(source: Source, tests: list[Source], pairs: list[tuple[dict, int, int]]) -> Image.Image:
    """The pairs side by side, four pairs a row: the training image left, the test image right."""
    columns, header = 4, 16
    width, height = 2 * TILE + 12, TILE + header + 8
    page = Image.new("RGB", (columns * width, -(-len(pairs) // columns) * height), "white")
    text = ImageDraw.Draw(page)
    for k, (pair, number, other) in enumerate(pairs):
        x, y = k % columns * width, k // columns * height
        label = f"{pair['distance']} bits: {os.path.basename(pair['name'])} | {os.path.basename(pair['like'])}"
        text.text((x + 2, y + 2), said(label)[:52], fill="black")
        for place, image in ((x, source[pair["index"]].image), (x + TILE + 2, tests[number][other].image)):
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).convert("RGB")
            picture.thumbnail((TILE, TILE)) if max(picture.size) > TILE else None
            if max(picture.size) < TILE // 2:
                picture = picture.resize((picture.width * TILE // max(picture.size), picture.height * TILE // max(picture.size)))
            page.paste(picture, (place, y + header))
    return page


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    sys.exit(run_job(Dedup, run, "train.data.dedup"))
