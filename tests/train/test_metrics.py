"""The records of a run: lines, resumes, damage, the picture and the progress line."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from train import metrics
from train.metrics import Recorder, draw, log_line, read


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(directory):
    return (directory / "metrics.jsonl").read_text().splitlines()


def test_a_record_is_one_object_a_line_and_on_disk_at_once(tmp_path):
    with Recorder(tmp_path, total_steps=10) as recorder:
        recorder.write(1, loss=np.float32(0.5), images_per_second=100)
        recorder.write(2, loss=0.25, val_accuracy=0.75, val_loss=None)
        assert [json.loads(line) for line in lines(tmp_path)] == [
            {"step": 1, "loss": 0.5, "images_per_second": 100.0},
            {"step": 2, "loss": 0.25, "val_accuracy": 0.75},
        ]
    assert [json.loads(line) for line in lines(tmp_path)] == read(tmp_path / "metrics.jsonl")


def test_what_is_not_finite_is_null_for_every_json_reader(tmp_path):
    with Recorder(tmp_path, total_steps=10) as recorder:
        recorder.write(1, loss=float("nan"), gradient_norm=float("inf"))
        recorder.draw()
    assert lines(tmp_path) == ['{"step": 1, "loss": null, "gradient_norm": null}']


def test_a_resume_drops_the_steps_that_are_done_again_and_appends(tmp_path):
    with Recorder(tmp_path, total_steps=10) as recorder:
        for step in range(1, 8):
            recorder.write(step, loss=float(step))
    kept = lines(tmp_path)[:5]
    with Recorder(tmp_path, total_steps=10, step=5) as recorder:
        assert lines(tmp_path) == kept
        recorder.write(6, loss=60.0)
    assert lines(tmp_path) == [*kept, '{"step": 6, "loss": 60.0}']
    with Recorder(tmp_path, total_steps=10):
        assert lines(tmp_path) == []
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_curves_are_drawn_beside_the_caller_and_waited_for_before_records_are_published(tmp_path, monkeypatch):
    go, done = threading.Event(), []

    def slowly(records, path):
        assert go.wait(20)
        time.sleep(0.05)
        done.append(len(records))

    monkeypatch.setattr(metrics, "draw", slowly)
    with Recorder(tmp_path, total_steps=10) as recorder:
        recorder.write(1, loss=0.5)
        recorder.draw_beside()
        recorder.write(2, loss=0.5)
        assert done == []
        go.set()
        recorder.publish()
        assert len(done) == 1
        recorder.draw_beside()
    assert done[1:] == [2]


def test_curves_that_cannot_be_drawn_are_an_error_of_the_caller(tmp_path, monkeypatch):
    def full(records, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics, "draw", full)
    recorder = Recorder(tmp_path, total_steps=10)
    for wait in (recorder.draw_beside, recorder.publish, recorder.close):
        recorder.draw_beside()
        with pytest.raises(OSError, match="No space"):
            wait()


@pytest.mark.parametrize("cut", [1, 5, 13])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, cut):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + b'{"step": 2, "loss": 1.0}'[:cut])
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    with Recorder(tmp_path, total_steps=10, step=1) as recorder:
        recorder.write(2, loss=1.0)
    assert lines(tmp_path) == ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.0}']


@pytest.mark.parametrize("damage", [b"\x00\xff", b"12", b'{"loss": 1.0}', b'{"step": "1"}', b""], ids=repr)
def test_other_damage_is_named_with_its_line_and_left_alone(tmp_path, damage):
    before = b'{"step": 1}\n' + damage + b'\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_bytes(before)
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 .*repair or remove") as error:
        Recorder(tmp_path, total_steps=10, step=3)
    assert "\n" not in str(error.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_resume_that_cannot_write_leaves_the_old_records(tmp_path, monkeypatch):
    with Recorder(tmp_path, total_steps=10) as recorder:
        recorder.write(1, loss=1.0)
    before = lines(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Recorder(tmp_path, total_steps=10, step=0)
    assert lines(tmp_path) == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def records(count, accuracy=True):
    every = [{"step": i, "loss": 2.0 / i, "images_per_second": 100.0 + i} for i in range(1, count)]
    for record in every[9::10] if accuracy else []:
        record |= {"val_accuracy": 1 - 1 / record["step"], "val_loss": 2.5 / record["step"]}
    return every


def panels(path):
    """How many pixels of colour, neither grey nor white, each half of the picture has."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert picture.shape[0] >= 400
    assert picture.shape[1] >= 1000
    colour = picture.max(-1) - picture.min(-1) > 60
    middle = picture.shape[1] // 2
    return colour[:, :middle].sum(), colour[:, middle:].sum()


