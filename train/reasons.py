"""What is said of a checkpoint that could not be written or read, and whether its files are to blame.

Orbax wraps what went wrong around its cause. tensorstore, whose error that mostly is, names a path twice before it says what went
wrong with it, and how the array was opened behind that.
"""

import re

_HOW_OPENED = re.compile(r" \[(source locations|tensorstore_spec)=.*")
_A_PATH = re.compile(r"""(["'])(/|\w+://).*?\1""")
_LONG_PATH = re.compile(r'"[^"]{4,}([^"]{40})"')
_LONGEST, _BEGINNING, _END = 300, 120, 175

# What says that this process may or can not read now, and nothing of the files: from Python, and from tensorstore
_CANNOT = re.compile(
    r"permission|denied|too many open files|cannot allocate|out of memory|resource.?exhausted|stale", re.IGNORECASE
)


def _root(error: BaseException) -> BaseException:
    """The root of an exception's chain."""
    while (deeper := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = deeper
    return error


def reason(error: BaseException) -> str:
    """Why something failed, in one line of at most 300 characters: a long path keeps its end, and what is still too long its
    beginning and its end."""
    error = _root(error)
    text = _HOW_OPENED.sub("", " ".join(str(error).split()) or type(error).__name__)
    if len(text) > _LONGEST:
        text = _LONG_PATH.sub(r'"...\1"', text)
    return text if len(text) <= _LONGEST else f"{text[:_BEGINNING]} ... {text[-_END:]}"


def is_of_this_process(error: BaseException) -> bool:
    """Whether it says that this process may or can not read now, which is no damage. Paths do not count, for a folder may be called
    "stale", and the whole text does, for `reason` may be cut."""
    error = _root(error)
    return isinstance(error, MemoryError) or bool(_CANNOT.search(_A_PATH.sub("", _HOW_OPENED.sub("", str(error)))))
