"""`train.pretrain --objective masked` as its user meets it: any mesh, resuming, its picture, what comes after it, mistakes."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitcore
from tests.train.interruption import interrupt_before
from train import evaluate, finetune, masked, pretrain, pretrained, recipes
from train.data import open_source
from vitcore.masked import Masked

TINY = ["--objective", "masked", "--batch-size", "32", "--steps", "6", "--eval-every", "3", "--checkpoint-every", "3",
        "--log-every", "1", "--dropout", "0.1", "--learning-rate", "0.01", "--warmup-steps", "1"]  # fmt: skip


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(*argv, fails=False):
    assert pretrain.main([str(a) for a in argv]) == (2 if fails else 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of 6 steps."""
    out = tmp_path_factory.mktemp("masked") / "whole"
    run(*TINY, "--mesh", "1x1", "--out", out)
    return out


def assert_same(a, b, tolerance=1e-5):
    for one, other in zip(records(a), records(b), strict=True):
        assert one["step"] == other["step"]
        for name in ("loss", "val_loss"):
            assert (name in one) == (name in other)
            np.testing.assert_allclose(other.get(name, 0), one.get(name, 0), rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x2", "2x1"])
def test_every_mesh_gives_the_same_losses(mesh, whole, tmp_path):
    """What is corrupted goes by the example: training and validation losses to 1e-5, though 355 images fill up other batches."""
    run(*TINY, "--mesh", mesh, "--out", tmp_path)
    assert_same(whole, tmp_path)
    losses = [line["loss"] for line in records(tmp_path)]
    assert losses[0] == pytest.approx(np.log(8), rel=1e-5)  # eight greys, a head of zeros
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.slow
def test_parts_of_a_batch_give_the_same_losses(whole, tmp_path):
    run(*TINY, "--mesh", "2x1", "--accumulate", 4, "--remat", "--out", tmp_path)
    assert_same(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.ci
def test_an_interrupted_run_continues_bit_for_bit(whole, tmp_path, monkeypatch):
    interrupt_before(monkeypatch, 4)
    assert pretrain.main([*TINY, "--mesh", "1x1", "--out", str(tmp_path)]) == 130
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / masked.PICTURE).exists()
    monkeypatch.undo()
    run(*TINY, "--mesh", "1x1", "--out", tmp_path)
    assert_same(whole, tmp_path, 0)
    assert (tmp_path / masked.PICTURE).read_bytes() == (whole / masked.PICTURE).read_bytes()


def test_what_a_run_leaves(whole, capsys):
    width, height = Image.open(whole / masked.PICTURE).size
    assert width > 1000
    assert height > 600
    held = json.loads((whole / "config.json").read_text())
    assert {key: held[key] for key in ("model", "masked_target", "corrupt", "representation_size")} == {
        "model": "ViT-Nano/2", "masked_target": "mean", "corrupt": 0.5, "representation_size": 0,
    }  # fmt: skip
    (whole / masked.PICTURE).unlink()
    run(*TINY, "--mesh", "1x1", "--out", whole)
    printed = capsys.readouterr().out
    assert "355 held-out images whose labels are not used: of 16 patches 8 are corrupted, their mean colour predicted" in printed
    assert "of 2840 colours of corrupted patches of held-out images right" in printed
    assert (whole / masked.PICTURE).exists()


def test_the_picture_shows_what_was_corrupted():
    config = vitcore.variant("ViT-Nano/2", image_size=4, channels=1, num_classes=0, masked=Masked())
    image = np.arange(16).reshape(4, 4, 1) / 16
    places, source = np.array([0, 1, 3]), np.array([-1, 2, 2, 3])
    colours = np.full((3, 1, 1, 1), 0.9)
    one: dict[str, Any] = {"images": image, "places": places, "source": source, "predicted": colours}
    original, seen, predicted = (masked._panel(kind, one, config) for kind in ("images", "seen", "predicted"))
    assert original.shape == seen.shape == predicted.shape == (48, 48, 3)
    np.testing.assert_allclose(original[::12, ::12, 2], image[..., 0])
    np.testing.assert_allclose(seen[:24, :24], np.broadcast_to(masked._BLUE, (24, 24, 3)))
    np.testing.assert_allclose(seen[4:20, 28:44], original[28:44, 4:20])  # the third patch in the second's place
    np.testing.assert_allclose(seen[0, 24], masked._ORANGE)
    np.testing.assert_allclose(seen[24, 24], masked._GREEN)
    np.testing.assert_allclose(seen[24:, :24], original[24:, :24])
    assert (predicted[:24] == 0.9).all()
    assert (predicted[24:, :24] != 0.9).all()


# --- what comes after it -------------------------------------------------------------------------------------------------------


def test_it_is_fine_tuned_without_what_it_predicted_with(whole, tmp_path, capsys):
    kept, found = pretrained.open_pretrained(str(whole), masked=True), pretrained.open_pretrained(str(whole), num_classes=10)
    assert kept.config.masked == Masked()
    assert kept.params["masked"]["embedding"].any()
    assert kept.params.keys() - found.params.keys() == {"masked"}
    assert found.config.masked is None
    assert not found.params["head"]["kernel"].any()
    words = [
        "--init",
        whole,
        "--split",
        "train[shots=3]",
        "--mesh",
        "2x2",
        "--steps",
        2,
        "--batch-size",
        8,
        "--out",
        tmp_path / "t",
    ]
    assert finetune.main([str(word) for word in words]) == 0
    assert "of 355 images of val right" in capsys.readouterr().out
    assert records(tmp_path / "t")[0]["loss"] == pytest.approx(np.log(10), rel=1e-5)


def test_it_has_no_classes_to_evaluate_or_to_write(whole, tmp_path, capsys):
    assert evaluate.main(["--init", str(whole), "--mesh", "1x1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "predicts no classes" in said
    assert f"train.finetune --init {whole}" in said
    file = tmp_path / "body.safetensors"
    assert pretrained.main([str(whole), str(file)]) == 0
    found = pretrained.open_pretrained(str(file))
    assert found.config.num_classes == 0
    np.testing.assert_array_equal(found.params["norm"]["scale"], pretrained.open_pretrained(str(whole)).params["norm"]["scale"])


@pytest.mark.slow
def test_a_longer_run_starts_from_it_at_another_rate(whole, tmp_path, capsys):
    short = ["--steps", 2, "--eval-every", 1, "--learning-rate", 1e-9]
    run(*TINY, "--mesh", "1x1", "--init", whole, "--out", tmp_path / "on", *short)
    assert records(tmp_path / "on")[0]["val_loss"] == pytest.approx(records(whole)[-1]["val_loss"], rel=1e-6)
    run(*TINY, "--mesh", "1x1", "--init", whole, "--out", tmp_path / "less", "--corrupt", 0.15, *short)
    assert "2 are corrupted" in capsys.readouterr().out
    run(*TINY, "--mesh", "1x1", "--init", whole, "--out", tmp_path / "no", "--masked-target", "pixels", fails=True)
    assert "masked mean there, pixels here" in capsys.readouterr().err
    run("--model", "ViT-Nano/2", "--mesh", "1x1", "--init", whole, "--out", tmp_path / "no", fails=True)
    assert "put a new head on it with train.finetune" in capsys.readouterr().err


# --- options -------------------------------------------------------------------------------------------------------------------


def test_the_recipe_is_the_appendix_s():
    args = pretrain.Pretrain(objective="masked", data="folder:x", recipe="jft")
    full = pretrain.resolve(args, examples=303_000_000)
    assert (full.learning_rate, full.warmup_steps, full.decay, full.batch_size) == (2e-4, 10_000, "cosine", 4096)
    assert (full.weight_decay, full.dropout, full.clip_norm, full.masked_target, full.corrupt) == (0.1, 0.0, 0.0, "mean", 0.5)
    assert full.steps == pytest.approx(1e6, rel=0.04)  # "1M steps (ca. 14 epochs)"
    assert pretrain.resolve(pretrain.Pretrain(objective="masked", data="folder:x"), examples=1_281_167).steps == 93_835
    assert masked.of_appendix(recipes.recipe("plain", "ViT-S/16")).mixup == 0


def test_a_draw_of_shots_is_some_of_each_class():
    few, more, other = (open_source("digits", f"train[shots={text}]") for text in ("2", "5", "5:1"))
    assert np.bincount(more.labels()).tolist() == [5] * 10
    names = [{source.example_name(i) for i in range(len(source))} for source in (few, more, other)]
    assert names[0] < names[1] != names[2]


MISTAKES = {
    "target": (["--masked-target", "colour"], "invalid choice 'colour' for argument '--masked-target'"),
    "rate of zero": (["--corrupt", "0"], "--corrupt 0.0: a share of the patches in (0, 1] is required"),
    "rate above one": (["--corrupt", "1.01"], "--corrupt 1.01: a share of the patches in (0, 1]"),
    "rate nan": (["--corrupt", "nan"], "--corrupt nan: a finite number is required"),
    "other objective": (["--objective", "classes", "--corrupt", "0.5"], "belong to --objective masked"),
    "mixup": (["--mixup", "0.2"], "--mixup: of labels and their head, which --objective masked does without"),
    "loss": (["--loss", "sigmoid", "--head-bias", "-5"], "--head-bias, --loss: of labels"),
    "resnet": (["--model", "R50x1", "--recipe", "jft"], "R50x1 is a ResNet, which has no patches to mask"),
    "one patch": (["--model", "ViT-Nano/8"], "image_size=8 makes one patch"),
    "small patches": (["--masked-target", "small"], "these have 2 pixels a side"),
    "shots": (["--train-split", "train[shots=500]"], "wants 500 images of each class of digits/train: 0 has 143"),
    "shots of words": (["--train-split", "train[shots=few]"], "[shots=few] is not understood"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, words = MISTAKES[name]
    run("--objective", "masked", *argv, "--mesh", "1x1", fails=True)
    captured = capsys.readouterr()
    assert captured.err.startswith("train.pretrain: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not list(tmp_path.iterdir())  # and nothing was begun
