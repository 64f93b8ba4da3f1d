"""The checkpoints of a run for whoever only reads them: an export, an evaluation, a fine-tuning, also while the run goes on.

Nothing here writes, renames or deletes. `train/checkpoint.py` adds that for the run itself, which holds the lock of its directory.

On disk: DIRECTORY/STEP/state (arrays, as a nested dict of names: "params/blocks/mlp/in/kernel", "opt_state/0/mu/...") and
DIRECTORY/STEP/extra/data.json (the rest: loader state, resolved config). Each of the two carries a manifest of sizes and checksums
(`train/manifest.py`), verified before anything is restored. What is there is then compared with what the caller expects, leaf by
leaf (Orbax alone would cast a wrong dtype in silence), and every failure is one line with the path.
"""

import contextlib
import gc
import hashlib
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import uvloop
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src import asyncio_utils

from train import distributed, manifest
from train.reasons import is_of_this_process, reason

# Replicas of an array share the work of writing it where each part is at least this large, in bytes. Orbax has no lower bound of
# its own and compiles a slice for every replica of every small vector: a first save on an 8x4 mesh blocked for 14 s, now 0.1 s.
_REPLICA_SLICE = 2**20

# Orbax writes this file last. A local step needs no such mark: it gets its name when it is whole.
_COMMITTED = "commit_success.txt"


class _Loop(uvloop.Loop):
    """Orbax ends its event loop while tensorstore still reads, after another read has failed. Each of these reads then calls a loop
    that is closed, and uvloop prints that from C, past every hook of Python's: 6 of 25 failed restores, now none."""

    def call_soon_threadsafe(self, callback, *args, context=None):
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise


asyncio_utils.uvloop = types.SimpleNamespace(new_event_loop=_Loop)  # pyright: ignore[reportAttributeAccessIssue]


class CheckpointError(OSError):
    """A checkpoint could not be written or read: one line that names the path and the reason."""


class Damaged(CheckpointError):
    """The files of a checkpoint are not what was written."""


