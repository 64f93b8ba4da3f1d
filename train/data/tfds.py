"""Sets that TensorFlow Datasets prepared as ArrayRecord, through its `data_source` reader: needs the extra [tfds], not TensorFlow.

`tfds:NAME` is a set in its usual data folder ($TFDS_DATA_DIR, ~/tensorflow_datasets), e.g. tfds:imagenet2012 or
tfds:cifar10:3.0.2; `tfds:FOLDER` one that lies elsewhere, in the folder with dataset_info.json. Nothing is downloaded or prepared.
The order is the prepared one, and ranges are cut from it as TFDS cuts them: train[:800] is the set that papers mean by it.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from train.data.encoded import EncodedSource
from train.data.index import Opened
from train.data.source import BadImage, DataError, Encoded


@dataclass(frozen=True, kw_only=True)
class Tfds(EncodedSource):
    """One split. image, label: the names of its features. length: of the split. identity: version and shards, as TFDS says
    them. readers: {split: TFDS's own data source}."""

    name: str
    split: str
    classes: tuple[str, ...] = field(repr=False)
    image: str
    label: str
    length: int
    identity: str
    readers: Opened = field(repr=False)

    shuffled = True  # ranges are TFDS's own
    sampled = 8
    slow_labels = True  # they lie in the records

    def __len__(self) -> int:
        return self.length

    def encoded(self, index: int) -> Encoded:
        row = self._row(self.split, index)
        return Encoded(row[self.image], int(row[self.label]), self.example_name(index))

    def _row(self, split: str, index: int) -> dict:
        try:
            return self.readers[split][index]
        except Exception as error:  # of many kinds, down to protobuf's
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadImage(f"cannot read {self.example_name(index)}: {reason}; prepare the set again") from error

    def labels(self) -> np.ndarray:
        """Reads every record: a minute or two for a million."""
        return np.array([int(self._row(self.split, i)[self.label]) for i in range(self.length)], np.int32)

    def contents(self):
        return (self.identity.encode(),)

    def example_name(self, index: int) -> str:
        return f"{self.name}/{index}"


@dataclass(frozen=True)
class _Open:
    """split -> data source of the set in a folder: what a worker process needs to open it anew. encoded: features left as bytes."""

    folder: str
    encoded: tuple[str, ...]

    def __call__(self, split: str) -> Any:
        tfds = _import()
        decoders = {name: tfds.decode.SkipDecoding() for name in self.encoded}
        return tfds.builder_from_directory(self.folder).as_data_source(split, decoders=decoders)


def open_tfds(rest: str, split: str) -> Tfds:
    """Raises DataError where the extra, the set, the split, or a feature of images or of labels is missing."""
    if not rest:
        raise DataError("the source 'tfds' needs a name; write 'tfds:NAME', e.g. tfds:imagenet2012, or 'tfds:FOLDER'")
    tfds = _import()
    try:
        if os.path.exists(os.path.join(rest, "dataset_info.json")):
            builder = tfds.builder_from_directory(rest)
        else:
            builder = tfds.builder(rest, try_gcs=False)
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"TFDS has no set tfds:{rest} ({reason}); correct the name, or give the folder with dataset_info.json"
        ) from error
    splits = builder.info.splits
    if not splits:
        raise DataError(f"tfds:{rest} is not prepared in {builder.data_dir}; run: tfds build {rest} --file_format=array_record")
    name = "validation" if split == "val" and "val" not in splits else split
    if name not in splits:
        raise DataError(f"tfds:{rest} has no split {split!r}; it has {', '.join(splits)}")
    features = dict(builder.info.features)
    image = _feature(features, tfds.features.Image, "image", rest)
    label = _feature(features, tfds.features.ClassLabel, "label", rest)
    images = tuple(key for key, feature in features.items() if isinstance(feature, tfds.features.Image))
    source = Tfds(
        name=f"tfds:{rest}/{name}",
        split=name,
        classes=tuple(features[label].names),
        image=image,
        label=label,
        length=splits[name].num_examples,
        identity=f"{builder.info.full_name} {list(splits[name].shard_lengths)} {splits[name].num_bytes}",
        readers=Opened(_Open(str(builder.data_dir), images)),
    )
    try:
        source.readers[name]
    except Exception as error:  # not ArrayRecord, or a shard is missing
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot read tfds:{rest}: {reason}; prepare it with --file_format=array_record") from error
    return source


def _feature(features: dict, kind: type, usual: str, rest: str) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if not found:
        have = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise DataError(
            f"tfds:{rest} has no feature of type {kind.__name__}; it has {have}; an image set with class labels is required"
        )
    return usual if usual in found else found[0]


def _import() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(f"the source 'tfds' is not installed ({error}); pip install 'vitcore[tfds]'") from error
    return tensorflow_datasets
