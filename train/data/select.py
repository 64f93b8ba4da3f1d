"""Which part of a source: `train`, `train[:99%]`, `train[99%:]`, `train[100:200]`, `train[classes=0-4]`, `train[shots=10]`,
`train[without=FILE]`.

Brackets apply from left to right, each to what the one before left: `train[classes=0-4][:90%]` is nine tenths of five classes.

A range counts in a fixed random order of the examples, not in the order in which they lie: class folders lie class after class,
so that the last hundredth of them would be the last classes. The order goes by the number of examples alone (and, as members keep
their places, so does which of them come first), hence `[:99%]` and `[99%:]` never overlap, and every form of a set is cut
alike. Only a source that says `shuffled` (tfds:, whose ranges are published splits) is cut in its own order.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from train.data.files import read_text
from train.data.sampling import RANGE, SHOTS, uniforms
from train.data.source import DataError, Encoded, Example, LeftOut, Source, contents, some
from train.files import parse_json

USAGE = (
    "NAME, then any of [FROM:TO] (counts or percentages), [classes=A,B,4-9], [shots=K:DRAW], [without=FILE], e.g. train[:99%] "
    "or train[classes=0-4]"
)

_NAME = re.compile(r"[A-Za-z0-9_.+-]+")


def parse_split(split: str) -> tuple[str, list[str]]:
    """ "train[classes=0-4][:9]" -> ("train", ["classes=0-4", ":9"]); brackets of a path within them pair. Raises DataError."""
    name = _NAME.match(split)
    rest, parts = split[name.end() :] if name else "", []
    while rest.startswith("["):
        depths = np.cumsum([(letter == "[") - (letter == "]") for letter in rest])
        if 0 not in depths:
            break
        end = depths.tolist().index(0)
        parts.append(rest[1:end])
        rest = rest[end + 1 :]
    if not name or rest:
        raise DataError(f"the split {split!r} is not understood; write {USAGE}")
    return name[0], parts


def select(source: Source, parts: list[str]) -> Source:
    """`source` narrowed by each of `parts`, the insides of brackets. Raises DataError for what does not parse or leaves nothing."""
    for part in parts:
        kind, equals, value = part.partition("=")
        if not equals:
            source = _range(source, part)
        elif kind == "classes":
            source = of_classes(source, value)
        elif kind == "shots":
            source = _shots(source, value)
        elif kind == "without":
            source = _without(source, value)
        else:
            raise DataError(f"[{part}] after a split is not understood; write {USAGE}")
        if len(source) == 0:
            raise DataError(f"{source.name} holds no images: [{part}] left none; choose more")
    return source


@dataclass(frozen=True, kw_only=True)
class Selected:
    """Some examples of a source. indices: int [K] into it, ascending. relabel: int32 [its classes], or None for as it is."""

    source: Source
    name: str
    indices: np.ndarray = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    relabel: np.ndarray | None = field(default=None, repr=False)

    @property
    def augment(self) -> str:
        return self.source.augment

    @property
    def decoded(self) -> bool:
        return self.source.decoded

    @property
    def shuffled(self) -> bool:
        return getattr(self.source, "shuffled", False)

    def __len__(self) -> int:
        return len(self.indices)

    def _label(self, label: int) -> int:
        return label if self.relabel is None else int(self.relabel[label])

    def __getitem__(self, index: int) -> Example:
        image, label, name = self.source[int(self.indices[index])]
        return Example(image, self._label(label), name)

    def encoded(self, index: int) -> Encoded:
        data, label, name = self.source.encoded(int(self.indices[index]))  # type: ignore[attr-defined]
        return Encoded(data, self._label(label), name)

    def labels(self) -> np.ndarray:
        labels = self.source.labels()[self.indices]
        return labels if self.relabel is None else self.relabel[labels]

    def example_name(self, index: int) -> str:
        return self.source.example_name(int(self.indices[index]))

    def contents(self):
        yield from contents(self.source)
        yield np.asarray(self.indices, np.int64)
        if self.relabel is not None:
            yield np.asarray(self.relabel, np.int32)

    @property
    def left_out(self) -> LeftOut:
        return getattr(self.source, "left_out", LeftOut())

    @property
    def slow_labels(self) -> bool:
        return getattr(self.source, "slow_labels", False)


# --- ranges -----------------------------------------------------------------------------------------------------------------


def _range(source: Source, text: str) -> Selected:
    first, colon, last = text.partition(":")
    bounds = [_bound(word.strip(), default, len(source)) for word, default in ((first, 0), (last, len(source)))]
    if not colon or None in bounds:
        raise DataError(f"[{text}] is no range: write [FROM:TO] with counts or percentages of {len(source)} examples, e.g. [:99%]")
    rank = np.arange(len(source)) if getattr(source, "shuffled", False) else _fixed_order(len(source))
    low, high = bounds
    return Selected(source=source, name=f"{source.name}[{text}]", indices=np.sort(rank[low:high]), classes=source.classes)


def _bound(word: str, default: int, length: int) -> int | None:
    """A place in [0, length]; negative ones count from the end. None where the word is no number."""
    if not word:
        return default
    number = re.fullmatch(r"(-?)(\d+(?:\.\d+)?)%|(-?)(\d+)", word)
    if not number:
        return None
    place = round(float(number[2]) / 100 * length) if number[2] else int(number[4])
    return max(0, length - place) if (number[1] or number[3]) else min(place, length)


def _fixed_order(length: int) -> np.ndarray:
    """int [length]: a permutation that goes by the length alone."""
    return np.argsort(uniforms(0, np.zeros(length), np.arange(length), 1, RANGE)[:, 0], kind="stable")


# --- classes ----------------------------------------------------------------------------------------------------------------


def of_classes(source: Source, text: str) -> Selected:
    """The examples of some classes, which are then numbered anew from 0 in the order of their old numbers.

    text: class names, numbers of classes, ranges of numbers (both ends belong to them), with commas between.
    """
    chosen: set[int] = set()
    unknown = []
    for word in (word.strip() for word in text.split(",")):
        found = _named(word, source.classes)
        chosen.update(found)
        if not found:
            unknown.append(word)
    if unknown:
        have = f"{len(source.classes)} classes: {some(source.classes)}"
        raise DataError(f"{source.name} has no class {some(unknown)}; it has {have}; name some, or their numbers from 0")
    kept = sorted(chosen)
    relabel = np.full(len(source.classes), -1, np.int32)
    relabel[kept] = np.arange(len(kept), dtype=np.int32)
    indices = np.flatnonzero(relabel[source.labels()] >= 0)
    classes = tuple(source.classes[k] for k in kept)
    return Selected(source=source, name=f"{source.name}[classes={text}]", indices=indices, classes=classes, relabel=relabel)


def _named(word: str, classes: tuple[str, ...]) -> list[int]:
    """The numbers of the classes that `word` names: a name, a number, FROM-TO. Where all names are numbers, those count."""
    if named := [k for k, name in enumerate(classes) if name == word]:
        return named
    span = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
    if not span:
        return []
    first, last = int(span[1]), int(span[2] or span[1])
    if all(name.isascii() and name.isdecimal() for name in classes):
        numbers = {int(name): k for k, name in enumerate(classes)}
        return [k for n, k in numbers.items() if first <= n <= last] if {first, last} <= numbers.keys() else []
    return list(range(first, last + 1)) if first <= last < len(classes) else []


def _shots(source: Source, text: str) -> Selected:
    """`K` or `K:DRAW`: K examples of each class, drawn at random; a draw of fewer lies inside that of more."""
    match = re.fullmatch(r"([1-9]\d{0,8})(?::(\d{1,9}))?", text.strip())
    if not match:
        raise DataError(
            f"[shots={text}] is not understood: write the images of each class, and which draw: [shots=10], [shots=10:1]"
        )
    wanted, labels = int(match[1]), np.asarray(source.labels())
    counts = np.bincount(labels, minlength=len(source.classes))
    if few := [f"{name} has {n}" for name, n in zip(source.classes, counts.tolist(), strict=True) if n < wanted]:
        raise DataError(f"[shots={text}] wants {wanted} images of each class of {source.name}: {some(few)}; choose fewer")
    order = np.argsort(uniforms(int(match[2] or 0), np.zeros(len(labels)), np.arange(len(labels)), 1, SHOTS)[:, 0], kind="stable")
    drawn = [order[labels[order] == label][:wanted] for label in range(len(source.classes))]
    return Selected(
        source=source, name=f"{source.name}[shots={text}]", indices=np.sort(np.concatenate(drawn)), classes=source.classes
    )  # fmt: skip


def check_classes(train: Source, other: Source) -> None:
    """Raises DataError where `other` has other classes than `train`, under which its labels would mean something else."""
    if train.classes == other.classes:
        return
    raise DataError(
        f"the classes of {train.name} and {other.name} differ: "
        f"{class_difference((train.name, train.classes), (other.name, other.classes))}; "
        "both need the same class names in the same order"
    )


def class_difference(one: tuple[str, Sequence[str]], other: tuple[str, Sequence[str]]) -> str:
    """What differs between two lists of class names, each given as (whose, names)."""
    only = [
        f"only {whose} has {some(names)}"
        for (whose, mine), (_, theirs) in ((one, other), (other, one))
        if (names := [name for name in mine if name not in set(theirs)])
    ]
    return "; ".join(only) or "they come in another order, or another number of times"


def by_names(source: Source, classes: Sequence[str] | None, whose: str, *, accept: bool = False) -> tuple[Source, str]:
    """`source` with its labels numbered as `classes` are, and a line for people where that is not plain, else "".

    classes: those that a model was trained for; None where nothing says. whose: the model, for people. Taken by name where the
    names are the same in another order; by number where one side has numbers for names, or accept says so. Raises DataError
    where names, or their number, differ.
    """
    theirs, count = source.classes, len(source.classes)
    if classes is None:
        return source, f"{whose} does not say its classes: labels are taken by number"
    classes = tuple(classes)
    if classes == theirs:
        return source, ""
    if len(classes) == count and sorted(classes) == sorted(theirs) and len(set(classes)) == count:
        numbers = {name: k for k, name in enumerate(classes)}
        relabel = np.array([numbers[name] for name in theirs], np.int32)
        whole = Selected(source=source, name=source.name, indices=np.arange(len(source)), classes=classes, relabel=relabel)
        return whole, f"{source.name} has the classes of {whose} in another order: taken by name"
    plain = tuple(str(k) for k in range(count))
    if len(classes) == count and (accept or plain in (classes, theirs)):
        why = "as was asked" if accept else "one of them has only numbers"
        return source, f"the class names of {source.name} are not those of {whose}: labels are taken by number, {why}"
    how = f"{len(classes)} classes there, {count} here; " if len(classes) != count else ""
    difference = class_difference((whose, classes), (source.name, theirs))
    raise DataError(
        f"{source.name} has other classes than {whose}: {how}{difference}; give the data with the classes it was trained for"
        + ("" if how else ", or --accept-data to take labels by number")
    )


# --- exclusions -------------------------------------------------------------------------------------------------------------


def _without(source: Source, path: str) -> Selected:
    """All but the examples whose names a file lists: `removed.json` of train.data.dedup, or a text file with a name a line."""
    if (text := read_text(path, "the list")) is None:
        raise DataError(f"cannot read the list {path}: No such file or directory; give removed.json of train.data.dedup")
    try:
        names = set(parse_json(text)["removed"]) if path.endswith(".json") else set(text.splitlines())
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no list of examples ({type(error).__name__}); give removed.json of train.data.dedup") from error
    keep = np.array([source.example_name(i) not in names for i in range(len(source))], bool)
    if (~keep).sum() < len(names):
        missing = len(names) - int((~keep).sum())
        raise DataError(
            f"{missing} of the {len(names)} examples that {path} lists are not in {source.name}; is it another set's list?"
        )
    return Selected(source=source, name=f"{source.name}[without={path}]", indices=np.flatnonzero(keep), classes=source.classes)
