"""Checkpoints of a run: Orbax (its v1 API) over tensorstore; atomic, asynchronous, sharded, on a local path or gs://.

What Orbax gives: a step is written to a temporary directory and renamed when it is whole, so a killed run leaves either a step
or nothing; arrays are written shard by shard and read back onto any mesh. What stands here on top: every save is forced (the loop
decides when), leaves are stored under their names in the tree, a restore is compared with what the caller expects leaf by leaf
before anything is read (Orbax alone would cast a wrong dtype in silence), and every failure is one line with the path.

On disk: DIRECTORY/STEP/state (arrays, as a nested dict of names: "params/blocks/mlp/in/kernel", "opt_state/0/mu/...") and
DIRECTORY/STEP/extra/data.json (the rest: loader state, resolved config).

Each of the two carries a manifest of sizes and checksums (`train/manifest.py`), part of the same commit and verified before
anything is restored. A damaged step is put aside, renamed to STEP.damaged, and the one before it is taken.
"""

import contextlib
import gc
import json
import logging
import os
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import uvloop
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src import asyncio_utils

from train import distributed, manifest

# Replicas of an array share the work of writing it where each part is at least this large, in bytes. Orbax has no lower bound of
# its own and compiles a slice for every replica of every small vector: a first save on an 8x4 mesh blocked for 14 s, now 0.1 s.
_REPLICA_SLICE = 2**20


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


