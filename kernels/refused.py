"""What JAX refuses in the environment, as one line: it reads its variables as it is imported, before any command could say more.

Imported before jax, until `no_more` is called behind that: an uncaught error in between, of a value that JAX does not know
(JAX_DEFAULT_DEVICE=cpu:7, JAX_NUM_CPU_DEVICES=two), ends the process with that line and code 2. It stands in the lowest package, so
that a job in its first moments has it without the model.
"""

import os
import sys
import traceback

_before = sys.excepthook


def _hook(kind, error, trace) -> None:
    settings = os.path.join("jax", "_src", "config.py")
    if not issubclass(kind, ValueError) or not any(f.filename.endswith(settings) for f in traceback.extract_tb(trace)):
        return _before(kind, error, trace)
    name = " ".join(word for word in os.environ if word.startswith("JAX_"))
    print(f"error: JAX refuses a setting of the environment ({name}): {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if not hasattr(sys, "ps1"):  # nobody types to this process
        sys.exit(2)  # from here it is the exit code, and what is registered for the end still runs


def no_more() -> None:
    """jax is there: errors are printed as before."""
    if sys.excepthook is _hook:
        sys.excepthook = _before


sys.excepthook = _hook
