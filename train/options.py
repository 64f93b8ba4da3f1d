"""A job's command line: a frozen dataclass of options, filled from --config FILE and then from the words given."""

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import TypeVar

Options = TypeVar("Options")


def parse(cls: type[Options], program: str, argv: list[str]) -> Options:
    """The command line, after the values of --config FILE where `cls` has that option and it is given.

    program: the module, "train.finetune". Raises ValueError, in one line, for what does not parse; SystemExit(0) for --help.
    """
    import tyro

    before: list[str] = []
    if any(field.name == "config" for field in dataclasses.fields(cls)):  # pyright: ignore[reportArgumentType]
        for i, word in enumerate(argv):
            if word == "--config" or word.startswith("--config="):
                path = argv[i + 1] if word == "--config" and i + 1 < len(argv) else word.partition("=")[2]
                before = as_options(cls, program, path)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=[*before, *argv], prog=f"python -m {program}", description=cls.__doc__)
    except SystemExit as error:
        if not error.code:
            raise  # --help
        # tyro draws a box of several lines around what it says
        said = " ".join(re.sub(r"\x1b\[[\d;]*m|[^\x00-\x7f]", " ", printed.getvalue()).split())
        said = re.sub(r"^(Value error|Invalid choice|Parsing error|Unrecognized options|Missing from \S+)\s+(?=\S)", "", said)
        said = re.sub(r"^(Required options)\s+", "required and not given: ", said)
        said = re.split(r"Got errors:|Argument helptext:|For full helptext|Similar options|Perhaps you meant", said)[0].strip(" .")
        raise ValueError(f"{said}: python -m {program} --help lists the options") from None


def as_options(cls, program: str, path: str) -> list[str]:
    """A config.json as the words of a command line: they are then checked as such."""
    try:
        values = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"--config {path} is not JSON ({error}): give the config.json of a run") from None
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(values, dict) or (unknown := set(values) - known):
        what = f"has no option {', '.join(sorted(unknown))}" if isinstance(values, dict) else "holds no options"
        raise ValueError(f"--config {path}: {program} {what}: give the config.json of a run")
    words = []
    for key, value in values.items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)] if value else []
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words
