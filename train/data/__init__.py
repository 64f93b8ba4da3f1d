"""Images for a run: sources behind one interface, augmentation keyed by example, batches that do not depend on the machine.

    source = open_source("folder:PATH", "train[:99%]")
    with train_batches(source, image_size=224, channels=3, batch_size=4096, seed=0) as batches:
        batch = next(batches)              # {"image": float32 [B, Y, X, C] in [-1, 1], "label": int32 [B]}
        saved = batches.get_state()        # {"global_next_index": 4096}

Sources: `digits`; `folder:PATH` of PATH/train/CLASS/*.jpg (.png, .webp, ...); `tar:PATTERN`, WebDataset shards;
`arrayrecord:PATTERN`, what train.data.pack writes; `tfds:NAME`, what TensorFlow Datasets prepared; `parquet:PATTERN`, as the
Hugging Face hub has them; `cifar:PATH`, the binary version; `toys:TASK`, small tasks made of the digits and two photographs. In a
PATTERN {split} stands for the name of the split, as in tar:DATA/imagenet-{split}-*.tar; a folder is a pattern, too.

A part of a split is written behind its name, in brackets that apply from left to right (`train/data/select.py`):

    train[:99%]  train[99%:]  train[:800]         a range of a fixed random order of the examples; the first two share none
    train[classes=0-4]  val[classes=cat,dog]      some classes, by name or number, then numbered anew from 0
    train[shots=10]  train[shots=10:1]            ten examples of each class, and another draw of ten
    train[without=removed.json]                   all but the examples that a file lists (train.data.dedup writes it)
    train[classes=5-9][:10%]                      both

and `digits:0-4` is short for the digits of some classes, on every split.

What a run sees is a function of (data, seed, batch size) alone: never of processes, workers, threads or interruptions.
A new source is one small file with an `open_...(rest, split)` function and one line in `SOURCES`.
"""

import importlib
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from train.data.augment import AUGMENTATIONS, PREPROCESSES
from train.data.pipeline import EvalBatches, TrainBatches, eval_batches, train_batches
from train.data.select import by_names, check_classes, parse_split, select
from train.data.source import BadImage, DataError, Example, Source, said

log = logging.getLogger("train.data")

__all__ = [
    "AUGMENTATIONS",
    "PREPROCESSES",
    "SOURCES",
    "BadImage",
    "DataError",
    "EvalBatches",
    "Example",
    "Source",
    "TrainBatches",
    "absolute",
    "by_names",
    "check_classes",
    "eval_batches",
    "open_source",
    "train_batches",
]


class Scheme(NamedTuple):
    """A kind of source. usage: how it is written. open: function of (what follows the colon, the split's name). path: whether what
    follows the colon is one."""

    usage: str
    open: Callable[[str, str], Source]
    path: bool = True


def _later(module: str) -> Callable[[str, str], Source]:
    """train.data.<module>.open_<module>, imported when it is called: each source has needs that the others should not pay for."""

    def opens(rest: str, split: str) -> Source:
        return getattr(importlib.import_module(f"train.data.{module}"), f"open_{module}")(rest, split)

    return opens


SOURCES = {
    "digits": Scheme("digits", _later("digits"), path=False),
    "folder": Scheme("folder:PATH", _later("folder")),
    "tar": Scheme("tar:PATTERN", _later("tar")),
    "arrayrecord": Scheme("arrayrecord:PATTERN", _later("arrayrecord")),
    "tfds": Scheme("tfds:NAME", _later("tfds"), path=False),
    "parquet": Scheme("parquet:PATTERN", _later("parquet")),
    "cifar": Scheme("cifar:PATH", _later("cifar")),
    "toys": Scheme("toys:TASK", _later("toys"), path=False),
}


def open_source(spec: str, split: str) -> Source:
    """The images that `spec` names on the command line.

    Args:
        spec: "digits", "folder:PATH", ...: see SOURCES.
        split: "train", "val", or another name that the source has; behind it ranges and classes, as above.

    Raises:
        DataError: an unknown source or split, or whatever is wrong with the one that is named; one line.
    """
    name, parts = parse_split(split)
    scheme, _, rest = absolute(spec).partition(":")  # names of examples then mean the same in every list of them
    if scheme not in SOURCES:
        known = ", ".join(known.usage for known in SOURCES.values())
        raise DataError(f"unknown data source {spec!r}; the known ones are {known}")
    source = SOURCES[scheme].open(rest, name)
    if left_out := getattr(source, "left_out", None):
        _say_once(f"{source.name}: {left_out.line()}; python -m train.data.inspect names them")
    return select(source, parts)


@lru_cache(maxsize=256)  # a job opens a set several times
def _say_once(line: str) -> None:
    log.warning("%s", said(line))


def absolute(spec: str) -> str:
    """`spec` with its path, where it has one, made absolute: it then means the same from every directory."""
    scheme, _, rest = spec.partition(":")
    return f"{scheme}:{os.path.abspath(rest)}" if rest and scheme in SOURCES and SOURCES[scheme].path else spec
