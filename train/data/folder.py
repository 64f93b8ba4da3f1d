"""Class folders of images: PATH/train/<class>/*.jpg ... and PATH/val/<class>/...; the class names, sorted, are the labels.

Folders named by numbers are sorted by number, so that label 10 is folder 10. What files there are, with their sizes, is listed
at each opening, many folders at a time: a folder's time of change does not tell (a copy keeps it), and a list of a million files
takes seconds. What is no image by its name, hidden files and folders within a class are left out, counted and said.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from train.data.decode import EXTENSIONS, read_file
from train.data.encoded import EncodedSource
from train.data.index import Names
from train.data.source import DataError, Encoded, LeftOut, some

THREADS = 16  # that list folders: on a network each waits
_KINDS = f"{', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]} files"


@dataclass(frozen=True, kw_only=True)
class Folder(EncodedSource):
    """One split of a folder. files: file names, class after class. sizes: int64 [K], bytes. targets: int32 [K], the labels."""

    name: str
    root: str
    classes: tuple[str, ...] = field(repr=False)
    files: Names = field(repr=False)
    sizes: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)
    left_out: LeftOut = field(repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def encoded(self, index: int) -> Encoded:
        path = self.example_name(index)
        return Encoded(read_file(path), int(self.targets[index]), path)

    def labels(self) -> np.ndarray:
        return self.targets

    def example_name(self, index: int) -> str:
        return os.path.join(self.root, self.classes[self.targets[index]], self.files[index])

    def contents(self):
        return self.files.block, self.files.ends, self.sizes, self.targets


def open_folder(rest: str, split: str) -> Folder:
    """The images of a split (`_root`). Raises DataError for a missing or empty folder, and for classes that train/ has not."""
    if not rest:
        raise DataError("the source 'folder' needs a path; write 'folder:PATH' with PATH/train/<class>/ and PATH/val/<class>/")
    root = _root(rest, split)
    left_out = LeftOut()
    classes = _classes(root, left_out)
    for known in ("train", "val"):  # either may be alone, to be cut by ranges or to be measured on; both must agree
        other = os.path.join(rest, known)
        if known != split and os.path.isdir(other):
            _same(rest, {split: classes, known: _classes(other, LeftOut())})
    with ThreadPoolExecutor(THREADS) as pool:
        listed = list(pool.map(_images, [os.path.join(root, name) for name in classes]))
    return Folder(
        name=f"folder:{root}",
        root=root,
        classes=classes,
        files=Names.of(name for names, _, _ in listed for name in names),
        sizes=np.array([size for _, sizes, _ in listed for size in sizes], np.int64),
        targets=np.repeat(np.arange(len(classes), dtype=np.int32), [len(names) for names, _, _ in listed]),
        left_out=sum((one for _, _, one in listed), left_out),
    )


def _root(rest: str, split: str) -> str:
    """Where a split's class folders are: `rest`/`split`; for val also `rest`/validation, or `rest` itself where it has folders and
    none is a split."""
    root, other = os.path.join(rest, split), os.path.join(rest, "validation")
    if split != "val" or os.path.isdir(root):
        return root
    if os.path.isdir(other):
        return other
    alone = not any(os.path.isdir(os.path.join(rest, known)) for known in ("train", "test"))
    return rest if alone and os.path.isdir(rest) and any(entry.is_dir() for entry in _scan(rest, LeftOut())) else root


def _same(rest: str, classes: dict[str, tuple[str, ...]]) -> None:
    (a, first), (b, second) = sorted(classes.items())
    if first != second:
        differences = [
            f"only {s}/ has {some(sorted(only))}" for s, only in ((a, {*first} - {*second}), (b, {*second} - {*first})) if only
        ]
        raise DataError(f"the class folders of {rest} differ: {'; '.join(differences)}; both splits need the same classes")


def _scan(path: str, left_out: LeftOut) -> list[os.DirEntry]:
    """What is in a folder but for hidden entries, by name."""
    try:
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda e: e.name)
    except OSError as error:
        wanted = f"a data folder holds train/<class>/ and val/<class>/ with {_KINDS}"
        raise DataError(f"cannot read the folder {path}: {error.strerror}; {wanted}") from error
    for entry in found:
        if entry.name.startswith("."):
            left_out.add("hidden", entry.path)
    return [entry for entry in found if not entry.name.startswith(".")]


def _classes(path: str, left_out: LeftOut) -> tuple[str, ...]:
    found = []
    for entry in _scan(path, left_out):
        if entry.is_dir():
            found.append(entry.name)
        else:
            left_out.add("beside the class folders", entry.path)
    if not found:
        raise DataError(f"the folder {path} holds no class folders; it needs one per class with {_KINDS}")
    if all(name.isascii() and name.isdecimal() for name in found):
        found.sort(key=lambda name: (int(name), name))
    return tuple(found)


def _images(path: str) -> tuple[list[str], list[int], LeftOut]:
    """Names and sizes of the images in a class folder, and what else is there."""
    names, sizes, left_out = [], [], LeftOut()
    for entry in _scan(path, left_out):
        if entry.name.lower().endswith(EXTENSIONS):
            names.append(entry.name)
            try:
                sizes.append(entry.stat().st_size)
            except OSError:  # a link to nothing: a bad image, once it is read
                sizes.append(-1)
        elif entry.is_dir():
            left_out.add("folders within a class", entry.path)
        else:
            left_out.add(os.path.splitext(entry.name)[1].lower() or "without an ending", entry.path)
    if not names:
        there = f" but {left_out.line()}" if left_out else ""
        raise DataError(f"the class folder {path} holds no {_KINDS}{there}; add some or remove the class")
    return names, sizes, left_out
