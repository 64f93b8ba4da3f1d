"""The job as its user meets it: what a run leaves, resuming, running again from config.json, and every mistake in one line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import train.loop
import vitcore
from tests.train.interruption import interrupt_before
from train import mesh as meshes
from train import metrics, pretrain
from train.checkpoint import Checkpoints
from train.data import DataError, TrainBatches
from train.job import BEFORE, differing, locked, place
from vitcore.blocks import BLOCKS
from vitcore.positions import POSITIONS
from vitcore.stems import STEMS

ROOT = Path(__file__).parents[2]

TINY = ["--mesh", "2x2", "--batch-size", "32", "--steps", "12", "--eval-every", "6", "--checkpoint-every", "6", "--log-every", "1"]


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(*argv, fails=False):
    assert pretrain.main([str(a) for a in argv]) == (2 if fails else 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of 12 steps."""
    out = tmp_path_factory.mktemp("run") / "whole"
    run(*TINY, "--out", out)
    return out


def test_a_run_leaves_its_directory(whole, capsys):
    lines = records(whole)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["loss"] > 0 and line["images_per_second"] >= 0 for line in lines)
    measured = {line["step"]: line["val_accuracy"] for line in lines if "val_accuracy" in line}
    assert measured.keys() == {6, 12}
    assert all(0 <= accuracy <= 1 and abs(accuracy * 355 - round(accuracy * 355)) < 1e-6 for accuracy in measured.values())
    assert Image.open(whole / "curves.png").size[0] > 800
    config = json.loads((whole / "config.json").read_text())
    assert (config["model"], config["recipe"], config["steps"], config["learning_rate"]) == ("ViT-Nano/4", "digits", 12, 0.002)
    assert None not in {config[key] for key in ("batch_size", "dropout", "warmup_steps", "decay", "loss", "eval_every")}
    # the same again: nothing left to do, and said so
    run(*TINY, "--out", whole)
    printed = capsys.readouterr().out
    assert "resuming at step 12" in printed
    assert "finished at step 12" in printed
    assert records(whole) == lines


def test_config_json_runs_again_to_the_same_numbers(whole, tmp_path):
    run("--config", whole / "config.json", "--out", tmp_path / "again")
    for a, b in zip(records(whole), records(tmp_path / "again"), strict=True):
        assert (a["step"], a["loss"], a.get("val_accuracy")) == (b["step"], b["loss"], b.get("val_accuracy"))


@pytest.mark.parametrize("mesh", ["2x2", pytest.param("4x1", marks=pytest.mark.slow)])  # -m faults moves between meshes as well
def test_an_interrupted_run_continues_as_if_nothing_had_happened(whole, tmp_path, monkeypatch, mesh):
    """Stopped after 9 steps, between checkpoints; continued from step 6: bit for bit on the same mesh, to rounding on another."""
    interrupt_before(monkeypatch, 9)
    assert pretrain.main([*TINY, "--out", str(tmp_path)]) == 130
    assert [line["step"] for line in records(tmp_path)] == list(range(1, 10))
    monkeypatch.undo()
    run(*TINY, "--mesh", mesh, "--out", tmp_path)
    a, b = records(whole), records(tmp_path)
    assert [line["step"] for line in b] == list(range(1, 13))
    if mesh == "2x2":
        assert [line["loss"] for line in a] == [line["loss"] for line in b]
    else:
        np.testing.assert_allclose([line["loss"] for line in a], [line["loss"] for line in b], rtol=1e-5)
    assert a[-1]["val_accuracy"] == pytest.approx(b[-1]["val_accuracy"], abs=0.01)


def test_the_next_batch_is_on_its_way_while_a_step_is_taken(tmp_path, monkeypatch):
    make, place, placed, taken = train.loop.make_train_step, train.loop.on_mesh, [], []

    def counting(mesh):
        put = place(mesh)

        def counted(batch):
            arrays = put(batch)
            if "weight" not in batch:  # an evaluation's
                placed.append(arrays)
            return arrays

        return counted

    def looking(*args):
        step = make(*args)

        def wrapped(*batch):
            taken.append(1)
            deadline = time.monotonic() + 20
            while len(placed) <= len(taken) < 12 and len(taken) > 1 and time.monotonic() < deadline:  # the first compiles
                time.sleep(0.01)
            assert len(placed) == min(len(taken) + (len(taken) > 1), 12)
            return step(*batch)

        return wrapped

    monkeypatch.setattr(train.loop, "on_mesh", counting)
    monkeypatch.setattr(train.loop, "make_train_step", looking)
    run(*TINY, "--out", tmp_path / "run")
    assert len(taken) == len(placed) == 12