@pytest.mark.parametrize("accuracy", [True, False])
def test_the_picture_has_two_panels_with_curves_in_them(tmp_path, accuracy):
    draw(records(200, accuracy), tmp_path / "curves.png")
    left, right = panels(tmp_path / "curves.png")
    assert left > 500
    assert right > 500
    assert os.listdir(tmp_path) == ["curves.png"]


def test_the_picture_of_nothing_and_of_one_step_can_be_drawn(tmp_path):
    for few in ([], records(2), [{"step": 1, "loss": None, "val_accuracy": None}]):
        draw(few, tmp_path / "curves.png")
        assert Image.open(tmp_path / "curves.png").size[0] >= 1000


def test_a_picture_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    draw(records(30), tmp_path / "curves.png")
    before = (tmp_path / "curves.png").read_bytes()

    def broken(self, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", broken)
    with pytest.raises(OSError, match="No space left"):
        draw(records(60), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["curves.png"]


def test_the_progress_line_says_loss_rate_and_time_left_on_a_terminal(tmp_path):
    terminal = Terminal()
    with Recorder(tmp_path, total_steps=40, step=10, stream=terminal) as recorder:
        for step in range(11, 41):
            recorder.progress(step, loss=0.1234, images_per_second=1500.4, val_accuracy=0.5)
        assert recorder._bar is not None
        recorder._bar.refresh()
    last = terminal.getvalue().split("\r")[-1]
    for part in ("100%", "40/40 steps", "left", "loss 0.1234", "1,500 images/s", "val accuracy 0.5"):
        assert part in last


def test_a_line_says_what_a_record_holds():
    record = {
        "step": 50,
        "loss": 1.23456,
        "gradient_norm": 0.8,
        "images_per_second": 3799.4,
        "val_accuracy": 0.8761,
        "val_loss": 0.4,
    }
    assert log_line(record, 1205) == "step 50 of 1205: loss 1.2346, 3,799 images/s, validation 87.61%, loss 0.4000"
    few = {"step": 1, "loss": None, "fewshot_5": 0.5, "fewshot_25": 0.75}
    assert log_line(few, 2) == "step 1 of 2: 5-shot 50.00%, 25-shot 75.00%"


def test_tensorboard_gets_the_records_or_a_line_says_what_is_missing(tmp_path, monkeypatch):
    """A resumed run's records take the place of those that were lost. Where its package is not there, what to install."""
    if importlib.util.find_spec("tensorboard") is not None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore

        for step, losses in ((0, (2.0, 1.5)), (1, (1.25,))):
            with Recorder(tmp_path, total_steps=5, step=step, tensorboard=True) as recorder:
                for i, loss in enumerate(losses, step + 1):
                    recorder.write(i, loss=loss)
        found = EventAccumulator(str(tmp_path / "tensorboard"))
        found.Reload()
        assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 2.0), (2, 1.25)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vitcore\[tensorboard\]', or leave it out"):
        Recorder(tmp_path, total_steps=5, tensorboard=True)


def test_few_shots_have_curves(tmp_path):
    records = [{"step": i, "loss": 1.0, "val_accuracy": 0.5, "fewshot_5": 0.4, "fewshot_25": 0.6} for i in range(1, 9)]
    draw(records, tmp_path / "with.png")
    draw([{key: r[key] for key in ("step", "loss", "val_accuracy")} for r in records], tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_nothing_is_printed_where_there_is_no_terminal(tmp_path):
    stream = io.StringIO()
    with Recorder(tmp_path, total_steps=40, stream=stream) as recorder:
        assert not recorder.on_terminal
        recorder.progress(1, loss=1.0)
        recorder.write(1, loss=1.0)
    assert stream.getvalue() == ""


def test_importing_it_is_cheap():
    code = "import sys, train.metrics; print(*{'matplotlib', 'jax', 'tqdm', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
