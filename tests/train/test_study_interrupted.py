"""Each study of the catalogue, interrupted at every one of its runs: nothing is done twice, nothing is lost."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.train.fault_jobs import ROOT, Job, environment
from train import study, vtab_results
from train.studies import cost, execute, others, report
from train.studies.catalogue import STUDIES

SETS = list(STUDIES)
# Pre-training with what follows, tasks, and rates: one study of each kind is among the fast tests.
BY_KIND = [pytest.param(name, marks=() if name in ("masked", "fig2", "fig12") else pytest.mark.slow) for name in SETS]


# --- the order of things, with runs that take no time ---------------------------------------------------------------------------


def _result(run) -> dict:
    """What a run may have found; another one each."""
    value = (sum(run.name.encode()) % 97) / 97
    if run.job == "vtab":
        final = {task: {"lr-0.01-seed-0": {"accuracy": value}} for task in vtab_results.TOYS}
        means = vtab_results.means(vtab_results.accuracies(final, 0.01), vtab_results.TOYS)
        return {"value": value, "vtab": {"toys": True, "final": final, "rate": 0.01, "missing": {}, "means": means}}
    if run.job == "throughput":
        words = run.options[run.options.index("--models") + 1 :] if "--models" in run.options else ("ViT-Ti/16",)
        row = {"where": "device", "dtype": "float32", "size": 8, "mode": "forward", "batch": 64, "images_per_second": 1e3 * value}
        return {"value": None, "rows": [row | {"model": model} for model in words if not model.startswith("--")]}
    return {"value": value, "steps": 3, "of_steps": 3}


@pytest.fixture
def quick(monkeypatch):
    """Jobs that only note that they were begun and ended, of which `breaks` says how one ends: {how many were begun: "told",
    "killed" or "behind"}; how they were begun, and ended."""
    begun: list[str] = []
    ended: list[str] = []
    breaks: dict[int, str] = {}

    def run(one, out, shared, stop):
        begun.append(one.name)
        (out / "runs" / one.name).mkdir(exist_ok=True)
        (out / "runs" / one.name / "config.json").write_text("{}")
        how = breaks.get(len(begun))
        if how == "told":
            return None
        if how == "killed":
            raise KeyboardInterrupt
        if how == "behind":
            stop.ask()
        ended.append(one.name)
        return _result(one)

    known, of_all = {}, cost.of_runs

    def of_runs(runs, setting):
        if setting not in known:
            known[setting] = of_all(runs, setting)
        return known[setting]

    monkeypatch.setattr(execute, "run", run)
    monkeypatch.setattr(execute, "check", lambda runs: None)  # test_study.py has it
    monkeypatch.setattr(cost, "of_runs", of_runs)
    monkeypatch.setattr(study, "_at_scale", lambda study: ["at scale"])
    monkeypatch.setattr(report, "draw", lambda study, rows, setting, path: path.write_text("drawn"))
    monkeypatch.setattr(others, "draw", lambda study, runs, results, setting, out: (out / f"{study.name}.png").write_text("drawn"))
    return begun, ended, breaks


def _made(out, name) -> dict:
    """All that a study says: its results without their cost, its table, its rows."""
    results = {path.name: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}
    for result in results.values():
        result.pop("cpu_seconds")
    rows = out / "rows.json"
    return results | {"table": (out / f"{name}.md").read_text(), "rows": rows.read_text() if rows.exists() else None}


@pytest.mark.parametrize("name", BY_KIND)
def test_stopped_at_every_run_nothing_is_done_twice(name, quick, tmp_path):
    begun, ended, breaks = quick
    assert study.main([name, "--out", str(tmp_path / "whole")]) == 0
    all_of_them, whole = list(ended), _made(tmp_path / "whole", name)
    assert (tmp_path / "whole" / f"{name}.png").exists()
    assert len(set(all_of_them)) == len(all_of_them) > 0

    begun.clear()
    ended.clear()
    words, calls = [name, "--out", str(tmp_path / "parts")], 0
    unfinished = 0
    while not (tmp_path / "parts" / f"{name}.md").exists():
        breaks.clear()
        how = ("told", "killed", "behind")[calls % 3]
        breaks[len(begun) + 1] = how
        assert study.main(words) == (130 if how == "killed" else 0)
        unfinished += how != "behind"
        calls += 1
        assert calls <= 3 * len(all_of_them) + 1
        if len(ended) == len(all_of_them):
            breaks.clear()
            assert study.main(words) == 0
    assert ended == all_of_them  # in order, each once
    assert len(begun) == len(all_of_them) + unfinished  # begun again only where it was not finished
    assert _made(tmp_path / "parts", name) == whole
    assert study.main(words) == 0
    assert ended == all_of_them


@pytest.mark.parametrize("name", BY_KIND)
def test_parts_of_each_study_in_any_order_make_what_the_whole_makes(name, quick, tmp_path):
    _, ended, _ = quick
    assert study.main([name, "--out", str(tmp_path / "whole")]) == 0
    all_of_them = sorted(ended)
    ended.clear()
    for part in (3, 8, 1, 2, 7, 6, 5, 4):
        assert study.main([name, "--out", str(tmp_path / "parts"), "--part", f"{part}/8"]) == 0
    assert sorted(ended) == all_of_them
    assert _made(tmp_path / "parts", name) == _made(tmp_path / "whole", name)


# --- the jobs themselves --------------------------------------------------------------------------------------------------------

# A hundredth of the steps: six of the most. Table 7 begins with a ResNet of 40, and a run of one step has no middle: a tenth. Of
# fig12 and fig13 what is timed differs each time, and no time would be enough.
BUDGETS = {"table7": "0.1"}
WHOLE = 3000  # seconds that all runs of a study may take on a busy machine


def start(folder: Path, name: str, log: str) -> Job:
    where = folder / log
    budget = ("--budget", BUDGETS.get(name, "0.01"), "--mesh", "1x1")
    command = [sys.executable, "-m", "train.study", name, *budget, "--out", str(folder / name)]
    with open(where.with_suffix(".out"), "w") as out, open(where.with_suffix(".err"), "w") as err:
        return Job(subprocess.Popen(command, cwd=ROOT, env=environment(folder.parent / "cache"), stdout=out, stderr=err), where)


def begun_in(folder: Path) -> list[str]:
    """The runs that were begun, in the order of the logs."""
    lines = [line for log in sorted(folder.glob("log-*.out")) for line in log.read_text().splitlines()]
    return [line.split(": ", 1)[1].rpartition(" (")[0] for line in lines if line.startswith("--- ")]


@pytest.mark.slow
@pytest.mark.timeout(2 * WHOLE)
@pytest.mark.parametrize("name", SETS)
def test_ended_by_a_signal_within_its_runs_it_makes_what_the_whole_makes(name, tmp_path):
    """SIGTERM in the middle of a pre-training, SIGKILL in the next run, SIGKILL in the last one."""
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    assert start(tmp_path / "whole", name, "log-0").end(WHOLE) == 0
    runs = begun_in(tmp_path / "whole")
    again = []
    for i, (at, how) in enumerate([(0, "term"), (min(1, len(runs) - 1), "kill"), (len(runs) - 1, "kill")]):
        job = start(tmp_path / "parts", name, f"log-{i}")
        job.reach(f"--- {at + 1} of {len(runs)}: {runs[at]} (", WHOLE)
        if how == "term" and runs[at] != "throughput":
            job.reach("step 1 of")
        job.term() if how == "term" else job.process.kill()
        assert job.end() == (0 if how == "term" else -9)
        again.append(runs[at])
    assert start(tmp_path / "parts", name, "log-9").end(WHOLE) == 0
    begun = begun_in(tmp_path / "parts")
    assert {run: begun.count(run) for run in runs} == {run: 1 + again.count(run) for run in runs}
    for run in runs:
        taken = _steps(tmp_path / "parts" / name / "runs" / run)
        assert len(taken) == len(set(taken)), run
    whole, parts = (_made(tmp_path / folder / name, name) for folder in ("whole", "parts"))
    if name in ("fig12", "fig13"):  # what was timed
        for made in (whole, parts):
            for key in [key for key, value in made.items() if key.startswith("throughput")] + ["table", "rows"]:
                made.pop(key)
    assert _places_left_out(parts) == _places_left_out(whole)
    assert Image.open(tmp_path / "parts" / name / f"{name}.png").size[0] > 500


def _steps(run: Path) -> list[tuple[Path, int]]:
    """Every step that a run took, or each of its tasks, as the metrics have them."""
    return [(path, json.loads(line)["step"]) for path in run.rglob("metrics.jsonl") for line in path.read_text().splitlines()]


def _places_left_out(made: dict) -> dict:
    """Without where the study lay, and the sums of files of checkpoints, which name that place."""
    said = re.sub(r'"checksum": "\w+"', '"checksum": ""', json.dumps(made))
    return json.loads(said.replace("/parts/", "/whole/"))