def test_curves_are_drawn_while_steps_are_taken_and_readers_end_while_the_last_checkpoint_is_written(tmp_path, monkeypatch):
    """Each takes seconds in which the devices had nothing to do."""
    step, close, wait = train.loop._Loop.step, TrainBatches.close, Checkpoints.wait
    begun, closed, saving = threading.Event(), threading.Event(), [0]

    def stepping(loop, batch):
        begun.set() if loop.now.step == 6 else None
        return step(loop, batch)

    def drawing(records, path):
        assert begun.wait(20)

    def closing(batches):
        close(batches)
        closed.set()

    def waiting(checkpoints):
        if checkpoints._saving and checkpoints._saving[0] == 12:
            saving[0] += closed.wait(20)
        wait(checkpoints)

    monkeypatch.setattr(train.loop._Loop, "step", stepping)
    monkeypatch.setattr(metrics, "draw", drawing)
    monkeypatch.setattr(TrainBatches, "close", closing)
    monkeypatch.setattr(Checkpoints, "wait", waiting)
    run(*TINY, "--out", tmp_path / "run")
    assert saving == [1]


@pytest.mark.slow
def test_mixed_images_of_five_digits_train(tmp_path):
    run(*TINY, "--out", tmp_path / "a", "--data", "digits:5-9", "--mixup", 0.5, "--accumulate", 2, "--augment", "none")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["data"] == "digits:5-9"


