"""A run's directory where a file of weights is wanted: this package does not train, so the trainer writes the file."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator


def is_run(path: str) -> bool:
    """Whether `path` is meant as a run's directory or directory/STEP, not as a file."""
    return os.path.isdir(path) or (os.path.basename(path.rstrip("/")).isdigit() and not os.path.isfile(path))


@contextlib.contextmanager
def as_file(path: str, *, allow_nonfinite: bool = False) -> Iterator[str]:
    """The path of a file of weights: `path` itself, or, of a run, one that another process writes and that is gone afterwards.

    Such a file has timm's names, or, where these have none for a part of the model, the release's. ValueError, one line.
    """
    if not is_run(path):
        yield path
        return
    with _stoppable(), tempfile.TemporaryDirectory() as folder:
        file, problem = os.path.join(folder, "weights.safetensors"), _written(path, folder, "weights.safetensors", allow_nonfinite)
        if problem and "no name for" in problem:
            file, problem = os.path.join(folder, "weights.npz"), _written(path, folder, "weights.npz", allow_nonfinite)
        if problem:
            raise ValueError(problem)
        yield file


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP end the program by SystemExit, with code 143, so that the file and who writes it go with it; but
    where the program has a handler of its own."""

    def stop(*_):
        sys.exit(128 + signal.SIGTERM)

    mine = []
    if threading.current_thread() is threading.main_thread():
        mine = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _written(path: str, folder: str, name: str, allow_nonfinite: bool) -> str:
    """Writes the weights of a run; why not, or nothing."""
    file = os.path.join(folder, name)
    command = [sys.executable, "-m", "train.pretrained", path, file, *(["--allow-nonfinite"] if allow_nonfinite else [])]
    environment = {**os.environ, "VITCORE_PARENT": str(os.getpid())}  # it ends with this process, also with a killed one
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not done.returncode and os.path.exists(file):
        return ""
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["it ended without a word"]
    return said[-1].partition("error: ")[2] or said[-1]
