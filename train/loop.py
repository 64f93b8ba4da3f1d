"""The training loop: batches in, steps taken, everything a run leaves behind written as it goes.

What it promises: a run is a function of its configuration, so stopping it anywhere and starting it again gives what an
unbroken run gives; every image of the validation set is counted once; a step is only begun when the one before the last is
done, so that the queue of an accelerator is never empty and never long. A SIGTERM ends it within a step and a save, on every
process at the same step; a step without a finite loss and gradient changes nothing and is counted.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from train import distributed, memory
from train import mesh as meshes
from train.checkpoint import Checkpoints, abstract
from train.data.device import on_mesh
from train.feed import Feed
from train.job import differing, place
from train.meeting import Told
from train.metrics import Recorder, Silence, log_line
from train.run import Best as Best
from train.run import Clock, Diverged, Progress, Result, Run, Shares
from train.signals import Stop, Watchdog, check_interrupt
from train.step import make_eval_step, make_init, make_train_step


def train(run: Run, say: Callable[[str], None] = print, *, stop: Stop | None = None) -> Result:
    """Train to the end, from the latest good checkpoint in the run's directory or from the start. Every process of a job calls it.

    say: hears one line where something happens, on process 0. stop: who is asked to stop; by default SIGTERM does it. Raises
    ValueError for a checkpoint of another run, CheckpointError, Diverged, and what the batches raise.
    """
    with contextlib.ExitStack() as stack:
        return _Loop(run, say, stop or stack.enter_context(Stop()), stack).run()


class _Loop:
    """One call of `train`. What is opened is left to `stack`."""

    def __init__(self, run: Run, say, stop: Stop, stack: contextlib.ExitStack):
        self.begun = time.perf_counter()
        self.spec = run
        self.first = distributed.rank() == 0
        self.say = say if self.first else lambda line: None
        self.stop, self.stack = stop, stack
        self.stopping = False
        distributed.share(stop)
        self.any_asked = distributed.AnyProcess(run.mesh)
        self.place = on_mesh(run.mesh)
        self.step_fn: Any = make_train_step(run.config, run.mesh, run.tx, run.options)
        self.eval_fn = make_eval_step(run.config, run.mesh, run.options)
        self.run_device = next(d for d in run.mesh.devices.flat if d.process_index == jax.process_index())
        self.simulated = self.run_device.platform == "cpu"
        self.memory = memory.limit_of(self.run_device)  # until the first step is known to fit; None: nobody can tell
        self.unseen: list[tuple[int, dict]] = []  # steps whose metrics nobody has looked at
        self.now = Progress()
        self.watchdog = stack.enter_context(Watchdog(run.step_timeout))
        self.shares = Shares()
        self.tracing = False
        stack.callback(self.end_trace)

    def next(self, feed: Feed, *, more: bool = True):
        """The next batch, waited for until one asks to stop; None where it has not come, or there is none."""
        return feed.next(lambda: self.stop.asked, more=more, busy=self.busy)

    def busy(self) -> bool:
        """Whether the devices still compute the last step that was given to them."""
        return bool(self.unseen) and not self.unseen[-1][1]["loss"].is_ready()

    def asked(self) -> bool:
        """Whether any process has been asked to stop. Every process asks between having a batch, or waiting for it no longer, and
        what all of them do with it together: so none is left in there by one that has no batch."""
        self.stopping = self.stopping or self.any_asked(self.stop.asked)
        return self.stopping

    def evaluate(self) -> dict[str, float] | None:
        """Sums over the validation set, or None if a signal came in between."""
        params = self.state.params if self.state.average is None else self.state.average
        total = {"count": 0.0, "correct": 0.0, "loss": 0.0}
        first = 0  # of the batch, in the set
        with Feed(self.spec.validation(), self.place) as feed:
            while True:
                batch = self.next(feed)
                if self.asked():
                    return None
                if batch is None:
                    if not total["count"]:
                        raise ValueError("no image of the validation set can be read: mend the files, or name another set")
                    return total
                sums = self.eval_fn(params, batch["image"], batch["label"], batch["weight"], first)
                first += batch["image"].shape[0]
                total = {key: total[key] + float(sums[key]) for key in total}
                self.watchdog.beat(f"evaluating after step {self.now.step}")

    def restore(self) -> None:
        """The state, from the latest good checkpoint or made; the directory is claimed once a first batch has come."""
        run, stack = self.spec, self.stack
        if run.reading is not None:
            run.reading.begin(self.say)
        directory = place(run.directory) / "checkpoints"
        fresh = distributed.broadcast(not directory.exists())
        self.feed = stack.enter_context(Feed(run.batches, self.place))
        self.batch = self.next(self.feed, more=False) if fresh else None
        if self.first and fresh:
            run.claim()
        distributed.broadcast(None)  # nobody writes before the claim stands
        distributed.check_shared(run.directory)
        self.checkpoints = stack.enter_context(Checkpoints(directory, keep=run.keep, every=run.keep_every, say=self.say))
        self.watchdog.beat("restoring")
        make = run.start or (lambda: make_init(run.config, run.mesh, run.tx, run.options)(jax.random.key(run.options.seed)))
        self.state = make()
        if self.checkpoints.begun():
            self.state, extra = self.checkpoints.restore(None, abstract(self.state))
            if other := differing(run.identity, extra["config"]):
                raise ValueError(f"{directory} is another run's ({', '.join(other)} differ): choose another --out")
            run.batches.set_state(extra["loader"])
            self.loader = extra["loader"]
            self.now = Progress.restored(int(self.state.step), extra)
            self.say(f"resuming at step {self.now.step} from {directory}")
        if self.first and not fresh:
            run.claim()  # now that there is a run to go on with
        self.started = self.now.step

    def save(self) -> None:
        now = self.now
        if self.checkpoints.latest_step() != now.step:
            self.settle()
            self.recorder.publish()
            self.watchdog.beat(f"saving step {now.step}")
            self.checkpoints.save(now.step, self.state, {"loader": self.loader, "config": self.spec.config_json, **now.saved()})
            if self.spec.checkpoint_wait:
                self.checkpoints.wait()

    def settle(self, but: int = 0) -> None:
        """Looks whether the steps so far were finite, but for the last `but`, which may still run."""
        now = self.now
        while len(self.unseen) > but:
            step, metrics = self.unseen.pop(0)
            if bool(metrics["finite"]):
                now.in_a_row = 0
                continue
            now.skipped, now.in_a_row = now.skipped + 1, now.in_a_row + 1
            loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
            self.say(f"step {step}: loss {loss}, gradient norm {norm}: skipped ({now.in_a_row} in a row, {now.skipped} in all)")

    def step(self, batch) -> dict:
        check_interrupt()
        self.watchdog.beat(f"taking step {self.now.step + 1}")
        self.profile(self.now.step + 1)
        if self.memory is not None:
            self.compile(batch)
        self.state, metrics = self.step_fn(self.state, batch["image"], batch["label"])
        self.now.step += 1
        self.unseen.append((self.now.step, metrics))
        in_flight = 0 if self.simulated else 1
        if len(self.unseen) > in_flight:
            jax.block_until_ready(self.unseen[-1 - in_flight][1])
        self.settle(in_flight)
        return metrics

    def compile(self, batch) -> None:
        """Compiles the step for this batch, and raises `memory.TooLarge` where the program does not fit the devices."""
        run, limit = self.spec, self.memory
        assert limit is not None
        self.memory = None  # once
        compiled = self.step_fn.lower(self.state, batch["image"], batch["label"]).compile()
        here = self.run_device

        def bytes_here(tree) -> int:
            shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
            return sum(shard.data.nbytes for shard in shards if shard.device == here)

        memory.check(
            compiled.memory_analysis(), bytes_here(batch["image"]), limit=limit, kept=bytes_here(self.state),
            batch_size=run.batch_size,
            parts=meshes.shape_of(run.mesh).data * run.options.accumulate, device=here.device_kind,
        )  # fmt: skip
        self.step_fn = compiled

    def profile(self, step: int) -> None:
        """Starts the profiler before the first step of --profile, and stops it before the one behind the last. On process 0."""
        if self.spec.profile is None or not self.first:
            return
        first, last = self.spec.profile
        if first <= step <= last and not self.tracing:
            jax.block_until_ready(self.state)
            jax.profiler.start_trace(os.fspath(place(self.spec.directory) / "profile"), create_perfetto_trace=True)
            self.tracing = True
        elif step > last:
            self.end_trace()

    def end_trace(self) -> None:
        if self.tracing:
            self.tracing = False
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self.say(
                f"profile: {place(self.spec.directory) / 'profile'}, for xprof; its perfetto_trace.json.gz for ui.perfetto.dev"
            )

    def finish_step(self, record: dict, rate: float) -> None:
        """The measurements of a step, where they are due, and its record. A signal in between leaves all to the continuation."""
        run, now = self.spec, self.now
        scores, measured = None, {}
        if self.evaluates(now.step):
            scores = self.evaluate()
        if run.probe_every and now.step % run.probe_every == 0 and not self.stopping:
            try:
                measured = run.probe(self.state)
            except Told:
                self.stopping = True
        if self.stopping and (self.evaluates(now.step) or (run.probe_every and now.step % run.probe_every == 0)):
            now.due = record
            return
        now.due = None
        if scores is not None:
            now.scores = scores
            accuracy, loss = scores["correct"] / scores["count"], scores["loss"] / scores["count"]
            now.best = now.best.after(accuracy, now.step)
            record |= {"val_accuracy": accuracy, "val_loss": loss}
        if record:
            record |= measured
            if now.skipped:
                record["skipped"] = now.skipped
            # the schedule counts the updates before this step; a skipped step is none, but had a rate
            lr = np.asarray(run.learning_rate(now.step - 1 - now.skipped + (now.in_a_row > 0))).item()
            self.recorder.write(now.step, **record, learning_rate=lr, images_per_second=rate * run.batch_size)
            if not self.recorder.on_terminal:
                self.say(log_line({"step": now.step, **record, "images_per_second": rate * run.batch_size}, run.total_steps))
            self.recorder.progress(now.step, loss=record.get("loss"), images_per_second=rate * run.batch_size)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation comes after a step."""
        return step % self.spec.eval_every == 0 or step == self.spec.total_steps

    @property
    def waited_enough(self) -> bool:
        return bool(self.spec.early_stop) and self.now.best.waited >= self.spec.early_stop

    def run(self) -> Result:
        run = self.spec
        self.restore()
        now = self.now
        if self.first:  # a step whose evaluation is still due is written again
            at = now.step - (now.due is not None)
            recorder = Recorder(run.directory, total_steps=run.total_steps, step=at, tensorboard=run.tensorboard)
        else:
            recorder = Silence()
        self.recorder = self.stack.enter_context(recorder)
        since, whole, waited = Clock(), Clock(), 0.0  # time since the last line; without the first step; of that, for batches
        if now.due is not None:
            self.finish_step(dict(now.due), 0.0)
        while now.step < run.total_steps and not self.waited_enough and not self.stopping:
            tick = time.perf_counter()
            self.watchdog.beat(f"waiting for the batch of step {now.step + 1}")
            batch, self.batch = self.batch, None
            more = now.step + 1 < run.total_steps
            if batch is None:
                batch = self.next(self.feed, more=more)
            if self.asked():
                break
            self.loader = self.feed.state  # a batch that came but is not taken is drawn again by the continuation
            if not more:
                self.feed.end()
            metrics = self.step(batch)
            last = now.step == run.total_steps
            log = now.step % run.log_every == 0
            due = self.evaluates(now.step)
            probe = run.probe_every and now.step % run.probe_every == 0
            record = {}
            if log or due or probe:
                record = {"loss": float(metrics["loss"]), "gradient_norm": float(metrics["gradient_norm"])}
                self.settle()
            taken = time.perf_counter() - tick
            since = since.after(taken)
            if now.step > self.started + 1:  # the first step compiles
                whole, waited = whole.after(taken), waited + self.feed.idle
            with self.shares.of("evaluations", count=now.step > self.started + 1 and bool(due or probe)):
                self.finish_step(record, since.rate)
            since = Clock() if record else since
            self.checkpoints.check()
            if now.in_a_row >= run.bad_steps:
                self.diverged()
            if now.step % run.checkpoint_every == 0 or last or self.waited_enough:
                with self.shares.of("saves"):
                    self.save()
            if due and now.due is None:
                self.recorder.draw_beside()
        self.say_times(whole, waited)
        return self.result(whole.rate * run.batch_size)

    def say_times(self, whole: Clock, waited: float) -> None:
        """Says where devices stood idle for long. Simulated ones share the cores that decode: there it means nothing."""
        for line in () if self.simulated else self.shares.lines(whole.seconds, waited):
            self.say(line)

    def diverged(self) -> None:
        self.save()
        self.checkpoints.wait()
        n, step = self.now.in_a_row, self.now.step
        raise Diverged(
            f"{n} steps in a row had no finite loss and gradient, the last of them step {step}; the parameters are as before them, "
            f"in checkpoint {step}: lower --learning-rate or look at the data (the same command goes on from there)"
        )

    def result(self, rate: float) -> Result:
        run, now = self.spec, self.now
        if self.stopping and now.step > 0:
            self.save()
        scores = now.scores
        if not self.stopping and (scores is None or now.due is not None):
            scores = self.evaluate()
        self.watchdog.beat("writing the last checkpoint")
        self.checkpoints.wait()
        if not self.stopping:
            self.watchdog.beat("after the last step")
            try:
                run.finish(self.state)
            except Told:
                self.stopping = True
        sums = {"correct": 0.0, "count": math.nan} if self.stopping or scores is None else scores
        self.stack.close()
        if run.reading is not None and not self.feed.stuck:
            run.reading.end()
        return Result(
            steps=now.step,
            started=self.started,
            accuracy=sums["correct"] / sums["count"],
            correct=round(sums["correct"]),
            count=0 if math.isnan(sums["count"]) else round(sums["count"]),
            best=now.best,
            stopped_early=self.waited_enough and now.step < run.total_steps,
            seconds=time.perf_counter() - self.begun,
            images_per_second=rate,
            skipped=now.skipped,
            asked_to_stop=self.stopping,
            stuck=self.feed.stuck,
        )
