"""How a trial in a process of its own speaks to whoever started it: a line of JSON behind a mark, and what its errors mean."""

import json
from collections.abc import Iterator
from typing import Any

MARK = "@@vitcore-trial "


def say(record: dict[str, Any]) -> None:
    print(MARK + json.dumps(record), flush=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of jax or torch means that the memory of the device is used up."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "resource_exhausted" in text or "out of memory" in text or "can't allocate" in text


def records(text: str) -> Iterator[dict[str, Any]]:
    """The marked lines of a trial's output."""
    for line in text.splitlines():
        if line.startswith(MARK):
            yield json.loads(line[len(MARK) :])
