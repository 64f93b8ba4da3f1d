"""Any source to ArrayRecord shards: `python -m train.data.pack SRC DST`.

    python -m train.data.pack folder:PATH DST --shorter-side 256       then train on arrayrecord:DST
    python -m train.data.pack parquet:PATH DST --splits train "val[:50%]=minival"

The order of the source is kept, so a run sees the same examples from either form. Each image is decoded once to see that it can be;
what cannot is left out and listed in SPLIT.bad.txt. Without --shorter-side the files go in as they are; with it, larger images are
made smaller (bicubic, JPEG stays JPEG, everything else becomes PNG) and the others go in as they are.

The same command again continues where it was stopped, wherever that was: a shard is whole or not there, and SPLIT.progress.jsonl
lists those that are. What a set consists of, with checksums, ends up in SPLIT.json (see `train.data.arrayrecord`).
"""

import hashlib
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import tyro
from array_record.python import array_record_module  # type: ignore[attr-defined]
from PIL import Image
from tqdm import tqdm

from train.data import absolute, open_source
from train.data.arrayrecord import FORMAT, LABELS, checksum, open_reader, read_manifest
from train.data.decode import decode_pillow
from train.data.files import read_text
from train.data.job import check_timeout, run_job
from train.data.rows import BAD_FLOOR
from train.data.source import BadImage, DataError, Source
from train.files import make_directory, parse_json, write_atomically
from train.signals import Watchdog, beat

_ANY_NAME: dict = {"unicode_errors": "surrogateescape"}  # a file's name need not be UTF-8
_WRITER = "group_size:1,uncompressed"  # a record a chunk, for random access; images are compressed already


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Pack a source into ArrayRecord shards with checksums. The same command again continues."""

    src: tyro.conf.Positional[str]
    """The source, as train.pretrain's --data: folder:PATH, tar:PATTERN, ..."""
    dst: tyro.conf.Positional[str]
    """Folder of the shards; made if it is not there."""
    splits: tuple[str, ...] = ("train", "val")
    """Splits to pack. SPLIT=NAME packs one under another name: "train[99%:]=minival"."""
    shorter_side: int | None = None
    """Make the shorter side of larger images this many pixels."""
    quality: int = 95
    """Of the JPEGs that are made smaller."""
    shard_images: int = 8192
    """Images in a shard."""
    workers: int = max(1, os.cpu_count() or 1)
    """Processes that do it."""
    step_timeout: int = 1800
    """Seconds without an image after which every thread's stack is printed and it ends; 0 for never."""
    bad_share: float = 0.01
    """Stop when more of the images than this cannot be decoded."""


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """One shard to write: examples start..stop of the source to `path`."""

    source: Source
    start: int
    stop: int
    path: str
    shorter_side: int | None
    quality: int
    step_timeout: int


def run(args: Pack) -> None:
    """Pack as `args` say; prints what became of each split."""
    for option, value in (("shorter-side", args.shorter_side), ("shard-images", args.shard_images), ("workers", args.workers)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} {value}: a positive number is required")
    check_timeout(args.step_timeout)
    if not 1 <= args.quality <= 100 or not 0 <= args.bad_share <= 1:
        raise ValueError(f"--quality {args.quality} --bad-share {args.bad_share}: 1 to 100 and 0 to 1 are required")
    named = []
    for split in args.splits:
        what, _, name = split.rpartition("=") if re.search(r"\]=\w+$|^\w+=\w+$", split) else (split, "", re.split(r"\[", split)[0])
        named.append((what, name))
    if len({name for _, name in named}) < len(named):
        raise ValueError(f"--splits {' '.join(args.splits)}: two would have the same name; write SPLIT=NAME")
    make_directory(Path(args.dst))
    for what, name in named:
        print(pack(open_source(absolute(args.src), what), args.dst, name, args), flush=True)


