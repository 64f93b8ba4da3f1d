"""What `train.loop` is given, what it keeps as it goes, and how a run ended."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import optax
from jax.sharding import Mesh

from train.data import TrainBatches
from train.data.suspects import Reading
from train.step import StepOptions, TrainState
from vitcore.config import ViTConfig


class Diverged(ValueError):
    """Too many steps in a row had no finite loss and gradient; a checkpoint has been written."""


UNSAID = 0.05  # share of a run's time that may pass without a step and without a word


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything `train` needs. batches: the endless stream of training batches; validation: a fresh pass over the held-out images;
    both give this process's rows; reading: what both mark and pass over. log_every, eval_every, checkpoint_every: in steps. keep:
    newest checkpoints that stay; keep_every: those of its multiples stay too. early_stop: evaluations without a better accuracy
    after which to stop, 0 for never. config_json: the resolved configuration, kept in every checkpoint; identity: the part of it
    that a continuation must share. start: makes the state at step 0 where that is not a fresh initialisation. claim: called on
    process 0 when the first batch has come, before anything is written. probe: a measurement every probe_every steps, {name:
    number} into the records. finish: called on every process with the state at the end, unless a signal ended the run.
    step_timeout: seconds, 0 for none. bad_steps, checkpoint_wait: see `train.job.JobOptions`. tensorboard, profile: see
    `train.options.TrainOptions`."""

    directory: os.PathLike
    config: ViTConfig
    mesh: Mesh
    tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    options: StepOptions
    batches: TrainBatches
    validation: Callable[[], Iterator[dict[str, Any]]]
    batch_size: int
    total_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep: int
    early_stop: int
    config_json: dict
    identity: dict
    keep_every: int | None = None
    reading: Reading | None = None
    start: Callable[[], TrainState] | None = None
    claim: Callable[[], None] = lambda: None
    probe: Callable[[TrainState], dict[str, float]] = lambda state: {}
    probe_every: int = 0
    finish: Callable[[TrainState], None] = lambda state: None
    step_timeout: float = 0
    bad_steps: int = 20
    checkpoint_wait: bool = False
    tensorboard: bool = False
    profile: tuple[int, int] | None = None


@dataclass(frozen=True)
class Best:
    """The best validation so far: its accuracy and step, and how many evaluations have passed without a better one."""

    accuracy: float = -1.0
    step: int = 0
    waited: int = 0

    def after(self, accuracy: float, step: int) -> "Best":
        return Best(accuracy, step, 0) if accuracy > self.accuracy else Best(self.accuracy, self.step, self.waited + 1)


@dataclass(frozen=True)
class Result:
    """How a run ended. steps: done in all; started: where this process took it up; seconds: spent here, compilation included.
    asked_to_stop: by a signal, with a checkpoint of the last step and no evaluation (accuracy is nan). stuck: a thread still waits
    for data, so that only `os._exit` ends the process."""

    steps: int
    started: int
    accuracy: float
    correct: int
    count: int
    best: Best
    stopped_early: bool
    seconds: float
    images_per_second: float
    skipped: int = 0
    asked_to_stop: bool = False
    stuck: bool = False


@dataclass(frozen=True)
class Clock:
    """Steps, and the seconds they took."""

    steps: int = 0
    seconds: float = 0.0

    def after(self, seconds: float) -> "Clock":
        return Clock(self.steps + 1, self.seconds + seconds)

    @property
    def rate(self) -> float:
        """Steps a second."""
        return self.steps / self.seconds if self.steps else 0.0


class Shares:
    """The seconds that parts of a run took beside its steps."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, part: str, *, count: bool = True):
        """Counts what happens inside as `part`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            if count:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begun

    def lines(self, stepping: float, waited: float) -> list[str]:
        """What is worth a word of a run whose steps took `stepping` seconds, `waited` of them without images for the devices."""
        said = []
        if stepping and waited / stepping > UNSAID:
            said.append(
                f"{waited / stepping:.0%} of the steps' time the devices waited for images: more --workers, the extra [fast], "
                "or a set packed at a smaller size (python -m train.data.pack) brings them faster"
            )
        whole = stepping + sum(self.seconds.values())
        shares = {part: took / whole for part, took in self.seconds.items() if took > UNSAID * whole}
        if long := [f"{share:.0%} of the time went into {part}" for part, share in shares.items()]:
            said.append(f"beside the steps, {' and '.join(long)}: --eval-every and --checkpoint-every say how often")
        return said


@dataclass
class Progress:
    """What changes as the loop goes, but for the state. due: the record of a step whose evaluation a signal cut short."""

    step: int = 0
    best: Best = field(default_factory=Best)
    scores: dict | None = None
    due: dict | None = None
    skipped: int = 0
    in_a_row: int = 0

    def saved(self) -> dict:
        return {"best": vars(self.best), "scores": self.scores, "due": self.due, "skipped": self.skipped}

    @classmethod
    def restored(cls, step: int, extra: dict) -> "Progress":
        return cls(step, Best(**extra["best"]), extra["scores"], extra["due"], extra["skipped"])
