"""Image sets as the Hugging Face hub stores them: parquet files with a column of {bytes, path} and one of labels. Extra [parquet].

The columns and class names are those that the files' own metadata name; without such metadata `image` (or `img`) and `label`.
Of several columns of a kind the one with the usual name counts, else the first. Files that number the same class names differently
are brought to the numbers of the first.

Parquet is read by row groups, often of a hundred images, and a shuffle wants one of each: what was read last stays, up to CACHE
bytes in each process, so a small set is read once; a large one is better packed first (`train.data.pack`), as a warning says.
"""

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from train.data.decode import check_size
from train.data.encoded import EncodedSource
from train.data.files import open_regular
from train.data.index import Names, described, shards
from train.data.select import class_difference
from train.data.source import BadImage, DataError, Encoded
from train.files import parse_json

log = logging.getLogger("train.data")

CACHE = 2**29  # bytes of row groups that a process keeps
IMAGE, LABEL = ("image", "img"), ("label", "labels", "fine_label")  # the usual names of columns
LARGEST = 2**31  # bytes of one row group: more is refused before it is read


class RowGroups:
    """The row groups read last, for all threads of a process; empty after pickling."""

    def __init__(self, paths: list[str], column: str):
        self._paths, self._column = paths, column
        self._held: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._reading: dict[tuple[int, int], threading.Lock] = {}

    def __reduce__(self):
        return type(self), (self._paths, self._column)

    def get(self, file: int, group: int) -> Any:
        """The images of a row group as an arrow array of bytes. Raises DataError."""
        key = (file, group)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:  # one thread reads, the others that want the same wait
            with self._lock:
                if key in self._held:
                    return self._held[key]
            images = self._read(self._paths[file], group)
            with self._lock:
                self._held[key] = images
                self._bytes += images.nbytes
                self._reading.pop(key, None)
                while self._bytes > CACHE and len(self._held) > 1:
                    self._bytes -= self._held.popitem(last=False)[1].nbytes
            return images

    def _read(self, path: str, group: int) -> Any:
        pq = _import()
        try:
            # Not one ParquetFile for all: it is not made for several threads, and its footer is read in a millisecond.
            # As a dictionary, which is as large as what is stored: an image that a file holds once and names a million times would
            # be written out a million times otherwise.
            with open_regular(path) as raw, pq.ParquetFile(raw, read_dictionary=[self._column]) as file:
                table = file.read_row_group(group, columns=[self._column], use_threads=False)
            column = table.column(0).combine_chunks()
            return column.field("bytes") if str(column.type).startswith("struct") else column
        except Exception as error:  # arrow's and the operating system's
            raise DataError(
                f"cannot read row group {group} of {path}: {' '.join(str(error).split())[:200]}; restore the file"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Parquet(EncodedSource):
    """One split. file, group, row: int32 [K], where each example lies. targets: int32 [K], the labels.
    sizes: int64, bytes of every row group."""

    name: str
    classes: tuple[str, ...] = field(repr=False)
    paths: list[str] = field(repr=False)
    file: np.ndarray = field(repr=False)
    group: np.ndarray = field(repr=False)
    row: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)
    groups: RowGroups = field(repr=False)
    sizes: np.ndarray = field(repr=False)

    sampled = 4  # a row group each

    def __len__(self) -> int:
        return len(self.targets)

    def encoded(self, index: int) -> Encoded:
        name = self.example_name(index)
        value = self.groups.get(int(self.file[index]), int(self.group[index]))[int(self.row[index])]
        if not value.is_valid or not value.value.is_valid:
            raise BadImage(
                f"cannot decode the image {name}: the row holds no bytes (a path alone is not followed); repair or remove it"
            )
        buffer = value.value.as_buffer()
        check_size(buffer.size, name)
        return Encoded(buffer.to_pybytes(), int(self.targets[index]), name)

    def labels(self) -> np.ndarray:
        return self.targets

    def contents(self):
        names = Names.of(os.path.basename(path) for path in self.paths)
        return names.block, names.ends, self.sizes, self.file, self.group, self.row, self.targets

    def example_name(self, index: int) -> str:
        return f"{self.paths[self.file[index]]}#{self.group[index]}.{self.row[index]}"


