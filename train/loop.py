"""The training loop: batches in, steps taken, everything a run leaves behind written as it goes.

What it promises: a run is a function of its configuration, so stopping it anywhere and starting it again gives what an
unbroken run gives; every image of the validation set is counted once; a step is only begun when the one before the last is
done, so that the queue of an accelerator is never empty and never long.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.checkpoint import Checkpoints, abstract
from train.data import EvalBatches, TrainBatches
from train.metrics import Recorder
from train.step import StepOptions, make_eval_step, make_init, make_train_step
from vitcore.config import ViTConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything `train` needs. batches: the endless stream of training batches; validation: a fresh pass over the held-out images.
    log_every, eval_every, checkpoint_every: in steps. early_stop: evaluations without a better accuracy after which to stop, 0
    for never. config_json: the resolved configuration, kept in every checkpoint; identity: the part of it that a continuation must
    share."""

    directory: Path
    config: ViTConfig
    mesh: Mesh
    tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    options: StepOptions
    batches: TrainBatches
    validation: Callable[[], EvalBatches]
    batch_size: int
    total_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep: int
    early_stop: int
    config_json: dict
    identity: dict


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
    """How a run ended. steps: done in all; started: where this process took it up; seconds: spent here, compilation included."""

    steps: int
    started: int
    accuracy: float
    correct: int
    count: int
    best: Best
    stopped_early: bool
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class _Clock:
    """Steps, and the seconds they took."""

    steps: int = 0
    seconds: float = 0.0

    def after(self, seconds: float) -> "_Clock":
        return _Clock(self.steps + 1, self.seconds + seconds)

    @property
    def rate(self) -> float:
        """Steps a second."""
        return self.steps / self.seconds if self.steps else 0.0


def train(run: Run, say: Callable[[str], None] = print) -> Result:
    """Train to the end, from the latest checkpoint in the run's directory or from the start."""
    begun = time.perf_counter()
    place = NamedSharding(run.mesh, P("data"))
    step_fn = make_train_step(run.config, run.mesh, run.tx, run.options)
    eval_fn = make_eval_step(run.config, run.mesh, run.options)
    simulated = run.mesh.devices.flat[0].platform == "cpu"

    def put(array):
        return jax.make_array_from_process_local_data(place, array)

    def evaluate(state) -> dict[str, float]:
        params = state.params if state.average is None else state.average
        total = {"count": 0.0, "correct": 0.0, "loss": 0.0}
        with run.validation() as batches:
            for batch in batches:
                sums = eval_fn(params, put(batch["image"]), put(batch["label"]), put(batch["weight"]))
                total = {key: total[key] + float(sums[key]) for key in total}
        return total

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.directory / "checkpoints", keep=run.keep))
        stack.enter_context(run.batches)
        state = make_init(run.config, run.mesh, run.tx, run.options)(jax.random.key(run.options.seed))
        best, scores = Best(), None
        if checkpoints.latest_step() is not None:
            state, extra = checkpoints.restore(None, abstract(state))
            if other := [key for key, value in run.identity.items() if extra["config"].get(key) != value]:
                raise ValueError(f"{checkpoints.directory} is another run's ({', '.join(other)} differ): choose another --out")
            run.batches.set_state(extra["loader"])
            best, scores = Best(**extra["best"]), extra["scores"]
            say(f"resuming at step {int(state.step)} from {checkpoints.directory}")
        started = step = int(state.step)
        stop = bool(run.early_stop) and best.waited >= run.early_stop
        recorder = stack.enter_context(Recorder(run.directory, total_steps=run.total_steps, step=step))

        since, whole, running = _Clock(), _Clock(), None  # time since the last line, and without the first step; the step in flight
        while step < run.total_steps and not stop:
            tick = time.perf_counter()
            batch = next(run.batches)
            state, metrics = step_fn(state, put(batch["image"]), put(batch["label"]))
            jax.block_until_ready(metrics if simulated else running)
            running, step = metrics, step + 1
            log, last = step % run.log_every == 0, step == run.total_steps
            due = step % run.eval_every == 0 or last
            record = {}
            if log or due:
                record = {"loss": float(metrics["loss"]), "gradient_norm": float(metrics["gradient_norm"])}
            taken = time.perf_counter() - tick
            since = since.after(taken)
            whole = whole if step == started + 1 else whole.after(taken)  # the first step compiles
            if due:
                scores = evaluate(state)
                accuracy, loss = scores["correct"] / scores["count"], scores["loss"] / scores["count"]
                best = best.after(accuracy, step)
                stop = bool(run.early_stop) and best.waited >= run.early_stop
                record |= {"val_accuracy": accuracy, "val_loss": loss}
            if record:
                recorder.write(
                    step,
                    **record,
                    learning_rate=np.asarray(run.learning_rate(step - 1)).item(),
                    images_per_second=since.rate * run.batch_size,
                )
                recorder.progress(step, loss=record["loss"], images_per_second=since.rate * run.batch_size)
                since = _Clock()
            checkpoints.check()
            if step % run.checkpoint_every == 0 or last or stop:
                extra = {"loader": run.batches.get_state(), "best": vars(best), "scores": scores, "config": run.config_json}
                checkpoints.save(step, state, extra)
            if due:
                recorder.draw()
        scores = scores or evaluate(state)
        checkpoints.wait()
    return Result(
        steps=step,
        started=started,
        accuracy=scores["correct"] / scores["count"],
        correct=round(scores["correct"]),
        count=round(scores["count"]),
        best=best,
        stopped_early=stop and step < run.total_steps,
        seconds=time.perf_counter() - begun,
        images_per_second=whole.rate * run.batch_size,
    )
