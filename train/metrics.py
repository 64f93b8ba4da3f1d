"""What a run writes down while it goes: metrics.jsonl, curves.png and the progress line. The only printing of the loop is here.

metrics.jsonl holds one JSON object a line: `step`, and of `loss`, `images_per_second`, `learning_rate`, `gradient_norm` and, where
they were measured, `val_accuracy` in [0, 1], `val_loss` and few-shot accuracies `fewshot_5`, whatever the caller knows. JSON has
no NaN: a value that is not finite is null.
"""

import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import SupportsFloat

from etils import epath

from train.files import open_regular, parse_json, write_atomically, write_picture

RECORDS = "metrics.jsonl"
CURVES = "curves.png"


class Recorder:
    """The records of one run, in its directory, and its progress line on stderr.

    directory: exists; on gs://, where nothing can be appended to, the files are written in a temporary directory and copied there
    by `draw`, `publish` and `close`. total_steps: of the whole run. step: the last step done before now; on a resume the lines
    after it, of steps that will be done again, are dropped first (in one rename), and new lines are appended. stream: where the
    progress line goes (default stderr), and only if it is a terminal: elsewhere there is none, and `log_line` says what a record
    holds. tensorboard: write TensorBoard's event files as well, into the directory's tensorboard/. Use as a context manager or
    close it. Raises ValueError for records that are not JSON (with the line), OSError where the file cannot be written.

        with Recorder(directory, total_steps=1500, step=start) as recorder:
            recorder.progress(step, loss=loss, images_per_second=rate)
            recorder.write(step, loss=loss, images_per_second=rate, val_accuracy=accuracy)
            recorder.draw()
    """

    def __init__(self, directory, *, total_steps: int, step: int = 0, stream=None, tensorboard: bool = False):
        self.events = Events(os.path.join(os.fspath(directory), "tensorboard"), step) if tensorboard else None
        self.directory, self._bucket = os.fspath(directory), None
        if "://" in self.directory:
            self._bucket, self.directory = epath.Path(self.directory), tempfile.mkdtemp(prefix="records-")
            if (self._bucket / RECORDS).exists():
                (self._bucket / RECORDS).copy(os.path.join(self.directory, RECORDS))
        self.path = os.path.join(self.directory, RECORDS)
        for name in os.listdir(self.directory):  # what a killed run was about to put in place
            if name in (f"{RECORDS}.tmp", f"{CURVES}.tmp"):
                os.unlink(os.path.join(self.directory, name))
        _drop_after(self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._drawer = ThreadPoolExecutor(1, thread_name_prefix="curves")
        self._drawing: Future | None = None
        stream = sys.stderr if stream is None else stream
        self._bar = None
        if stream is not None and not stream.closed and stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=step, unit="step", file=stream, dynamic_ncols=True, bar_format=_BAR)

    def write(self, step: int, **values: SupportsFloat | None) -> None:
        """Appends one line and flushes it. values: whatever float() takes; None is left out."""
        record = {"step": int(step)} | {key: _number(value) for key, value in values.items() if value is not None}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self.events is not None:
            self.events.write(record)

    @property
    def on_terminal(self) -> bool:
        """Whether the progress line is seen."""
        return self._bar is not None

    def progress(
        self, step: int, *, loss: SupportsFloat | None = None, images_per_second: SupportsFloat | None = None, **more: SupportsFloat
    ) -> None:
        """Moves the progress line to `step`: loss, images/s and what `more` names beside it. Nothing where there is no terminal."""
        if self._bar is None:
            return
        parts = [] if loss is None else [f"loss {float(loss):.4f}"]
        parts += [] if images_per_second is None else [f"{float(images_per_second):,.0f} images/s"]
        parts += [f"{name.replace('_', ' ')} {float(value):.4g}" for name, value in more.items()]
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(step - self._bar.n)

    def draw(self) -> None:
        """Writes curves.png from the records so far."""
        self._drawn()
        self._draw()

    def draw_beside(self) -> None:
        """Begins to `draw`, in a thread: matplotlib takes a second, the first time several, in which steps can be taken. What that
        raises is raised by the next call of this, `draw`, `publish` or `close`, which wait for it."""
        self._drawn()
        self._drawing = self._drawer.submit(self._draw)

    def _drawn(self) -> None:
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            drawing.result()

    def _draw(self) -> None:
        draw(read(self.path), os.path.join(self.directory, CURVES))
        self._publish()

    def publish(self) -> None:
        """What there is onto the disk, or to the bucket where the run lives in one: before a checkpoint is written, whose step the
        records then reach. It waits for a drawing, which would put older records into the bucket behind it."""
        self._drawn()
        self._publish()

    def _publish(self) -> None:
        if self._bucket is None:
            if not self._file.closed:
                os.fsync(self._file.fileno())
            return
        for name in (RECORDS, CURVES):
            if os.path.exists(os.path.join(self.directory, name)):
                epath.Path(self.directory, name).copy(self._bucket / name, overwrite=True)

    def close(self) -> None:
        try:
            self._drawn()
        finally:
            self._drawer.shutdown()
            self._file.close()
        if self.events is not None:
            self.events.close()
        self.publish()
        if self._bucket is not None:
            shutil.rmtree(self.directory)
        if self._bar is not None:
            self._bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Silence:
    """A Recorder that writes nothing: of the processes that are not the first."""

    on_terminal = True  # there is nothing to say in its place

    def write(self, step: int, **values) -> None:
        pass

    def progress(self, step: int, **values) -> None:
        pass

    def draw_beside(self) -> None:
        pass

    def publish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Events:
    """The records as TensorBoard's scalars, each under its own name; with its own writer, of the extra [tensorboard].

    step: the last one done before now: a resumed run's events start a new file, which takes the place of what came after it.
    Raises ValueError where the package is not installed, and for a bucket.
    """

    def __init__(self, directory: str, step: int):
        need_tensorboard()
        if "://" in directory:
            raise ValueError(
                f"--tensorboard writes to a local directory, and this is {directory}: give a local --out, or leave it out"
            )
        from tensorboard.compat.proto import event_pb2, summary_pb2  # pyright: ignore
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # pyright: ignore

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(directory)
        if step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, record: dict) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step" and value is not None
        ]
        self._writer.add_event(self._event(wall_time=time.time(), step=record["step"], summary=self._summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def need_tensorboard() -> None:
    """Raises ValueError where TensorBoard's writer is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs TensorBoard's writer: pip install 'vitcore[tensorboard]', or leave it out")


def log_line(record: dict, total_steps: int) -> str:
    """What a record holds, in a line of a log: where nobody sees the progress line."""
    parts = [f"loss {record['loss']:.4f}"] if record.get("loss") is not None else []
    if "images_per_second" in record:
        parts.append(f"{record['images_per_second']:,.0f} images/s")
    if "val_accuracy" in record:
        parts.append(f"validation {record['val_accuracy']:.2%}, loss {record['val_loss']:.4f}")
    parts += [f"{name.removeprefix('fewshot_')}-shot {value:.2%}" for name, value in record.items() if name.startswith("fewshot_")]
    return f"step {record['step']} of {total_steps}: {', '.join(parts)}"


_BAR = "{desc}{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"


def read(path) -> list[dict]:
    """The records of a metrics.jsonl in order. A last line that a killed run cut short is left out. ValueError for other damage."""
    with open_regular(os.fspath(path)) as file:
        lines = file.read().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            if number == len(lines):
                break  # empty after the last newline, or cut short
            raise ValueError(f"{os.fspath(path)} line {number} is not a record ({error}): repair or remove the file") from None
        records.append(record)
    return records


def draw(records: list[dict], path) -> None:
    """Two panels over the steps, training and validation loss, and validation and few-shot accuracy (images/s if none was
    measured), to a PNG.

    The file appears whole or not at all. OSError where it cannot be written.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # says so when it first builds its cache of fonts
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    def series(key):
        """Steps and values of a key; a null value, which was not finite, breaks the line."""
        found = [(r["step"], math.nan if r[key] is None else r[key]) for r in records if key in r]
        return [step for step, _ in found], [value for _, value in found]

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, loss = series("loss")
    left.plot(steps, loss, color="tab:blue", alpha=0.3 if len(steps) > 50 else 1.0, linewidth=1, label="training")
    if len(steps) > 50:
        left.plot(steps, _smooth(loss), color="tab:blue", linewidth=1.8, label="training, averaged")
    val_steps, val_loss = series("val_loss")
    if val_steps:
        left.plot(val_steps, val_loss, color="tab:orange", marker="o", markersize=3, label="validation")
    left.set(xlabel="step", ylabel="loss", title="Loss")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    val_steps, accuracy = series("val_accuracy")
    if val_steps:
        right.plot(val_steps, accuracy, color="tab:orange", marker="o", markersize=3, clip_on=False)
        best = max(((a, s) for s, a in zip(val_steps, accuracy, strict=True) if math.isfinite(a)), default=None)
        right.set(xlabel="step", title="Validation accuracy" + (f", best {best[0]:.2%} at step {best[1]:,}" if best else ""))
        for name in sorted({key for r in records for key in r if key.startswith("fewshot_")}, key=lambda key: int(key[8:])):
            right.plot(*series(name), marker="o", markersize=2, linewidth=1, alpha=0.7, label=f"{name[8:]} shots")
        if len(right.lines) > 1:
            right.lines[0].set_label("validation")
            right.legend(frameon=False)
        right.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
        right.set_ylim(top=1.0)
    else:
        right.plot(*series("images_per_second"), color="tab:green", linewidth=1)
        right.set(xlabel="step", ylabel="images/s", title="Throughput")
        right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_picture(figure, Path(path))


def _smooth(values: list[float]) -> list[float]:
    """A centred mean over a fiftieth of the run, of the finite values in reach."""
    reach = max(1, len(values) // 100)
    windows = ([v for v in values[max(0, i - reach) : i + reach + 1] if math.isfinite(v)] for i in range(len(values)))
    return [sum(window) / len(window) if window else math.nan for window in windows]


def _number(value):
    value = float(value)
    return value if math.isfinite(value) else None


def _drop_after(path, step: int) -> None:
    if os.path.exists(path):
        kept = [record for record in read(path) if record["step"] <= step]
        write_atomically(Path(path), "".join(json.dumps(record) + "\n" for record in kept))