def open_parquet(rest: str, split: str) -> Parquet:
    """The files of a pattern, see `index.shards`. Raises DataError for what is missing, damaged, or of another layout."""
    paths = shards("parquet", rest, split)
    described(paths)
    pq = _import()
    image = label = names = None
    first = paths[0]
    files, groups, rows, targets, sizes = [], [], [], [], []
    for number, path in enumerate(paths):
        try:
            with open_regular(path) as raw, pq.ParquetFile(raw) as file:
                leaf, label, own = _columns(file.schema_arrow, path)
                if number == 0:
                    image, names = leaf, own
                elif leaf != image:
                    raise DataError(
                        f"the images of {path} are in the column {leaf}, those of {first} in {image}; use files of one set"
                    )
                metadata = file.metadata
                if metadata.num_rows > os.fstat(raw.fileno()).st_size:
                    raise DataError(f"{path} claims {metadata.num_rows:,} rows, more than it has bytes: no images are in there")
                column = file.read(columns=[label], use_threads=False).column(0)
        except DataError:
            raise
        except Exception as error:  # arrow's and the operating system's
            raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}; restore the file") from error
        targets.append(_numbered_as(names, own, _labels(column, label, path, own), path, first))
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            sizes.append(group.total_byte_size)
            if sizes[-1] > LARGEST:
                raise DataError(
                    f"row group {g} of {path} takes {sizes[-1]:,} bytes, more than {LARGEST:,}; write it with smaller ones"
                )
            files.append(np.full(group.num_rows, number, np.int32))
            groups.append(np.full(group.num_rows, g, np.int32))
            rows.append(np.arange(group.num_rows, dtype=np.int32))
    labels = np.concatenate(targets)
    if not len(labels):
        raise DataError(f"the files of parquet:{rest}, split {split!r}, hold no rows")
    classes = names or tuple(str(k) for k in range(int(labels.max()) + 1))
    if sum(sizes) > CACHE:
        log.warning(
            "%s: in random order an image costs a row group of %.1f MB; python -m train.data.pack makes a form with random access",
            f"parquet:{rest}/{split}",
            max(sizes) / 1e6,
        )
    return Parquet(
        name=f"parquet:{rest}/{split}",
        classes=classes,
        paths=paths,
        file=np.concatenate(files),
        group=np.concatenate(groups),
        row=np.concatenate(rows),
        targets=labels,
        groups=RowGroups(paths, str(image)),
        sizes=np.array(sizes, np.int64),
    )


def _columns(schema: Any, path: str) -> tuple[str, str, tuple[str, ...] | None]:
    """The columns of images and of labels, and the class names where the metadata have them."""
    features = {}
    with contextlib.suppress(ValueError, KeyError, TypeError):  # written by someone else: the usual names then
        features = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    image = _usual([name for name, kind in kinds.items() if kind == "Image"], IMAGE)
    label = _usual([name for name, kind in kinds.items() if kind == "ClassLabel"], LABEL)
    have = ", ".join(f"{field.name} ({field.type})" for field in schema)
    image = image or next((name for name in IMAGE if name in schema.names), None)
    label = label or next((name for name in LABEL if name in schema.names), None)
    if image is None or label is None or not {image, label} <= {*schema.names}:
        raise DataError(
            f"{path} has the columns {have}; an image column of {{bytes, path}} and an integer column label are required"
        )
    kind = schema.field(image).type
    leaf = image if str(kind) in ("binary", "large_binary") else f"{image}.bytes"
    if leaf != image and not (str(kind).startswith("struct") and kind.get_field_index("bytes") >= 0):
        raise DataError(f"the column {image} of {path} is {kind}; binary, or a struct with bytes, is required")
    names = features.get(label, {}).get("names") if kinds.get(label) == "ClassLabel" else None
    return leaf, label, tuple(map(str, names)) if isinstance(names, list) else None


def _usual(names: list[str], usual: tuple[str, ...]) -> str | None:
    return next((name for name in usual if name in names), names[0] if names else None)


def _numbered_as(names, own, labels: np.ndarray, path: str, first: str) -> np.ndarray:
    """`labels` of a file whose classes are `own` as numbers of `names`, those of the first file. Raises DataError."""
    if own == names:
        return labels
    if own is None or names is None or sorted(own) != sorted(names) or len(set(own)) < len(own):
        how = class_difference((first, names or ()), (path, own or ()))
        raise DataError(f"{path} has other classes than {first}: {how}; use files of one set")
    number = {name: k for k, name in enumerate(names)}
    return np.array([number[name] for name in own], np.int32)[labels]


def _labels(column: Any, label: str | None, path: str, names: tuple[str, ...] | None) -> np.ndarray:
    import pyarrow.types

    if not pyarrow.types.is_integer(column.type):
        raise DataError(f"the column {label} of {path} is {column.type}; integers are required, as ClassLabel stores them")
    if column.null_count:
        raise DataError(f"the column {label} of {path} has {column.null_count} rows without a value; every image needs its label")
    values, most = column.to_numpy(), len(names) if names else 2**31 - 1
    if len(values) and not (int(values.min()) >= 0 and int(values.max()) < most):
        outside = int(values.min()) if int(values.min()) < 0 else int(values.max())
        raise DataError(
            f"the column {label} of {path} has a label {outside}, 0 to {most - 1} are required; use a split that is labelled"
        )
    return values.astype(np.int32)


def _import() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"the source 'parquet' is not installed ({error}); pip install 'vitcore[parquet]'") from error
    return pyarrow.parquet
