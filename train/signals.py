"""What a run does when it is told to end, and when it hangs.

The first SIGTERM (a scheduler's notice of preemption, `kill`) asks the loop to save and end; the second ends the process at once.
Python runs its signal handlers between two bytecodes of the main thread, which may be minutes away in a compilation; so a thread
reads the signals from the pipe that Python's C handler writes them to.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from typing import Any

TERMINATED = 128 + signal.SIGTERM  # exit code of a process that a second SIGTERM ended

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


class Stop:
    """Whether the process has been asked to end. As a context manager it listens to SIGTERM (in the main thread; elsewhere it can
    only be asked by `ask`), and puts back what was there before. In a job of several, `train.distributed.share` asks all of them.

        with Stop() as stop:
            while not stop.asked: ...
    """

    def __init__(self):
        self._event = threading.Event()
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
            before = signal.signal(signal.SIGTERM, lambda *_: None)  # the thread below does what there is to do
            pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            listener = threading.Thread(target=self._listen, args=(reader,), daemon=True, name="signals")
            listener.start()

            def undo():
                signal.set_wakeup_fd(pipe)
                signal.signal(signal.SIGTERM, before)
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
            if number == signal.SIGTERM:
                terms += 1
                if terms > 1:
                    os._exit(TERMINATED)
                self._event.set()


class Watchdog:
    """Ends a process whose steps have stopped, after printing every thread's stack.

    seconds: that may pass between two calls of `beat`; 0 for no watchdog. faulthandler's own thread does the printing and ending
    in C: it needs no lock of the interpreter, which whatever hangs may hold. Exit code 1; the line that says why comes first.
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
        if self._thread is not None:
            self._arm()

    def _arm(self) -> None:
        # a second later than the line below, so that this comes first
        faulthandler.dump_traceback_later(self.seconds + 1, exit=True, file=self._stream)

    def __enter__(self):
        if self.seconds > 0:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._since = time.monotonic()
            self._arm()
            self._thread.start()
        return self

    def __exit__(self, *_):
        if self._thread is not None:
            faulthandler.cancel_dump_traceback_later()
            self._done.set()
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        said = None
        while not self._done.wait(0.25):
            if time.monotonic() - self._since >= self.seconds and said != self._since:
                said = self._since
                sys.stdout.flush()
                line = f"hung for {self.seconds:g} s while {self._doing} (--step-timeout): the stacks of all threads follow"
                print(line, file=self._stream, flush=True)
