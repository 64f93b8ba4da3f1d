"""Class folders of images: PATH/train/<class>/*.jpg|jpeg|png and PATH/val/<class>/...; the sorted class names are the labels."""

import os
from dataclasses import dataclass, field

import numpy as np

from train.data.decode import check_header, decode
from train.data.source import DataError, Example

EXTENSIONS = (".jpg", ".jpeg", ".png")

# Files whose header is read on opening, evenly spread: a small folder is checked whole, a large one for a fifth of a second
# (0.1 ms a file; a million would take two minutes, longer on a network). The rest is checked when it is read.
HEADERS_CHECKED = 2000


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One split of a folder. files: file names, class after class. targets: int32 [K], the labels."""

    name: str
    root: str
    classes: tuple[str, ...]
    files: list[str] = field(repr=False)
    targets: np.ndarray = field(repr=False)

    augment = "inception"
    decoded = False

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.classes[self.targets[index]], self.files[index])

    def __getitem__(self, index: int) -> Example:
        path = self.path(index)
        return Example(decode(path), int(self.targets[index]), path)

    def labels(self) -> np.ndarray:
        return self.targets

    def example_name(self, index: int) -> str:
        return self.path(index)


def open_folder(rest: str, split: str) -> Folder:
    """The images below `rest`/`split`. Raises DataError for a missing or empty folder, for classes that only one split has,
    and for a file that is no image (of the headers checked)."""
    if not rest:
        raise DataError("the source 'folder' needs a path; write 'folder:PATH' with PATH/train/<class>/ and PATH/val/<class>/")
    classes, other = (_classes(os.path.join(rest, s)) for s in ("train", "val"))
    if classes != other:
        differences = [
            f"only {s}/ has {_some(sorted(set(a) - set(b)))}"
            for s, a, b in (("train", classes, other), ("val", other, classes))
            if set(a) - set(b)
        ]
        raise DataError(f"the class folders of {rest} differ: {'; '.join(differences)}; both splits need the same classes")
    root, files, counts = os.path.join(rest, split), [], []
    for c in classes:
        found = _images(os.path.join(root, c))
        files += found
        counts.append(len(found))
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    folder = Folder(name=f"folder:{rest}/{split}", root=root, classes=classes, files=files, targets=labels)
    for index in np.linspace(0, len(folder) - 1, min(len(folder), HEADERS_CHECKED)).astype(int):
        check_header(folder.path(index))
    return folder


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


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
