"""What every command says of options that it cannot take: one line, in one style, with the nearest option that there is."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

Options = TypeVar("Options")

_FEW = 12  # options that are all named where none is near


def unknown(words: Sequence[str], known: Iterable[str]) -> str | None:
    """A line on the first of a command's words that is an option and none of the `known`, which begin with "--"; None for none."""
    known = sorted({*known, "--help"})
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        if option == "--":
            return None
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, 1)
            shown = [one for one in known if one != "--help" and not one.startswith("--no-")]
            others = f": there are {', '.join(shown)}" if len(shown) <= _FEW else ""
            return f"unknown option {option}{f': did you mean {near[0]}?' if near else others}"
    return None


def parsed(cls: type[Options], program: str, words: Sequence[str]) -> Options:
    """An instance of the dataclass `cls` from a command's words. Raises ValueError, in one line; SystemExit(0) for --help."""
    import tyro

    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    names = [f"--{field.name.replace('_', '-')}" for field in fields]
    help_ = f"python -m {program} --help lists the options"
    if (line := unknown(words, [*names, *(name.replace("--", "--no-", 1) for name in names)])) is not None:
        raise ValueError(f"{line} ({help_})")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=list(words), prog=f"python -m {program}", description=cls.__doc__)
    except SystemExit as error:
        if not error.code:
            raise  # --help
        # tyro draws a box of several lines around what it says
        said = re.sub(r"\x1b\[[\d;]*m|[^\x00-\x7f]|-{5,}|^\s*[|+]|[|+]\s*$", " ", printed.getvalue(), flags=re.MULTILINE)
        said = " ".join(said.split()).lstrip("+ ")
        said = re.sub(r"^(Value error|Invalid choice|Parsing error|Unrecognized options|Missing from \S+)\s+(?=\S)", "", said)
        said = re.sub(r"^Required options\s+(Missing from python -m \S+\s+)?", "required and not given: ", said)
        said = re.sub(rf"Error parsing {cls.__name__}: ", "", said)
        said = re.split(r"Got errors:|Argument helptext:|For full helptext|Similar options|Perhaps you meant", said)[0]
        raise ValueError(f"{said.lstrip(' .').rstrip(' .-')}: {help_}") from None


def attempt(program: str, work: Callable[[], object]) -> int:
    """The exit code of a command's work: 0, or 2 with one line on stderr where it raises ValueError or OSError."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"{program}: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def end(program: str, main: Callable[[], int]) -> NoReturn:
    """Ends a command with the exit code of its `main`; with one line and 130 where it is interrupted."""
    for descriptor in range(3):  # closed ones would be taken by the next file, and what C++ code prints goes into it
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)
    try:
        code = main()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage; options are not shortened."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        words = sys.argv[1:] if args is None else list(args)
        if not self._subparsers and (line := unknown(words, [o for o in self._option_string_actions if o.startswith("--")])):
            self.error(line)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: error: {message} ({self.prog} --help lists the options)\n")
