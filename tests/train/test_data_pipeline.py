"""The pipeline: what a run sees is a function of data, seed and batch size; never of processes, workers, threads, interruptions."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.data import DataError, Example, digits, eval_batches, open_source, train_batches


@dataclass(frozen=True)
class Numbered:
    """Example i is an image whose pixels spell i in base 256, so a batch says which examples it holds. Read without decoding
    or, where decoded is False, in groups by many threads."""

    length: int
    decoded: bool = True
    bad: int = -1
    slow: float = 0.0

    name = "numbered"
    classes = tuple("0123456789")
    augment = "none"

    def __len__(self):
        return self.length

    def labels(self):
        return np.arange(self.length, dtype=np.int32) % 10

    def example_name(self, index):
        return str(index)

    def __getitem__(self, index):
        if index == self.bad:
            raise DataError(f"cannot decode the image number {index}")
        time.sleep(self.slow * (index % 3))  # so that threads finish in another order than they start
        return Example(np.array([[[index % 256], [index // 256]]] * 2, np.uint8), index % 10, str(index))


def numbers(batch):
    """Which examples a batch of Numbered holds."""
    pixels = np.rint((batch["image"][:, 0, :, 0] + 1) * 127.5).astype(int)
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def train(source, batch_size=12, seed=0, **options):
    return train_batches(source, image_size=2, channels=1, batch_size=batch_size, seed=seed, **options)


def take(batches, count):
    """`count` batches, and the end of the threads."""
    with batches:
        return [next(batches) for _ in range(count)]


def seen(source, count, **options):
    """The examples of the first `count` batches, in order."""
    return [n for batch in take(train(source, **options), count) for n in numbers(batch)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])
            assert x[key].dtype == y[key].dtype


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """A folder source: JPEGs of several sizes, made from the digits."""
    root = tmp_path_factory.mktemp("jpegs")
    for split, count in (("train", 10), ("val", 5)):
        source = digits.load(split)
        for label in range(4):
            place = root / split / f"digit{label}"
            place.mkdir(parents=True)
            for k, i in enumerate(np.flatnonzero(source.labels() == label)[:count]):
                grey = Image.fromarray(source.images[i, :, :, 0])
                Image.merge("RGB", [grey, grey, grey]).resize((20 + k, 24), Image.Resampling.BICUBIC).save(place / f"{k}.jpg")
    return str(root)


# --- the order --------------------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 400), batch_size=st.integers(1, 50), seed=st.integers(0, 2**64 - 1))
def test_each_epoch_is_a_permutation(length, batch_size, seed):
    epochs = 3
    order = seen(Numbered(length), -(-epochs * length // batch_size), batch_size=batch_size, seed=seed)
    for epoch in range(epochs):
        assert sorted(order[epoch * length : (epoch + 1) * length]) == list(range(length))
    if length > 20:
        assert order[:length] != order[length : 2 * length]
        assert order[:length] != list(range(length))


def test_labels_belong_to_their_images():
    for batch in take(train(Numbered(1000)), 20):
        assert batch["label"].tolist() == [n % 10 for n in numbers(batch)]
        assert batch["label"].dtype == np.int32
        assert batch["image"].shape == (12, 2, 2, 1)
        assert batch["image"].dtype == np.float32


def test_the_seed_decides():
    source = open_source("digits", "train")
    run = lambda seed: take(train_batches(source, image_size=8, channels=1, batch_size=32, seed=seed), 20)  # noqa: E731
    first = run(0)
    assert_same(first, run(0))
    assert all((a["image"] != b["image"]).any() for a, b in zip(first, run(1), strict=True))


def test_augmentation_is_new_in_every_epoch():
    one = open_source("digits", "train")
    options: dict[str, Any] = dict(image_size=8, channels=1, batch_size=1, seed=0, subset=1)
    images = [batch["image"][0] for batch in take(train_batches(one, **options), 5)]
    assert all((images[0] != image).any() for image in images[1:])
    images = [batch["image"][0] for batch in take(train_batches(one, augment="none", **options), 5)]
    assert all((images[0] == image).all() for image in images[1:])


def test_augmentation_goes_by_the_example_not_by_its_place():
    """Another batch size, and a subset, put an example elsewhere in the epoch; its augmentation stays."""
    source = open_source("digits", "train")
    options: dict[str, Any] = dict(image_size=8, channels=1, seed=5)
    whole = take(train_batches(source, batch_size=len(source), **options), 1)[0]
    half = take(train_batches(source, batch_size=700, subset=700, **options), 1)[0]
    known = {image.tobytes() for image in whole["image"]}
    assert len(known) == len(source)
    assert {image.tobytes() for image in half["image"]} < known


@pytest.mark.parametrize("batch", [12, 13])  # a multiple of three, and not
def test_an_image_comes_as_often_as_asked_each_time_another_picture(batch):
    """Repeated augmentation: once around, and each time in a batch or its neighbour, never beside itself, on any shards."""
    source = Numbered(24, decoded=True)
    found = [i for b in take(train(source, batch, repeats=3), -(-72 // batch)) for i in numbers(b)][:72]
    assert sorted(found) == sorted([*range(24)] * 3)
    assert all(a != b for a, b in itertools.pairwise(found))
    joined = [take(train(source, batch, repeats=3, shard=(k, batch)), 2) for k in range(batch)]
    assert [numbers(one[1])[0] for one in joined] == found[batch : 2 * batch]
    options: dict[str, Any] = dict(image_size=8, channels=1, batch_size=300, seed=0, repeats=3)
    digits_of = take(train_batches(open_source("digits", "train"), **options), 1)[0]["image"]
    assert len({image.tobytes() for image in digits_of}) == 300  # a hundred images, three pictures of each


def test_repeats_that_make_no_batch_are_refused():
    with pytest.raises(ValueError, match="repeats 13: from 1 to the batch's 12 is required"):
        train(Numbered(24), 12, repeats=13)


# --- processes, threads, workers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("decoded", [True, False])
def test_shards_joined_are_the_whole(count, decoded):
    source = Numbered(37, decoded=decoded)
    whole = take(train(source, augment="digits"), 10)
    parts = [take(train(source, augment="digits", shard=(k, count)), 10) for k in range(count)]
    joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, whole)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_of_image_files(jpegs, count):
    source = open_source(f"folder:{jpegs}", "train")
    options: dict[str, Any] = dict(image_size=16, channels=3, batch_size=24, seed=1)
    whole = take(train_batches(source, threads=1, **options), 4)
    assert whole[0]["image"].shape == (24, 16, 16, 3)
    parts = [take(train_batches(source, shard=(k, count), threads=4, **options), 4) for k in range(count)]
    joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, whole)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 48])
def test_threads_do_not_change_the_order(batch_size):
    source = Numbered(50, decoded=False, slow=1e-3)
    one, many = (seen(source, 96 // batch_size, batch_size=batch_size, threads=threads) for threads in (1, 8))
    assert one == many
    assert one == seen(Numbered(50), 96 // batch_size, batch_size=batch_size)


WORKERS = """
import sys
from train.data import eval_batches, open_source, train_batches
if __name__ == "__main__":
    source = open_source(sys.argv[1], "train")
    for workers in map(int, sys.argv[2].split(",")):
        with train_batches(source, image_size=16, channels=3, batch_size=32, seed=3, workers=workers, threads=2, bad_share=0,
                           state={"global_next_index": 32}) as batches:
            taken = [next(batches) for _ in range(6)]
            state = batches.get_state()
        with eval_batches(source, image_size=16, channels=3, batch_size=32, workers=workers, threads=2) as batches:
            taken += list(batches)
        print(workers, hash(b"".join(b["image"].tobytes() + b["label"].tobytes() for b in taken)), state, len(taken))
