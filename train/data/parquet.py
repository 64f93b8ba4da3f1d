"""Image sets as the Hugging Face hub stores them: parquet files with a column of {bytes, path} and one of labels. Extra [parquet].

The columns and class names are those that the files' own metadata name; without such metadata `image` (or `img`) and `label`.
Parquet is read by row groups, often of a hundred images, and a shuffle wants one of each: what was read last stays, up to CACHE
bytes in each process, so a small set is read once; a large one is better packed first (`train.data.pack`), as a warning says.
"""

import contextlib
import json
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from train.data.decode import check_size
from train.data.index import described, shards
from train.data.source import BadImage, DataError, Encoded, EncodedSource

log = logging.getLogger("train.data")

CACHE = 2**29  # bytes of row groups that a process keeps
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
            with pq.ParquetFile(path) as file:
                table = file.read_row_group(group, columns=[self._column], use_threads=False)
            column = table.column(0).combine_chunks()
            return column.field("bytes") if str(column.type).startswith("struct") else column
        except Exception as error:  # arrow's and the operating system's
            raise DataError(
                f"cannot read row group {group} of {path}: {' '.join(str(error).split())[:200]}; restore the file"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Parquet(EncodedSource):
    """One split. file, group, row: int32 [K], where each example lies. targets: int32 [K], the labels."""

    name: str
    classes: tuple[str, ...] = field(repr=False)
    paths: list[str] = field(repr=False)
    file: np.ndarray = field(repr=False)
    group: np.ndarray = field(repr=False)
    row: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)
    groups: RowGroups = field(repr=False)

    def __len__(self) -> int:
        return len(self.targets)

    def encoded(self, index: int) -> Encoded:
        name = self.example_name(index)
        value = self.groups.get(int(self.file[index]), int(self.group[index]))[int(self.row[index])]
        if not value.is_valid:
            raise BadImage(
                f"cannot decode the image {name}: the row holds no bytes (a path alone is not followed); repair or remove it"
            )
        buffer = value.as_buffer()
        check_size(buffer.size, name)
        return Encoded(buffer.to_pybytes(), int(self.targets[index]), name)

    def labels(self) -> np.ndarray:
        return self.targets

    def example_name(self, index: int) -> str:
        return f"{self.paths[self.file[index]]}#{self.group[index]}.{self.row[index]}"


def open_parquet(rest: str, split: str) -> Parquet:
    """The files of a pattern, see `index.shards`. Raises DataError for what is missing, damaged, or of another layout."""
    paths = shards("parquet", rest, split)
    described(paths)
    pq = _import()
    image = label = names = None
    files, groups, rows, targets, sizes = [], [], [], [], []
    for number, path in enumerate(paths):
        try:
            with pq.ParquetFile(path) as file:
                if image is None:
                    image, label, names = _columns(file.schema_arrow, path)
                metadata = file.metadata
                column = file.read(columns=[label], use_threads=False).column(0)
        except DataError:
            raise
        except Exception as error:  # arrow's and the operating system's
            raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}; restore the file") from error
        targets.append(_labels(column, label, path))
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
    if not 0 <= labels.min() <= labels.max() < len(classes):
        outside = int(labels.min() if labels.min() < 0 else labels.max())
        raise DataError(
            f"parquet:{rest}, split {split!r}, has a label {outside} with {len(classes)} classes; use a split that is labelled"
        )
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
    )


def _columns(schema: Any, path: str) -> tuple[str, str, tuple[str, ...] | None]:
    """The columns of images and of labels, and the class names where the metadata have them."""
    features = {}
    with contextlib.suppress(ValueError, KeyError, TypeError):  # written by someone else: the usual names then
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    image = next((name for name, kind in kinds.items() if kind == "Image"), None)
    label = next((name for name, kind in kinds.items() if kind == "ClassLabel"), None)
    names = tuple(features[label]["names"]) if label and "names" in features[label] else None
    have = ", ".join(f"{field.name} ({field.type})" for field in schema)
    image = image or next((name for name in ("image", "img") if name in schema.names), None)
    label = label or next((name for name in ("label", "labels", "fine_label") if name in schema.names), None)
    if image is None or label is None or not {image, label} <= {*schema.names}:
        raise DataError(
            f"{path} has the columns {have}; an image column of {{bytes, path}} and an integer column label are required"
        )
    kind = schema.field(image).type
    leaf = image if str(kind) in ("binary", "large_binary") else f"{image}.bytes"
    if leaf != image and not (str(kind).startswith("struct") and kind.get_field_index("bytes") >= 0):
        raise DataError(f"the column {image} of {path} is {kind}; binary, or a struct with bytes, is required")
    return leaf, label, names


def _labels(column: Any, label: str | None, path: str) -> np.ndarray:
    import pyarrow.types

    if not pyarrow.types.is_integer(column.type):
        raise DataError(f"the column {label} of {path} is {column.type}; integers are required, as ClassLabel stores them")
    if column.null_count:
        raise DataError(f"the column {label} of {path} has {column.null_count} rows without a value; every image needs its label")
    return column.to_numpy().astype(np.int32)


def _import() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"the source 'parquet' is not installed ({error}); pip install 'vitcore[parquet]'") from error
    return pyarrow.parquet
