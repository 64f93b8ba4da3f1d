"""What stands in place of a file: a pipe, which nobody writes to, or a file that no memory holds; and who may read what is kept."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from etils import epath

from train import job, metrics, pinned, scores
from train.data import index, suspects
from train.files import read_object

pytestmark = pytest.mark.faults


def place_of_index(name: str) -> str:
    return f"indices/{hashlib.sha256(name.encode()).hexdigest()[:24]}.npz"


PIPES = {  # file -> (who reads it, what comes of it: an error's words, or none)
    ".lock": (lambda p: job.locked(epath.Path(p.parent)).__enter__(), "is a pipe, which no run makes"),
    "metrics.jsonl": (metrics.read, "it is no regular file"),
    "real.json": (lambda p: scores.read_real(str(p)), "it is no regular file"),
    "init.npz": (lambda p: pinned.begin(epath.Path(p.parent), "none", {"step": 4, "checksum": ""}), "it is no regular file"),
    "a.marks": (lambda p: suspects._indexes(p), None),
    "stopped_by.json": (lambda p: suspects.Reading(p.parent, ()).begin(print), "it is no regular file"),
    place_of_index("pipe"): (lambda p: index.kept("pipe", [], lambda: {"a": np.zeros(3)}), None),
}


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch, name):
    monkeypatch.setenv("VITCORE_CACHE", str(tmp_path))
    read, words = PIPES[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    said: list[str] = []

    def attempt():
        try:
            read(tmp_path / name)
            said.append("")
        except (ValueError, OSError) as error:
            said.append(str(error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    waited = thread.is_alive()
    if waited:  # it goes on where somebody comes to the other end
        os.close(os.open(tmp_path / name, os.O_RDWR | os.O_NONBLOCK))
    assert not waited
    assert (words or "") in said[0]
    assert bool(words) == bool(said[0])


def test_a_description_that_no_memory_holds_is_refused(tmp_path):
    """A file with a hole, of a terabyte."""
    (tmp_path / "config.json").write_text("{")
    os.truncate(tmp_path / "config.json", 2**40)
    with pytest.raises(ValueError, match=r"config.json is damaged \(it has 1,099,511,627,776 bytes"):
        read_object(epath.Path(tmp_path / "config.json"), cure="restore it")
    with pytest.raises(ValueError, match="is not JSON"):
        scores.read_real(str(tmp_path / "config.json"))


@pytest.mark.parametrize("change", ["labels", "missing", "shorter", "other kind"])
def test_a_kept_index_that_was_changed_is_built_anew(tmp_path, monkeypatch, caplog, change):
    """Its zip's own sums being right: labels of other images would be taken without a word."""
    monkeypatch.setenv("VITCORE_CACHE", str(tmp_path))
    built = {"label": np.arange(4, dtype=np.int32), "start": np.arange(4)}
    index.kept("one", [], lambda: built)
    with np.load(tmp_path / place_of_index("one")) as file:
        held = dict(file)
    change_of = {
        "labels": lambda: held | {"label": held["label"][::-1]},
        "missing": lambda: {key: array for key, array in held.items() if key != "start"},
        "shorter": lambda: held | {"start": held["start"][:2]},
        "other kind": lambda: held | {"label": held["label"].astype(np.int64)},
    }
    np.savez(tmp_path / place_of_index("one"), **change_of[change]())
    found = index.kept("one", [], lambda: built)
    assert found.keys() == built.keys()
    assert all((found[key] == built[key]).all() for key in built)
    assert "is damaged" in caplog.text


def test_a_kept_index_is_for_whoever_may_read_the_cache(tmp_path, monkeypatch):
    """Its mode follows the umask; and several processes may build it at once."""
    monkeypatch.setenv("VITCORE_CACHE", str(tmp_path))
    before = os.umask(0o022)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: index.kept("one", [], lambda: {"a": np.arange(9)})["a"].sum(), range(16)))
    finally:
        os.umask(before)
    assert found == [36] * 16
    assert os.listdir(tmp_path / "indices") == [os.path.basename(place_of_index("one"))]
    assert (tmp_path / place_of_index("one")).stat().st_mode & 0o777 == 0o644
