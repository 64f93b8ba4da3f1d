"""WebDataset shards: tar files in which KEY.jpg (.png, .webp, ...) and KEY.cls, or KEY.json with "label", lie one after the other.

The headers of all shards are read once and the places of the images kept (`index.kept`), so an image is one read at a known
offset and the shuffle is global and exact. Nothing is ever extracted: member names are names for a log, never paths, and devices
and folders are passed over. Which members make a sample: `train/data/tar_samples.py`. Class names stand in classes.txt beside the
shards, one a line; a .cls then holds a number or one of them (a name that stands there twice needs numbers). Without it the classes
are the numbers up to the largest label.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from train.data.decode import check_size
from train.data.encoded import EncodedSource
from train.data.files import open_regular, read_text
from train.data.index import Arrays, Names, Opened, described, kept, shards
from train.data.source import DataError, Encoded, LeftOut, some
from train.data.tar_headers import Member, TarError, members
from train.data.tar_samples import IMAGES, samples
from train.files import parse_json

log = logging.getLogger("train.data")

LABEL_BYTES = 2**16  # a label that is longer is none

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class Descriptor:
    """A file that is open as long as someone holds this."""

    def __init__(self, path: str):
        try:
            with open_regular(path) as file:
                self.number = os.dup(file.fileno())
        except OSError as error:
            raise DataError(f"cannot read the shard {path}: {error.strerror}; restore it") from error

    def __del__(self, close=os.close):  # bound here: at the end of the process `os` may be gone
        if hasattr(self, "number"):
            close(self.number)


@dataclass(frozen=True, kw_only=True)
class Tar(EncodedSource):
    """One split. shard: int32 [K], into paths. start, size: int64 [K], of the image in its shard. targets: int32 [K], labels."""

    name: str
    classes: tuple[str, ...] = field(repr=False)
    paths: list[str] = field(repr=False)
    shard: np.ndarray = field(repr=False)
    start: np.ndarray = field(repr=False)
    size: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)
    keys: Names = field(repr=False)
    left_out: LeftOut = field(repr=False)
    opened: Opened[Descriptor] = field(repr=False)

    def __len__(self) -> int:
        return len(self.targets)

    def encoded(self, index: int) -> Encoded:
        name, path, size = self.example_name(index), self.paths[self.shard[index]], int(self.size[index])
        check_size(size, name)
        held = self.opened[path]
        try:
            data = os.pread(held.number, size, int(self.start[index]))
        except OSError as error:
            raise DataError(f"cannot read the shard {path}: {error.strerror}; restore it") from error
        if len(data) < size:
            raise DataError(f"the shard {path} has become shorter since it was indexed; restore it and start again")
        return Encoded(data, int(self.targets[index]), name)

    def labels(self) -> np.ndarray:
        return self.targets

    def example_name(self, index: int) -> str:
        return f"{self.paths[self.shard[index]]}/{self.keys[index]}"

    def contents(self):
        names = Names.of(os.path.basename(path) for path in self.paths)
        return names.block, names.ends, self.shard, self.start, self.size, self.keys.block, self.keys.ends, self.targets


def open_tar(rest: str, split: str) -> Tar:
    """The shards of a pattern, see `index.shards`. Raises DataError for a shard that is missing, cut short or compressed, and for
    labels that are missing, no numbers, or no known classes."""
    paths = shards("tar", rest, split)
    names = class_names(os.path.dirname(paths[0]))

    def build() -> Arrays:
        log.info("indexing %d shards of %s: once", len(paths), rest)
        left_out, known = LeftOut(), ClassNames(names)
        rows = [(shard, *row) for shard, path in enumerate(paths) for row in _images(path, known, left_out)]
        shard, start, size, label, keys = zip(*rows, strict=True) if rows else ((),) * 5
        table, aside = Names.of(keys), Names.of([json.dumps(left_out.found)])
        return {
            "shard": np.array(shard, np.int32), "start": np.array(start, np.int64), "size": np.array(size, np.int64),
            "label": np.array(label, np.int32), "block": table.block, "ends": table.ends, "left_out": aside.block,
        }  # fmt: skip

    index = kept(f"tar {os.path.abspath(rest)} {split}", [described(paths), names], build)
    left_out = LeftOut({what: (n, tuple(some)) for what, (n, some) in json.loads(index["left_out"].tobytes()).items()})
    if not len(index["label"]):
        there = f" but {left_out.line()}" if left_out else ""
        raise DataError(f"the shards of tar:{rest}, split {split!r}, hold no {', '.join('.' + i for i in IMAGES)} members{there}")
    return Tar(
        name=f"tar:{rest}/{split}",
        classes=names or tuple(str(k) for k in range(int(index["label"].max()) + 1)),
        paths=paths,
        shard=index["shard"],
        start=index["start"],
        size=index["size"],
        targets=index["label"],
        keys=Names(index["block"], index["ends"]),
        left_out=left_out,
        opened=Opened(Descriptor),
    )


class ClassNames:
    """Class names to numbers. count: of classes, 0 where there are no names. numbers: {name: number, -1 where several have it}."""

    def __init__(self, names: Sequence[str] | None):
        self.count = len(names or ())
        self.numbers: dict[str, int] = {}
        for number, name in enumerate(names or ()):
            self.numbers[name] = -1 if name in self.numbers else number


def class_names(folder: str) -> tuple[str, ...] | None:
    """The lines of classes.txt in `folder`; None where there is no such file."""
    text = read_text(os.path.join(folder, "classes.txt"), "the class names")
    return None if text is None else tuple(line.strip() for line in text.splitlines() if line.strip())


def _images(path: str, known: ClassNames, left_out: LeftOut) -> list[tuple[int, int, int, str]]:
    """(start, size, label, name) of each image in a shard, in its order."""
    found: list[tuple[int, int, int, str]] = []
    with open_regular(path) as file:
        start = os.pread(file.fileno(), 2, 0)
        if start in _COMPRESSED:
            raise DataError(
                f"the shard {path} is compressed ({_COMPRESSED[start]}), so nothing in it can be read alone; decompress it"
            )
        try:
            for image, labels in samples(members(file), path, left_out):
                said = (_label(file, label, path, known) for label in labels)
                label = next((one for one in said if one is not None), None)
                if label is None:
                    raise DataError(f"in the shard {path} {image.name} has no label: its .json holds no 'label'")
                found.append((image.start, image.size, label, image.name))
        except TarError as error:
            raise DataError(f"the shard {path} is damaged or cut short ({error}); restore it") from error
    return found


def _label(file, member: Member, path: str, known: ClassNames) -> int | None:
    where = f"in the shard {path} the label {member.name}"
    if member.size > LABEL_BYTES:
        raise DataError(f"{where} has {member.size:,} bytes; a number or a class name is required")
    text = os.pread(file.fileno(), member.size, member.start).decode("utf-8", "surrogateescape")
    value: object = text.strip()
    if member.name.lower().endswith(".json"):
        try:
            content = parse_json(text)
        except ValueError as error:
            raise DataError(f"{where} is no JSON; repair it") from error
        if not isinstance(content, dict) or "label" not in content:
            return None
        value = content["label"]
    return as_label(value, known, where)


def as_label(value: object, known: ClassNames, where: str) -> int:
    """A label as it is written, a number or one of the `known` names, as a number. Raises DataError, beginning with `where`."""
    count = known.count
    if isinstance(value, str) and value in known.numbers:
        if (label := known.numbers[value]) >= 0:
            return label
        raise DataError(f"{where} is {value!r}, a name that several classes in classes.txt have; its number is required")
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < (count or 2**31):
        return value
    wanted = (
        f"a number below {count} or one of the names in classes.txt ({some(known.numbers, 3)})" if count else "a number from 0 up"
    )
    raise DataError(f"{where} is {value!r}; {wanted} is required")
