"""Opening what a user names: regular files only. A pipe that nobody writes to would be waited for, a device read, for ever."""

import os

from train.data.source import DataError
from train.files import MOST_TEXT
from train.files import open_regular as open_regular


def read_text(path: str, what: str) -> str | None:
    """A small file as text, bytes that are no UTF-8 as lone surrogates; None where it is missing.

    what: the file for people, "the list". Raises DataError for what cannot be read or is above MOST_TEXT.
    """
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MOST_TEXT:
                raise DataError(f"{what} {path} has {size:,} bytes, more than {MOST_TEXT:,}: is it another file?")
            return file.read().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {what} {path}: {error.strerror}; restore it") from error
