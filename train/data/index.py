"""What the sources of large sets share: tables of names, indices kept on disk, shard patterns, files held open.

An index (the files of a folder, the members of tar shards) is built once and kept below $VITCORE_CACHE, or ~/.cache/vitcore: the
data may lie where nothing can be written. A kept index carries a description of what it was built from, and is built anew
when that no longer fits. Where the cache cannot be written, the index is built each time, and a warning says so.
"""

import glob
import hashlib
import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from train.data.source import DataError, some
from train.files import atomically, make_directory, open_regular

log = logging.getLogger("train.data")

FORMAT = 3  # of kept indices; another number makes them all anew
Arrays = dict[str, np.ndarray]


# --- a million names in a few bytes each ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """A sequence of strings as one block of bytes: 8 bytes each besides their own, where a list of str takes 75."""

    block: np.ndarray = field(repr=False)  # uint8
    ends: np.ndarray = field(repr=False)  # int64 [K]

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.block[start : self.ends[index]].tobytes())


# --- indices kept on disk ---------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    return Path(os.environ.get("VITCORE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitcore")


def kept(what: str, made_from: Any, build: Callable[[], Arrays]) -> Arrays:
    """The index `what` (a kind and a path): as it was kept if `made_from` (JSON) is what it was made from, else built and kept."""
    path = cache_folder() / "indices" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.npz"
    stamp = hashlib.sha256(json.dumps([FORMAT, what, made_from]).encode()).digest()
    try:
        with open_regular(str(path)) as raw, np.load(raw, allow_pickle=False) as file:
            if file["stamp"].tobytes() == stamp:
                arrays = {key: file[key] for key in file.files if key not in ("stamp", "sum")}
                if file["sum"].tobytes() != _sum(arrays):
                    raise ValueError("it is not what was kept")
                return arrays
    except FileNotFoundError:
        pass
    except Exception as error:  # damaged: numpy and zipfile raise nearly anything
        log.warning("the kept index %s is damaged (%s): building it anew", path, type(error).__name__)
    arrays = build()
    try:
        make_directory(path.parent)
        with atomically(path, at_once=True) as file:  # several processes may build it
            said = {"stamp": np.frombuffer(stamp, np.uint8), "sum": np.frombuffer(_sum(arrays), np.uint8)}
            np.savez(file, allow_pickle=False, **said, **arrays)
    except OSError as error:
        log.warning(
            "cannot keep the index of %s in %s (%s): set VITCORE_CACHE to a writable folder", what, path.parent, error.strerror
        )
    return arrays


