"""Fine-tuning as its user meets it: from every kind of start, at another resolution, swept, stopped and taken up again."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import train.build
import train.loop
import vitcore
from tests.train.interruption import interrupt_before
from train import finetune, pretrain
from train import sweep as sweeps
from train.data import open_source
from train.optim import sgd
from train.pretrained import open_pretrained
from train.tuning import dev_splits
from vitcore.posemb import fit

CONFIG = vitcore.variant("ViT-Nano/4", image_size=8, channels=1, num_classes=5, representation_size=16)
TINY = ["--mesh", "2x1", "--batch-size", "16", "--steps", "6", "--eval-every", "3", "--checkpoint-every", "2", "--log-every", "1"]
FIVE = ["--data", "digits:5-9"]


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(*argv, fails=False):
    assert finetune.main([str(a) for a in argv]) == (2 if fails else 0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    vitcore.save(path, jax.jit(lambda: vitcore.init(jax.random.key(3), CONFIG))(), CONFIG)
    return path


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    """A finished run of 6 steps."""
    out = tmp_path_factory.mktemp("run") / "whole"
    run(*TINY, *FIVE, "--init", weights, "--out", out)
    return out


@pytest.mark.parametrize("of", ["directory", "step"])
def test_a_run_stands_where_a_file_of_weights_is_wanted(whole, of, tmp_path, capsys):
    from vitcore import export, weights

    path = str(whole if of == "directory" else whole / "6")
    if of == "directory":
        assert weights.main(["show", path]) == 0
        assert "classes 5, 6, 7" in capsys.readouterr().out
        assert export.main([path, str(tmp_path / "m.stablehlo")]) == 0
        assert "logits [B, " in capsys.readouterr().out
        assert weights.main(["show", str(tmp_path)]) == 2
        assert "holds no config.json" in capsys.readouterr().err
        return
    assert weights.main(["convert", path, str(tmp_path / "w.npz")]) == 0
    found, _ = vitcore.load(tmp_path / "w.npz")
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, open_pretrained(path).params))


def test_a_run_starts_at_the_weights_with_a_new_head(weights, whole, capsys):
    lines = records(whole)
    assert lines[0]["loss"] == pytest.approx(np.log(5), rel=1e-6)  # five classes, a head of zeros
    assert [line["step"] for line in lines] == list(range(1, 7))
    held = json.loads((whole / "config.json").read_text())
    assert (held["recipe"], held["momentum"], held["clip_norm"], held["learning_rate"]) == ("digits", 0.9, 1.0, 0.1)
    assert held["vit"]["representation_size"] is None
    run(*TINY, *FIVE, "--init", weights, "--out", whole)
    assert "resuming at step 6" in capsys.readouterr().out
    # a run's directory is a start too, for evaluation with its head
    found = open_pretrained(str(whole))
    assert (found.config.num_classes, found.config.width, found.config.image_size) == (5, 64, 8)
    assert np.abs(found.params["head"]["kernel"]).max() > 0


def test_config_json_runs_again_to_the_same_numbers(whole, tmp_path):
    run("--config", whole / "config.json", "--out", tmp_path / "again")
    assert [line["loss"] for line in records(tmp_path / "again")] == [line["loss"] for line in records(whole)]


@pytest.mark.slow  # twenty steps of fine-tuning against float64 are a fast test (test_optim.py)
def test_the_first_step_is_sgd_on_the_loaded_weights(weights, tmp_path):
    """One update, done again here with optax on one device: momentum, clipping, warm-up, head, and all the rest."""
    argv = [
        "--mesh",
        "2x2",
        "--batch-size",
        "16",
        "--steps",
        "2",
        "--warmup-steps",
        "0",
        "--augment",
        "none",
        "--learning-rate",
        0.5,
    ]
    run(*argv, *FIVE, "--init", weights, "--checkpoint-every", 1, "--keep", 2, "--out", tmp_path)
    start = open_pretrained(str(weights), num_classes=5)
    source = open_source("digits:5-9", "train")
    from train.data import train_batches

    with train_batches(source, image_size=8, channels=1, batch_size=16, seed=0, augment="none") as batches:
        batches = [next(batches) for _ in range(2)]

    def loss(params, batch):
        logits = vitcore.apply(params, batch["image"], start.config)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    params, momentum = start.params, jax.tree.map(np.zeros_like, start.params)
    for step, batch in enumerate(batches):
        grads = jax.jit(jax.grad(loss))(params, batch)
        norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g, n=norm: g * np.minimum(1, 1 / n), grads)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        rate = 0.5 * 0.5 * (1 + np.cos(np.pi * step / 2))
        params = jax.tree.map(lambda p, m, r=rate: p - r * m, params, momentum)
        found = open_pretrained(str(tmp_path / str(step + 1))).params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, params)


def test_how_images_are_read_is_not_what_is_computed(weights, tmp_path, monkeypatch, capsys):
    """Bytes travel; decoder and share of bad images reach the reading, and a continuation may change them."""
    config = dataclasses.replace(CONFIG, channels=3, num_classes=2)
    vitcore.save(tmp_path / "w.npz", jax.jit(lambda: vitcore.init(jax.random.key(3), config))(), config)
    for split in ("train", "val"):
        for label, name in enumerate("ab"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.random.default_rng(i).integers(100 * label, 156 + 100 * label, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "d" / split / name / f"{i}.jpg")
    seen, asked, make = [], [], train.loop.Feed

    def feed(batches, place):
        return make(batches, lambda batch: seen.append(batch["image"].dtype) or place(batch))

    def reading(read, *args, **options):
        asked.append((options["decoder"], options["bad_share"]))
        return read(*args, **options)

    monkeypatch.setattr(train.loop, "Feed", feed)
    for name in ("train_batches", "eval_batches"):
        monkeypatch.setattr(train.build, name, functools.partial(reading, getattr(train.build, name)))
    argv = [*TINY, "--data", f"folder:{tmp_path / 'd'}", "--init", tmp_path / "w.npz", "--augment", "inception", "--batch-size", 8,
            "--image-size", 8, "--out", tmp_path / "run"]  # fmt: skip
    run(*argv, "--decoder", "simplejpeg", "--bad-share", 0.5, "--keep-every", 4)
    assert len(seen) > 6  # training and evaluation
    assert set(seen) == {np.dtype("uint8")}
    assert len(asked) == 2
    assert set(asked) == {("simplejpeg", 0.5)}
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()) == [4, 6]
    run(*argv, "--remat", "--remat-every", 2)
    assert "resuming at step 6" in capsys.readouterr().out


@pytest.mark.slow
def test_a_larger_image_and_a_pretraining_run_as_the_start(tmp_path):
    pre = [str(a) for a in (*TINY, "--data", "digits:0-4", "--model", "ViT-Nano/4", "--recipe", "digits", "--polyak", "0.5",
           "--out", tmp_path / "pre")]  # fmt: skip
    assert pretrain.main(pre) == 0
    small = open_pretrained(str(tmp_path / "pre"))
    assert small.config.representation_size == 64
    assert "Polyak" in small.about
    found = open_pretrained(str(tmp_path / "pre"), image_size=16, num_classes=5)
    want = fit(small.params["patch_embed"]["position"], grid=(2, 2), to=(4, 4), class_slots=1)
    np.testing.assert_array_equal(found.params["patch_embed"]["position"], want)
    assert "pre_logits" not in found.params
    assert not found.params["head"]["kernel"].any()
    run(*TINY, *FIVE, "--init", tmp_path / "pre", "--image-size", 16, "--out", tmp_path / "ft", "--polyak", "0.9")
    assert open_pretrained(str(tmp_path / "ft")).config.image_size == 16
    run(*TINY, *FIVE, "--init", tmp_path / "pre" / "6", "--out", tmp_path / "step")
    run(*TINY, *FIVE, "--init", tmp_path / "pre" / "5", "--out", tmp_path / "none", fails=True)


@pytest.mark.parametrize("mesh", ["2x1", pytest.param("2x2", marks=pytest.mark.slow)])
def test_an_interrupted_run_continues_as_if_nothing_had_happened(weights, whole, tmp_path, monkeypatch, mesh):
    interrupt_before(monkeypatch, 3)
    argv = [*TINY, *FIVE, "--init", str(weights), "--out", str(tmp_path)]
    assert finetune.main(argv) == 130
    monkeypatch.undo()
    run(*argv, "--mesh", mesh)
    a, b = ([line["loss"] for line in records(out)] for out in (whole, tmp_path))
    assert len(b) == 6
    np.testing.assert_allclose(b, a, rtol=0 if mesh == "2x1" else 1e-5)


def test_momentum_in_bfloat16_is_worked_on_in_float32():
    params = {"kernel": np.full(3, 1.0, np.float32)}
    updates = {}
    for dtype in ("float32", "bfloat16"):
        tx = sgd(lambda step: 1.0, momentum=0.9, dtype=dtype)
        state = tx.init(params)
        for i in range(3):
            u, state = tx.update({"kernel": np.full(3, 1 / (3 + i), np.float32)}, state, params)
        updates[dtype] = float(u["kernel"][0])  # pyright: ignore
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.ndim} == {dtype}
    m = 0.0
    for i in range(3):
        m = 0.9 * float(np.asarray(m, "bfloat16").astype(np.float32)) + 1 / (3 + i)
    assert updates["bfloat16"] == pytest.approx(-m, rel=1e-6)
    assert updates["bfloat16"] != updates["float32"]
    assert updates["bfloat16"] == pytest.approx(updates["float32"], rel=5e-3)


def test_every_option_reaches_the_run(weights, tmp_path, monkeypatch):
    seen = []

    def taken(run, say, **_):
        seen.append(run)
        return train.loop.Result(1, 1, 0.5, 1, 2, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", taken)

    def given(*argv):
        run(*TINY, *FIVE, "--init", weights, "--out", tmp_path / str(len(seen)), *argv)
        return seen[-1]

    plain = given()
    assert plain.config == dataclasses.replace(CONFIG, representation_size=None)
    assert given("--dropout", 0.3).config.dropout == 0.3
    assert given("--drop-path", 0.2).config.drop_path == 0.2
    assert given("--gelu", "erf").config.gelu == "erf"
    assert given("--image-size", 16).config.image_size == 16
    assert given("--label-smoothing", 0.2).options.label_smoothing == 0.2
    assert plain.config_json["weight_decay"] is plain.config_json["layer_decay"] is None
    decays = given("--optimizer", "adamw", "--weight-decay", 0.1, "--layer-decay", 0.7).config_json
    assert (decays["weight_decay"], decays["layer_decay"]) == (0.1, 0.7)
    mixed = next(given("--cutmix", 1.0).batches)
    assert mixed["share"].shape == mixed["other_label"].shape == (16,)
    assert given("--polyak", 0.9).options.polyak == 0.9
    assert given("--clip-norm", 0).options.clip_norm is None
    assert given("--accumulate", 2).options.accumulate == 2
    assert given("--seed", 3).options.seed == 3
    assert given("--dtype", "bfloat16").options.dtype == "bfloat16"
    assert given("--ops", "interpret").options.ops is vitcore.INTERPRET
    assert given("--remat").options.remat == 1
    assert given("--remat", "--remat-every", 2).options.remat == 2
    assert given("--keep", 5).keep == 5
    assert (plain.keep_every, given("--keep-every", 4).keep_every) == (None, 4)
    assert [given(*o).checkpoint_wait for o in ([], ["--checkpoint-wait"])] == [False, True]
    first = next(plain.batches)
    assert first["label"].max() < 5
    for option in (["--seed", 1], ["--augment", "none"], ["--split", "train[:50%]"], ["--dev"]):
        assert not np.array_equal(next(given(*option).batches)["image"], first["image"]), option
    rates = [[], ["--learning-rate", 0.01], ["--warmup-steps", 4], ["--steps", 12]]
    assert len({float(given(*option).learning_rate(4)) for option in rates}) == 4
    position = [np.asarray(given("--image-size", 24, "--interpolation", m).start().params["patch_embed"]["position"])
                for m in ("corners", "half-pixel")]  # fmt: skip
    assert np.abs(position[0] - position[1]).max() > 1e-3
    traces = [jax.tree.leaves(given("--momentum-dtype", d).start().opt_state)[0].dtype for d in ("float32", "bfloat16")]
    assert traces == ["float32", "bfloat16"]
    head = given("--head-bias", -2.5).start().params["head"]
    assert (np.asarray(head["bias"]) == -2.5).all()
    assert not np.asarray(head["kernel"]).any()


def test_dev_and_train_share_no_image_and_are_all_of_it():
    for split, share in (("train", 0.02), ("train[classes=5-9]", 0.1), ("train", 0.01)):
        parts = [open_source("digits", s) for s in dev_splits(split, share)]
        names = [[s.example_name(i) for i in range(len(s))] for s in parts]
        everything = open_source("digits", split)
        assert not set(names[0]) & set(names[1])
        assert len(names[0]) + len(names[1]) == len(everything)
        assert len(names[1]) == pytest.approx(share * len(everything), abs=1)


# --- the sweep --------------------------------------------------------------------------------------------------------------

SWEEP = ["--sweep", "--learning-rates", "0.001", "0.1", "--runs", "2"]


@pytest.mark.slow
def test_a_sweep_chooses_and_is_taken_up_where_it_was_left(weights, tmp_path, monkeypatch, capsys):
    """Killed in the middle of its second run, between checkpoints: the first run is not done again, the second loses one step."""
    argv = [*TINY, *FIVE, "--init", str(weights), "--out", str(tmp_path), *SWEEP]
    interrupt_before(monkeypatch, 9)
    assert finetune.main(argv) == 130
    held = json.loads((tmp_path / "sweep.json").read_text())
    assert list(held["dev"]) == ["0.001"]
    assert "mean" not in held
    taken = interrupt_before(monkeypatch, None)
    run(*argv)
    assert len(taken) == 6 - 2 + 2 * 6  # checkpoints every 2 steps, killed after step 3
    held = json.loads((tmp_path / "sweep.json").read_text())
    accuracies = {float(rate): one["accuracy"] for rate, one in held["dev"].items()}
    assert set(accuracies) == {0.001, 0.1}
    assert accuracies[held["rate"]] == max(accuracies.values())
    assert {one["count"] for one in held["dev"].values()} == {72}  # a tenth of 718
    finals = [one["accuracy"] for one in held["final"].values()]
    assert list(held["final"]) == ["0", "1"]
    assert {one["count"] for one in held["final"].values()} == {177}
    assert held["mean"] == pytest.approx(np.mean(finals))
    assert held["std"] == pytest.approx(np.std(finals))
    printed = capsys.readouterr().out
    assert f"| {held['mean']:.2%} +- {held['std']:.2%} |" in printed
    assert (tmp_path / "sweep.md").read_text().rstrip() in printed
    assert Image.open(tmp_path / "sweep.png").size[0] > 800
    config = json.loads((tmp_path / "final" / "seed-1" / "config.json").read_text())
    assert (config["split"], config["test_split"], config["learning_rate"], config["seed"]) == ("train", "val", held["rate"], 1)
    config = json.loads((tmp_path / "dev" / "lr-0.1" / "config.json").read_text())
    assert (config["split"], config["test_split"]) == ("train[:90%]", "train[90%:]")
    # the same again: nothing left to do
    taken.clear()
    run(*argv)
    assert not taken
    # another sweep does not take this one's directory
    run(*argv, "--seed", 5, fails=True)
    assert "holds another run (seed 0 there, 5 now)" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text("{")
    run(*argv, fails=True)
    assert "sweep.json is damaged" in capsys.readouterr().err


def test_a_sweep_does_each_run_once(weights, tmp_path, monkeypatch, capsys):
    """The order of things, with runs that take no time: stopped at every run in turn, none is done twice."""
    done, allowed = [], 0

    def quick(run, say, **_):
        if len(done) == allowed:
            raise KeyboardInterrupt
        where = "/".join(str(run.directory).split("/")[-2:])
        done.append(where)
        right = {"dev/lr-0.001": 3, "dev/lr-0.1": 9, "final/seed-0": 7, "final/seed-1": 8}[where]
        return train.loop.Result(1, 1, right / 10, right, 10, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", quick)
    argv = [*TINY, *FIVE, "--init", str(weights), "--out", str(tmp_path), *SWEEP]
    for allowed in range(5):
        assert finetune.main(argv) == (0 if allowed == 4 else 130)
        assert len(done) == allowed
    assert done == ["dev/lr-0.001", "dev/lr-0.1", "final/seed-0", "final/seed-1"]
    held = json.loads((tmp_path / "sweep.json").read_text())
    assert (held["rate"], held["mean"], held["std"]) == (0.1, pytest.approx(0.75), pytest.approx(0.05))
    assert "| test, 2 runs | | 75.00% +- 5.00% |" in capsys.readouterr().out
    assert Image.open(tmp_path / "sweep.png").size[0] > 800


def test_a_sweep_stays_with_the_step_it_began_from(whole, tmp_path, monkeypatch, capsys):
    """--init goes on, and deletes the step: the sweep has a copy. Without that it says so."""
    live, out, begun = tmp_path / "live", tmp_path / "out", []
    shutil.copytree(whole, live)
    (live / "checkpoints" / "6").rename(tmp_path / "6")
    wanted = open_pretrained(str(live / "4")).params["patch_embed"]["kernel"]

    def quick(run, say, **_):
        if len(begun) == allowed:
            raise KeyboardInterrupt
        begun.append(run.config_json["began_from"]["step"])
        weights = np.asarray(run.start().params["patch_embed"]["kernel"])
        assert np.array_equal(weights, wanted)
        return train.loop.Result(1, 1, 0.5, 1, 2, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", quick)
    argv = [*TINY, *FIVE, "--init", str(live), "--out", str(out), *SWEEP]
    allowed = 1
    assert finetune.main(argv) == 130
    (tmp_path / "6").rename(live / "checkpoints" / "6")  # the run goes on
    shutil.rmtree(live / "checkpoints" / "4")
    allowed = 10
    run(*argv)
    assert begun == [4] * 4
    held = json.loads((out / "sweep.json").read_text())
    assert held["model"]["step"] == 4
    assert {(one["step"], one["checksum"]) for kind in ("dev", "final") for one in held[kind].values()} == {
        (4, held["model"]["checksum"])
    }
    copy = bytearray((out / "init.npz").read_bytes())
    copy[len(copy) // 2] ^= 1
    (out / "init.npz").write_bytes(copy)
    capsys.readouterr()
    run(*argv, fails=True)
    said = capsys.readouterr().err
    assert f"{out / 'init.npz'} is damaged (" in said
    assert said.count("\n") == 1
    (out / "init.npz").unlink()
    run(*argv, fails=True)
    said = capsys.readouterr().err
    assert f"was begun from {live} (step 4, checksum {held['model']['checksum']}), and no checkpoint of step 4" in said
    assert said.count("\n") == 1


def test_of_equal_rates_the_smallest(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(
        train.loop, "train", lambda run, say, **_: train.loop.Result(1, 1, 0.5, 1, 2, train.loop.Best(), False, 0.0, 0.0)
    )
    run(*TINY, *FIVE, "--init", weights, "--out", tmp_path, "--sweep", "--learning-rates", "0.1", "0.01", "--runs", "1")
    assert json.loads((tmp_path / "sweep.json").read_text())["rate"] == 0.01


def test_the_table():
    one = {"accuracy": 0.9, "correct": 9, "count": 10}
    summary = {"dev": {"0.01": one}, "final": {"0": one, "1": {"accuracy": 0.8, "correct": 8, "count": 10}}}
    summary |= sweeps.summarise(summary, 0.01)
    assert "| test, 2 runs | | 85.00% +- 5.00% |" in sweeps.table(summary, "x")
    assert "| dev, rate 0.01 (chosen) | 9 of 10 | 90.00% |" in sweeps.table(summary, "x")


# --- mistakes ---------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no start": ([], "--init is required"),
    "no such start": (["--init", "/no/such.npz"], "/no/such.npz"),
    "no run": (["--init", "/tmp"], "holds no config.json"),
    "unknown recipe": (["--init", "W", "--recipe", "cifar"], "unknown fine-tuning recipe 'cifar': the nearest are cifar10"),
    "unknown split": (["--init", "W", "--split", "training"], "training"),
    "two ways": (["--init", "W", "--dev", "--sweep"], "a sweep makes its own dev split"),
    "rate": (["--init", "W", "--learning-rate", "0"], "a rate above 0"),
    "not a number": (["--init", "W", "--learning-rate", "nan"], "a finite number"),
    "steps": (["--init", "W", "--steps", "0"], "--steps 0: a positive number"),
    "warm-up": (["--init", "W", "--warmup-steps", "7"], "a warm-up shorter than the run"),
    "size": (["--init", "W", "--image-size", "9"], "image_size=9 is not divisible by patch_size=4"),
    "batch": (["--init", "W", "--batch-size", "15"], "--batch-size 15 is not divisible by the data axis of 2"),
    "remat": (["--init", "W", "--remat", "--remat-every", "3"], "pixels [-1, 1]) has 4 blocks, a divisor of that is required"),
    "kernels": (["--init", "W", "--ops", "fused"], "--ops fused runs on a TPU, mesh 2x1: 2 devices simulated"),
    "seed": (["--init", "W", "--seed", str(2**62)], "a seed below 2**62 is required"),
    "workers": (["--init", "W", "--workers", "-1"], "--workers -1: zero or a positive number is required"),
    "bad images": (["--init", "W", "--bad-share", "1.5"], "--bad-share 1.5: a share in [0, 1] is required"),
    "heads": (["--init", "W", "--mesh", "1x8"], "num_heads=4 is not divisible"),
    "word": (["--init", "W", "--steps", "abc"], "--steps"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, weights, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, words = MISTAKES[name]
    run(*TINY, *FIVE, *(str(weights) if a == "W" else a for a in argv), fails=True)
    said = capsys.readouterr().err
    assert said.startswith("train.finetune: error: ")
    assert said.count("\n") == 1
    assert words in said
    assert not list(tmp_path.iterdir())
