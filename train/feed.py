"""Batches drawn in a thread and sent on to the device from there: they travel while a step runs, and a wait can be interrupted."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any

_POLL = 0.1  # seconds between two looks at whether to go on waiting
_BUSY_POLL = 0.005  # and while the devices compute, at whether they still do: a step takes some tens of milliseconds
_GRACE = 2.0  # seconds that the end waits for a batch in the making


class Kept:
    """The batches of a pass over a set, which later calls give again from memory if they are no more than `most` bytes.

    make: () -> an iterator over dicts of arrays that may have `close`. A pass that ends early keeps nothing. So a small validation
    set is read and decoded once a run, and not at every evaluation.
    """

    def __init__(self, make: Callable[[], Iterable[dict[str, Any]]], most: int):
        self._make, self._most = make, most
        self._batches: list[dict[str, Any]] | None = None

    def __call__(self) -> Iterator[dict[str, Any]]:
        return self._read() if self._batches is None else iter(self._batches)

    def _read(self) -> Iterator[dict[str, Any]]:
        batches, kept, size = self._make(), [], 0
        try:
            for batch in batches:
                size += sum(array.nbytes for array in batch.values())
                if size > self._most:
                    kept.clear()
                else:  # a copy: what processes send lies in memory of theirs
                    kept.append({name: array.copy() for name, array in batch.items()})
                yield batch
            if size <= self._most:
                self._batches = kept
        finally:
            if hasattr(batches, "close"):
                batches.close()  # pyright: ignore


class Feed:
    """The batches of an iterator, one drawn and placed ahead.

    batches: an iterator that may have `get_state` and `close`. place: what the thread makes of each; `on_mesh` sends it to the
    devices, which then hold one batch more. `state` is that of the batches given out so far, not of those drawn; `idle` the seconds
    of the last `next` in which the devices had nothing to do.
    Use as a context manager: leaving closes the iterator, unless a draw does not end within two seconds: then `stuck` is True and
    the caller has a thread that an ordinary exit of the process would wait for.
    """

    def __init__(self, batches: Iterator, place: Callable[[Any], Any] = lambda batch: batch):
        self._batches, self._place = batches, place
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: Future | None = None
        self.state: Any = self._state()
        self.idle = 0.0
        self.stuck = False

    def _state(self):
        return self._batches.get_state() if hasattr(self._batches, "get_state") else None  # pyright: ignore

    def _draw(self):
        try:
            return self._place(next(self._batches)), self._state()
        except StopIteration:
            return None

    def next(
        self, give_up: Callable[[], bool] = lambda: False, *, more: bool = True, busy: Callable[[], bool] = lambda: False
    ) -> Any:
        """The next batch; None where the iterator has ended, or as soon as `give_up` says so. more: draw another ahead.
        busy: whether the devices still compute: a wait costs them nothing before they have ended, as the loop runs ahead of them.

        Raises what the iterator raises.
        """
        if self._ahead is None:
            self._ahead = self._pool.submit(self._draw)
        self.idle, since = 0.0, None
        while not self._ahead.done():
            if give_up():
                return None
            if since is None and not busy():
                since = time.perf_counter()
            with contextlib.suppress(NotYet):
                self._ahead.exception(_BUSY_POLL if since is None else _POLL)
        if since is not None:
            self.idle = time.perf_counter() - since
        drawn, self._ahead = self._ahead.result(), None
        if drawn is None:
            return None
        if more:
            self._ahead = self._pool.submit(self._draw)
        batch, self.state = drawn
        return batch

    def end(self) -> None:
        """No more batches are wanted: the iterator is closed beside whatever the caller does until it leaves. Worker processes end
        one after another, each in some tenths of a second."""
        if self._ahead is None and hasattr(self._batches, "close"):
            self._pool.submit(self._batches.close)  # pyright: ignore

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._ahead is not None and not self._ahead.cancel():
            with contextlib.suppress(Exception):
                self._ahead.exception(_GRACE)
            self.stuck = not self._ahead.done()
        self._pool.shutdown(wait=not self.stuck)
        if not self.stuck and hasattr(self._batches, "close"):
            self._batches.close()  # pyright: ignore