def pack(source: Source, dst: str, name: str, args: Pack) -> str:
    """Write the shards, labels and manifest of one split, going on where an earlier call stopped. Returns a line on it."""
    folder = Path(dst)
    manifest_path, progress = folder / f"{name}.json", folder / f"{name}.progress.jsonl"
    size = args.shard_images
    count = -(-len(source) // size)
    identity = {
        "format": FORMAT,
        "source": source.name,
        "images": len(source),
        "classes": list(source.classes),
        "augment": source.augment,
        "shorter_side": args.shorter_side,
        "quality": args.quality if args.shorter_side else None,
        "shard_images": size,
    }
    if (held := read_manifest(str(manifest_path))) is not None:
        _same(held, identity, manifest_path)
        return f"{manifest_path}: complete already, {held['count']} images in {len(held['shards'])} shards"
    done = _done(progress, identity, folder)
    todo = [
        _Shard(
            source=source,
            start=k * size,
            stop=min(len(source), (k + 1) * size),
            path=str(folder / f"{name}-{k:05d}-of-{count:05d}.arrayrecord"),
            shorter_side=args.shorter_side,
            quality=args.quality,
            step_timeout=args.step_timeout,
        )
        for k in range(count)
        if k not in done
    ]
    kept = len(done)
    with open(progress, "a", encoding="utf-8") as journal, tqdm(total=len(source), unit=" images", desc=name, disable=None) as bar:
        if not done and not progress.stat().st_size:
            _append(journal, identity)
        bar.update(sum(shard["seen"] for shard in done.values()))
        for shard in _written(todo, args.workers):
            done[shard["shard"]] = shard
            _append(journal, shard)
            bar.update(shard["seen"])
            bad, seen = (sum(s[key] if key == "seen" else len(s[key]) for s in done.values()) for key in ("bad", "seen"))
            if bad > args.bad_share * max(seen, BAD_FLOOR):
                last = next(s["bad"][-1] for s in done.values() if s["bad"])
                raise DataError(
                    f"{bad} of {seen} images of {source.name} cannot be decoded, more than {args.bad_share:.2%}: {last[:300]}"
                )
    shards = [done[k] for k in range(count)]
    labels = np.concatenate([shard["labels"] for shard in shards]).astype(LABELS).tobytes()
    write_atomically(folder / f"{name}.labels", labels)
    bad = [line for shard in shards for line in shard["bad"]]
    write_atomically(folder / f"{name}.bad.txt", "".join(f"{line}\n" for line in bad).encode("utf-8", "surrogateescape"))
    listed = [{key: shard[key] for key in ("file", "count", "bytes", "sha256")} for shard in shards]
    total = sum(shard["count"] for shard in shards)
    if total == 0:
        raise DataError(f"not one image of {source.name} can be decoded: {bad[0]}")
    manifest = {
        **identity, "count": total, "bad": len(bad), "shards": listed, "labels_sha256": hashlib.sha256(labels).hexdigest(),
    }  # fmt: skip
    write_atomically(manifest_path, (json.dumps(manifest | {"sha256": checksum(manifest)}, indent=1) + "\n").encode())
    progress.unlink()
    left_out = f", {len(bad)} left out ({name}.bad.txt)" if bad else ""
    went_on = f", {kept} of them from before" if kept else ""
    size_gb = sum(shard["bytes"] for shard in listed) / 1e9
    return f"{manifest_path}: {total} images in {count} shards{went_on}, {size_gb:.3f} GB{left_out}"


def _written(todo: list[_Shard], workers: int):
    """What `write_shard` returns for each, as they are done."""
    if workers == 1 or len(todo) < 2:
        yield from map(write_shard, todo)
        return
    # spawned, not forked: jax or grain may have threads already
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(write_shard, shard) for shard in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError("a process that packs was killed, or hung as it says above: the same command continues") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def write_shard(shard: _Shard) -> dict[str, Any]:
    """Write one shard, whole or not at all. Returns what the journal and the manifest say of it. Raises DataError, OSError."""
    partial, labels, bad = f"{shard.path}.tmp", [], []
    writer = array_record_module.ArrayRecordWriter(partial, _WRITER)
    try:
        for index in _watched(shard):
            try:
                data, label, name = _image(shard, index)
            except BadImage as error:
                bad.append(str(error))
                continue
            labels.append(label)
            writer.write(msgpack.packb({"image": data, "label": label, "name": "/".join(name.split("/")[-2:])}, **_ANY_NAME))
    finally:
        writer.close()
    if open_reader(partial).num_records() != len(labels):
        raise OSError(28, f"{partial} was not written whole; is the disk full?")
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = os.path.getsize(partial)
    os.replace(partial, shard.path)
    file = os.path.basename(shard.path)
    return {
        "shard": int(file.split("-")[-3]), "file": file, "count": len(labels), "seen": shard.stop - shard.start, "bytes": size,
        "sha256": digest, "labels": labels, "bad": bad,
    }  # fmt: skip


def _watched(shard: _Shard) -> Iterator[int]:
    """The shard's examples; the process that packs them ends where one takes more than its time."""
    with Watchdog(shard.step_timeout):
        for index in range(shard.start, shard.stop):
            beat(f"packing {shard.source.example_name(index)}")
            yield index


def _image(shard: _Shard, index: int) -> tuple[bytes, int, str]:
    """The image file to store, its label and name. Raises BadImage."""
    source = shard.source
    if source.decoded:
        pixels, label, name = source[index]
        picture, data = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), b""
    else:
        data, label, name = source.encoded(index)  # type: ignore[attr-defined]
        picture = decode_pillow(data, name)
    side, wanted = min(picture.size), shard.shorter_side
    if wanted is not None and side > wanted:
        width, height = (max(1, round(s * wanted / side)) for s in picture.size)
        picture, jpeg = picture.resize((width, height), Image.Resampling.BICUBIC), data[:2] == b"\xff\xd8"
    elif data:
        return data, label, name
    else:
        jpeg = False
    stored = io.BytesIO()
    if jpeg:
        picture.save(stored, "JPEG", quality=shard.quality)
    else:
        picture.save(stored, "PNG")
    return stored.getvalue(), label, name


def _append(journal, line: dict) -> None:
    journal.write(json.dumps(line) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def _done(progress: Path, identity: dict, folder: Path) -> dict[int, dict]:
    """The shards that an earlier call finished. Raises DataError where it packed something else."""
    if not progress.exists() or not progress.stat().st_size:
        return {}
    lines = []
    for text in (read_text(str(progress), "the journal") or "").splitlines():
        try:
            lines.append(parse_json(text))
        except ValueError:
            break  # the line that a kill cut off: its shard is written again
    if not lines:
        progress.unlink()
        return {}
    _same(lines[0], identity, progress)
    with open(progress, "w", encoding="utf-8") as journal:
        whole = [s for s in lines[1:] if (folder / s["file"]).exists() and (folder / s["file"]).stat().st_size == s["bytes"]]
        for line in [lines[0], *whole]:
            _append(journal, line)
    return {s["shard"]: s for s in whole}


def _same(held: dict, identity: dict, path: Path) -> None:
    other = [key for key in identity if held.get(key) != identity[key]]
    if other:
        what = ", ".join(f"{k} {held.get(k)} there, {identity[k]} now" if k != "classes" else "other classes" for k in other[:3])
        raise DataError(f"{path} is of another set ({what}): choose another DST, or remove it")


if __name__ == "__main__":
    sys.exit(run_job(Pack, run, "train.data.pack"))
