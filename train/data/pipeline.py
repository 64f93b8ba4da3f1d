"""Batches for training and evaluation that do not depend on how many machines, workers or threads make them.

The stream of a run is one infinite sequence of positions. Position p is example `epoch_order(seed, epoch)[p % K]` in epoch
p // K; batch s holds the positions s*B .. (s+1)*B - 1; process k of n takes the k-th of n equal blocks of it. So a row of the
global batch is the same image with the same augmentation on any number of processes, and so are the dropout masks, which
go by that row. (grain's ElasticIterator deals the positions out like cards: the same set, in an order that changes with n.)
All the state there is: {"global_next_index": p}, the position that the next batch starts with.

An image that cannot be decoded is replaced by another, which depends on (seed, index) alone, so the law above holds for damaged
sets too. Readers mark the rows where that happened; the iterator counts and logs them, and stops above a share of them.

grain does the reading: an ordered pool of threads, in worker processes if asked for. An item of it is a group of rows, since
an item costs grain some 0.1 ms: a whole batch where examples lie decoded in memory, a few files where they must be decoded.
"""

import math
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grain
import grain.experimental
import numpy as np
from absl import flags

from train.data.augment import AUGMENTATIONS, AUTHORS, PREPROCESSES, How
from train.data.decode import check_decoder
from train.data.mix import Mix
from train.data.rows import BAD, BadImages, Batch, EvalRows, TrainRows
from train.data.sampling import random_subset
from train.data.source import DataError, Source
from train.data.suspects import Reading

GROUP = 16  # files an item decodes: large against grain's 0.1 ms, small enough to spread a batch over the threads
AT_ONCE = 32  # side up to which a batch of decoded examples is one item, made by one thread: nothing in it takes long
MAX_THREADS = 16
PREFETCH = 2  # batches ready or in the making ahead of the one in use
BAD_SHARE = 0.01

_STATE = "global_next_index"


