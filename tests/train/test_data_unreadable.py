"""Images that cannot be read end no measurement: they are left out and told; only where none is left there is nothing to say."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import vitcore
from train import evaluate, fewshot
from train.data import open_source
from train.frozen import NoImage

CONFIG = vitcore.variant("ViT-Nano/4", image_size=8, num_classes=2)


@pytest.fixture
def place(tmp_path):
    """A model, and eight images of two classes in train and in val, named as ImageNet's."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(8):
            (tmp_path / split / "ab"[i // 4]).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
            picture.save(tmp_path / split / "ab"[i // 4] / f"ILSVRC2012_val_{i + 1:08d}.png")
    params = jax.jit(lambda: vitcore.init(jax.random.key(0), CONFIG))()
    vitcore.save(tmp_path / "m.safetensors", params, CONFIG, classes=("a", "b"))
    (tmp_path / "real.json").write_text(json.dumps([[0]] * 4 + [[1]] * 4))
    return tmp_path


def spoil(place, *numbers, split="val"):
    for path in sorted((place / split).rglob("*.png")):
        if int(path.stem[-8:]) in numbers:
            path.write_bytes(b"no image")


def words(place, *more):
    return ["--init", str(place / "m.safetensors"), "--data", f"folder:{place}", "--mesh", "1x1", *more]


@pytest.mark.parametrize("lost", [(1,), (8,), (3, 4, 5)])
def test_real_labels_stay_with_their_images(place, capfd, lost):
    spoil(place, *lost)
    out = str(place / "out")
    assert evaluate.main(words(place, "--real", str(place / "real.json"), "--out", out)) == 0
    assert f"{8 - len(lost)} images of 8; the others cannot be read" in capfd.readouterr().out
    found = json.loads((place / "out" / "evaluation.json").read_text())
    assert found["real"]["counted"] == 8 - len(lost)
    assert found["real"]["right"] == found["top1"]["right"]  # ReaL says here what the folders say


def test_where_no_image_can_be_read_that_is_said(place, capfd):
    spoil(place, *range(1, 9))
    assert evaluate.main(words(place, "--out", str(place / "out"))) == 2
    assert "not one image of folder:" in capfd.readouterr().err


def test_few_shots_go_on_without_the_images_that_cannot_be_read(place, capfd):
    spoil(place, 2, split="train")
    spoil(place, 7)
    assert fewshot.main(words(place, "--shots", "4", "--seeds", "1")) == 0
    assert "4-shot:" in capfd.readouterr().out


def test_a_model_of_images_that_are_not_square_says_what_to_do(place, capfd):
    wide = vitcore.ViTConfig(**{**vars(CONFIG), "image_size": (8, 16)})
    params = jax.jit(lambda: vitcore.init(jax.random.key(0), wide))()
    vitcore.save(place / "m.safetensors", params, wide, classes=("a", "b"))
    assert evaluate.main(words(place, "--out", str(place / "out"))) == 2
    assert "the model takes images of 8 x 16 pixels, images are read as squares: give --image-size" in capfd.readouterr().err
    assert evaluate.main(words(place, "--out", str(place / "out"), "--image-size", "8")) == 0


@pytest.mark.faults
@pytest.mark.parametrize("lost", ["the first drawn", "a class", "all"])
def test_in_place_of_a_drawn_image_that_cannot_be_read_comes_the_next(caplog, lost):
    """One shot whose only image is lost would otherwise be a mean over nothing, and nan an accuracy."""
    train, test = open_source("digits:0-1", "train"), open_source("digits:0-1", "val")
    labels, protocol = np.asarray(train.labels()), fewshot.Protocol(shots=(1,), seeds=2)
    drawn = [fewshot.orders(labels, 2, seed) for seed in range(2)]
    bad = {
        "the first drawn": {int(order[0]) for each in drawn for order in each},
        "a class": set(np.flatnonzero(labels == 1).tolist()),
        "all": set(range(len(train))),
    }[lost]
    passes = []

    def read(source):
        indices = source.indices.tolist() if source.name.endswith("(few shots)") else None
        there = [k for k in range(len(source)) if indices is None or indices[k] not in bad]
        passes.append(len(source))
        if not there:
            raise NoImage("not one image")
        return np.stack([source[k].image.reshape(-1) for k in there]).astype(np.float64), np.array(there)

    if lost == "all":
        with pytest.raises(NoImage):
            fewshot.measure(read, train, test, protocol)
        assert len(passes) < 6
        return
    found = fewshot.measure(read, train, test, protocol)[1]
    assert np.isfinite(found).all()
    assert len(passes) < 6  # a class that is lost is not read to its end
    assert ("class '1'" in caplog.text) == (lost == "a class")
    if lost == "the first drawn":
        for each, accuracy in zip(drawn, found, strict=True):
            chosen = [next(i for i in order.tolist() if i not in bad) for order in each]
            x, x_test = (
                [source[i].image.reshape(-1) for i in which] for source, which in ((train, chosen), (test, range(len(test))))
            )
            want = fewshot.accuracy(np.stack(x) * 1.0, labels[chosen], np.stack(x_test) * 1.0, test.labels(), 2)
            assert accuracy == pytest.approx(want)
            assert accuracy > 0.7