"""


CATCH = """
if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(type(error).__name__, error, *getattr(error, "__notes__", []))
"""


@pytest.mark.slow
def test_workers_do_not_change_the_batches(jpegs, tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, str(script), f"folder:{jpegs}", "0,1,3"], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert [workers for workers, _ in lines] == ["0", "1", "3"]
    assert len({rest for _, rest in lines}) == 1


@pytest.mark.ci
@pytest.mark.slow
def test_a_failure_in_a_worker_is_the_callers_one_line(jpegs, tmp_path):
    shutil.copytree(jpegs, tmp_path / "set")
    bad = tmp_path / "set" / "train" / "digit2" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:-40])
    script = tmp_path / "workers.py"
    script.write_text(WORKERS.replace('if __name__ == "__main__":', "def main():") + CATCH)
    command = [sys.executable, str(script), f"folder:{tmp_path / 'set'}", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr
    assert re.match(rf"DataError 1 of 64 images of .* the last: cannot decode the image {bad}: ", done.stdout)
    assert done.stdout.count("\n") == 1


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


# --- resuming ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoded", [True, False])
@pytest.mark.parametrize("after", [0, 1, 5, 13])
def test_resume_is_exact_in_mid_epoch(decoded, after):
    source = Numbered(101, decoded=decoded)
    whole = take(train(source, augment="digits"), 30)
    with train(source, augment="digits") as batches:
        for _ in range(after):
            next(batches)
        state = batches.get_state()
    assert state == {"global_next_index": 12 * after}
    assert_same(take(train(source, augment="digits", state=state), 30 - after), whole[after:])


def test_resume_under_other_processes_and_another_batch_size():
    source = Numbered(101)
    whole = seen(source, 20)
    with train(source, shard=(1, 2)) as batches:
        for _ in range(7):
            next(batches)
        state = batches.get_state()
    parts = [take(train(source, shard=(k, 4), batch_size=8, state=state), 3) for k in range(4)]
    again = [n for step in zip(*parts, strict=True) for part in step for n in numbers(part)]
    assert again == whole[84 : 84 + 24]


def test_set_state_goes_back_and_forth():
    with train(Numbered(50, decoded=False)) as batches:
        taken = [next(batches) for _ in range(6)]
        batches.set_state({"global_next_index": 24})
        assert_same([next(batches) for _ in range(4)], taken[2:])
        assert batches.get_state() == {"global_next_index": 72}
        batches.close()
        batches.set_state({"global_next_index": 0})
        assert_same([next(batches)], taken[:1])


@pytest.mark.parametrize("state", [None, {}, {"next_index": 3}, {"global_next_index": -1}, {"global_next_index": "3"}, [3]])
def test_a_strange_state_is_refused(state):
    with pytest.raises(ValueError, match="global_next_index"):
        train(Numbered(5)).set_state(state)


# --- subsets ----------------------------------------------------------------------------------------------------------------


def test_subset_is_that_many_examples_each_once_an_epoch():
    order = seen(Numbered(1000), 10, subset=60)
    members = set(order[:60])
    assert len(members) == 60
    assert set(order[60:]) == members
    assert len({tuple(order[:60]), tuple(order[60:]), tuple(sorted(members))}) == 3, "each epoch has an order of its own"
    assert members != set(seen(Numbered(1000), 5, subset=60, subset_seed=1))
    assert members == set(seen(Numbered(1000), 5, subset=60, seed=9)), "the run's seed must not choose the subset"
    assert members < set(seen(Numbered(1000), 25, subset=300))


# --- evaluation -------------------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 100), batch=st.integers(1, 40), count=st.sampled_from([1, 2, 4]), decoded=st.booleans())
def test_evaluation_counts_every_image_once(length, batch, count, decoded):
    source, batch = Numbered(length, decoded=decoded), batch * count
    found, steps = [], set()
    for k in range(count):
        batches = list(eval_batches(source, image_size=2, channels=1, batch_size=batch, shard=(k, count)))
        steps.add(len(batches))
        for b in batches:
            assert b["image"].shape == (batch // count, 2, 2, 1)
            assert {key: b[key].dtype for key in b} == {"image": np.float32, "label": np.int32, "weight": np.float32}
            assert set(b["weight"].tolist()) <= {0.0, 1.0}
            real = b["weight"] == 1
            kept = [n for n, r in zip(numbers(b), real, strict=True) if r]
            found += kept
            assert b["label"][real].tolist() == [n % 10 for n in kept]
            assert (b["image"][~real] == 0).all()
    assert sorted(found) == list(range(length))
    assert steps == {-(-length // batch)}


def test_evaluation_length_and_preprocessing(jpegs):
    source = open_source(f"folder:{jpegs}", "val")
    make = lambda preprocess: eval_batches(source, image_size=16, channels=3, batch_size=8, preprocess=preprocess)  # noqa: E731
    assert len(make("resize")) == 3
    resized, centred = list(make("resize")), list(make("center"))
    assert len(resized) == len(centred) == 3
    assert sum(b["weight"].sum() for b in resized) == 20
    assert abs(resized[0]["image"] - centred[0]["image"]).max() > 0.1


# --- failures and the end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoded", [True, False])
def test_a_failure_in_the_loader_is_the_callers_one_line(decoded):
    source = Numbered(100, decoded=decoded, bad=57)
    with pytest.raises(DataError, match=r"^cannot decode the image number 57$"):
        take(train(source), 9)
    assert_no_threads()
    with pytest.raises(DataError, match=r"^cannot decode the image number 57$"):
        list(eval_batches(source, image_size=2, channels=1, batch_size=8))
    assert_no_threads()


def test_an_undecodable_file_stops_the_run_with_its_name(jpegs, tmp_path):
    shutil.copytree(jpegs, tmp_path / "set")
    bad = tmp_path / "set" / "train" / "digit2" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:-40])
    source = open_source(f"folder:{tmp_path / 'set'}", "train")
    batches = train_batches(source, image_size=8, channels=3, batch_size=40, seed=0, bad_share=0)
    with pytest.raises(DataError) as error, batches:
        next(batches)
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)


def assert_no_threads():
    deadline = time.monotonic() + 5
    while left := [t.name for t in threading.enumerate() if t.name.startswith("grain")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.mark.parametrize("decoded", [True, False])
def test_close_ends_the_threads(decoded):
    batches = train(Numbered(100, decoded=decoded))
    assert_no_threads()  # nothing starts before it is used
    next(batches)
    assert any(t.name.startswith("grain") for t in threading.enumerate())
    batches.close()
    batches.close()
    assert_no_threads()
    list(eval_batches(Numbered(100, decoded=decoded), image_size=2, channels=1, batch_size=8))
    assert_no_threads()


@dataclass(frozen=True)
class Watched(Numbered):
    """Counts its readings."""

    read: list[int] = field(default_factory=list)

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("decoded", [True, False])
def test_batches_are_made_ahead_but_not_without_limit(decoded):
    """While the caller computes, the next batches are read; some, not all that there are."""
    source = Watched(1000, decoded=decoded)
    with train(source) as batches:
        next(batches)
        deadline = time.monotonic() + 10
        while len(source.read) < 3 * 12:  # the one in use and PREFETCH more
            assert time.monotonic() < deadline, len(source.read)
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(source.read) <= 6 * 12


LEFT_OPEN = """
from train.data import open_source, train_batches
source = open_source("{spec}", "train")
batches = train_batches(source, image_size=32, channels=3, batch_size=40, seed=0)
print(next(batches)["image"].shape, flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("kind", "end", "code"),
    [("digits", "", 0), ("folder", "", 0), ("folder", "raise SystemExit(3)", 3), ("folder", "raise KeyboardInterrupt", None)],
)
def test_the_interpreter_ends_with_an_iterator_open(jpegs, kind, end, code):
    spec = "digits" if kind == "digits" else f"folder:{jpegs}"
    start = time.monotonic()
    command = [sys.executable, "-c", LEFT_OPEN.format(spec=spec, end=end)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert done.stdout.strip() == "(40, 32, 32, 3)", done.stderr
    if code is None:
        assert done.returncode != 0
        assert "KeyboardInterrupt" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (code, "")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(batch_size=10, shard=(0, 4)), "a batch of 10 does not divide over 4"),
        (dict(batch_size=0), "a batch of 0"),
        (dict(shard=(2, 2)), "shard is 2 of 2"),
        (dict(augment="mixup"), "unknown augmentation 'mixup'; the known ones are inception, digits, none"),
        (dict(seed=-1), "seeds are -1"),
        (dict(seed=2**64), "must lie in"),
        (dict(subset=6), "a training subset of 6 examples was asked of numbered, which has 5"),
        (dict(subset=0), "a training subset of 0"),
        (dict(threads=0), "0 threads"),
        (dict(workers=-1), "-1 workers"),
    ],
)
def test_bad_arguments_of_training(options, words):
    with pytest.raises(ValueError, match=words) as error:
        train(Numbered(5), **options)
    assert "\n" not in str(error.value)


