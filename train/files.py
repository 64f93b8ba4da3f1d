"""Files that survive a loss of power: what is written is on the disk, under its name, before anything is built on it.

A file's bytes are on the disk after an fsync of the file, its name after an fsync of the directory that holds it; a rename is one
moment for whoever reads, and is on the disk after an fsync of the directory. On gs:// an object is there when its upload returns.
"""

import contextlib
import errno
import io
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from etils import epath

MOST_TEXT = 2**26  # bytes of a list, a manifest, a configuration or class names: a million names have a third of that


def open_regular(path: str) -> BinaryIO:
    """A regular file, open for reading, local or on gs://. Raises OSError for whatever is none, without waiting for it."""
    if "://" in path:
        return cast(BinaryIO, epath.Path(path).open("rb"))
    # Through open, which also closes what it refuses (a directory); a descriptor of our own stayed open.
    file = open(  # noqa: SIM115
        path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)
    )
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "it is no regular file", path)
    except BaseException:
        file.close()
        raise
    return file


def text_of(path: str | os.PathLike) -> str:
    """The text of a small file, local or on gs://. OSError, also for what is no regular file; ValueError for what is no UTF-8, or
    has more than MOST_TEXT bytes."""
    if "://" in os.fspath(path):
        return epath.Path(path).read_text()
    with open_regular(os.fspath(path)) as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST_TEXT:
            raise ValueError(f"it has {size:,} bytes, more than {MOST_TEXT:,}")
        return file.read().decode()


def parse_json(text: str | bytes) -> Any:
    """json.loads of what somebody else may have written. ValueError too for lists within lists beyond Python's stack, of which json
    raises RecursionError. (`vitcore.json_text` has it as well: a worker that reads images does not load the model.)"""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None


def sync(path: str | os.PathLike) -> None:
    """A file's bytes, or a directory's names, onto the disk. OSError where the disk fails; a file system that cannot sync a
    directory is left alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: str | os.PathLike) -> None:
    """Every file and every directory below a local directory, and itself, onto the disk."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            if stat.S_ISREG(os.lstat(os.path.join(folder, name)).st_mode):
                sync(os.path.join(folder, name))
        sync(folder)


def make_directory(path: epath.Path | Path) -> None:
    """A directory and what it lies in, where they are missing; local ones are on the disk on return. OSError."""
    if "://" in str(path):
        return path.mkdir(parents=True, exist_ok=True)
    path = Path(os.path.abspath(path))
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


@contextlib.contextmanager
def atomically(path: epath.Path | Path, *, at_once: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which behind the block stands under `path`, whole, also after a loss of power, and after an exception not at
    all; local or gs://. at_once: several processes may do so at once. Modes follow the umask; a symbolic link at `path` gives way
    to the file. OSError."""
    if "://" in str(path):
        buffer = io.BytesIO()
        yield buffer
        path.write_bytes(buffer.getvalue())  # an object appears when it is whole
        return
    partial = path.parent / (f"{path.name}.{secrets.token_hex(4)}.tmp" if at_once else f"{path.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)  # left by a process that was killed, or put there: what a link points to is not ours to write
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    sync(path.parent)


def write_atomically(path: epath.Path | Path, content: str | bytes) -> None:
    """A file's new content, as `atomically`."""
    with atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def read_object(path: epath.Path, *, cure: str, holding: tuple[str, ...] = (), wrong: str = "no object") -> dict:
    """The JSON object in a file, which holds an object under each name of `holding`. ValueError, in one line, for another file:
    that it is damaged (`wrong`, where it is JSON), and what to do, `cure`. OSError."""
    try:
        held = parse_json(text_of(path))
        if not isinstance(held, dict) or not all(isinstance(held.get(name), dict) for name in holding):
            raise ValueError(wrong)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {cure}") from None
    return held


def write_picture(figure, path: epath.Path | Path) -> None:
    """A matplotlib figure as a PNG, as `write_atomically`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    write_atomically(path, png.getvalue())