# --- which rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """Where the rows of this process stand. group divides batch // count."""

    batch: int
    index: int
    count: int
    group: int

    @property
    def groups(self) -> int:
        return self.batch // self.count // self.group

    def positions(self, start: int, item: int) -> np.ndarray:
        """int64 [group]: the positions of the `item`-th group that this process reads from batch start `start` on."""
        step, group = divmod(item, self.groups)
        first = start + step * self.batch + self.index * (self.batch // self.count) + group * self.group
        return np.arange(first, first + self.group)


@dataclass(frozen=True, kw_only=True)
class _Items:
    """The groups of rows as the random-access source that grain reads."""

    rows: TrainRows | EvalRows
    shard: _Shard
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        return self.rows(self.shard.positions(self.start, index))


def _join(groups: Sequence[Batch]) -> Batch:
    return {key: np.concatenate([g[key] for g in groups]) for key in groups[0]}


def _close(reader: list[Any]) -> None:
    while reader:
        reader.pop().close()


# --- the iterators ----------------------------------------------------------------------------------------------------------


class _Batches(Iterator[Batch]):
    """Rows through grain. Nothing starts before the first `next`; `close`, or leaving the `with` block, ends the threads."""

    def __init__(
        self, rows: TrainRows | EvalRows, shard: _Shard, *, steps: int | None, threads: int, workers: int, bad_share: float
    ):
        self._rows, self._shard, self._steps, self._threads, self._workers = rows, shard, steps, threads, workers
        self._bad = BadImages(rows, bad_share)
        self._start = 0
        self._reader: list[Any] = []  # grain's iterator, while there is one
        self._end: weakref.finalize | None = None  # closes it

    def _open(self) -> Any:
        shard, ahead = self._shard, PREFETCH * self._shard.groups
        steps = sys.maxsize // shard.groups if self._steps is None else self._steps - self._start // shard.batch
        items = _Items(rows=self._rows, shard=shard, start=self._start, length=steps * shard.groups)
        buffer = max(1, math.ceil(ahead / max(self._workers, 1)))  # of each process
        options = grain.ReadOptions(num_threads=min(self._threads, buffer), prefetch_buffer_size=buffer)
        dataset = grain.MapDataset.source(items).to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain reads its flags before it starts a process; only absl programs parse them
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=buffer))
        if shard.groups > 1:
            # Joining the groups copies the batch: in a thread of its own, so that the step does not wait for it.
            dataset = dataset.batch(shard.groups, batch_fn=_join)
            dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)
        return iter(dataset)

    def __next__(self) -> Batch:
        if not self._reader:
            self._reader = [self._open()]
            # Also where nobody closes: grain's own destructor, run last of all, finds its modules gone and says so at length.
            self._end = weakref.finalize(self, _close, self._reader)
        try:
            batch = next(self._reader[0])
        except BaseException as error:
            self.close()
            if isinstance(error, DataError):
                error.__dict__.pop("__notes__", None)  # grain's remark on how to see its own frames: not for the user
            raise
        try:
            self._bad.see(batch.pop(BAD))
        except DataError:
            self.close()
            raise
        self._start += self._shard.batch
        return batch

    @property
    def bad(self) -> int:
        """Rows so far, in this process and since it began, that held another image because theirs could not be read."""
        return self._bad.count

    def close(self) -> None:
        """Ends the threads and processes. Harmless when repeated; a later `next` starts them again where it stopped."""
        if self._end is not None:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TrainBatches(_Batches):
    """An endless iterator over {"image": [b, Y, X, C], "label": int32 [b]}, see `train_batches`; b = batch_size / processes."""

    def get_state(self) -> dict[str, int]:
        """{"global_next_index": n}, n examples of the global stream having been used: the same on every process."""
        return {_STATE: self._start}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on at a state that `get_state` returned, under any number of processes and workers and any batch size."""
        start = state.get(_STATE) if isinstance(state, dict) else None
        if not isinstance(start, int) or start < 0:
            raise ValueError(f"the loader's state is {state!r}; it must be {{'{_STATE}': n}} with an integer n >= 0")
        self.close()
        self._start = start


class EvalBatches(_Batches):
    """A finite iterator over {"image", "label", "weight"}; see `eval_batches`. len() is the number of batches."""

    def __len__(self) -> int:
        return -(-len(self._rows.source) // self._shard.batch)

    def __next__(self) -> Batch:
        if self._start >= len(self) * self._shard.batch:
            self.close()
            raise StopIteration
        return super().__next__()


def train_batches(
    source: Source,
    *,
    image_size: int,
    channels: int,
    batch_size: int,
    seed: int,
    augment: str | None = None,
    shard: tuple[int, int] = (0, 1),
    subset: int | None = None,
    subset_seed: int = 0,
    threads: int | None = None,
    workers: int = 0,
    state: dict[str, int] | None = None,
    decoder: str = "auto",
    pixels: str = "float32",
    how: How = AUTHORS,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mixup_share: str = "batch",
    bad_share: float = BAD_SHARE,
    reading: Reading | None = None,
    repeats: int = 1,
) -> TrainBatches:
    """The endless stream of training batches: a new permutation each epoch, no example left out, none twice in an epoch.

    Yields {"image": float32 [b, Y, X, C] in [-1, 1], or uint8 as `pixels` says, "label": int32 [b]}; with MixUp also
    "other_label": int32 [b] and "share": float32 [b], the target being share of label and the rest of other_label.
    Memory on the host: at most PREFETCH + 3 batches.

    Args:
        source: from `open_source`.
        image_size, channels: of the images that the model sees; channels 1 or 3.
        batch_size: of the whole run; each process gets batch_size / shard count rows, block k of the global batch.
        seed: in [0, 2**64); the order and, with epoch and example, the augmentation.
        augment: a key of AUGMENTATIONS; None takes the one that suits the source.
        shard: (index, count) of this process among those that read different data.
        subset: train on that many examples only, chosen at random by `subset_seed`.
        threads: that read and decode, in each process; None chooses.
        workers: processes that do it instead of this one; they take seconds to start, and pay off with many cores.
        state: where to go on, from `get_state`.
        decoder: a key of DECODERS; simplejpeg is faster and gives the same pixels, and auto takes it where it is installed.
        pixels: "uint8" for a quarter of the memory where the augmentation gives whole numbers ("digits" does not, and stays
            float32): 0.6 GB instead of 2.5 GB for 4096 images of 224 x 224. `vitcore.pixels.to_unit` makes [-1, 1] of either.
        how: images are cut, resized and changed, where there is a choice.
        mixup, cutmix: strengths a of MixUp and CutMix, shares being drawn from Beta(a, a); 0 for none; with both, one of the two is
            drawn each time. Needs an even batch in each process.
        mixup_share: "batch", one share for all rows of the global batch, or "row", one for each.
        bad_share: of images that cannot be read (each is replaced by another, counted and logged), the most to go on with.
        reading: of a run, what its readers mark and pass over.
        repeats: times that an example comes in an epoch, each augmented anew, within a batch or two; at most batch_size.

    Raises:
        ValueError: an argument out of range, at once. DataError, from `next`: a shard cannot be read, or too many images.
    """
    _check_choice("augmentation", augment or source.augment, AUGMENTATIONS)
    if not 0 <= seed < 2**64 or not 0 <= subset_seed < 2**64:
        raise ValueError(f"the data's seeds are {seed} and {subset_seed} (subset); each must lie in [0, 2**64)")
    if subset is not None and not 1 <= subset <= len(source):
        raise ValueError(
            f"a training subset of {subset} examples was asked of {source.name}, which has {len(source)}; ask for 1 to that many"
        )
    if not 1 <= repeats <= max(1, batch_size):
        raise ValueError(f"repeats {repeats}: from 1 to the batch's {batch_size} is required")
    mix = Mix(mixup=mixup, cutmix=cutmix, share=mixup_share)  # pyright: ignore[reportArgumentType]
    chosen = None if subset is None else random_subset(len(source), subset, subset_seed)
    place, count = _shard(source, image_size, channels, batch_size, shard, threads, workers, pairs=bool(mix))
    rows = TrainRows(
        source=source, size=image_size, channels=channels, decoder=decoder, dtype=_dtype(pixels, augment or source.augment),
        seed=seed, augment=augment or source.augment, chosen=chosen, mix=mix, batch=batch_size, how=how,
        reading=reading, repeats=repeats,
    )  # fmt: skip
    _check_reading(decoder, bad_share)
    batches = TrainBatches(rows, place, steps=None, threads=count, workers=workers, bad_share=bad_share)
    if state is not None:
        batches.set_state(state)
    return batches


def eval_batches(
    source: Source,
    *,
    image_size: int,
    channels: int,
    batch_size: int,
    preprocess: str = "resize",
    how: How = AUTHORS,
    shard: tuple[int, int] = (0, 1),
    threads: int | None = None,
    workers: int = 0,
    decoder: str = "auto",
    pixels: str = "float32",
    bad_share: float = BAD_SHARE,
    reading: Reading | None = None,
) -> EvalBatches:
    """One pass over the source: every image once, whatever the batch size and the number of processes.

    Yields {"image": as `train_batches`, "label": int32 [b], "weight": float32 [b]}: weight 1 for an image, 0 for the padding that
    fills the last batch and for an image that cannot be read. Every process yields as many batches, so collectives match.

    Args: as `train_batches`; preprocess is a key of PREPROCESSES. Raises: likewise.
    """
    _check_choice("preprocessing", preprocess, PREPROCESSES)
    _check_reading(decoder, bad_share)
    place, count = _shard(source, image_size, channels, batch_size, shard, threads, workers, pairs=False)
    rows = EvalRows(
        source=source, size=image_size, channels=channels, decoder=decoder, dtype=_dtype(pixels, "none"), preprocess=preprocess,
        how=how, reading=reading,
    )  # fmt: skip
    steps = -(-len(source) // batch_size)
    return EvalBatches(rows, place, steps=steps, threads=count, workers=workers, bad_share=bad_share)


# --- checks -----------------------------------------------------------------------------------------------------------------


def _check_choice(what: str, name: str, known: dict) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; the known ones are {', '.join(known)}")


def _check_reading(decoder: str, bad_share: float) -> None:
    check_decoder(decoder)
    if not 0 <= bad_share <= 1:
        raise ValueError(f"a share of {bad_share} bad images was allowed; it must lie in [0, 1]")


def _dtype(pixels: str, augment: str) -> Any:
    _check_choice("type of pixels", pixels, {"float32": None, "uint8": None})
    return np.uint8 if pixels == "uint8" and AUGMENTATIONS[augment].exact else np.float32


def _shard(source, image_size, channels, batch_size, shard, threads, workers, *, pairs: bool) -> tuple[_Shard, int]:
    """The checks that training and evaluation share; the place of this process, and its number of threads."""
    index, count = shard
    if image_size < 1 or channels not in (1, 3):
        raise ValueError(
            f"images of side {image_size} with {channels} channels were asked for; the side must be >= 1, channels 1 or 3"
        )
    if not 0 <= index < count:
        raise ValueError(f"the data shard is {index} of {count}; the index must lie in [0, count)")
    if batch_size < 1 or batch_size % count:
        raise ValueError(f"a batch of {batch_size} does not divide over {count} data processes; use a positive multiple of {count}")
    if len(source) == 0:
        raise ValueError(f"the source {source.name} holds no images")
    if workers < 0 or (threads is not None and threads < 1):
        raise ValueError(f"{threads} threads and {workers} workers were asked for; threads must be >= 1, workers >= 0")
    local = batch_size // count
    if pairs and local % 2:
        raise ValueError(f"MixUp takes rows by twos, and a batch of {batch_size} over {count} processes has {local}; make it even")
    at_once = source.decoded and image_size <= AT_ONCE
    groups = [g for g in range(1, min(GROUP, local) + 1) if local % g == 0 and (g % 2 == 0 or not pairs)]
    group = local if at_once else max(groups)
    if threads is None:
        threads = 1 if at_once else min(MAX_THREADS, os.cpu_count() or 1)
    return _Shard(batch=batch_size, index=index, count=count, group=group), threads
