"""What a run does when it is told to end, and when it hangs.

The first SIGTERM (a scheduler's notice of preemption, `kill`) asks the loop to save and end; the second ends the process at once. A
SIGHUP (the terminal is gone) is a SIGTERM, but where the caller has it ignored, as nohup does.
Python runs its signal handlers between two bytecodes of the main thread, which may be minutes away in a compilation; so a thread
reads the signals from the pipe that Python's C handler writes them to.
"""

import contextlib
import faulthandler
import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

TERMINATED = 128 + signal.SIGTERM  # exit code of a process that a second SIGTERM ended

_ASKS = (signal.SIGTERM, signal.SIGHUP)
_LOOK = 0.25  # seconds between two looks of the watchdog
# Between a watchdog's word and its process's end, in seconds: the other processes of a job, which wait for this one, are past the
# limit a moment later, and its end breaks the collective they wait in. So each has said where it stood.
_LINGER = 1.0


def standard_streams() -> None:
    """Opens what is closed of stdin, stdout and stderr, on nothing. Otherwise the next file that is opened, a lock or a checkpoint,
    takes that number, and what C++ code or a process started from here prints goes into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


_interrupted = threading.Event()


def interruptible() -> None:
    """From now on SIGINT raises KeyboardInterrupt; `check_interrupt` raises it again where a library has swallowed it, as a
    callback of the garbage collector does: Python would print that traceback as ignored, beside the job's own line."""

    def interrupt(*_):
        _interrupted.set()
        raise KeyboardInterrupt

    before = sys.unraisablehook

    def ignored(unraisable):
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)

    sys.unraisablehook = ignored
    signal.signal(signal.SIGINT, interrupt)


def check_interrupt() -> None:
    """Raises KeyboardInterrupt if SIGINT has come since `interruptible`: what is raised in a callback of C code goes no further."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


_listening: "list[Stop]" = []


def asked() -> bool:
    """Whether this process has been asked to end, of the `Stop` that listens."""
    return any(stop.asked for stop in _listening)


class Stop:
    """Whether the process has been asked to end. As a context manager it listens to SIGTERM and SIGHUP (in the main thread;
    elsewhere only `ask` asks it), and puts back what was there before. In a job of several, `train.distributed.share` asks all.
    at_once: for a job that has nothing to save: called when the first signal comes, in the thread that listens; ends the process.

        with Stop() as stop:
            while not stop.asked: ...
    """

    def __init__(self, at_once: Callable[[], None] | None = None):
        self._event = threading.Event()
        self._at_once = at_once
        self._undo = contextlib.ExitStack()

    @property
    def asked(self) -> bool:
        return self._event.is_set()

    def ask(self) -> None:
        self._event.set()

    def wait(self) -> None:
        """Returns when the process is asked to end."""
        self._event.wait()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            heard = [n for n in _ASKS if n == signal.SIGTERM or signal.getsignal(n) != signal.SIG_IGN]
            before = {n: signal.signal(n, lambda *_: None) for n in heard}  # the thread below does what there is to do
            pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            listener = threading.Thread(target=self._listen, args=(reader,), daemon=True, name="signals")
            listener.start()

            _listening.append(self)

            def undo():
                _listening.remove(self)
                signal.set_wakeup_fd(pipe)
                for number, handler in before.items():
                    signal.signal(number, handler)
                os.write(writer, b"\0")
                listener.join()
                os.close(reader)
                os.close(writer)

            self._undo.callback(undo)
        return self

    def __exit__(self, *_):
        self._undo.close()

    def _listen(self, reader: int) -> None:
        terms = 0  # only signals count: another process's SIGTERM may have asked before this one's own comes
        while (number := os.read(reader, 1)[0]) != 0:
            if number in _ASKS:
                terms += 1
                if terms > 1:
                    os._exit(TERMINATED)
                if self._at_once is None:
                    self._event.set()
                else:  # without a word to the job, which would end in the ordinary way, in the moment before it is ended
                    self._at_once()


_watching: "list[Watchdog]" = []


def beat(doing: str) -> None:
    """Tells the `Watchdog` of this process, where there is one, that something has been done, and what comes next."""
    if _watching:
        _watching[-1].beat(doing)


class Watchdog:
    """Ends a process whose steps have stopped, after printing every thread's stack.

    seconds: that may pass between two calls of `beat`; 0 for no watchdog. A thread looks at the clock; where it cannot, because
    whatever hangs holds the interpreter's lock, faulthandler's own thread in C does the printing and ending, after twice the time.
    Time in which the process was stopped (SIGSTOP, a suspended machine) does not count: a step is given its time again. Of two, one
    within the other, the inner one watches. Exit code 1; the line that says why comes first.
    """

    def __init__(self, seconds: float, *, stream=None):
        self.seconds = seconds
        self._stream: Any = stream or sys.__stderr__
        self._doing = "starting"
        self._since = time.monotonic()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, doing: str) -> None:
        """Something has been done, and `doing` comes next."""
        self._doing, self._since = doing, time.monotonic()

    def __enter__(self):
        if self.seconds > 0:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._since = time.monotonic()
            _watching.append(self)
            self._thread.start()
        return self

    def __exit__(self, *_):
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            self._thread = None
            _watching.remove(self)
            if not _watching:
                faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._done.wait(_LOOK):
            now = time.monotonic()
            if _watching[-1:] != [self] or now - before > max(10 * _LOOK, self.seconds / 10):
                self._since = now  # another one watches, or the whole process stood still
            before = now
            if _watching[-1:] == [self] and self._stream is not None:
                faulthandler.dump_traceback_later(2 * self.seconds + 1, exit=True, file=self._stream)
            if now - self._since >= self.seconds:
                self._end()

    def _end(self) -> None:
        with contextlib.suppress(Exception):  # a stream that is closed changes nothing
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            line = f"hung for {self.seconds:g} s while {self._doing} (--step-timeout): the stacks of all threads follow"
            print(line, file=self._stream, flush=True)
            faulthandler.dump_traceback(file=self._stream, all_threads=True)
        time.sleep(_LINGER)
        os._exit(1)


_PARENT = "VITCORE_PARENT"  # in a process's environment: the one that started it and that it ends with, and a pipe of that one
_last: list[Callable[[], Any]] = []
_life: list[int] = []  # a pipe whose end closes with this process
_bound: list[int] = []  # descriptors at whose other end's closing the kernel kills this process
_binding = threading.Lock()


def of_this_process(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process, not multiprocessing's, that shall end when this one does: it need only import `train`."""
    if not _life:
        _life.extend(os.pipe())
    return {**environment, _PARENT: f"{os.getpid()}:{_life[0]}"}


