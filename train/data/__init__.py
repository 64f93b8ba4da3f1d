"""Images for a run: sources behind one interface, augmentation keyed by example, batches that do not depend on the machine.

    source = open_source("folder:/data/imagenet", "train")
    with train_batches(source, image_size=224, channels=3, batch_size=4096, seed=0) as batches:
        batch = next(batches)              # {"image": float32 [B, Y, X, C] in [-1, 1], "label": int32 [B]}
        saved = batches.get_state()        # {"global_next_index": 4096}

What a run sees is a function of (data, seed, batch size) alone: never of processes, workers, threads or interruptions.
A new source is one small file with an `open_...(rest, split)` function and one line in `SOURCES`.
"""

from train.data.augment import AUGMENTATIONS, PREPROCESSES
from train.data.digits import open_digits
from train.data.folder import open_folder
from train.data.pipeline import EvalBatches, TrainBatches, eval_batches, train_batches
from train.data.source import DataError, Example, Source

__all__ = [
    "AUGMENTATIONS",
    "PREPROCESSES",
    "SOURCES",
    "DataError",
    "EvalBatches",
    "Example",
    "Source",
    "TrainBatches",
    "eval_batches",
    "open_source",
    "train_batches",
]

# scheme -> (how it is written on a command line, function of (what follows the colon, split))
SOURCES = {
    "digits": ("digits", open_digits),
    "folder": ("folder:PATH", open_folder),
}


def open_source(spec: str, split: str) -> Source:
    """The images that `spec` names on the command line.

    Args:
        spec: "digits", or "folder:PATH".
        split: "train" or "val".

    Raises:
        DataError: an unknown source, or whatever is wrong with the one that is named; one line.
        ValueError: a split of another name.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; a source has the splits 'train' and 'val'")
    scheme, _, rest = spec.partition(":")
    if scheme not in SOURCES:
        known = ", ".join(usage for usage, _ in SOURCES.values())
        raise DataError(f"unknown data source {spec!r}; the known ones are {known}")
    return SOURCES[scheme][1](rest, split)
