"""An image that ends a run by hanging in its decoder, or by taking all memory, is found by the next start and passed over."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from tests.train.fault_jobs import JOB, ROOT, environment, losses, start
from tests.train.hostile_source import Hostile
from train import pretrain
from train.data import suspects
from train.data.sampling import epoch_order, random_subset
from train.data.source import BadImage
from train.data.suspects import LISTED, Reading

pytestmark = pytest.mark.faults


def test_of_the_images_in_hand_those_to_blame_are_found():
    source = Hostile("good", "damaged", "hangs", "good", "grows", "kills", "good")
    found = dict(suspects.tried(source, [0, 1, 2, 4, 5, 6], "pillow", 5.0))
    assert sorted(found) == [2, 4, 5]
    assert found[2] == "decoding it took more than 5 s"
    assert found[4] == "decoding it took more than 2 GB"
    assert found[5] == "decoding it ended the process, by signal 9"


KILLED = """
    import os, signal, sys, threading, time
    from tests.train.hostile_source import Hostile
    from train.data.suspects import Reading
    source = Hostile(*["good"] * 9)
    reading = Reading(sys.argv[1], (source,))
    reading.begin(print)
    def read(index):
        with reading.of(source, index):
            time.sleep(1000)
    with reading.of(source, 0):
        pass  # done before
    for index in (3, 7):
        threading.Thread(target=read, args=(index,), daemon=True).start()
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
    """


def test_what_was_in_hand_outlives_the_process(tmp_path, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], env=environment(), cwd=ROOT, timeout=100, check=False
    )
    assert done.returncode == -signal.SIGKILL
    looked_at = []

    def blamed(source, indexes, decoder, seconds):
        looked_at.extend(indexes)
        yield 7, "it hung"

    monkeypatch.setattr(suspects, "tried", blamed)
    source, said = Hostile(*["good"] * 9), []
    for _ in range(2):  # the second start finds nothing in hand, and has the list
        reading = Reading(tmp_path, (source,))
        reading.begin(said.append)
        assert looked_at == [3, 7]
        with pytest.raises(BadImage, match=r"passed over the image 7: good: it has ended this run before \(it hung\)"):
            reading.of(source, 7).__enter__()
        with reading.of(source, 3):
            assert list(tmp_path.glob("reading/*.marks"))
    assert len(said) == 1
    assert "7: good" in said[0]
    assert [one["index"] for one in json.loads((tmp_path / LISTED).read_text())["images"]] == [7]
    reading.end()
    assert not (tmp_path / "reading").exists()
    other = Reading(tmp_path, (Hostile(*["good"] * 7, "mended", "good"),))  # another image stands there now
    other.begin(said.append)
    with other.of(Hostile(*["good"] * 7, "mended", "good"), 7):
        pass
    other.end()


def test_a_damaged_list_is_one_line(tmp_path):
    (tmp_path / LISTED).write_text('{"images": {}}')
    with pytest.raises(ValueError, match=r"stopped_by.json is damaged \(no list of images\): remove it"):
        Reading(tmp_path, (Hostile("good"),)).begin(print)


def slow_jpeg() -> bytes:
    """A JPEG that decodes for some ten seconds: within `decode.MAX_WORK`, of four million pixels, a thousand scans go over each."""
    across, file = np.arange(2048).astype(np.uint8), io.BytesIO()
    pixels = np.stack(np.broadcast_arrays(across, across[:, None], np.uint8(0)), axis=2)
    Image.fromarray(pixels).save(file, "JPEG", progressive=True, quality=5, subsampling=0)
    data = file.getvalue()
    first, second = [at.start() for at in re.finditer(b"\xff\xda", data)][:2]
    return data[:second] + data[first:second] * 1000 + data[second:]


BATCH, IMAGES = 8, 64


def folder(path, bad: bytes):
    """Images of two classes; the one of step 8 of a run with seed 0 is `bad`. Returns its name."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 8)):
        for i in range(count):
            at = path / split / f"{i * 2 // count}"
            at.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(at / f"{i:03d}.png")
    index = int(random_subset(IMAGES, IMAGES, 0)[epoch_order(IMAGES, 0, 0)[7 * BATCH + 3]])
    name = path / "train" / f"{index * 2 // IMAGES}" / f"{index:03d}.png"
    name.write_bytes(bad)
    return name


@pytest.mark.slow
def test_a_run_that_an_image_hung_passes_it_over_when_it_is_resumed(tmp_path, monkeypatch, capsys):
    name = folder(tmp_path / "set", slow_jpeg())
    words = ["--data", f"folder:{tmp_path / 'set'}", "--model", "ViT-Ti/8", "--image-size", "16", "--steps", "8",
             "--subset", str(IMAGES), "--batch-size", str(BATCH), "--augment", "none", "--threads", "1",
             "--checkpoint-every", "2", "--eval-every", "8"]  # fmt: skip
    job = start(tmp_path, *words, "--out", tmp_path / "run", faults=["tight4@3"])
    assert job.end() == 1
    assert "hung for 4 s while waiting for the batch of step" in job.stderr
    monkeypatch.setattr(suspects, "SECONDS", 3.0)
    assert pretrain.main([*JOB, *words, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"the image {name} ended this run (decoding it took more than 3 s): it is passed over from now on" in out
    assert [one["name"] for one in json.loads((tmp_path / "run" / LISTED).read_text())["images"]] == [str(name)]
    folder(tmp_path / "other", b"damaged")  # what a merely damaged image would have given
    assert pretrain.main([*JOB, *words, "--data", f"folder:{tmp_path / 'other'}", "--out", str(tmp_path / "same")]) == 0
    # the steps before it hung were another process's, whose sums may be added in another order
    numbers = [[np.nan if x is None else x for line in losses(tmp_path / out) for x in line] for out in ("run", "same")]
    np.testing.assert_allclose(*numbers, rtol=1e-5)
    assert not os.path.exists(tmp_path / "run" / "reading")