class Checkpoints:
    """The checkpoints of one run, in one directory.

    directory: made if missing, relative paths are made absolute. keep: how many of the newest steps stay. every: steps that are
    multiples of it stay for good as well. say: hears, on process 0, of every step that is put aside. Opening removes, in the
    background, what a killed run left half-written. Every process of a job calls every method. Close it, or use it as a context
    manager: leaving waits for the save under way. Raises ValueError, CheckpointError.

        with Checkpoints("run/checkpoints", keep=3) as checkpoints:
            if checkpoints.begun():
                state, extra = checkpoints.restore(None, abstract(state))
            checkpoints.save(step, state, {"loader": loader_state})
    """

    def __init__(self, directory, *, keep: int = 3, every: int | None = None, say: Callable[[str], None] | None = None):
        if keep < 1 or (every is not None and every < 1):
            raise ValueError(f"keep={keep}, every={every}: a run keeps at least 1 checkpoint, and every is None or at least 1")
        directory = os.fspath(directory)
        self.directory = directory if re.match(r"\w+://", directory) else os.path.abspath(directory)
        preservation = ocp.training.preservation_policies
        policies = [preservation.LatestN(keep)] + ([] if every is None else [preservation.EveryNSteps(every)])
        registry = ocp.handlers.local_registry(include_global_registry=False)
        registry.add(manifest.MeasuredTree, checkpointable_name="state")
        registry.add(manifest.MeasuredJson, checkpointable_name="extra")
        context = ocp.Context()
        context.checkpointables.registry = registry
        context.array.saving.min_slice_bytes_for_replica_parallel = _REPLICA_SLICE
        self._start = partial(
            ocp.training.Checkpointer,
            self.directory,
            context=context,
            preservation_policy=preservation.AnyPreservationPolicy(policies),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )
        self._say = say or logging.getLogger(__name__).warning
        self._saving = None  # (step, Orbax's response) of the save under way
        self._open = None
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_a_failure_of_orbax)
        self._orbax()

    def _orbax(self):
        """Orbax's checkpointer, opened anew after a failed save: the old one would raise that failure at every later call."""
        if self._open is None:
            try:
                if os.path.isfile(self.directory):
                    raise NotADirectoryError("it is a file")
                self._open = self._start()
            except Exception as error:
                raise CheckpointError(f"cannot open the checkpoints in {self.directory}: {_reason(error)}") from error
        return self._open

    def steps(self) -> tuple[int, ...]:
        """The whole steps there are, ascending. One under way does not count."""
        return tuple(checkpoint.step for checkpoint in self._orbax().checkpoints)

    def latest_step(self) -> int | None:
        """The newest whole step, None where there is none."""
        return max(self.steps(), default=None)

    def begun(self) -> bool:
        """Whether there is a step to restore. Raises CheckpointError where all that is left are steps put aside: to start again at
        zero is the user's to say."""
        steps, aside = distributed.broadcast([self._held(), self._aside()])
        if aside and not steps:
            raise CheckpointError(
                f"{self.directory} holds damaged checkpoints only ({', '.join(aside)}): "
                "put a copy of a good one there, or choose another --out"
            )
        return bool(steps)

    def _held(self) -> list[int]:
        """The steps there are, also those that Orbax no longer takes for one."""
        found = {int(name) for name in manifest.names(self.directory) if name.isdigit()}
        # a step on gs:// has its name before it is whole
        return sorted(found & set(self.steps()) if "://" in self.directory else found)

    def _aside(self) -> list[str]:
        return [name for name in manifest.names(self.directory) if re.fullmatch(r"\d+\.damaged(-\d+)?", name)]

    def save(self, step: int, state, extra: dict) -> None:
        """Starts to write a step and returns once the arrays are copied, so that the caller may donate them at once.

        state: pytree of jax arrays, sharded or not. extra: JSON-able. Waits for the save before it. Raises ValueError for a leaf
        that is no array, an extra that is not JSON, or a step that is not past the latest; CheckpointError where this save or the
        one before failed.
        """
        self.wait()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"step {step}: {self.directory} already holds step {latest}, and a save must be of a later one")
        for name, leaf in _named(state).items():
            if not isinstance(leaf, jax.Array):
                raise ValueError(f"leaf {name} is a {type(leaf).__name__}: the state holds jax arrays, the rest is for extra")
        try:
            extra = json.loads(json.dumps(extra))  # as it will come back
        except (TypeError, ValueError) as error:
            raise ValueError(f"the extra of step {step} is not JSON: {error}") from error
        orbax, tree = self._orbax(), {"state": _nested(state), "extra": extra}
        try:
            response = orbax.save_checkpointables_async(step, tree, force=True)
            assert response is not None, "a forced save is never left out"
            self._saving = step, response
        except Exception as error:
            raise self._failed(step, error) from error

    def check(self) -> None:
        """Raises CheckpointError if the save under way has failed; does not wait, so that a loop may call it at every step."""
        if self._saving is not None and not self._orbax().is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the save under way is whole. Raises CheckpointError if it failed, once: the next save starts afresh."""
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            response.result()
            self._orbax().wait()
        except Exception as error:
            raise self._failed(step, error) from error

    def _failed(self, step, error) -> CheckpointError:
        kept = ", ".join(map(str, self.steps())) or "none"
        broken, self._open = self._open, None
        if broken is not None:
            # closing waits for, and raises, what has failed already: off to a thread that nobody waits for
            threading.Thread(target=_quietly, args=(broken.close,), daemon=True).start()
        path = os.path.join(self.directory, str(step))
        return CheckpointError(f"cannot write checkpoint {path}: {_reason(error)}; whole steps there: {kept}")

    def restore(self, step: int | None, abstract):
        """Reads a step onto the shardings of `abstract`, whatever mesh and process count wrote it.

        step: None for the newest that is good: newer ones that are damaged are put aside, once a good one has been read. abstract:
        tree of jax.ShapeDtypeStruct with shardings, see `abstract` below. Returns (state, extra), state with abstract's
        structure. Raises ValueError where a leaf is missing, unknown, or of another shape or dtype (named, with what was expected
        and found), or there is no such step; CheckpointError where the step, or every step there is, is damaged.
        """
        self.wait()
        held = distributed.broadcast(self._held())
        if (step is None and not held) or (step is not None and step not in held):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise ValueError(f"no {wanted} in {self.directory}; it has {', '.join(map(str, held)) or 'none'}")
        damaged: dict[int, str] = {}
        for candidate in reversed(held) if step is None else [step]:
            try:
                loaded = self._read(candidate, abstract)
            except CheckpointError as error:
                damaged[candidate] = str(error)
                continue
            self._put_aside(damaged)
            return loaded
        if step is not None:
            raise CheckpointError(damaged[step])
        more = f"; none of the {len(damaged)} checkpoints there is good" if len(damaged) > 1 else "; there is no other"
        raise CheckpointError(f"{damaged[held[-1]]}{more}. Nothing was changed: put a good copy there, or choose another --out")

    def stored(self, step: int):
        """What a step's state is on disk: nested dicts of jax.ShapeDtypeStruct by name. CheckpointError where it is damaged."""
        path = os.path.join(self.directory, str(step))
        if problem := _damage(path):
            raise CheckpointError(problem)
        with _reading(path):
            tree = self._orbax().checkpointables_metadata(step).metadata["state"]
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)

    def _read(self, step: int, abstract):
        """One step, verified and read: (state, extra). CheckpointError, on every process, where any of them cannot."""
        path = os.path.join(self.directory, str(step))
        problem = distributed.broadcast(_damage(path) if distributed.rank() == 0 else None)
        loaded = metadata = None
        if problem is None:
            try:
                with _reading(path):
                    metadata = self._orbax().checkpointables_metadata(step).metadata
                    if set(metadata) != {"state", "extra"}:
                        raise ValueError(f"it holds {', '.join(sorted(metadata)) or 'nothing'}, not state and extra")
                _must_match(path, _named(abstract), _named(metadata["state"]))
                with _reading(path):
                    loaded = self._orbax().load_checkpointables(step, {"state": _nested(abstract), "extra": None})
            except CheckpointError as error:
                problem = str(error)
            problem = next((found for found in distributed.gather(problem) if found), None)
        if problem is not None:
            raise CheckpointError(problem)
        assert loaded is not None
        leaves = _named(loaded["state"])
        state = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in _named(abstract)])
        return state, loaded["extra"]

    def _put_aside(self, damaged: dict[int, str]) -> None:
        if not damaged:
            return
        self._orbax().close()
        self._open = None
        if distributed.rank() == 0:
            for step, reason in sorted(damaged.items()):
                taken, name = self._aside(), f"{step}.damaged"
                name = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
                directory = epath.Path(self.directory)
                (directory / str(step)).rename(directory / name)
                self._say(f"{reason}: put aside as {name}")
        distributed.broadcast(None)  # nobody lists the steps before they are renamed

    def close(self) -> None:
        """Waits for the save under way and frees the threads. Raises CheckpointError if that save failed."""
        try:
            self.wait()
        finally:
            if self._open is not None:
                self._open.close()
                self._open = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            return self.close()
        with contextlib.suppress(CheckpointError):  # The error on its way out is the one to show.
            self.close()


