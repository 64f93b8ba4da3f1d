"""Images that end a run: which ones its readers had in hand when its process ended, and which of them are to blame.

A decoder that hangs, or takes all the memory there is, ends the process without a word of which image it was. So a reader marks
what it is about to decode in a file mapped into memory, which outlives the process and costs some microseconds; a run that begins,
or goes on, finds there what was in hand. Most of that is innocent, for whatever ended the run caught other readers at work: each is
decoded again, in a process of its own with a limit of time and memory. What fails there is bad from then on, like any image that
cannot be decoded; it is named, and listed in the run's directory. The others change nothing: the run is the unbroken one.

    OUT/reading/SOURCE.HOST.PID.marks   the indexes of one process, 0 where a slot is free, index + 1 otherwise
    OUT/stopped_by.json                 what was to blame: {"images": [{"source", "index", "name", "why"}]}; a mended image's entry
                                        may be removed

Not on gs://, where nothing can be mapped.
"""

import contextlib
import hashlib
import json
import mmap
import os
import pickle
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from train import distributed
from train.data.source import BadImage, Source, said
from train.files import make_directory, open_regular, read_object, write_atomically
from train.signals import asked, beat, of_this_process

LISTED = "stopped_by.json"
SECONDS = 60.0  # for one image: what `decode.MAX_WORK` lets pass takes some 17
MEMORY = 2**31  # bytes beside those of the interpreter: the largest image and its file take 1.1 GB
_SLOTS = 256  # images that one process can have in hand; grain's threads are 16
_WORD = struct.Struct("<q")
_LOOK = 0.25  # seconds between two looks at whether to go on


class _Marks:
    """The mapped file of one process and source."""

    def __init__(self, path: Path):
        self._free: list[int] = []  # pop and append of a list are atomic between threads
        with contextlib.suppress(OSError):  # a full disk ends no reader: it goes on without marks
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            with open(descriptor, "r+b") as file:
                file.write(bytes(_SLOTS * _WORD.size))  # a hole would have no room on the disk, and touching it be a SIGBUS
                file.flush()
                self._map = mmap.mmap(descriptor, 0)
            self._free.extend(range(_SLOTS))

    @contextlib.contextmanager
    def of(self, index: int) -> Iterator[None]:
        try:
            slot = self._free.pop()
        except IndexError:  # no file, or more in hand than anything here reads at once
            yield
            return
        _WORD.pack_into(self._map, slot * _WORD.size, index + 1)
        try:
            yield
        finally:
            _WORD.pack_into(self._map, slot * _WORD.size, 0)
            self._free.append(slot)


_current: "list[Reading]" = []
_open: dict[tuple[str, str, int], _Marks] = {}  # of this process: a worker, to which a `Reading` is pickled, has its own


def current() -> "Reading | None":
    """The `Reading` of the run that this process is in, for a measurement within it."""
    return _current[-1] if _current else None


@lru_cache
def _key(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:12]