def test_bad_arguments_of_evaluation():
    good: dict[str, Any] = dict(image_size=8, channels=1, batch_size=4)
    for options, words in [
        (dict(preprocess="crop"), "unknown preprocessing 'crop'; the known ones are resize, resize-center, center"),
        (dict(channels=2), "channels 1 or 3"),
        (dict(image_size=0), "side must be >= 1"),
        (dict(shard=(0, 3)), "does not divide"),
    ]:
        with pytest.raises(ValueError, match=words):
            eval_batches(Numbered(5), **{**good, **options})
    with pytest.raises(ValueError, match="holds no images"):
        eval_batches(Numbered(0), **good)


def test_processes_read_where_there_are_cores_for_them(monkeypatch):
    """By default none on few cores and for images in memory, else seven of eight cores, 16 at most; what is asked counts."""
    from train import build

    files: Any = SimpleNamespace(decoded=False)
    arrays: Any = SimpleNamespace(decoded=True)

    for cores, on_gpu, on_cpu in (
        (1, 0, 0),
        (2, 0, 0),
        (4, 3, 0),
        (8, 7, 0),
        (12, 11, 11),
        (16, 14, 14),
        (32, 28, 28),
        (96, 28, 28),
    ):
        monkeypatch.setattr(build.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        for platform, expected in (("gpu", on_gpu), ("tpu", on_gpu), ("cpu", on_cpu)):
            assert build.reading_processes(None, files, platform=platform) == expected
            assert build.reading_processes(None, arrays, platform=platform) == 0
            assert build.reading_processes(3, arrays, platform=platform) == 3
