"""What a trial's process says to the one that started it: marked lines of JSON among whatever else comes on stdout."""

import json
from typing import Any

from train.signals import end_with_parent as end_with_parent  # done when `train` is imported

MARK = "@@vitcore-trial "


def say(record: dict[str, Any]) -> None:
    print(MARK + json.dumps(record), flush=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of jax or torch means that the memory of the device is used up."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "resource_exhausted" in text or "out of memory" in text or "can't allocate" in text
