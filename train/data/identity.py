"""Which images a run has seen: class names, counts and a fingerprint of each set, kept with the run, compared when it goes on.

    {"classes": ["cat", "dog"],
     "train":      {"source": "folder:PATH/train", "images": 800, "counts": [400, 400], "fingerprint": "9f86d08188...",
                    "sample": "60303ae22b..."},
     "validation": {...},
     "before":     [what stood here until --accept-data put this in its place, ...]}

A fingerprint is SHA-256 of names and sizes (and labels) in their order, not of pixels: of a million files it takes the time of
listing them. Where a set lies is no part of it. A sample is SHA-256 of the content of SAMPLED files, evenly spaced: so a set whose
files have the names and sizes of others, as those of pictures without compression have, is known from them. One file that is
replaced by another of its name and size is not, where it is none of these.
"""

import hashlib
import types
from collections.abc import Iterable
from typing import Any

import numpy as np

from train.data.select import by_names
from train.data.source import BadImage, DataError, Source, contents, some

KEY = "data_seen"  # of config.json
SAMPLED = 64  # files whose content is looked at; of a source in which that is dear, what it has as `sampled`


def fingerprint(source: Source) -> str:
    """32 hexadecimal digits that other names, sizes, labels or another order of the examples would change."""
    digest = hashlib.sha256()
    for part in contents(source):
        data = np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def sample(source: Any) -> str | None:
    """32 hexadecimal digits of the content of some files; None where that is part of the fingerprint."""
    inner = source
    while hasattr(inner, "source"):  # a selection: down to the source that it is made of
        inner = inner.source
    if source.decoded or not hasattr(source, "encoded") or not (most := getattr(inner, "sampled", SAMPLED)):
        return None
    digest = hashlib.sha256()
    for index in sorted({round(k * (len(source) - 1) / max(1, most - 1)) for k in range(most)}):
        try:
            data = source.encoded(index).data
        except BadImage:  # no other process or run can read it either: every digest leaves it out
            data = b""
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def describe(source: Source) -> dict:
    """What is kept of one set, but for its classes. counts: images of each class; None where to count is to read them all."""
    slow = getattr(source, "slow_labels", False)
    counts = None if slow else np.bincount(source.labels(), minlength=len(source.classes)).tolist()
    return {"source": source.name, "images": len(source), "counts": counts, "fingerprint": fingerprint(source),
            "sample": sample(source)}  # fmt: skip


def seen(train: Source, validation: Source) -> dict:
    """What is kept of a run's two sets, which have the same classes."""
    return {"classes": list(train.classes), "train": describe(train), "validation": describe(validation)}


def continued(
    held: dict | None, train: Source, validation: Source, *, where: str, accept: bool
) -> tuple[tuple[Source, Source], dict, list[str]]:
    """The two sets as the run in `where` is to go on with them, what to keep of them, and lines for people.

    held: what the run kept so far; None where it kept nothing, being older than this. Classes with the same names in another order
    get the run's numbers. Raises DataError where classes or images are others, unless `accept`.
    """
    now, lines = seen(train, validation), []
    if held is None:
        return (
            (train, validation),
            now,
            [f"{where} says nothing of its images: taken for those that are there now, and kept from now on"],
        )
    sources = []
    for source in (train, validation):
        one, line = by_names(source, held["classes"], f"the run in {where}", accept=accept)
        sources.append(one)
        lines += [line] if line and line not in lines else []
    now["classes"] = list(sources[0].classes)
    differences = [line for part in ("train", "validation") for line in _differences(part, held[part], now[part], now["classes"])]
    if differences and not accept:
        raise DataError(
            f"the images are not those that the run in {where} has seen: {'; '.join(differences)}; restore them, or "
            "--accept-data to go on with what is there"
        )
    before = held.get("before", [])
    if differences or held["classes"] != now["classes"]:
        before = [*before, {key: value for key, value in held.items() if key != "before"}]
        lines.append(f"going on with other images than before, as was asked: {'; '.join(differences) or 'other class names'}")
    return (sources[0], sources[1]), now | ({"before": before} if before else {}), lines


def _differences(part: str, held: dict, now: dict, classes: list[str]) -> Iterable[str]:
    if held["fingerprint"] == now["fingerprint"]:
        if held.get("sample") not in (None, now["sample"]):  # runs of before there was one have none
            yield f"{part} has files of the same names and sizes with another content"
        return
    if held["images"] != now["images"]:
        yield f"{part} had {held['images']:,} images, now {now['images']:,}"
    counts = [(a, b) for a, b in zip(held["counts"] or (), now["counts"] or (), strict=False)]
    if other := [f"{name} {a:,} for {b:,}" for name, (a, b) in zip(classes, counts, strict=False) if a != b]:
        yield f"images of a class, before and now: {some(other, 3)}"
    elif held["images"] == now["images"]:
        prints = f"fingerprint {held['fingerprint'][:8]}, now {now['fingerprint'][:8]}"
        yield f"{part} has other names or sizes of files, or another order ({prints})"


def trained_on(held: dict | None, source: Source, whose: str) -> str:
    """A line where `source` is what a model was trained on, which `held` says (of `check`), else "". whose: the model."""
    if held is None or held["train"]["fingerprint"] != fingerprint(source):
        return ""
    return (
        f"the images of {source.name} have the names and sizes of those that {whose} was trained on: if they are the same, what it "
        "gets right there says little of others"
    )


def check(held: object) -> dict | None:
    """What a config.json holds under KEY, where it is whole; None where there is nothing. Raises DataError for what is damaged."""
    if held is None:
        return None
    try:
        parts = [held[part] for part in ("train", "validation")]  # type: ignore[index]
        whole = all(
            isinstance(part["images"], int)
            and isinstance(part["fingerprint"], str)
            and isinstance(part["counts"], list | types.NoneType)
            for part in parts
        ) and all(isinstance(name, str) for name in held["classes"])  # type: ignore[index]
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise DataError(f"{KEY} of a run's config.json is damaged: restore it")
    return held  # type: ignore[return-value]
