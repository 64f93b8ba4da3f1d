"""WebDataset shards: tar files in which KEY.jpg (.jpeg, .png) and KEY.cls, or KEY.json with "label", lie one after the other.

The headers of all shards are read once and the places of the images kept (`index.kept`), so an image is one read at a known
offset and the shuffle is global and exact. Nothing is ever extracted: member names are names for a log, never paths, and
links, devices and folders are passed over. Class names stand in classes.txt beside the shards, one a line; a .cls then holds a
number or one of them. Without it the classes are the numbers up to the largest label.
"""

import json
import logging
import os
import tarfile
from dataclasses import dataclass, field

import numpy as np

from train.data.decode import check_size
from train.data.index import Arrays, Names, Opened, described, kept, shards
from train.data.source import DataError, Encoded, EncodedSource, some
from train.data.tar_headers import Bounded

log = logging.getLogger("train.data")

IMAGES = ("jpg", "jpeg", "png")
LABEL_BYTES = 2**16  # a label that is longer is none

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class Descriptor:
    """A file that is open as long as someone holds this."""

    def __init__(self, path: str):
        try:
            self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot read the shard {path}: {error.strerror}; restore it") from error

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


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


def open_tar(rest: str, split: str) -> Tar:
    """The shards of a pattern, see `index.shards`. Raises DataError for a shard that is missing, cut short or compressed, and for
    labels that are missing, no numbers, or no known classes."""
    paths = shards("tar", rest, split)
    names = class_names(os.path.dirname(paths[0]))
    known = {name: k for k, name in enumerate(names or ())}

    def build() -> Arrays:
        log.info("indexing %d shards of %s: once", len(paths), rest)
        rows = [(shard, *row) for shard, path in enumerate(paths) for row in _members(path, known)]
        shard, start, size, label, keys = zip(*rows, strict=True) if rows else ((),) * 5
        table = Names.of(keys)
        return {
            "shard": np.array(shard, np.int32), "start": np.array(start, np.int64), "size": np.array(size, np.int64),
            "label": np.array(label, np.int32), "block": table.block, "ends": table.ends,
        }  # fmt: skip

    index = kept(f"tar {os.path.abspath(rest)} {split}", [described(paths), names], build)
    if not len(index["label"]):
        raise DataError(f"the shards of tar:{rest}, split {split!r}, hold no .jpg, .jpeg or .png members")
    return Tar(
        name=f"tar:{rest}/{split}",
        classes=names or tuple(str(k) for k in range(int(index["label"].max()) + 1)),
        paths=paths,
        shard=index["shard"],
        start=index["start"],
        size=index["size"],
        targets=index["label"],
        keys=Names(index["block"], index["ends"]),
        opened=Opened(Descriptor),
    )


def class_names(folder: str) -> tuple[str, ...] | None:
    """The lines of classes.txt in `folder`; None where there is no such file."""
    try:
        with open(os.path.join(folder, "classes.txt"), encoding="utf-8") as file:
            return tuple(line.strip() for line in file if line.strip())
    except FileNotFoundError:
        return None


def _members(path: str, known: dict[str, int]) -> list[tuple[int, int, int, str]]:
    """(start, size, label, name) of each image in a shard, in its order."""
    found: list[tuple[int, int, int, str]] = []
    key, image, label = None, None, None

    def finish():
        if image is not None:
            if label is None:
                raise DataError(
                    f"in the shard {path} {image[2]} has no label: a .cls, or a .json with 'label', must follow or precede it"
                )
            found.append((image[0], image[1], label, image[2]))

    with open(path, "rb") as file:
        start = file.read(2)
        if start in _COMPRESSED:
            raise DataError(
                f"the shard {path} is compressed ({_COMPRESSED[start]}), so nothing in it can be read alone; decompress it"
            )
        file.seek(0)
        length = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Bounded) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[misc]  # tarfile would keep them all
                    if not member.isreg() or member.sparse is not None:  # type: ignore[attr-defined]
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    if (folder, stem) != key:
                        finish()
                        key, image, label = (folder, stem), None, None
                    extension = extension.rpartition(".")[2].lower()
                    if extension in IMAGES:
                        image = (member.offset_data, member.size, member.name)
                    elif extension == "cls" or (extension == "json" and label is None):
                        label = _label(file, member, extension, path, known)
                finish()
                end = tar.offset
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"the shard {path} is damaged or cut short ({error}); restore it") from error
        # tarfile takes a header that is cut off or destroyed for the end; a whole file ends with blocks of zeros.
        file.seek(end)
        if file.read(512) != bytes(512):
            raise DataError(f"the shard {path} is damaged or cut short (at byte {end} of {length}); restore it")
    return found


def _label(file, member: tarfile.TarInfo, extension: str, path: str, known: dict[str, int]) -> int | None:
    where = f"in the shard {path} the label {member.name}"
    if member.size > LABEL_BYTES:
        raise DataError(f"{where} has {member.size:,} bytes; a number or a class name is required")
    text = os.pread(file.fileno(), member.size, member.offset_data).decode("utf-8", "replace")
    value: object = text.strip()
    if extension == "json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where} is no JSON; repair it") from error
        if not isinstance(content, dict) or "label" not in content:
            return None
        value = content["label"]
    return as_label(value, known, where)


def as_label(value: object, known: dict[str, int], where: str) -> int:
    """A label as it is written, a number or one of the names `known`, as a number. Raises DataError, beginning with `where`."""
    if isinstance(value, str) and value in known:
        return known[value]
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < (len(known) or 2**31):
        return value
    wanted = f"a number below {len(known)} or one of the names in classes.txt ({some(known, 3)})" if known else "a number from 0 up"
    raise DataError(f"{where} is {value!r}; {wanted} is required")
