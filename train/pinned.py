"""The weights that a study of several runs began from, kept in its own directory: OUT/init.npz.

A sweep or `train.vtab` whose --init is a run that goes on holds to the step that was the newest at the beginning, and the run
deletes that step when it has newer ones. So the study keeps the step's parameters, as they were read: float32, 4 bytes a parameter.
A file of weights stays where it is, and is not copied. zip's own CRC of each array says whether the copy is damaged.
"""

import dataclasses
import json
import zipfile
from typing import Any

import jax
import numpy as np
from etils import epath

from train.files import atomically, make_directory, open_regular, parse_json
from train.pretrained import Run, Stored, store
from vitcore import families

COPY = "init.npz"
_ABOUT = "about.json"  # of the archive: no name of an array has a dot in it


def begin(out: epath.Path, init: str, model: dict | None) -> Stored:
    """What a study in `out` begins from: its own copy, if it has one of `model`, otherwise what --init is, as `store` reads it.

    model: `Stored.model` of the study's results so far, None for a new one. Raises ValueError in one line; OSError.
    """
    if model is not None and model["step"] is not None and (out / COPY).exists():
        return _read(out / COPY, init, model)
    return store(init, model)


def keep(out: epath.Path, stored: Stored) -> None:
    """Puts a copy of a run's step into `out`, whole or not at all, if none is there. On process 0. OSError."""
    if stored.run is None or (out / COPY).exists():
        return
    run = stored.run
    about = {"model": stored.model, "config": dataclasses.asdict(run.config), "about": run.about, "held": run.held}
    make_directory(out)
    with atomically(out / COPY) as file:
        _write(file, run.params, about)


def _write(file, params, about: dict) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_ABOUT, json.dumps(about))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            with archive.open(jax.tree_util.keystr(path, simple=True, separator="/"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(leaf), allow_pickle=False)


def _read(path: epath.Path, init: str, model: dict) -> Stored:
    try:
        with open_regular(str(path)) as file, zipfile.ZipFile(file) as archive:
            about = parse_json(archive.read(_ABOUT))
            if about["model"] != model:
                raise ValueError("it is of other weights than the results beside it")
            params: dict[str, Any] = {}
            for name in archive.namelist():
                if name == _ABOUT:
                    continue
                *parents, last = name.split("/")
                inner = params
                for parent in parents:
                    inner = inner.setdefault(parent, {})
                with archive.open(name) as member:
                    inner[last] = np.lib.format.read_array(member, allow_pickle=False)
            run = Run(families.restored(about["config"]), params, f"{about['about']}, of which {path} is a copy", about["held"])
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        cure = f"remove it, while {init} still has step {model['step']}, or choose another --out"
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split()) or type(error).__name__}): {cure}") from error
    return Stored(init, model, run)
