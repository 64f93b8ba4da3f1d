"""`bench.throughput --job`: a whole training job measured, and what the table says of it."""

import json
import multiprocessing
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from bench import job
from bench.device_study import TrialError
from bench.peers import timm_job
from bench.throughput import Throughput, run


@pytest.mark.slow
def test_a_whole_job_on_the_cpu(tmp_path, capsys):
    rows = run(
        Throughput(job=True, images=48, steps=6, every=2, batch_sizes=(8,), sizes=(32,), models=("ViT-Ti/16",), out=tmp_path)
    )
    printed = capsys.readouterr().out
    assert "48 JPEGs made" in printed
    assert json.loads((tmp_path / "job.json").read_text())["rows"] == rows
    (row,) = rows
    assert (row["name"], row["batch"], row["cards"], row["steps"]) == ("vitcore", 8, 1, 6)
    assert 0 < row["whole"] < row["training"] < 1e5, "evaluations and saves take time beside the steps"
    assert row["loss"] > 0


def test_the_table_compares_ours_with_each_of_theirs():
    same = {"model": "ViT-B/16", "size": 224, "batch": 512, "cards": 2, "loss": 0.5, "training": 7000.0}
    rows = [
        same | {"name": "vitcore", "whole": 6000.0, "said": ["7% of the time"]},
        same | {"name": "timm", "whole": 2000.0, "workers": 4},
        same | {"name": "timm, tuned", "whole": 4000.0, "workers": 16},
        same | {"name": "timm", "model": "ViT-L/16", "error": "out of memory"},
    ]
    assert job.compared(rows) == ["ViT-B/16@224: vitcore runs at 3.00 x timm, 1.50 x timm, tuned"]
    assert "7% of the time" in job.line(rows[0])
    assert "16 workers" in job.line(rows[2])
    assert "out of memory" in job.line(rows[3])
    assert job.compared(rows[:1]) == [], "nothing to compare with"


def test_a_job_that_fails_says_what_it_said():
    with pytest.raises(TrialError, match="no such thing"):
        job._lines([sys.executable, "-c", "import sys; sys.exit('no such thing')"], 60)
    with pytest.raises(TrialError, match="the time it was given"):
        job._lines([sys.executable, "-c", "import time; time.sleep(60)"], 1)


def test_sides_of_several_calls_make_one_table(tmp_path, monkeypatch, capsys):
    """Each in a call of its own; those of another batch or count of steps are not compared."""
    monkeypatch.setattr(job, "ours", lambda *_: {"whole": 3000.0, "training": 4000.0, "loss": 0.5})
    monkeypatch.setattr(job, "find_spec", lambda name: name)  # torchvision, which the others would need
    said = {"training": 2500.0, "loss": 0.5}
    monkeypatch.setattr(job, "theirs", lambda request, _: said | {"whole": 2000.0 if request["tuned"] else 1000.0, "workers": 3})
    device = {"platform": "gpu", "mesh_devices": 1, "count": 1, "kind": "card", "cores": 3, "dtype": "bfloat16"}
    monkeypatch.setattr(job, "describe", lambda *_, **__: device)
    for folder in ("train/a", "val/a"):
        (tmp_path / folder).mkdir(parents=True)
    for k in range(16):
        (tmp_path / "train" / "a" / f"{k}.jpg").touch()
    same: dict = dict(job=True, data=tmp_path, every=2, batch_sizes=(8,), sizes=(32,), models=("ViT-Ti/16",))
    calls: list[Any] = [("a", 6, ("ours",)), ("b", 6, ("timm",)), ("c", 6, ("tuned",)), ("d", 4, ("timm", "tuned"))]
    for name, steps, sides in calls:
        rows = run(Throughput(**same, steps=steps, only=sides, out=tmp_path / name))
        assert [row["name"] for row in rows] == [{"ours": "vitcore", "tuned": "timm, tuned"}.get(side, side) for side in sides]
    capsys.readouterr()
    assert job.main([str(tmp_path / name / "job.json") for name in "abcd"]) == ""
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 7
    assert printed[-1] == "ViT-Ti/16@32: vitcore runs at 3.00 x timm, 1.50 x timm, tuned"
    (tmp_path / "bad.json").write_text("[]")
    assert "bad.json is no job.json" in job.main([str(tmp_path / "bad.json")])
    assert "none.json is no job.json" in job.main([str(tmp_path / "none.json")])


def test_a_side_belongs_to_a_job():
    with pytest.raises(ValueError, match="--only belongs to --job"):
        run(Throughput(only=("ours",)))


def test_a_peer_that_does_not_end_says_how_far_it_came(monkeypatch):
    monkeypatch.setattr(job, "start", lambda request, **_: ([{"step": 40, "loss": 1.0}], "ended after 60 s, the time it was given"))
    request = {"workers": 4, "tuned": False, "steps": 120}
    with pytest.raises(job.TrialError, match=r"ended after 60 s, the time it was given \(step 40 of 120 was its last word\)"):
        job.theirs(request, 60.0)


def test_a_card_s_process_forks_its_readers_as_torchrun_s_do(monkeypatch):
    """A process that was spawned would spawn them, one after another, each with torch to import: minutes on 32 cores."""

    class Trainer:
        def __init__(self, request, rank):
            pass

        def run(self, folder):
            return {"readers": multiprocessing.get_start_method()}

    groups = SimpleNamespace(init_process_group=lambda *_, **__: None, destroy_process_group=lambda: None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), distributed=groups))
    monkeypatch.setattr(timm_job, "_Trainer", Trainer)
    said: list[dict] = []
    monkeypatch.setattr(timm_job, "say", said.append)
    before = multiprocessing.get_start_method()
    try:
        multiprocessing.set_start_method("spawn", force=True)
        timm_job._work(0, {"cards": 2}, 1, "")
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert said == [{"readers": "fork"}]
