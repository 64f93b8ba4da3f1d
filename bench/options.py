"""How the commands of bench read their options and end: one line and exit code 2 for whatever a user can mend."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from train.signals import TERMINATED, Stop


def _unknown(cls: type, words: Sequence[str]) -> None:
    """ValueError for the first option that `cls` has not, with the nearest one it has."""
    names = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(cls)]
    known = {"--help", *names, *(name.replace("--", "--no-", 1) for name in names)}
    for word in words:
        option = word.split("=", 1)[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, sorted(known), 1)
            raise ValueError(f"unknown option {option}{f': did you mean {near[0]}?' if near else ''}")


def parse(cls: type, program: str, argv: Sequence[str]) -> Any:
    """An instance of the dataclass `cls` from the words of a command line. ValueError, in one line; SystemExit(0) for --help."""
    import tyro

    _unknown(cls, argv)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=list(argv), prog=f"python -m {program}", description=cls.__doc__)
    except SystemExit as error:
        if not error.code:
            raise
        # tyro draws a box of several lines around what it says
        said = " ".join(re.sub(r"\x1b\[[\d;]*m|[^\x00-\x7f]|-{5,}|^\s*[|+]|[|+]\s*$", " ", printed.getvalue(), flags=re.M).split())
        said = re.sub(r"^(Value error|Parsing error|Invalid choice)\s+", "", said.lstrip("+ "))
        said = re.sub(rf"Error parsing {cls.__name__}: ", "", said)
        raise ValueError(re.split(r"Argument helptext:|For full helptext", said)[0].lstrip(" .").rstrip(" .-")) from None


def command(
    cls: type, program: str, run: Callable[[Any], int], mendable: tuple[type[Exception], ...] = (), *, interrupted=""
) -> int:
    """run(options) as a command: its exit code, 2 with one line for a ValueError or one of `mendable`, 130 where interrupted, 143
    after a SIGTERM or SIGHUP.

    interrupted: what to say then of the work that was done.
    """

    def stop():
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            print(f"\n{program}: asked to stop{interrupted and '; '}{interrupted}", file=sys.stderr, flush=True)
        os._exit(TERMINATED)  # what it started ends with it, each row of its results is whole

    try:
        with Stop(stop):
            return run(parse(cls, program, sys.argv[1:]))
    except (ValueError, *mendable) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted{interrupted and '; '}{interrupted}", file=sys.stderr)
        return 130