def test_every_option_reaches_the_run(tmp_path, monkeypatch):
    """What `--help` promises arrives where it acts: the run that `train` is given is taken apart, one option at a time."""
    seen = []

    def taken(run, say, stop):
        seen.append(run)
        return train.loop.Result(1, 1, 0.0, 0, 1, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", taken)

    def given(*argv):
        run(*TINY, "--out", tmp_path / str(len(seen)), *argv)
        return seen[-1]

    assert given("--dropout", 0.3).config.dropout == 0.3
    assert given("--model", "ViT-Nano/2").config.patch_size == 2
    assert given("--pool", "gap").config.pool == "gap"
    assert given("--gelu", "erf").config.gelu == "erf"
    assert given("--block", "layerscale").config.block == "layerscale"
    assert given("--stem", "clip").config.stem == "clip"
    for table, entries, like in (("stem", STEMS, "clip"), ("position", POSITIONS, "2d"), ("block", BLOCKS, "layerscale")):
        monkeypatch.setitem(entries, "mine", entries[like])  # an entry that was added to its table, and nowhere else
        assert getattr(given(f"--{table}", "mine").config, table) == "mine"
    assert given("--registers", 4).config.registers == 4
    assert given("--representation-size", 0).config.representation_size is None
    assert given("--image-size", 16).config.image_size == 16
    assert given("--accumulate", 2).options.accumulate == 2
    assert given("--remat").options.remat == 1
    assert given("--remat", "--remat-every", 2).options.remat == 2
    assert given("--polyak", 0.9).options.polyak == 0.9
    assert given("--clip-norm", 0).options.clip_norm is None
    assert given("--clip-norm", 2).options.clip_norm == 2
    assert given("--loss", "sigmoid").options.loss == "sigmoid"
    assert given("--label-smoothing", 0.2).options.label_smoothing == 0.2
    assert [given(*o).config.head_bias for o in ([], ["--head-bias", -3])] == [0.0, -3.0]
    assert given("--seed", 3).options.seed == 3
    assert given("--dtype", "bfloat16").options.dtype == "bfloat16"
    assert given("--ops", "interpret").options.ops is vitcore.INTERPRET
    assert given().options.ops is vitcore.REFERENCE
    assert given("--steps", 13).total_steps == 13
    assert given("--early-stop", 4).early_stop == 4
    assert given("--keep", 5).keep == 5
    assert [given(*o).checkpoint_wait for o in ([], ["--checkpoint-wait"])] == [False, True]
    first = next(given().batches)
    assert first["image"].shape == (32, 8, 8, 1)
    assert next(given("--batch-size", 16).batches)["image"].shape[0] == 16
    assert "share" in next(given("--mixup", 0.4).batches)
    assert len(next(given("--val-split", "val[:10]").validation())["label"]) == 10
    assert given("--train-split", "train[:99%]").config_json["steps"] == given().config_json["steps"]
    for option in (
        ["--seed", 1],
        ["--augment", "none"],
        ["--train-split", "train[:99%]"],
        ["--data", "digits:0-4"],
        ["--subset", 500],
        ["--subset", 500, "--subset-seed", 1],
        ["--repeats", 3],
    ):
        assert not np.array_equal(next(given(*option).batches)["image"], first["image"]), option
    rates = [([],), (["--learning-rate", 1e-4],), (["--decay", "linear"],), (["--warmup-steps", 9],)]
    assert len({float(given(*option).learning_rate(5)) for (option,) in rates}) == 4

    def updates(*argv):
        tx = given("--warmup-steps", 0, *argv).tx
        w = {"kernel": np.full(3, 0.5, np.float32)}
        update, state = tx.update({"kernel": np.ones(3, np.float32)}, tx.init(w), w)
        return str(jax.tree.map(lambda x: (x.dtype, x.tolist()), (update, state)))

    # the two forms of decay are the same decay by default: each comes with the value that makes it so
    assert updates() == updates("--weight-decay-form", "independent")
    form = updates("--weight-decay", 0.7, "--weight-decay-form", "independent")
    assert len({updates(), updates("--weight-decay", 0.7), updates("--first-moment", "bfloat16"), form}) == 4


def test_options_together_train(tmp_path):
    run(*TINY, "--out", tmp_path / "r", "--model", "ViT-Nano/2", "--dropout", 0.3, "--accumulate", 2, "--remat",
        "--dtype", "bfloat16", "--polyak", 0.9, "--first-moment", "bfloat16", "--loss", "sigmoid", "--pool", "gap")  # fmt: skip
    first = records(tmp_path / "r")[0]
    assert first["loss"] == pytest.approx(10 * np.log(2), rel=1e-3)  # ten sigmoids at zero: the loss is the one asked for


@pytest.mark.ci
@pytest.mark.slow
def test_interpreted_kernels_train_on_a_mesh_as_the_reference_does(tmp_path, capsys):
    """The whole step on the Pallas kernels, heads and hidden columns split, dropout on: the losses of the einsum path."""
    losses, data = [], folder(tmp_path / "data")
    for ops in ("reference", "interpret"):
        run("--mesh", "1x2", "--ops", ops, "--data", data, "--model", "ViT-Nano/8", "--image-size", 16, "--batch-size", 4,
            "--steps", 2, "--log-every", 1, "--learning-rate", 0.01, "--warmup-steps", 0, "--dropout", 0.2,
            "--out", tmp_path / ops)  # fmt: skip
        assert f"ops: {ops}" in capsys.readouterr().out
        losses.append([line["loss"] for line in records(tmp_path / ops)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_early_stopping_ends_two_evaluations_after_the_best(tmp_path, capsys):
    run(*TINY[:-6], "--eval-every", 1, "--log-every", 1, "--early-stop", 2, "--learning-rate", 1e-9, "--out", tmp_path)
    accuracies = [line["val_accuracy"] for line in records(tmp_path)]
    best = int(np.argmax(accuracies)) + 1
    assert len(accuracies) == best + 2 < 12
    assert f"stopped early at step {best + 2}" in capsys.readouterr().out
    run(*TINY[:-6], "--eval-every", 1, "--log-every", 1, "--early-stop", 2, "--learning-rate", 1e-9, "--out", tmp_path)
    assert len(records(tmp_path)) == best + 2  # a run that has stopped stays stopped


# --- mistakes ---------------------------------------------------------------------------------------------------------------


def folder(path, train=("cat", "dog"), val=("cat", "dog"), broken=False):
    rng = np.random.default_rng(0)
    for split, classes in (("train", train), ("val", val)):
        for name in classes:
            (path / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(path / split / name / f"{i}.png")
    if broken:
        (path / "train" / train[0] / "0.png").write_bytes((path / "train" / train[0] / "0.png").read_bytes()[:200])
    return f"folder:{path}"


def test_a_folder_of_images_trains(tmp_path, capsys):
    data = folder(tmp_path / "data")
    run("--mesh", "2x1", "--data", data, "--model", "ViT-Ti/16", "--recipe", "imagenet", "--image-size", 32, "--batch-size", 4,
        "--steps", 2, "--out", tmp_path / "run")  # fmt: skip
    assert "8 training and 8 held-out images of 2 classes" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["clip_norm"] == 1.0


MISTAKES = {
    "unknown model": (["--model", "ViT-B-16"], "unknown model 'ViT-B-16': did you mean ViT-B/16"),
    "unknown recipe": (["--recipe", "imagent"], "unknown recipe 'imagent': the nearest are imagenet"),
    "unknown data": (["--data", "digit"], "unknown data source 'digit'; the known ones are digits, folder:PATH"),
    "patch": (["--model", "ViT-Nano/3"], "image_size=8 is not divisible by patch_size=3"),
    "heads": (["--mesh", "1x8"], "num_heads=4 is not divisible by the model axis of the 1x8 mesh"),
    "batch": (["--mesh", "8x1", "--batch-size", "100"], "--batch-size 100 is not divisible by the data axis of 8"),
    "batch and parts": (
        ["--mesh", "2x1", "--batch-size", "6", "--accumulate", "2"],
        "data axis of 2 times --accumulate 2: use a multiple of 4",
    ),
    "mesh of zero": (["--mesh", "0x4"], "--mesh 0x4: two positive sizes DATAxMODEL are required"),
    "negative mesh": (["--mesh=-8x4"], "--mesh -8x4: two positive sizes"),
    "mesh of words": (["--mesh", "big"], "--mesh big: two positive sizes"),
    "too many devices": (["--mesh", "16x1"], "--mesh 16x1 needs 16 devices, 8 x cpu present"),
    "steps": (["--steps", "0"], "--steps 0: a positive number is required"),
    "dropout": (["--dropout", "1.5"], "dropout=1.5"),
    "subset": (["--subset", "5000"], "--subset 5000: digits has 1442 training images"),
    "missing folder": (["--data", "folder:/no/such/place"], "/no/such/place"),
    "missing config": (["--config", "/no/such/config.json"], "/no/such/config.json"),
    "smoothed sigmoid": (["--loss", "sigmoid", "--label-smoothing", "0.1"], "only softmax smooths labels"),
    "not a number": (["--learning-rate", "nan"], "--learning-rate nan: a finite number is required"),
    "huge seed": (["--seed", str(2**63)], "seeds below 2**63 are required"),
    "word for a number": (["--steps", "abc"], "Error parsing --steps"),
    "unknown option": (["--stepz", "3"], "--stepz"),
    "not a choice": (["--decay", "max"], "invalid choice 'max' for argument '--decay'"),
    "a pool": (["--pool", "max"], "--pool max: one of token, gap, map, first is required"),
    "no pool": (["--pool", "none"], "--pool none: one of token, gap, map, first is required"),
    "a position": (["--position", "3d"], "--position 3d: one of 1d, 1d-patches, 1d-layers, 1d-shared, 2d"),
    "a stem": (["--stem", "resnet"], "--stem resnet: one of clip is required"),
    "heartbeat": (["--heartbeat-timeout", "0"], "--heartbeat-timeout 0: at least 1 is required"),
    "watchdog": (["--step-timeout=-1"], "--step-timeout -1: at least 0 is required"),
    "bad steps": (["--bad-steps", "0"], "--bad-steps 0: at least 1 is required"),
    "processes": (["--distributed", "host"], "--distributed host: auto, off or HOST:PORT,N,ID is required"),
    "process too many": (["--distributed", "localhost:99,2,2"], "process 2 of 2; ID must lie in 0..N-1"),
    "bucket": (["--out", "gs://bucket/run"], "--out gs://bucket/run: gs:// needs gcsfs and google-cloud-storage"),
    "another bucket": (["--out", "s3://bucket/run"], "--out s3://bucket/run: a local path or gs://BUCKET/PATH is required"),
    "remat": (["--remat", "--remat-every", "3"], "--remat-every 3: ViT-Nano/4 has 4 blocks"),
    "few-shot": (["--fewshot-every", "0"], "--fewshot-every 0: a positive number is required"),
    "few images": (
        ["--train-split", "train[shots=10]", "--batch-size", "16", "--mesh", "1x1", "--fewshot-every", "5"],
        "--fewshot-every: class '0' has 10 training images, 25 shots need 25: leave it out",
    ),
    "repeats": (["--repeats", "0"], "--repeats 0: a positive number is required"),
    "repeats of nothing": (["--repeats", "3", "--augment", "none"], "with --augment none an image is the same each time"),
    "a block": (["--block", "layer"], "--block layer: one of encoder, layerscale"),
    "registers": (["--registers", "-1"], "--registers -1: a positive number is required, or 0 for none"),
    "a ResNet's block": (["--model", "R50x1", "--block", "layerscale"], "--block layerscale: R50x1 is a ResNet"),
    "no weights": (["--init", "no/such/run"], "no/such/run: there is no such file or directory: a run's directory, an .npz or"),
    "warm-up": (["--steps", "10", "--warmup-steps", "10"], "the warm-up must be shorter than the run"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, words = MISTAKES[name]
    run(*argv, fails=True)
    captured = capsys.readouterr()
    assert captured.err.startswith("train.pretrain: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not list(tmp_path.iterdir())  # and nothing was begun


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: (path.mkdir(), f"folder:{path}")[1], "data"),
        (lambda path: folder(path, val=("cat", "cow")), "cow"),
    ],
    ids=["empty folder", "classes that differ"],
)
def test_a_bad_folder_is_one_line(make, words, tmp_path, capsys):
    data = make(tmp_path / "data")
    run(
        "--data",
        data,
        "--model",
        "ViT-Ti/16",
        "--image-size",
        16,
        "--batch-size",
        8,
        "--steps",
        2,
        "--mesh",
        "1x1",
        "--out",
        tmp_path / "o",
        fails=True,
    )
    error = capsys.readouterr().err
    assert error.startswith("train.pretrain: error: ")
    assert words in error
    assert error.count("\n") == 1


def test_another_runs_directory_is_left_alone(whole, capsys):
    before = {path: path.read_bytes() for path in whole.glob("*.*")}
    run(*TINY, "--out", whole, "--seed", 1, fails=True)
    assert "holds another run (seed 0 there, 1 now): choose another --out" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in whole.glob("*.*")} == before


def test_a_run_whose_first_batch_fails_has_claimed_nothing(tmp_path, monkeypatch, capsys):
    """The corrected command may use the same directory, though it is another run."""

    def broken(self):
        raise DataError("the first image is none")

    monkeypatch.setattr(TrainBatches, "__next__", broken)
    run(*TINY, "--out", tmp_path / "run", fails=True)
    assert capsys.readouterr().err == "train.pretrain: error: the first image is none\n"
    # what was in hand, for the next run to look at: nobody's claim
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "reading"]
    monkeypatch.undo()
    run(*TINY, "--augment", "none", "--out", tmp_path / "run")
    assert len(records(tmp_path / "run")) == 12


def test_few_shot_accuracy_as_it_goes(tmp_path):
    run(*TINY, "--fewshot-every", 5, "--out", tmp_path / "run")
    found = {line["step"]: line["fewshot_5"] for line in records(tmp_path / "run") if "fewshot_5" in line}
    assert found.keys() == {5, 10}
    assert all(0.3 < accuracy < 1 for accuracy in found.values())


def test_a_directory_that_says_not_whose_it_is_is_left_alone(whole, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    run(*TINY, "--out", tmp_path, fails=True)
    assert "holds metrics.jsonl but no config.json" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    (tmp_path / "config.json").write_text("[]")
    run(*TINY, "--out", tmp_path, fails=True)
    assert "config.json is damaged" in capsys.readouterr().err


def test_checkpoints_of_another_run_are_not_continued(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "other")
    held = json.loads((whole / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(held | {"seed": 5}))
    run(*TINY, "--out", tmp_path / "other", "--seed", 5, fails=True)
    assert "is another run's (seed differ)" in capsys.readouterr().err


def test_two_processes_cannot_share_a_directory(whole, capsys):
    with locked(place(whole)):
        run(*TINY, "--out", whole, fails=True)
    assert "is in use by another process" in capsys.readouterr().err


@pytest.mark.parametrize("values", [{"steps": 2.5}, {"dtype": "float16"}, {"seed": "zero"}, {"stepz": 3}, [], {"mesh": 4}])
def test_a_damaged_config_is_refused(values, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(values))
    run("--config", tmp_path / "config.json", "--out", tmp_path / "o", fails=True)
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_default_name_is_the_runs_own():
    a = pretrain.resolve(pretrain.Pretrain(), examples=1442)
    same = pretrain.resolve(pretrain.Pretrain(mesh="8x4", keep=9, steps=1205), examples=1442)
    other = pretrain.resolve(pretrain.Pretrain(seed=1), examples=1442)
    assert pretrain.directory(a) == pretrain.directory(same) != pretrain.directory(other)
    assert pretrain.directory(a).name.startswith("ViT-Nano_4-digits-")


def test_a_longer_run_starts_from_a_finished_one(whole, tmp_path, capsys):
    run(*TINY, "--out", whole, "--steps", 20, fails=True)
    said = capsys.readouterr().err
    assert "holds another run (steps 12 there, 20 now" in said
    assert f"a longer run starts from that one, its schedule anew: --init {whole} and another --out" in said
    run(*TINY, "--init", whole, "--out", tmp_path / "on", "--steps", 2, "--eval-every", 1, "--learning-rate", 1e-9, "--dropout", 0)
    assert records(tmp_path / "on")[0]["val_accuracy"] == records(whole)[-1]["val_accuracy"], (
        "its parameters, and a rate of nothing"
    )
    for option, words in (
        (("--model", "ViT-Nano/2"), "patch_size 4 there, 2 here"),
        (("--data", "digits:0-4"), "num_classes 10 there, 5"),
    ):
        run(*TINY, "--init", whole, "--out", tmp_path / "other", *option, fails=True)
        assert words in capsys.readouterr().err


def test_a_run_of_before_there_were_these_options_goes_on():
    """Its config.json lacks them; its directory's name, made then, is the same now."""
    now = pretrain.resolve(pretrain.Pretrain(), examples=1442)
    now = dataclasses.replace(now, mesh="1x1", augment="digits")
    held = {key: value for key, value in dataclasses.asdict(now).items() if key not in BEFORE or key == "weight_decay"} | {
        "mixup": 0.0
    }
    assert differing(pretrain.identity(now), held) == []
    photographs = pretrain.resolve(pretrain.Pretrain(data="folder:x"), examples=1442)
    held |= {"data": photographs.data}
    assert {"antialias", "crop"} <= set(differing(pretrain.identity(photographs), held)), "these have other crops now"
    assert "mixup" in differing(pretrain.identity(dataclasses.replace(now, mixup=0.2)), held)


def test_mesh_is_parsed():
    assert meshes.parse("8x4")[:2] == (8, 4)


def test_a_second_run_in_a_process_has_the_flags_of_the_first(monkeypatch):
    """Were they more, JAX's cache would not know the second run's programs for those of the first."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    meshes.prepare(meshes.parse("2x1"))
    once = os.environ["XLA_FLAGS"]
    meshes.prepare(meshes.parse("2x1"))
    assert os.environ["XLA_FLAGS"] == once
    assert once.startswith("--xla_cpu_enable_fast_math=false --xla_cpu_collective")


@pytest.mark.parametrize(
    ("settings", "shape", "said"),
    [
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, "None", "mesh 4x1: 4 devices simulated"),
        ({"JAX_NUM_CPU_DEVICES": "3", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, "None", "mesh 3x1: 3 devices"),
        ({"JAX_NUM_CPU_DEVICES": "4"}, "meshes.parse('2x1')", "mesh 2x1: 2 devices simulated"),
        ({}, "None", "mesh 1x1: 1 x cpu"),
    ],
    ids=["flags", "number", "both", "none"],
)
def test_devices_simulated_by_jax_s_own_settings_are_seen_without_mesh(settings, shape, said):
    code = f"from train import mesh as meshes; shape = {shape}; meshes.prepare(shape); print(meshes.make(shape)[1])"
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=clean | settings)
    assert done.stdout.startswith(said), (done.stdout, done.stderr)


# --- the default run, as the README has it ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_run_reads_digits_on_8x4(tmp_path):
    """96 % of the held-out fifth, at least; quiet on stderr where there is no terminal."""
    command = [sys.executable, "-m", "train.pretrain", "--mesh", "8x4", "--out", tmp_path / "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "32 devices simulated" in done.stdout
    last = records(tmp_path / "run")[-1]
    assert last["val_accuracy"] >= 0.96
    assert f"{last['val_accuracy']:.2%}" in done.stdout
    assert done.stderr == ""
