"""The throughput comparison: it measures what it says, and says so where torch is missing."""

import os

import pytest

from bench import data, data_cores
from train.data.job import run_job


def missing(*_):
    raise ImportError("No module named 'torch'")  # hidden from the import system, torch would stay half imported


def test_every_contender_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("VITCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "torch_batches", missing)
    data.run(data.Options(images=16, width=60, height=50, batch_size=4, batches=1, rounds=1))
    out = capsys.readouterr().out
    assert "torch is not installed" in out
    for form in ("bare", "folder", "tar", "arrayrecord", "parquet"):
        for decoder in ("pillow", "simplejpeg"):
            (line,) = [line for line in out.splitlines() if line.startswith(f"{form} {decoder} ") and "float32" not in line]
            assert float(line.split()[2]) > 1
            assert ("%" in line) == (form != "bare")


def test_ratios_are_medians_of_rounds():
    rates = {"bare pillow": [200.0, 300.0, 100.0], "folder pillow": [100.0, 100.0, 100.0], "torch": [50.0, 100.0, 400.0]}
    assert data.ratio(rates, "folder pillow", "torch") == 1.0
    line = data.report(rates)[2]
    assert line.split()[2:] == ["100", "1.00", "100.0%"]


@pytest.mark.slow
def test_a_million_files_start_in_seconds(tmp_path):
    """Listed anew, in a new process: below 15 s and 500 MB, all imports included."""
    found = data.start_up(tmp_path, 1_000_000)
    assert found["files"] == 1_000_000
    assert found["import_s"] + found["open_s"] + found["order_s"] < 15
    assert found["peak_mb"] < 500


@pytest.mark.peers
def test_torch_is_measured_too(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("VITCORE_CACHE", str(tmp_path))
    argv = ["--images", "16", "--width", "60", "--height", "50", "--batch-size", "4", "--batches", "2", "--rounds", "1"]
    assert run_job(data.Options, data.run, "bench.data", [*argv, "--sources", "folder"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("torch ")]
    assert float(line.split()[1]) > 1


@pytest.mark.slow
def test_the_curve_over_cores_counts_by_what_they_do_bare_all_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("VITCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_cores, "torch_batches", missing)
    said: list[str] = []
    before = os.sched_getaffinity(0)
    rows = data_cores.curve((1, 2), 0.2, tmp_path, 16, said.append)
    assert os.sched_getaffinity(0) == before
    assert [(row["cores"], row["source"], row["decoder"]) for row in rows] == [
        (cores, source, decoder) for cores in (1, 2) for decoder in ("pillow", "simplejpeg") for source in ("folder", "packed 256")
    ]
    bare = {int(line.split()[0]): line for line in said if "all cores at once" in line}
    assert set(bare) == {1, 2}
    for row in rows:
        one, together = (float(bare[n].split(f"{row['source']} {row['decoder']} ")[1].split(",")[0]) for n in (1, row["cores"]))
        assert row["share"] == pytest.approx(row["images_per_second"] / together, rel=0.05)
        assert row["of_one"] == pytest.approx(row["images_per_second"] / (row["cores"] * one), rel=0.05)
