"""How the commands of bench read their options and end: one line and exit code 2 for whatever a user can mend."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from train.signals import TERMINATED, Stop, clear_up
from vitcore.command_line import parsed as parse


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
        clear_up()
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