def before_the_end(work: Callable[[], Any]) -> None:
    """What `clear_up` does, where the process ends at once: by a signal that a command obeys so, or with the one that started it,
    where the kernel then does not end it."""
    with _binding:
        _last.append(work)
        for descriptor in _bound:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_ASYNC)


def clear_up() -> None:
    """What `before_the_end` was told; whatever fails of it is left."""
    for work in _last:
        with contextlib.suppress(Exception):
            work()


def end_with_parent() -> None:
    """From now on this process, a worker that multiprocessing started or one of `of_this_process`, ends when the one that started
    it does, however that ends. Otherwise a worker waits for ever for one that was killed, and its memory stays taken; a compiler
    goes on for minutes. In other processes it does nothing."""
    # a worker that is being spawned imports its modules before it knows its parent
    starting = getattr(multiprocessing.current_process(), "_inheriting", False)
    told, _, pipe = os.environ.pop(_PARENT, "").partition(":")  # a process that this one starts has another parent
    if multiprocessing.parent_process() is None and not starting and not told:
        return
    first = int(told) if told.isdigit() else os.getppid()

    def look():
        if pipe:
            with contextlib.suppress(OSError):  # elsewhere than on Linux
                _end_by_the_kernel(os.open(f"/proc/{first}/fd/{pipe}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        while True:
            time.sleep(_LOOK)
            parent = multiprocessing.parent_process()
            if os.getppid() != first or (parent is not None and not parent.is_alive()):
                clear_up()
                os._exit(1)
            if parent is not None and not _bound:  # not before: the parent still writes into that pipe what there is to do
                _end_by_the_kernel(parent.sentinel)

    threading.Thread(target=look, daemon=True, name="end with parent").start()


def _end_by_the_kernel(descriptor: int) -> None:
    """SIGKILL to this process when the other end of a pipe closes, or is written to. A thread cannot look while C code holds the
    interpreter's lock, as a decoder does that hangs, nor in a process that is stopped."""
    with _binding:
        _bound.append(descriptor)
        if _last or not hasattr(fcntl, "F_SETSIG"):
            return
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
