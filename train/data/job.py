"""How the small jobs on data begin and end: options from a dataclass, one line and exit code 2 for whatever a user can mend."""

import io
import os
import sys
from collections.abc import Callable
from typing import Any

from train.signals import TERMINATED, Stop, clear_up
from vitcore.command_line import parsed


def check_timeout(seconds: int) -> None:
    """Raises ValueError for a --step-timeout that is none."""
    if seconds < 0:
        raise ValueError(f"--step-timeout {seconds}: zero, for none, or a positive number is required")


def run_job(options: type, run: Callable[[Any], None], name: str, argv: list[str] | None = None) -> int:
    """`run(options from argv)`. Returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    try:
        args = parsed(options, name, sys.argv[1:] if argv is None else argv)
    except SystemExit:  # --help
        return 0
    except ValueError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2

    def stop():
        print(f"{name}: asked to stop: ended, nothing is left half-written", file=sys.stderr, flush=True)
        clear_up()
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
