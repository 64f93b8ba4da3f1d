"""The checkpoints that a run writes: Orbax (its v1 API) over tensorstore; atomic, asynchronous, sharded, on a local path or gs://.

What Orbax gives: a step is written to a temporary directory and renamed when it is whole, so a killed run leaves either a step
or nothing; arrays are written shard by shard and read back onto any mesh. What stands here on top: every save is forced (the loop
decides when), and every failure is one line with the path. A damaged step is put aside, renamed to STEP.damaged, and the one before
it is taken. Before that rename every file of the step and every directory that names one are on the disk, and the rename is before
an older step is deleted: a loss of power costs what a kill would.

Whoever opens `Checkpoints` removes, renames and deletes: only the run itself, under the lock of its directory (`train.job.locked`).
Everybody else reads with `train.saved.SavedSteps`, which also says what is on disk.
"""

import asyncio
import contextlib
import json
import os
import re
import threading
import types
from collections.abc import Callable
from functools import partial

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.path import atomicity

from train import distributed, files, manifest
from train.reasons import reason
from train.saved import CheckpointError, Damaged, SavedSteps, abstract, handlers, named, nested

__all__ = ["CheckpointError", "Checkpoints", "Damaged", "abstract"]


_rename = atomicity.AtomicRenameTemporaryPath.finalize


async def _rename_what_is_on_the_disk(self) -> None:
    """Orbax's commit of a step, or of a part of one. Orbax by itself syncs its arrays and nothing beside them."""

    async def commit():
        await asyncio.to_thread(files.sync_tree, self.get())
        self.get().rename(self.get_final())
        await asyncio.to_thread(files.sync, self.get_final().parent)

    if "://" not in str(self.get_final()):
        self._snapshot = types.SimpleNamespace(replace_source=commit)  # where there is one, it renames instead
    await _rename(self)


atomicity.AtomicRenameTemporaryPath.finalize = _rename_what_is_on_the_disk


class Checkpoints(SavedSteps):
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
        super().__init__(directory, say=say)
        if set(self.directory) & set("[*?\\"):
            raise ValueError(f"{self.directory}: Orbax takes [, *, ? and \\ for a pattern, and loses what it writes: rename it")
        preservation = ocp.training.preservation_policies
        policies = [preservation.LatestN(keep)] + ([] if every is None else [preservation.EveryNSteps(every)])
        self._start = partial(
            ocp.training.Checkpointer,
            self.directory,
            context=handlers(),
            preservation_policy=preservation.AnyPreservationPolicy(policies),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )
        self._mark = f"{self.directory}.begun"  # there since the first checkpoint was whole
        self._saving = None  # (step, Orbax's response) of the save under way
        self._open = None
        self._orbax()

    def _orbax(self):
        """Orbax's checkpointer, opened anew after a failed save: the old one would raise that failure at every later call."""
        if self._open is None:
            try:
                if os.path.isfile(self.directory):
                    raise NotADirectoryError("it is a file")
                if distributed.rank() == 0:
                    files.make_directory(epath.Path(self.directory))
                self._open = self._start()
            except Exception as error:
                raise CheckpointError(f"cannot open the checkpoints in {self.directory}: {reason(error)}") from error
        return self._open

    def steps(self) -> tuple[int, ...]:
        """The whole steps there are and the one under way, ascending."""
        return tuple(checkpoint.step for checkpoint in self._orbax().checkpoints)

    def begun(self) -> bool:
        """Whether there is a step to restore. Raises CheckpointError where there were some, and none is left but those put aside:
        to start again at zero is the user's to say."""
        steps, aside = distributed.broadcast([self._on_disk(), self._aside()])
        if not steps and not aside and distributed.broadcast(epath.Path(self._mark).exists()):
            raise CheckpointError(
                f"{self.directory} has held checkpoints and holds none now: put them back, or choose another --out; "
                f"to begin at step 0 again in its place, remove {self._mark}"
            )
        if aside and not steps:
            raise CheckpointError(
                f"{self.directory} holds damaged checkpoints only ({', '.join(aside)}): "
                "put a copy of a good one there, or choose another --out"
            )
        return bool(steps)

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
        for name, leaf in named(state).items():
            if not isinstance(leaf, jax.Array):
                raise ValueError(f"leaf {name} is a {type(leaf).__name__}: the state holds jax arrays, the rest is for extra")
        try:
            extra = json.loads(json.dumps(extra))  # as it will come back
        except (TypeError, ValueError) as error:
            raise ValueError(f"the extra of step {step} is not JSON: {error}") from error
        orbax, tree = self._orbax(), {"state": nested(state), "extra": extra}
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
        if distributed.rank() == 0 and not epath.Path(self._mark).exists():
            with contextlib.suppress(OSError):  # on a full disk it is the next save that fails
                files.write_atomically(epath.Path(self._mark), "")

    def _failed(self, step, error) -> CheckpointError:
        kept = "unknown"
        with contextlib.suppress(CheckpointError):
            kept = ", ".join(map(str, super().steps())) or "none"  # as the disk has them: Orbax's list holds what it did itself
        broken, self._open = self._open, None
        if broken is not None:
            # closing waits for, and raises, what has failed already: off to a thread that nobody waits for
            threading.Thread(target=_quietly, args=(broken.close,), daemon=True).start()
        return CheckpointError(f"cannot write checkpoint {self.path(step)}: {reason(error)}; whole steps there: {kept}")

    def restore(self, step: int | None, abstract):
        """As `SavedSteps.restore`; damaged steps newer than the one that was read are put aside."""
        self.wait()
        return super().restore(step, abstract)

    def _passed_over(self, damaged: dict[int, str]) -> None:
        if not damaged:
            return
        self._orbax().close()
        self._open = None
        if distributed.rank() == 0:
            for step, why in sorted(damaged.items()):
                taken, name = self._aside(), f"{step}.damaged"
                name = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
                directory = epath.Path(self.directory)
                (directory / str(step)).rename(directory / name)
                self._say(f"{why}: put aside as {name}")
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


def _quietly(function) -> None:
    with contextlib.suppress(Exception):
        function()
