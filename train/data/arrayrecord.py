"""ArrayRecord shards as `train.data.pack` writes them: random access without an index of our own, one record an image.

A record is msgpack {"image": the image file's bytes, "label": int, "name": str}. Beside the shards of a split lie SPLIT.json, with
the class names and the number of records, bytes and SHA-256 of each shard, and SPLIT.labels, every label as int32, little-endian.
SPLIT.json has the SHA-256 of the labels and of itself, too, which are compared at each opening; those of the shards by
train.data.inspect. A record carries checksums of its own.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field

import msgpack
import numpy as np
from array_record.python import array_record_module  # type: ignore[attr-defined]

from train.data.encoded import EncodedSource
from train.data.files import open_regular, read_text
from train.data.index import Opened, shards
from train.data.source import BadImage, DataError, Encoded, some
from train.files import parse_json

FORMAT = 1
LABELS = np.dtype("<i4")
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


def open_reader(path: str) -> "array_record_module.ArrayRecordReader":
    """Raises DataError."""
    try:
        open_regular(path).close()  # the reader would wait for a pipe
        reader = array_record_module.ArrayRecordReader(path, _RANDOM_ACCESS)
        if reader.ok():
            return reader
        reason = "its footer is damaged"
    except Exception as error:  # absl statuses come as several types
        reason = " ".join(str(error).split())[:200]
    raise DataError(f"cannot read the shard {path}: {reason}; restore it, or pack the set again")


@dataclass(frozen=True, kw_only=True)
class ArrayRecord(EncodedSource):
    """One split. ends: int64 [shards], the number of records up to the end of each. targets: int32 [K], the labels.
    sums: of the shards, SHA-256."""

    name: str
    classes: tuple[str, ...] = field(repr=False)
    augment: str  # type: ignore[misc]  # a packed set keeps what suited its source
    paths: list[str] = field(repr=False)
    ends: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)
    readers: Opened = field(repr=False)
    sums: tuple[str, ...] = field(repr=False)

    sampled = 0  # `sums` are of every byte

    def __len__(self) -> int:
        return len(self.targets)

    def _record(self, index: int) -> dict:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        place = index - (int(self.ends[shard - 1]) if shard else 0)
        try:
            (record,) = self.readers[self.paths[shard]].read([place])
            found = msgpack.unpackb(record, unicode_errors="surrogateescape")
            if not _holds(found, {"image": bytes, "label": int, "name": str}):
                raise ValueError("it holds no image, label and name")
        except DataError:
            raise
        except Exception as error:  # a flipped bit: the checksum of its chunk, or msgpack
            reason = " ".join(str(error).split())[:200]
            raise BadImage(f"cannot read record {place} of {self.paths[shard]}: {reason}; restore the shard") from error
        if found["label"] != self.targets[index]:
            raise DataError(
                f"record {place} of {self.paths[shard]} has the label {found['label']}, the labels beside it say "
                f"{self.targets[index]}: they are not of one set; restore them, or pack again"
            )
        return found

    def encoded(self, index: int) -> Encoded:
        record = self._record(index)
        return Encoded(record["image"], int(self.targets[index]), record["name"])

    def labels(self) -> np.ndarray:
        return self.targets

    def contents(self):
        yield from (one.encode() for one in self.sums)
        yield self.targets

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
    with open_regular(at) as file:
        data = file.read()
    if manifest.get("labels_sha256") not in (None, hashlib.sha256(data).hexdigest()):
        raise DataError(f"{at} is not what was packed (SHA-256 differs); restore it, or pack again")
    targets = np.frombuffer(data, LABELS).astype(np.int32)
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
        sums=tuple(shard["sha256"] for shard in manifest["shards"]),
    )


def read_manifest(path: str) -> dict | None:
    """SPLIT.json, or None where there is none. Raises DataError for one that is damaged or of another format."""
    if (text := read_text(path, "the manifest")) is None:
        return None
    try:
        manifest = parse_json(text)
        if manifest["format"] != FORMAT or not {"classes", "augment", "shards"} <= manifest.keys():
            raise ValueError(f"format {manifest['format']}")
        if manifest.get("sha256") not in (None, checksum(manifest)):
            raise ValueError("SHA-256 differs")
        of_shard = {"file": str, "count": int, "bytes": int, "sha256": str}
        if not _holds(manifest, {"classes": list, "augment": str, "shards": list}) or not (
            all(isinstance(name, str) for name in manifest["classes"])
            and all(_holds(shard, of_shard) and shard["count"] >= 0 for shard in manifest["shards"])
            and len({shard["file"] for shard in manifest["shards"]}) == len(manifest["shards"])
        ):
            raise ValueError("its classes or shards are none")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged or of another version ({error}); restore it, or pack the set again") from error


def _holds(found: object, kinds: dict[str, type]) -> bool:
    """Whether an object from a file has these fields."""
    return isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in kinds.items())


def checksum(manifest: dict) -> str:
    """SHA-256 of all that a manifest says, but for itself."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