def _sum(arrays: Arrays) -> bytes:
    """SHA-256 of an index's arrays."""
    digest = hashlib.sha256()
    for key, array in sorted(arrays.items()):
        digest.update(f"{key} {array.dtype.str} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()


# --- shards -----------------------------------------------------------------------------------------------------------------


def shards(scheme: str, pattern: str, split: str) -> list[str]:
    """The files of a split, sorted. pattern: with {split}, *, ?, [0-9] and {000..123}; a folder means FOLDER/{split}*.

    Folders that are there under the very name that a pattern has are those folders, whatever else *, ?, [ and { mean. "val" is also
    looked for as "validation". A pattern without {split} has the one split "train". Where the name of a split is followed by *,
    what has another word behind it (train_extra-0.tar) is another split's. Raises DataError where none, or not each of a
    numbered {000..123}, is there.
    """
    if not pattern:
        raise DataError(f"the source '{scheme}' needs a pattern; write '{scheme}:PATTERN', e.g. {scheme}:DATA/{{split}}-*")
    if os.path.isdir(pattern):
        extensions = {"arrayrecord": ".arrayrecord", "parquet": ".parquet", "tar": ".tar"}
        pattern = os.path.join(pattern, "{split}*" + extensions[scheme])
    if "{split}" not in pattern and split != "train":
        raise DataError(
            f"the pattern {pattern} names no splits, so it has 'train' alone, not {split!r}; write {{split}} where they stand"
        )
    names = ("val", "validation") if split == "val" else (split,)
    open_ended = os.path.basename(pattern).startswith("{split}*")
    for name in names:
        each = {one: sorted(filter(os.path.isfile, glob.glob(one))) for one in _globs(pattern.replace("{split}", name))}
        if open_ended:
            each = {one: _of_split(name, here, pattern) for one, here in each.items()}
        missing = [one for one, here in each.items() if not here]
        if missing and len(missing) < len(each):
            raise DataError(f"of {pattern} the shards {some(missing)} are missing; restore them, or narrow the pattern")
        if not missing:
            return [path for here in each.values() for path in here]
    where = " or ".join(pattern.replace("{split}", name) for name in names)
    raise DataError(f"no file fits {where}, so {scheme} has no split {split!r} there; correct the pattern or the name of the split")


def _globs(pattern: str) -> list[str]:
    """`pattern` as glob takes it: {08..10} written out, and folders that are there taken by their names."""
    parts, literal = pattern.split("/"), 0
    for place in range(1, len(parts)):
        if not os.path.isdir("/".join(parts[:place]) or "/"):
            break
        literal = place
    folder = glob.escape("/".join(parts[:literal]))
    return ["/".join([folder, rest] if literal else [rest]) for rest in _numbered("/".join(parts[literal:]))]


def _of_split(split: str, paths: list[str], pattern: str) -> list[str]:
    """Those of `paths`, whose names begin with that of a split, that are the split's. Raises DataError where that is not clear."""
    words: dict[str, list[str]] = {}
    for path in paths:
        rest = os.path.basename(path)[len(split) :].rpartition(".")[0]
        rest = re.sub(r"[-_.][0-9a-f]{16,}$", "", rest)  # the hub puts a hash behind the number
        if not re.match(r"[A-Za-z]", rest):
            words.setdefault(re.sub(r"[-_.\d]+of(?=[-_.]\d)|[-_.\d]", "", rest), []).append(path)
    if "" in words:
        if others := sorted(path for word, found in words.items() if word for path in found):
            log.warning("%s: taken for another split's than %s: %s", pattern, split, some(map(os.path.basename, others)))
        return words[""]
    if len(words) > 1:
        first = some(os.path.basename(found[0]) for found in words.values())
        raise DataError(f"of {pattern} several sets begin with {split}: {first}; write a pattern that only one of them fits")
    return next(iter(words.values()), [])


def _numbered(pattern: str) -> list[str]:
    """{000..123} written out: "a-{08..10}.tar" -> a-08.tar, a-09.tar, a-10.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    before, after, width = pattern[: found.start()], pattern[found.end() :], len(found[1])
    return [full for n in range(int(found[1]), int(found[2]) + 1) for full in _numbered(f"{before}{n:0{width}d}{after}")]


def described(paths: Sequence[str]) -> list[list]:
    """[path, size, times] of each: what a kept index was made from. A copy may keep the time of modification, not the other."""
    try:
        return [
            [os.path.abspath(path), (status := os.stat(path)).st_size, status.st_mtime_ns, status.st_ctime_ns] for path in paths
        ]
    except OSError as error:
        raise DataError(f"cannot read the shard {error.filename}: {error.strerror}; restore it, or narrow the pattern") from error


# --- files held open --------------------------------------------------------------------------------------------------------

T = TypeVar("T")


class Opened(Generic[T]):
    """The most recently used of many open files, for all threads of a process; none of them when it is pickled.

    One that is dropped closes itself when the last thread that reads from it is done.
    """

    def __init__(self, open_one: Callable[[str], T], most: int = 128):
        self._open, self._most = open_one, most
        self._held: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, path: str) -> T:
        with self._lock:
            one = self._held.pop(path, None)
            if one is None:
                one = self._open(path)
            self._held[path] = one
            if len(self._held) > self._most:
                self._held.popitem(last=False)
            return one

    def __reduce__(self):
        return type(self), (self._open, self._most)
