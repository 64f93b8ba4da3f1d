"""ArrayRecord shards as `train.data.pack` writes them: random access without an index of our own, one record an image.

A record is msgpack {"image": the image file's bytes, "label": int, "name": str}. Beside the shards of a split lie SPLIT.json, with
the class names and the number of records, bytes and SHA-256 of each shard, and SPLIT.labels, every label as int32, little-endian.
"""

import json
import os
from dataclasses import dataclass, field

import msgpack
import numpy as np
from array_record.python import array_record_module  # type: ignore[attr-defined]

from train.data.index import Opened, shards
from train.data.source import BadImage, DataError, Encoded, EncodedSource, some

FORMAT = 1
LABELS = np.dtype("<i4")
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


def open_reader(path: str) -> "array_record_module.ArrayRecordReader":
    """Raises DataError."""
    try:
        reader = array_record_module.ArrayRecordReader(path, _RANDOM_ACCESS)
        if reader.ok():
            return reader
        reason = "its footer is damaged"
    except Exception as error:  # absl statuses come as several types
        reason = " ".join(str(error).split())[:200]
    raise DataError(f"cannot read the shard {path}: {reason}; restore it, or pack the set again")


@dataclass(frozen=True, kw_only=True)
class ArrayRecord(EncodedSource):
    """One split. ends: int64 [shards], the number of records up to the end of each. targets: int32 [K], the labels."""

    name: str
    classes: tuple[str, ...] = field(repr=False)
    augment: str  # type: ignore[misc]  # a packed set keeps what suited its source
    paths: list[str] = field(repr=False)
    ends: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)
    readers: Opened = field(repr=False)

    def __len__(self) -> int:
        return len(self.targets)

    def _record(self, index: int) -> dict:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        place = index - (int(self.ends[shard - 1]) if shard else 0)
        try:
            (record,) = self.readers[self.paths[shard]].read([place])
            return msgpack.unpackb(record)
        except DataError:
            raise
        except Exception as error:  # a flipped bit: the checksum of its chunk, or msgpack
            reason = " ".join(str(error).split())[:200]
            raise BadImage(f"cannot read record {place} of {self.paths[shard]}: {reason}; restore the shard") from error

    def encoded(self, index: int) -> Encoded:
        record = self._record(index)
        return Encoded(record["image"], int(self.targets[index]), record["name"])

    def labels(self) -> np.ndarray:
        return self.targets

    def example_name(self, index: int) -> str:
        return self._record(index)["name"]


def open_arrayrecord(rest: str, split: str) -> ArrayRecord:
    """The shards of a pattern, see `index.shards`. Raises DataError for a shard that is missing or cut short, or a bad manifest."""
    paths = shards("arrayrecord", rest, split)
    folder = os.path.dirname(paths[0])
    path = os.path.join(folder, f"{os.path.basename(paths[0]).partition('-')[0]}.json")
    manifest = read_manifest(path)
    if manifest is None:
        raise DataError(
            f"{paths[0]} has no {os.path.basename(path)} beside it: arrayrecord: reads what train.data.pack writes; "
            "for sets that TFDS prepared write tfds:FOLDER"
        )
    missing = sorted({s["file"] for s in manifest["shards"]} - {os.path.basename(p) for p in paths})
    if missing:
        raise DataError(
            f"of arrayrecord:{rest}, split {split!r}, the shards {some(missing)} are missing; restore them, or pack again"
        )
    counts, listed = [], []
    for shard in manifest["shards"]:
        listed.append(os.path.join(folder, shard["file"]))
        counts.append(shard["count"])
        if (size := os.path.getsize(listed[-1])) != shard["bytes"]:
            raise DataError(
                f"the shard {listed[-1]} has {size:,} bytes, not the {shard['bytes']:,} of {path}; restore it, or pack again"
            )
    total, at = sum(counts), path.removesuffix(".json") + ".labels"
    if not os.path.exists(at) or os.path.getsize(at) != total * LABELS.itemsize:
        raise DataError(f"{at} is missing or not of the {total} records that {path} counts; pack again")
    targets = np.fromfile(at, LABELS).astype(np.int32)
    if total and not 0 <= targets.min() <= targets.max() < len(manifest["classes"]):
        raise DataError(f"{at} has labels outside of the {len(manifest['classes'])} classes of {path}; pack again")
    return ArrayRecord(
        name=f"arrayrecord:{rest}/{split}",
        classes=tuple(manifest["classes"]),
        augment=manifest["augment"],
        paths=listed,
        ends=np.cumsum(counts, dtype=np.int64),
        targets=targets,
        readers=Opened(open_reader),
    )


def read_manifest(path: str) -> dict | None:
    """SPLIT.json, or None where there is none. Raises DataError for one that is damaged or of another format."""
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        if manifest["format"] == FORMAT and {"classes", "augment", "shards"} <= manifest.keys():
            return manifest
        raise ValueError(f"format {manifest['format']}")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged or of another version ({error}); restore it, or pack the set again") from error
