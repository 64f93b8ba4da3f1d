"""A run knows its images: what a user sees who renames, removes or adds some between a stop and what comes after."""

import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

import train.loop
from train import evaluate, pretrain
from train.data import DataError, by_names, open_source
from train.data.identity import continued, fingerprint, seen, trained_on
from train.data.source import Example

SMALL = [
    "--model", "ViT-Nano/4", "--recipe", "digits", "--image-size", "8", "--batch-size", "4", "--warmup-steps", "0", "--steps", "2",
    "--mesh", "1x1",
]  # fmt: skip


def write_images(root, classes=("ant", "bee"), each=4):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(each):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(root / split / name / f"{i}.png")
    return root


def rename_class(root, old, new):
    for split in ("train", "val"):
        (root / split / old).rename(root / split / new)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of images and a run on it, finished."""
    place = tmp_path_factory.mktemp("trained")
    write_images(place / "set")
    assert pretrain.main(["--data", f"folder:{place / 'set'}", *SMALL, "--out", str(place / "run")]) == 0
    return place


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # behind the picture
    path.write_bytes(bytes(data))


@pytest.fixture
def run(trained, tmp_path, capfd):
    """A function that starts the run again. The set and the run are as they were when the test is over."""
    shutil.copytree(trained, tmp_path / "as it was")

    def again(*more):
        capfd.readouterr()
        code = pretrain.main(["--data", f"folder:{trained / 'set'}", *SMALL, "--out", str(trained / "run"), *more])
        said = capfd.readouterr()
        return code, said.out + said.err

    yield again
    shutil.rmtree(trained)
    shutil.copytree(tmp_path / "as it was", trained)


def held(place):
    return json.loads((place / "run" / "config.json").read_text())["data_seen"]


def test_a_run_keeps_names_counts_and_a_fingerprint(trained):
    seen = json.loads((trained / "run" / "config.json").read_text())["data_seen"]
    assert seen["classes"] == ["ant", "bee"]
    assert seen["train"]["images"] == 8
    assert seen["train"]["counts"] == [4, 4]
    assert seen["train"]["fingerprint"] == fingerprint(open_source(f"folder:{trained / 'set'}", "train"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: rename_class(root, "ant", "cat"), ("only the run in", "has ant", "has cat", "--accept-data")),
        (lambda root: (root / "train" / "ant" / "0.png").unlink(), ("train had 8 images, now 7", "ant 4 for 3", "--accept-data")),
        (
            lambda root: shutil.copy(root / "val/bee/0.png", root / "val/bee/9.png"),
            ("validation had 8 images, now 9", "bee 4 for 5"),
        ),
        (lambda root: (root / "train/ant/0.png").rename(root / "train/ant/9.png"), ("train has other names or sizes",)),
        (lambda root: Image.new("RGB", (50, 50)).save(root / "train/ant/0.png"), ("train has other names or sizes",)),
        (lambda root: flip_a_bit(root / "train/ant/0.png"), ("train has files of the same names and sizes with another content",)),
    ],
    ids=["class renamed", "image removed", "image added", "image renamed", "image replaced", "image of the same size"],
)
def test_a_run_is_not_resumed_on_other_images_unless_asked(run, trained, change, words):
    before = held(trained)
    change(trained / "set")
    code, said = run()
    assert code == 2
    for word in words:
        assert word in said
    assert held(trained) == before  # a refusal changes nothing


def test_accepted_images_are_kept_with_what_was_seen_before(run, trained):
    first = held(trained)
    (trained / "set" / "train" / "ant" / "0.png").unlink()
    assert run()[0] == 2
    code, said = run("--accept-data")
    assert code == 0
    assert "going on with other images than before, as was asked: train had 8 images, now 7" in said
    now = held(trained)
    assert now["train"]["images"] == 7
    assert now["before"] == [first]
    assert run()[0] == 0  # the answer holds from now on
    assert held(trained) == now


def test_a_set_that_moved_is_the_same_set(trained, tmp_path):
    shutil.copytree(trained / "set", tmp_path / "elsewhere")
    for split in ("train", "val"):
        assert fingerprint(open_source(f"folder:{tmp_path / 'elsewhere'}", split)) == fingerprint(
            open_source(f"folder:{trained / 'set'}", split)
        )


def test_a_run_from_before_this_is_told_and_accepted(run, trained):
    path = trained / "run" / "config.json"
    config = json.loads(path.read_text())
    seen = config.pop("data_seen")
    path.write_text(json.dumps(config))
    code, said = run()
    assert code == 0
    assert "says nothing of its images: taken for those that are there now" in said
    assert held(trained) == seen


def test_the_config_of_a_run_starts_another(trained, tmp_path, capfd):
    words = ["--config", str(trained / "run" / "config.json"), "--out", str(tmp_path / "other")]
    assert pretrain.main(words) == 0, capfd.readouterr().err


def test_an_evaluation_on_other_classes_is_refused_with_the_difference(trained, tmp_path, capfd):
    shutil.copytree(trained / "set", tmp_path / "set")
    rename_class(tmp_path / "set", "ant", "cat")
    words = [
        "--init",
        str(trained / "run"),
        "--data",
        f"folder:{tmp_path / 'set'}",
        "--mesh",
        "1x1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert evaluate.main(words) == 2
    said = capfd.readouterr().err
    assert "has ant" in said
    assert "has cat" in said
    assert evaluate.main([*words, "--accept-data"]) == 0
    assert "labels are taken by number, as was asked" in capfd.readouterr().out


def test_a_start_from_weights_of_other_classes_is_refused_unless_asked(trained, tmp_path, capfd, monkeypatch):
    taken = []

    def nothing(run, say, **_):
        taken.append(next(run.batches)["label"])
        return train.loop.Result(1, 0, 0.5, 1, 2, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", nothing)
    init = ["--init", str(trained / "run"), "--seed", "1", "--batch-size", "8"]

    def start(name, *words):
        capfd.readouterr()
        code = pretrain.main([*SMALL, *init, "--out", str(tmp_path / name), *words])
        said = capfd.readouterr()
        return code, said.out + said.err

    shutil.copytree(trained / "set", tmp_path / "set")
    rename_class(tmp_path / "set", "ant", "cat")
    code, said = start("other", "--data", f"folder:{tmp_path / 'set'}")
    assert code == 2
    assert "has ant" in said
    assert "has cat" in said
    assert start("accepted", "--data", f"folder:{tmp_path / 'set'}", "--accept-data")[0] == 0
    code, said = start("plain", "--data", f"folder:{trained / 'set'}", "--val-split", "train")
    assert code == 0
    assert "was trained on: if they are the same, what it gets right there says little of others" in said
    assert sorted(taken[-1].tolist()) == [0] * 4 + [1] * 4


def test_images_that_a_model_was_trained_on_are_said(trained):
    seen = held(trained)
    whole, part = (open_source(f"folder:{trained / 'set'}", split) for split in ("train", "train[:50%]"))
    assert "of those that RUN was trained on" in trained_on(seen, whole, "RUN")
    assert trained_on(seen, part, "RUN") == trained_on(None, whole, "RUN") == ""


class Three:
    """Labels 0, 1, 2 under the names given."""

    name, augment, decoded = "three", "none", True

    def __init__(self, *classes):
        self.classes = classes

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Example(np.zeros((1, 1, 3), np.uint8), index, str(index))

    def labels(self):
        return np.arange(3, dtype=np.int32)

    def example_name(self, index):
        return str(index)


def test_classes_in_another_order_are_taken_by_name():
    source, line = by_names(Three("a", "b", "c"), ["c", "a", "b"], "the model")
    assert source.classes == ("c", "a", "b")
    assert source.labels().tolist() == [1, 2, 0]
    assert [source[i].label for i in range(3)] == [1, 2, 0]
    assert "in another order: taken by name" in line


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (None, "does not say its classes"),
        (["0", "1", "2"], "labels are taken by number, one of them has only numbers"),
        (["a", "b", "c"], ""),
    ],
)
def test_labels_are_taken_by_number_where_there_are_no_names(theirs, words):
    source, line = by_names(Three("a", "b", "c"), theirs, "the model")
    assert source.labels().tolist() == [0, 1, 2]
    assert words in line
    assert bool(words) == bool(line)


@pytest.mark.parametrize("theirs", [["a", "b", "d"], ["a", "b"], ["a", "a", "b"]])
def test_other_classes_are_refused(theirs):
    with pytest.raises(DataError, match="other classes than the model"):
        by_names(Three("a", "b", "c"), theirs, "the model")


@pytest.mark.faults
@pytest.mark.parametrize("form", ["folder", "tar"])
def test_classes_whose_files_have_the_same_names_and_sizes_do_not_change_places(tmp_path, form):
    """Pictures without compression have all one size, and numbers for names: the folders of two classes are swapped, or all
    pictures of a shard are others."""

    def make(root, order):
        for split in ("train", "val"):
            for number, name in zip(order, ("ant", "bee"), strict=True):
                (root / split / name).mkdir(parents=True)
                for k in range(3):
                    pixels = np.random.default_rng([number, k]).integers(0, 255, (8, 8, 3), np.uint8)
                    Image.fromarray(pixels).save(root / split / name / f"{k}.bmp")
            with tarfile.open(root / f"{split}-0.tar", "w") as shard:
                for k, path in enumerate(sorted((root / split).rglob("*.bmp"))):
                    shard.add(path, f"{k}.bmp")
                    (tmp_path / "label").write_text(str(k // 3))
                    shard.add(tmp_path / "label", f"{k}.cls")
        where = str(root) if form == "folder" else f"{root}/{{split}}-*.tar"
        return tuple(open_source(f"{form}:{where}", split) for split in ("train", "val"))

    first, same, other = (make(tmp_path / name, order) for name, order in (("a", (0, 1)), ("b", (0, 1)), ("c", (1, 0))))
    held = seen(*first)
    if form == "folder":
        assert fingerprint(first[0]) == fingerprint(other[0])
    assert continued(held, *same, where="R", accept=False)[2] == []
    with pytest.raises(DataError, match="train has files of the same names and sizes with another content; validation has"):
        continued(held, *other, where="R", accept=False)
    for part in ("train", "validation"):
        del held[part]["sample"]  # a run of before there was one
    assert continued(held, *other, where="R", accept=False)[2] == []


def test_a_fingerprint_is_cheap_and_sees_every_name_and_size(tmp_path):
    root = write_images(tmp_path / "set")
    first = fingerprint(open_source(f"folder:{root}", "train"))
    os.utime(root / "train" / "ant" / "0.png", (0, 0))  # a time is no content
    assert fingerprint(open_source(f"folder:{root}", "train")) == first
    assert fingerprint(open_source(f"folder:{root}", "train[:50%]")) != fingerprint(open_source(f"folder:{root}", "train[50%:]"))
