"""Class folders of images: PATH/train/<class>/*.jpg|jpeg|png and PATH/val/<class>/...; the sorted class names are the labels.

What files there are is listed once and kept (`index.kept`); the list is made anew when a folder's modification time says that
a file came or went. From then on opening a million files takes a look at each class folder and one read of some 30 MB.
"""

import os
from dataclasses import dataclass, field

import numpy as np

from train.data.decode import read_file
from train.data.index import Names, kept
from train.data.source import DataError, Encoded, EncodedSource, some

EXTENSIONS = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, kw_only=True)
class Folder(EncodedSource):
    """One split of a folder. files: file names, class after class. targets: int32 [K], the labels."""

    name: str
    root: str
    classes: tuple[str, ...] = field(repr=False)
    files: Names = field(repr=False)
    targets: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def encoded(self, index: int) -> Encoded:
        path = self.example_name(index)
        return Encoded(read_file(path), int(self.targets[index]), path)

    def labels(self) -> np.ndarray:
        return self.targets

    def example_name(self, index: int) -> str:
        return os.path.join(self.root, self.classes[self.targets[index]], self.files[index])


def open_folder(rest: str, split: str) -> Folder:
    """The images below `rest`/`split`. Raises DataError for a missing or empty folder, and for classes that train/ has not."""
    if not rest:
        raise DataError("the source 'folder' needs a path; write 'folder:PATH' with PATH/train/<class>/ and PATH/val/<class>/")
    root = os.path.join(rest, split)
    classes = _classes(root)
    for known in ("train", "val"):  # a set with train/ alone is cut by ranges; where both are there, they must agree
        other = os.path.join(rest, known)
        if known != split and (known == "train" or os.path.isdir(other)):
            _same(rest, {split: classes, known: _classes(other)})
    folders = [os.path.join(root, c) for c in classes]
    made_from = [[c, os.stat(folder).st_mtime_ns] for c, folder in zip(classes, folders, strict=True)]

    def build():
        found = [_images(folder) for folder in folders]
        names = Names.of(name for one in found for name in one)
        return {"block": names.block, "ends": names.ends, "counts": np.array([len(one) for one in found])}

    index = kept(f"folder {os.path.abspath(root)}", made_from, build)
    return Folder(
        name=f"folder:{rest}/{split}",
        root=root,
        classes=classes,
        files=Names(index["block"], index["ends"]),
        targets=np.repeat(np.arange(len(classes), dtype=np.int32), index["counts"]),
    )


def _same(rest: str, classes: dict[str, tuple[str, ...]]) -> None:
    (a, first), (b, second) = sorted(classes.items())
    if first != second:
        differences = [
            f"only {s}/ has {some(sorted(only))}" for s, only in ((a, {*first} - {*second}), (b, {*second} - {*first})) if only
        ]
        raise DataError(f"the class folders of {rest} differ: {'; '.join(differences)}; both splits need the same classes")


def _scan(path: str) -> list[os.DirEntry]:
    try:
        with os.scandir(path) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        wanted = "a data folder holds train/<class>/ and val/<class>/ with .jpg, .jpeg or .png files"
        raise DataError(f"cannot read the folder {path}: {error.strerror}; {wanted}") from error


def _classes(path: str) -> tuple[str, ...]:
    found = tuple(e.name for e in _scan(path) if e.is_dir())
    if not found:
        raise DataError(f"the folder {path} holds no class folders; it needs one per class with .jpg, .jpeg or .png files")
    return found


def _images(path: str) -> list[str]:
    found = [e.name for e in _scan(path) if e.name.lower().endswith(EXTENSIONS)]
    if not found:
        raise DataError(f"the class folder {path} holds no .jpg, .jpeg or .png files; add some or remove the class")
    return found
