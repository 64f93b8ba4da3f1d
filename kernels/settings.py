"""What our code assumes of JAX's own settings, whatever the program around it has set.

Arrays of fewer axes broadcast against those of more, and dtypes promote: `jax_numpy_rank_promotion="raise"` and
`jax_numpy_dtype_promotion="strict"` are for a program's own code. In a kernel an integer has 32 bits, also where `jax_enable_x64`
is set: index maps would mix both. A derivative is traced outside the call that it belongs to, so each brings its own settings.
"""

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def promotion():
    """Shapes and dtypes promote as jax.numpy does by default."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@contextlib.contextmanager
def in_kernels():
    """`promotion`, and integers of 32 bits."""
    with promotion(), jax.enable_x64(False):
        yield


def own(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, traced under `promotion`."""

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        with promotion():
            return function(*args, **options)

    return run
