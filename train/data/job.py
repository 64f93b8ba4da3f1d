"""How the small jobs on data begin and end: options from a dataclass, one line and exit code 2 for whatever a user can mend."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import tyro

from train.signals import TERMINATED, Stop


def run_job(options: type, run: Callable[[Any], None], name: str, argv: list[str] | None = None) -> int:
    """`run(options from argv)`. Returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            args = tyro.cli(options, args=sys.argv[1:] if argv is None else argv, prog=f"python -m {name}")
    except SystemExit as error:
        if not error.code:
            return 0  # --help
        # tyro draws a box of several lines around what it says
        said = " ".join(re.sub(r"\x1b\[[\d;]*m|[^\x00-\x7f]", " ", printed.getvalue()).split())
        said = re.split(r"Argument helptext:|For full helptext", said)[0].strip(" .")
        print(f"{name}: error: {said}: python -m {name} --help lists the options", file=sys.stderr)
        return 2

    def stop():
        print(f"{name}: asked to stop: ended, nothing is left half-written", file=sys.stderr, flush=True)
        os._exit(TERMINATED)

    try:
        with Stop(stop):
            run(args)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0