class SavedSteps:
    """The checkpoints in one directory, to be read. Every process of a job calls every method.

    directory: need not exist; a relative path is made absolute. say: hears, on process 0, of every step that is passed over.

        state, extra = SavedSteps("run/checkpoints").restore(None, abstract(state))
    """

    def __init__(self, directory, *, say: Callable[[str], None] | None = None):
        directory = os.fspath(directory)
        self.directory = directory if re.match(r"\w+://", directory) else os.path.abspath(directory)
        self._say = say or logging.getLogger(__name__).warning
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_a_failure_of_orbax)

    def path(self, step: int) -> str:
        """Where a step is."""
        return os.path.join(self.directory, str(step))

    def steps(self) -> tuple[int, ...]:
        """The whole steps there are, ascending. CheckpointError where they cannot be listed."""
        return tuple(self._on_disk())

    def _on_disk(self) -> list[int]:
        try:
            found = sorted(int(name) for name in manifest.names(self.directory) if re.fullmatch(r"0|[1-9]\d*", name))
            if "://" in self.directory:
                found = [step for step in found if epath.Path(self.path(step), _COMMITTED).exists()]
        except OSError as error:
            raise CheckpointError(f"cannot list the checkpoints in {self.directory}: {error.strerror or error}") from error
        return found

    def latest_step(self) -> int | None:
        """The newest whole step, None where there is none."""
        return max(self.steps(), default=None)

    def restore(self, step: int | None, abstract):
        """Reads a step onto the shardings of `abstract`, whatever mesh and process count wrote it.

        step: None for the newest that is good: newer ones that are damaged are passed over. abstract: tree of
        jax.ShapeDtypeStruct with shardings, see `abstract` below. Returns (state, extra), state with abstract's structure. Raises
        ValueError where a leaf is missing, unknown, or of another shape or dtype (named, with what was expected and found), or
        there is no such step; Damaged where the step, or every step there is, is; CheckpointError where a step cannot be looked
        at (no permission, too many open files), which is no damage.
        """
        return self._newest_good(step, lambda found: self._read(found, abstract))[1]

    def load(self, step: int | None = None) -> tuple[int, dict, dict]:
        """Reads a step as it is stored onto this process's first device: (step, state as nested dicts by name, extra). step and
        errors as for `restore`."""
        found, (state, extra) = self._newest_good(step, lambda found: self._read(found, None))
        return found, state, extra

    def load_told(self, step: int | None = None) -> tuple[int, str, dict, dict]:
        """As `load`, with the step's `digest` behind its number: of what was read, whatever the run does meanwhile."""
        found, (state, extra, digest) = self._newest_good(step, lambda found: (*self._read(found, None), self._told(found)))
        return found, digest, state, extra

    def _newest_good(self, step: int | None, read: Callable):
        """(step, read(step)) of the step asked for or, where that is None, of the newest that is not damaged."""
        damaged: dict[int, str] = {}
        while True:  # the list is made anew each time: a run that goes on deletes what it has newer ones of
            held = distributed.broadcast(self._on_disk() if distributed.rank() == 0 else [])
            damaged = {k: text for k, text in damaged.items() if k in held}
            left = [k for k in held if k not in damaged and step in (None, k)]
            if not left:
                break
            try:
                loaded = read(left[-1])
            except Damaged as error:
                damaged[left[-1]] = str(error)
                continue
            self._passed_over(damaged)
            return left[-1], loaded
        if not damaged:
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise ValueError(f"no {wanted} in {self.directory}; it has {', '.join(map(str, held)) or 'none'}")
        if step is not None:
            raise Damaged(damaged[step])
        more = f"; none of the {len(damaged)} checkpoints there is good" if len(damaged) > 1 else "; there is no other"
        raise Damaged(f"{damaged[held[-1]]}{more}. Nothing was changed: put a good copy there, or choose another --out")

    def _passed_over(self, damaged: dict[int, str]) -> None:
        """What is done about damaged steps, {step: why}, once an older good one has been read."""
        if distributed.rank() == 0:
            for reason in damaged.values():
                self._say(f"{reason}: passed over")

    def digest(self, step: int) -> str:
        """What tells a step's content from any other: a hash of its manifests, 16 hexadecimal digits. OSError."""
        parts = [epath.Path(self.path(step), part, manifest.MANIFEST).read_bytes() for part in ("state", "extra")]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def _told(self, step: int) -> str:
        """`digest` on every process. Damaged where it is gone, for a run may delete a step while it is read, or CheckpointError."""
        problem, digest = None, ""
        if distributed.rank() == 0:
            try:
                digest = self.digest(step)
            except FileNotFoundError as error:
                problem = [True, f"checkpoint {self.path(step)} is gone: {error.filename}"]
            except OSError as error:
                problem = [False, f"cannot read checkpoint {self.path(step)}: {error.strerror or error}"]
        problem, digest = distributed.broadcast([problem, digest])
        _raise(problem)
        return digest

    def _read(self, step: int, abstract):
        """One step, verified and read: (state, extra). abstract: None for what is stored, on this process's first device. Damaged
        or CheckpointError, on every process, where any of them cannot."""
        path = self.path(step)
        verified = _problem(_verify, path) if distributed.rank() == 0 else None
        _raise(distributed.broadcast(verified))
        loaded = None

        def load():
            nonlocal loaded, abstract
            with _reading(path):
                metadata = ocp.checkpointables_metadata(path).metadata
                if set(metadata) != {"state", "extra"}:
                    raise ValueError(f"it holds {', '.join(sorted(metadata)) or 'nothing'}, not state and extra")
            abstract = _on_first_device(metadata["state"]) if abstract is None else abstract
            _must_match(path, named(abstract), named(metadata["state"]))
            with _reading(path):
                loaded = ocp.load_checkpointables(path, {"state": nested(abstract), "extra": None})

        with handlers():
            problem = _problem(load)
        _raise(next((found for found in distributed.gather(problem) if found), None))
        assert loaded is not None
        leaves = named(loaded["state"])
        said = leaves.get("step")
        if isinstance(said, jax.Array) and not said.shape and int(said) != step:
            raise Damaged(f"checkpoint {path} holds step {int(said)}: it has been copied or renamed to another's number")
        state = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in named(abstract)])
        return state, loaded["extra"]


