"""What code a job runs: a digest of our sources and the versions it stands on, which processes compare and runs record."""

import contextlib
import hashlib
import importlib.metadata
import sys
from pathlib import Path

import vitcore

_STANDS_ON = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "tensorstore", "grain", "pillow", "libtpu")


def digest() -> str:
    """The code's digest: of every source file of this package and those it stands on."""
    total = hashlib.sha256()
    root, library = Path(__file__).resolve().parents[1], Path(vitcore.__file__).resolve().parent
    for package in (root / "kernels", library, root / "train"):  # an installed library has the other two in it
        for path in sorted(package.rglob("*.py")):
            total.update(str(path.relative_to(root.parent)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def versions() -> str:
    """The versions of Python and the packages whose word a job takes: "3.11, jax 0.10.2, ..."."""
    found = [f"{sys.version_info[0]}.{sys.version_info[1]}"]
    for name in _STANDS_ON:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)