class Reading:
    """What the readers of a run mark, and what they pass over.

    directory: of the run. sources: that it reads. decoder: a key of DECODERS. seconds: that one image may take when it is looked at
    again. Before `begin` nothing is marked and nothing passed over.
    """

    def __init__(self, directory: os.PathLike, sources: tuple[Source, ...], *, decoder: str = "pillow", seconds: float = SECONDS):
        self._directory, self._decoder = os.fspath(directory), decoder
        self._seconds = min(seconds, SECONDS) if seconds > 0 else SECONDS
        self._sources = {_key(source.name): source for source in sources}
        self._passed: dict[str, dict[int, str]] = {}
        self._marking = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sources": {}}  # a worker has its rows' own

    @property
    def _folder(self) -> Path:
        return Path(self._directory) / "reading"

    @contextlib.contextmanager
    def of(self, source: Source, index: int) -> Iterator[None]:
        """While the image `index` of `source` is read and decoded. Raises BadImage, at once, for one that has ended the run."""
        if not self._marking:
            yield
            return
        key = _key(source.name)
        if (why := self._passed.get(key, {}).get(index)) is not None:
            where = os.path.join(self._directory, LISTED)
            raise BadImage(
                f"passed over the image {source.example_name(index)}: it has ended this run before ({why}); repair or remove it, "
                f"and its entry in {where}"
            )
        at = (self._directory, key, os.getpid())
        if (marks := _open.get(at)) is None:
            marks = _open.setdefault(at, _Marks(self._folder / f"{key}.{socket.gethostname()}.{os.getpid()}.marks"))
        with marks.of(index):
            yield

    def begin(self, say: Callable[[str], None]) -> None:
        """Looks at what was in hand when the last process of this run ended, and begins to mark. Every process of a job calls it,
        before any of them reads. Raises ValueError for a damaged list; OSError."""
        if "://" in self._directory:
            return
        listed: list[dict] = []
        if distributed.rank() == 0:
            listed = self._listed()
            if blamed := self._blamed(listed):
                listed = [*listed, *blamed]
                make_directory(Path(self._directory))
                write_atomically(Path(self._directory) / LISTED, json.dumps({"images": listed}, indent=1) + "\n")
                for one in blamed:
                    say(f"the image {said(one['name'])} ended this run ({one['why']}): it is passed over from now on, as one that "
                        f"cannot be decoded; {os.path.join(self._directory, LISTED)}")  # fmt: skip
            if self._folder.is_symlink():
                self._folder.unlink()
            if not asked():  # otherwise the next start looks
                shutil.rmtree(self._folder, ignore_errors=True)
            make_directory(self._folder)
        listed = distributed.broadcast(listed)
        for one in listed:
            source = self._sources.get(_key(one["source"]))
            if source is not None and one["index"] < len(source) and said(source.example_name(one["index"])) == one["name"]:
                self._passed.setdefault(_key(one["source"]), {})[one["index"]] = one["why"]
        _open.clear()  # of a run before this one, whose files are gone
        self._marking = True
        _current[:] = [self]  # a process has one run at a time

    def end(self) -> None:
        """After an end in the ordinary way there is nothing to look at. Process 0 does it."""
        _current.clear()
        if self._marking and distributed.rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _listed(self) -> list[dict]:
        path = Path(self._directory) / LISTED
        if not path.exists():
            return []
        cure = "remove it; an image that ends the run is then found again"
        found = read_object(path, cure=cure).get("images")  # pyright: ignore[reportArgumentType]
        fields = {"source": str, "index": int, "name": str, "why": str}
        if not isinstance(found, list) or not all(
            isinstance(one, dict) and all(isinstance(one.get(name), kind) for name, kind in fields.items()) for one in found
        ):
            raise ValueError(f"{path} is damaged (no list of images): {cure}")
        return found

    def _blamed(self, known: list[dict]) -> list[dict]:
        """Of what was in hand, the images to blame."""
        found = []
        for key, source in self._sources.items():
            before = {one["index"] for one in known if one["source"] == source.name}
            marked = {index for path in sorted(self._folder.glob(f"{key}.*.marks")) for index in _indexes(path)}
            hand = sorted(index for index in marked - before if index < len(source))
            if source.decoded or not hasattr(source, "encoded") or not hand:
                continue
            for index, why in tried(source, hand, self._decoder, self._seconds):
                found.append({"source": source.name, "index": index, "name": said(source.example_name(index)), "why": why})
        return found


def _indexes(path: Path) -> list[int]:
    try:
        with open_regular(str(path)) as file:
            data = file.read(_SLOTS * _WORD.size)
    except OSError:  # nothing that a reader made: it tells of no image
        return []
    return [word - 1 for (word,) in _WORD.iter_unpack(data[: len(data) // _WORD.size * _WORD.size]) if word > 0]


# --- the trial --------------------------------------------------------------------------------------------------------------


def tried(source: Source, indexes: list[int], decoder: str, seconds: float) -> Iterator[tuple[int, str]]:
    """Those of `indexes` that end, or hold up, a process which decodes them, with what they did. An image that is merely damaged is
    none of them. Ends early where this process is asked to stop."""
    left = list(indexes)
    while left and not asked():
        begun, why = _until_one_fails(source, left, decoder, seconds)
        if why is not None:
            yield left[begun], why
        left = left[begun + 1 :]


def _until_one_fails(source: Source, indexes: list[int], decoder: str, seconds: float) -> tuple[int, str | None]:
    """Decodes one after the other in a process. (the place of the last that was begun, what went wrong with it)."""
    environment = of_this_process({**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)})
    command = [sys.executable, "-m", f"{__package__}.trial", decoder, str(MEMORY)]
    begun, line = 0, b""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(pickle.dumps((source, indexes)))
                child.stdin.close()
            since = None  # until the child has its modules, which may take long on a busy machine and is no image's fault
            while not asked():
                if not select.select([child.stdout], [], [], _LOOK)[0]:
                    beat("looking at the images that were in hand")
                    if since is not None and time.monotonic() - since > seconds:
                        return begun, f"decoding it took more than {seconds:g} s"
                    continue
                if not (read := os.read(child.stdout.fileno(), 4096)):
                    break
                *lines, line = (line + read).split(b"\n")
                for text in lines:
                    word, _, rest = text.decode().partition(" ")
                    if word == "begin":
                        begun, since = int(rest), time.monotonic()
                    elif word == "memory":
                        return begun, f"decoding it took more than {MEMORY / 2**30:g} GB"
                    elif word == "done":
                        return len(indexes) - 1, None
            if asked() or since is None:  # a child that cannot even begin says nothing of an image
                return len(indexes) - 1, None
            return begun, f"decoding it ended the process, {_ended(child.wait())}"
        finally:
            child.kill()


def _ended(code: int) -> str:
    return f"by signal {-code}" if code < 0 else f"with code {code}"