def _damage(path: str) -> str | None:
    """What the manifests of a step say of its files, in one line; None if they are what was written."""
    found = [f"{part}/{text}" for part in ("state", "extra") for text in manifest.faults(os.path.join(path, part))]
    more = f"; and {len(found) - 2} more" if len(found) > 2 else ""
    return f"checkpoint {path} is damaged: {'; '.join(found[:2])}{more}" if found else None


def _quietly(function) -> None:
    with contextlib.suppress(Exception):
        function()


def abstract(state):
    """The shapes, dtypes and shardings of a tree of jax arrays: what `Checkpoints.restore` reads onto."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def _keys(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _named(tree) -> dict:
    """{"a/b/0": leaf}: the tree's leaves by name, in its own order."""
    return {"/".join(_keys(path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _nested(tree) -> dict:
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


def _reason(error: BaseException) -> str:
    """The root of an exception's chain in one line: Orbax wraps what went wrong ("incompatible handler") around its cause."""
    while (deeper := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = deeper
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _not_a_failure_of_orbax(record) -> bool:
    """A log filter: Orbax prints each failure with a traceback on every thread it passes, and asyncio those of Orbax's tasks that
    nobody awaits any more; here a failure is raised, and said once. Orbax also warns at every look of a file that it can miss."""
    said = record.getMessage()
    return "Metadata file does not exist" not in said and (
        record.levelno < logging.ERROR or not ("orbax" in record.pathname or "orbax" in said)
    )


@contextlib.contextmanager
def _reading(path):
    """Turns whatever reading raises into one CheckpointError.

    Orbax drops its other, still failing reads, and Python reports each on stderr when it is freed, which for some is at the next
    garbage collection: that is run here, unheard, and the error's own chain, which would keep them alive longer, is cut.
    """
    heard, reason = sys.unraisablehook, None

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        if code is None or "orbax" not in code.co_filename:
            heard(unraisable)

    sys.unraisablehook = hook
    try:
        try:
            yield
        except Exception as error:
            reason = _reason(error)
        if reason is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # "was never awaited"
                gc.collect()
    finally:
        sys.unraisablehook = heard
    if reason is not None:
        raise CheckpointError(f"cannot read checkpoint {path}: {reason}")