def handlers() -> ocp.Context:
    """Orbax's settings: what writes and reads the two parts of a step."""
    registry = ocp.handlers.local_registry(include_global_registry=False)
    registry.add(manifest.MeasuredTree, checkpointable_name="state")
    registry.add(manifest.MeasuredJson, checkpointable_name="extra")
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.array.saving.min_slice_bytes_for_replica_parallel = _REPLICA_SLICE
    # Mantissas are noise: zstd takes a tenth off them, in most of a save's time. Compressed steps of before say so and are read.
    context.array.saving.use_compression = False
    return context


def _verify(path: str) -> None:
    """Raises Damaged where the files of a step are not what its manifests say, CheckpointError where they cannot be looked at."""
    try:
        found = [f"{part}/{text}" for part in ("state", "extra") for text in manifest.faults(os.path.join(path, part))]
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise CheckpointError(f"cannot read checkpoint {path}: {error.filename or ''}: {what}; nothing was changed") from error
    more = f"; and {len(found) - 2} more" if len(found) > 2 else ""
    if found:
        raise Damaged(f"checkpoint {path} is damaged: {'; '.join(found[:2])}{more}")


def _problem(work: Callable, *args) -> list | None:
    """What went wrong, for the other processes: [whether it is damage, the line]; None if all went well."""
    try:
        work(*args)
    except CheckpointError as error:
        return [isinstance(error, Damaged), str(error)]
    return None


def _raise(problem: list | None) -> None:
    if problem is not None:
        raise (Damaged if problem[0] else CheckpointError)(problem[1])


def abstract(state):
    """The shapes, dtypes and shardings of a tree of jax arrays: what `Checkpoints.restore` reads onto."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def _on_first_device(stored):
    """As `abstract`, of what a step's metadata say is stored."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), stored)


def _keys(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def named(tree) -> dict:
    """{"a/b/0": leaf}: the tree's leaves by name, in its own order."""
    return {"/".join(_keys(path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def nested(tree) -> dict:
    """The tree as nested dicts of strings: what is on disk then depends on names alone, not on optax's classes."""
    nested = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = _keys(path)
        inner = nested
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return nested


def _stored(leaf) -> str:
    """Shape and dtype as they are on disk, "float32[3, 4]": a typed random key is stored as its words."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _must_match(path, expected: dict, found: dict) -> None:
    wrong = []
    for name in sorted(expected.keys() | found.keys()):
        want = _stored(expected[name]) if name in expected else "nothing of this name"
        have = _stored(found[name]) if name in found else "nothing of this name"
        if want != have:
            wrong.append(f"{name}: expected {want}, found {have}")
    if wrong:
        more = f"; and {len(wrong) - 3} more leaves" if len(wrong) > 3 else ""
        raise ValueError(f"checkpoint {path} is of another model or optimizer: {'; '.join(wrong[:3])}{more}")


def _not_a_failure_of_orbax(record) -> bool:
    """A log filter: Orbax prints each failure with a traceback on every thread it passes, and asyncio those of Orbax's tasks that
    nobody awaits any more; here a failure is raised, and said once. Orbax also warns at every look of a file that it can miss."""
    said = record.getMessage()
    return "Metadata file does not exist" not in said and (
        record.levelno < logging.ERROR or not ("orbax" in record.pathname or "orbax" in said)
    )


@contextlib.contextmanager
def _reading(path):
    """Turns whatever reading raises, of files that are as their manifests say, into one line: Damaged, or CheckpointError for what
    is no fault of theirs.

    Orbax drops its other, still failing reads, and Python reports each on stderr when it is freed, which for some is at the next
    garbage collection: that is run here, unheard, and the error's own chain, which would keep them alive longer, is cut.
    """
    heard, failure = sys.unraisablehook, None

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        if code is None or "orbax" not in code.co_filename:
            heard(unraisable)

    sys.unraisablehook = hook
    try:
        try:
            yield
        except Exception as error:
            kind = CheckpointError if is_of_this_process(error) else Damaged
            failure = kind(f"cannot read checkpoint {path}: {reason(error)}")
        if failure is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # "was never awaited"
                gc.collect()
    finally:
        sys.unraisablehook = heard
    if failure is not None:
        raise failure
