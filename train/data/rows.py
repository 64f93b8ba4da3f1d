"""What the readers make: from positions in the stream of a run to rows of a batch, with a stand-in for what cannot be read.

A row depends on (seed, epoch, index) alone, and so does what stands in for a bad image: on (seed, index). The readers, which may be
other processes, mark such rows; `BadImages` counts and logs the marks where the run is.
"""

import contextlib
import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.data.augment import AUGMENTATIONS, PREPROCESSES, How, Images, sides
from train.data.decode import DECODERS, Picture
from train.data.mix import DRAWS as MIX_DRAWS
from train.data.mix import Mix, mixed
from train.data.sampling import MIXUP, MIXUP_BATCH, epoch_order, replacements, uniforms
from train.data.source import BadImage, DataError, Source
from train.data.suspects import Reading

log = logging.getLogger("train.data")

Batch = dict[str, np.ndarray]

PIXELS = 2**21  # decoded pixels that wait in a reader to be resized together: some ten photographs, or a single larger image
BAD_FLOOR = 1000  # the share of bad images counts from so many examples on: the first of a run may well be bad
BAD_LINES = 20  # of the log; what follows is only counted
BAD = "bad"  # int64 [b], within the pipeline: the index of the image that could not be read, -1 in good rows


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What training and evaluation share. dtype: of the images, float32 or uint8. how: they are cut and resized. reading: what a
    run marks and passes over, None for nothing."""

    source: Source
    size: int
    channels: int
    decoder: str
    dtype: Any
    how: How
    reading: Reading | None

    def read(self, index: int) -> tuple[Picture, int]:
        """Raises BadImage."""
        if self.source.decoded or not hasattr(self.source, "encoded"):
            image, label, _ = self.source[index]
            return image, label
        with self.reading.of(self.source, index) if self.reading else contextlib.nullcontext():
            data, label, name = self.source.encoded(index)  # type: ignore[attr-defined]
            return DECODERS[self.decoder](data, name), label

    def images(self, count: int) -> np.ndarray:
        return np.zeros((count, self.size, self.size, self.channels), self.dtype)


@dataclass(frozen=True, kw_only=True)
class TrainRows(Rows):
    """positions -> augmented examples. chosen: the subset's indices into the source, or None for all. batch: of the
    whole run, whose rows may share what they are mixed by. repeats: times that an example comes, one after the other `apart`
    positions further on, so that MixUp's neighbours are others."""

    seed: int
    augment: str
    chosen: np.ndarray | None
    mix: Mix
    batch: int
    repeats: int = 1

    def __call__(self, positions: np.ndarray) -> Batch:
        length = len(self.source) if self.chosen is None else len(self.chosen)
        apart = self.batch // self.repeats
        block, within = np.divmod(positions, apart * self.repeats)
        time, first = np.divmod(within, apart)
        epoch, place = np.divmod(block * apart + first, length)
        index = np.empty_like(place)
        for e in np.unique(epoch).tolist():
            index[epoch == e] = epoch_order(length, self.seed, e)[place[epoch == e]]
        if self.chosen is not None:
            index = self.chosen[index]
        augmentation = AUGMENTATIONS[self.augment]
        view = epoch * self.repeats + time  # each time the example is another picture
        draws = uniforms(self.seed, view, index, augmentation.draws(self.how))

        def finish(start: int, images: Images) -> np.ndarray:
            rows = slice(start, start + len(images))
            return augmentation.apply(images, draws[rows], self.size, self.channels, self.dtype, self.how)

        batch = {"image": self.images(0), "label": np.zeros(len(index), np.int32), BAD: np.full(len(index), -1, np.int64)}
        parts, waiting, pixels = [], [], 0
        for row, i in enumerate(index.tolist()):
            picture, batch["label"][row], replaced = self.read_or_replace(i)
            if replaced:
                batch[BAD][row] = i
            waiting.append(picture)
            pixels += math.prod(sides(picture))
            if pixels > PIXELS and not self.source.decoded:
                parts.append(finish(row + 1 - len(waiting), waiting))
                waiting, pixels = [], 0
        if waiting:
            parts.append(finish(len(index) - len(waiting), waiting))
        batch["image"] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.mix:
            by_row = self.mix.share == "row"
            key = (view, index, MIX_DRAWS, MIXUP) if by_row else (0 * index, positions // self.batch, MIX_DRAWS, MIXUP_BATCH)
            mix = mixed(batch["image"], batch["label"], uniforms(self.seed, *key), self.mix)
            batch["image"], batch["other_label"], batch["share"] = mix
        return batch

    def read_or_replace(self, index: int) -> tuple[Picture, int, bool]:
        """The example, or what stands in for it; and whether it does."""
        try:
            return *self.read(index), False
        except BadImage as error:
            for other in self.stand_ins(index):
                try:
                    return *self.read(other), True
                except BadImage:
                    continue
            raise DataError(f"{error}; and the {len(self.stand_ins(index))} images tried in its place are as bad") from error

    def stand_ins(self, index: int) -> list[int]:
        members = len(self.source) if self.chosen is None else self.chosen
        places = replacements(members if isinstance(members, int) else len(members), self.seed, index)
        return (places if isinstance(members, int) else members[places]).tolist()


@dataclass(frozen=True, kw_only=True)
class EvalRows(Rows):
    """positions -> preprocessed examples in the source's order; positions past its end, and bad images -> black, of weight 0."""

    preprocess: str

    def __call__(self, positions: np.ndarray) -> Batch:
        n = len(positions)
        batch = {
            "image": self.images(n),
            "label": np.zeros(n, np.int32),
            "weight": np.zeros(n, np.float32),
            BAD: np.full(n, -1, np.int64),
        }
        rows, waiting, pixels = [], [], 0

        def finish():
            if waiting:
                batch["image"][rows] = PREPROCESSES[self.preprocess](waiting, self.size, self.channels, self.dtype, self.how)

        for row, i in enumerate(positions.tolist()):
            if i >= len(self.source):
                break
            try:
                picture, batch["label"][row] = self.read(i)
            except BadImage:
                batch[BAD][row] = i
                continue
            batch["weight"][row] = 1
            rows.append(row)
            waiting.append(picture)
            pixels += math.prod(sides(picture))
            if pixels > PIXELS:
                finish()
                rows, waiting, pixels = [], [], 0
        finish()
        return batch


class BadImages:
    """Counts the images that could not be read, logs them, and ends the run when they are too many."""

    def __init__(self, rows: TrainRows | EvalRows, share: float):
        self._rows, self._share = rows, share
        self._named: set[int] = set()
        self.count = self._seen = 0

    def see(self, marks: np.ndarray) -> None:
        """marks: int64 [b], the index of the bad image in each row, or -1. Raises DataError above the share."""
        self._seen += len(marks)
        bad = marks[marks >= 0].tolist()
        if not bad:
            return
        self.count += len(bad)
        for index in sorted({*bad} - self._named):
            self._named.add(index)
            if len(self._named) <= BAD_LINES:
                log.warning("%s (%s)", self._reason(index), self._instead(index))
            if len(self._named) == BAD_LINES:
                log.warning("that makes %d different bad images: more are counted, not named", BAD_LINES)
        if self.count > self._share * max(self._seen, BAD_FLOOR):
            raise DataError(
                f"{self.count} of {self._seen} images of {self._rows.source.name} could not be read, more than "
                f"the {self._share:.2%} allowed; the last: {self._reason(bad[-1])}"
            )

    def _reason(self, index: int) -> str:
        try:
            self._rows.read(index)
        except DataError as error:
            return str(error)
        return f"the image {self._rows.source.example_name(index)} could not be read at first, and then could"

    def _instead(self, index: int) -> str:
        if isinstance(self._rows, EvalRows):
            return "left out of the evaluation"
        for other in self._rows.stand_ins(index):
            try:
                self._rows.read(other)
            except BadImage:
                continue
            return f"replaced by {self._rows.source.example_name(other)}"
        return "no other in its place"
