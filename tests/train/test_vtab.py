"""The nineteen tasks on sets made here: what is missing is named, what is done is not done again, one rate for all."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image

import train.loop
import vitcore
from tests.train.interruption import interrupt_before
from train import vtab, vtab_results
from train.checkpoint import Checkpoints

CONFIG = vitcore.variant("ViT-Nano/4", image_size=8, num_classes=3, representation_size=None)
HERE = ("pets", "svhn", "kitti-dist")
TINY = ["--mesh", "2x1", "--batch-size", "8", "--steps", "3", "--image-size", "8", "--examples", "20"]

# Table 9's columns, typed in again from the paper
PAPER = [
    "Caltech101", "CIFAR-100", "DTD", "Flowers102", "Pets", "Sun397", "SVHN",
    "Camelyon", "EuroSAT", "Resisc45", "Retinopathy",
    "Clevr-Count", "Clevr-Dist", "DMLab", "dSpr-Loc", "dSpr-Ori", "KITTI-Dist", "sNORB-Azim", "sNORB-Elev",
]  # fmt: skip


def run(*argv, fails=False):
    assert vtab.main([str(a) for a in argv]) == (2 if fails else 0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    vitcore.save(path, jax.jit(lambda: vitcore.init(jax.random.key(3), CONFIG))(), CONFIG)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Three tasks of 20 training and 8 test images; two classes, told apart by their brightness."""
    root = tmp_path_factory.mktemp("vtab")
    rng = np.random.default_rng(0)
    for task in HERE:
        for split, count in (("train", 10), ("val", 4)):
            for label, name in enumerate("ab"):
                folder = root / task / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(160 * label, 90 + 160 * label, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_the_tasks_are_the_papers():
    assert [name for name, _ in vtab.TASKS.values()] == PAPER
    assert [sum(g == group for _, g in vtab.TASKS.values()) for group in vtab_results.GROUPS] == [7, 4, 8]


@pytest.mark.slow
def test_one_rate_for_all_task_by_task(weights, sets, tmp_path, monkeypatch, capsys):
    """Two rates on 16 + 4 images of each set; interrupted in the middle of a run, and taken up again."""
    argv = [*TINY, "--init", weights, "--data", sets, "--out", tmp_path / "out", "--learning-rates", "0.0001", "0.05"]
    interrupt_before(monkeypatch, 7)
    assert vtab.main([str(a) for a in argv]) == 130
    taken = interrupt_before(monkeypatch, None)
    run(*argv)
    assert len(taken) == 3 * (3 * 2 + 3) - 7  # checkpoints after every step: nothing is lost
    printed = capsys.readouterr().out
    held = json.loads((tmp_path / "out" / "vtab.json").read_text())
    assert set(held["dev"]) == set(held["final"]) == set(HERE)
    assert {one["count"] for runs in held["dev"].values() for one in runs.values()} == {4}
    assert {one["count"] for runs in held["final"].values() for one in runs.values()} == {8}
    by_rate = {r: np.mean([held["dev"][t][f"lr-{r:g}"]["accuracy"] for t in HERE]) for r in (0.0001, 0.05)}
    assert by_rate[held["rate"]] == max(by_rate.values())
    # sixteen tasks have no data, each said by name with its place
    assert len(held["missing"]) == 16
    assert "Camelyon has no data: " in printed
    assert f"{sets / 'camelyon'}" in held["missing"]["camelyon"]
    assert held["means"]["all"]["tasks"] == 3
    assert held["means"]["Specialized"] == {"mean": None, "tasks": 0, "of": 4}
    done = vtab.accuracies(held["final"], held["rate"])
    assert held["means"]["Natural"]["mean"] == pytest.approx((done["pets"] + done["svhn"]) / 2)
    text = (tmp_path / "out" / "vtab.md").read_text()
    assert f"| Natural | mean (2 of 7 tasks) | {held['means']['Natural']['mean']:.2%} |" in text
    assert "| Structured | sNORB-Elev | no data: " in text
    assert text.rstrip() in printed
    assert Image.open(tmp_path / "out" / "vtab.png").size[0] > 1000
    # the same again: nothing left to do
    taken.clear()
    run(*argv)
    assert not taken


def test_each_task_is_done_once_and_what_is_missing_is_named(weights, sets, tmp_path, monkeypatch, capsys):
    """The order of things, with runs that take no time: stopped at every run in turn, none is done twice."""
    done, allowed = [], 0

    def quick(run, say, **_):
        if len(done) == allowed:
            raise KeyboardInterrupt
        kind, task, key = str(run.directory).split("/")[-3:]
        done.append((kind, task, key))
        right = {("dev", "lr-0.05"): 3, ("dev", "lr-0.0001"): 1}.get((kind, key), 4 + HERE.index(task))
        return train.loop.Result(1, 1, right / 10, right, 10, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", quick)
    argv = [*TINY, "--init", weights, "--data", sets, "--out", tmp_path / "out", "--learning-rates", "0.0001", "0.05"]
    for allowed in (0, 1, 4, 7, 9):
        assert vtab.main([str(a) for a in argv]) == (0 if allowed == 9 else 130)
        assert len(done) == allowed
    assert done == [("dev", t, r) for t in HERE for r in ("lr-0.0001", "lr-0.05")] + [("final", t, "lr-0.05-seed-0") for t in HERE]
    held = json.loads((tmp_path / "out" / "vtab.json").read_text())
    assert held["rate"] == 0.05
    assert held["means"]["Natural"] == {"mean": pytest.approx(0.45), "tasks": 2, "of": 7}
    assert held["means"]["Specialized"] == {"mean": None, "tasks": 0, "of": 4}
    assert held["means"]["all"] == {"mean": pytest.approx(0.5), "tasks": 3, "of": 19}
    assert set(held["missing"]) == set(vtab.TASKS) - set(HERE)
    printed = capsys.readouterr().out
    assert "Camelyon has no data: " in printed
    assert f"{sets / 'camelyon'}" in held["missing"]["camelyon"]
    text = (tmp_path / "out" / "vtab.md").read_text()
    assert "| Natural | mean (2 of 7 tasks) | 45.00% |" in text
    assert "| Structured | sNORB-Elev | no data: " in text
    assert text.rstrip() in printed
    assert Image.open(tmp_path / "out" / "vtab.png").size[0] > 1000


def test_all_tasks_begin_from_the_step_that_the_first_began_from(sets, tmp_path, monkeypatch, capsys):
    """--init is a run that goes on, first at step 4 and then at 12, when it has 4 no more; what went wrong before it was opened has
    claimed nothing."""
    config, live, out = dataclasses.replace(CONFIG, representation_size=None), tmp_path / "live", tmp_path / "out"
    argv = [*TINY, "--init", live, "--data", sets, "--out", out]
    run(*argv, fails=True)
    assert not (out / "config.json").exists()

    def save(step):
        params = jax.jit(lambda: vitcore.init(jax.random.key(step), config))()
        with Checkpoints(live / "checkpoints") as checkpoints:
            checkpoints.save(step, {"params": params}, {})

    save(4)
    (live / "config.json").write_text(json.dumps({"vit": dataclasses.asdict(config)}))
    begun, allowed = [], 1

    def quick(run, say, **_):
        if len(begun) == allowed:
            raise KeyboardInterrupt
        begun.append((run.config_json["began_from"]["step"], np.asarray(run.start().params["patch_embed"]["kernel"]).tobytes()))
        return train.loop.Result(1, 1, 0.5, 1, 2, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", quick)
    assert vtab.main([str(a) for a in argv]) == 130
    save(12)
    shutil.rmtree(live / "checkpoints" / "4")
    allowed = 9
    run(*argv)
    assert len(begun) == 3
    assert len(set(begun)) == 1
    held = json.loads((out / "vtab.json").read_text())
    assert held["model"]["step"] == 4
    assert {one["checksum"] for runs in held["final"].values() for one in runs.values()} == {held["model"]["checksum"]}


@pytest.mark.faults
def test_a_link_that_moves_between_two_tasks_is_noticed(sets, tmp_path, monkeypatch, capsys):
    """--init is a symbolic link to the newest file of weights, as people keep one: the study is of the file that it began from."""
    config = dataclasses.replace(CONFIG, representation_size=None)
    for number in (1, 2):
        params = jax.jit(lambda number=number: vitcore.init(jax.random.key(number), config))()
        vitcore.save(tmp_path / f"{number}.npz", params, config)
    link, out, begun = tmp_path / "latest.npz", tmp_path / "out", []
    link.symlink_to(tmp_path / "1.npz")

    def quick(run, say, **_):
        begun.append(np.asarray(run.start().params["patch_embed"]["kernel"]).tobytes())
        link.unlink()
        link.symlink_to(tmp_path / "2.npz")
        return train.loop.Result(1, 1, 0.5, 1, 2, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", quick)
    argv = [*TINY, "--init", link, "--data", sets, "--out", out]
    for words in ("is another file than when this began (checksum", "was begun from"):  # and when it is taken up again
        assert vtab.main([str(a) for a in argv]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert len(begun) == 1
    held = json.loads((out / "vtab.json").read_text())
    assert {one["checksum"] for runs in held["final"].values() for one in runs.values()} == {held["model"]["checksum"]}


def test_a_signal_between_two_tasks(weights, sets, tmp_path, monkeypatch, capsys):
    """SIGTERM when one task is done and the next has not begun: nothing of it is begun, and nothing is done twice."""
    done, train_, signalled = [], train.loop.train, False

    def quick(run, say, *, stop):
        if len(done) == 1 and not signalled:
            os.kill(os.getpid(), signal.SIGTERM)  # this moment lies between the tasks
            stop.wait()
            ended = train_(run, say, stop=stop)  # the loop itself
            assert ended.asked_to_stop
            assert ended.steps == 0
            return ended
        done.append(str(run.directory).split("/")[-2])
        return train.loop.Result(1, 1, 0.5, 5, 10, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", quick)
    argv = [*TINY, "--init", weights, "--data", sets, "--out", tmp_path / "out"]
    run(*argv)
    assert f"asked to stop in final/{HERE[1]} at step 0: the same command resumes there" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out" / "vtab.json").read_text())["final"]) == [HERE[0]]
    assert not (tmp_path / "out" / "vtab.png").exists()
    signalled = True
    run(*argv)
    assert done == list(HERE)
    assert json.loads((tmp_path / "out" / "vtab.json").read_text())["means"]["all"]["tasks"] == 3


def test_sources_from_a_file_and_tables_recipe(weights, tmp_path, monkeypatch):
    seen = []

    def done(run, say, **_):
        seen.append(run)
        return train.loop.Result(1, 1, 0.5, 1, 2, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", done)
    (tmp_path / "s.json").write_text(json.dumps({"dtd": {"data": "digits:0-2", "train": "train[:1000]", "test": "val"}}))
    grey = tmp_path / "g.npz"
    config = vitcore.variant("ViT-Nano/4", image_size=8, channels=1)
    vitcore.save(grey, jax.jit(lambda: vitcore.init(jax.random.key(3), config))(), config)
    run("--mesh", "1x1", "--init", grey, "--sources", tmp_path / "s.json", "--out", tmp_path / "o", "--tasks", "dtd", "pets",
        "--examples", "431")  # fmt: skip
    (job,) = seen
    assert (job.total_steps, job.batch_size, job.config.image_size, job.config.num_classes) == (2500, 512, 384, 3)
    assert max(float(job.learning_rate(i)) for i in range(0, 2500, 50)) == pytest.approx(0.01, rel=1e-3)
    held = json.loads((tmp_path / "o" / "vtab.json").read_text())
    assert list(held["missing"]) == ["pets"]
    assert held["rate"] == 0.01
    assert not held["dev"]


def test_what_jobs_that_train_share_reaches_every_run(weights, sets, tmp_path, monkeypatch):
    seen = []

    def done(run, say, **_):
        seen.append(run)
        return train.loop.Result(1, 1, 0.5, 1, 2, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", done)
    run(*TINY, "--init", weights, "--data", sets, "--out", tmp_path / "o", "--tasks", "pets", "--remat", "--remat-every", 2,
        "--accumulate", 2, "--decoder", "simplejpeg", "--bad-share", 0.5, "--keep-every", 2, "--checkpoint-every", 3,
        "--ops", "interpret", "--bad-steps", 7)  # fmt: skip
    (job,) = seen
    assert (job.options.remat, job.options.accumulate, job.options.ops) == (2, 2, vitcore.INTERPRET)
    assert (job.keep, job.keep_every, job.checkpoint_every, job.bad_steps) == (2, 2, 3, 7)
    batch = next(job.batches)
    job.batches.close()
    assert batch["image"].dtype == np.uint8
    assert (job.batches._rows.decoder, job.batches._bad._share) == ("simplejpeg", 0.5)


def test_what_the_file_of_the_model_does_not_say_is_told(sets, tmp_path, monkeypatch, capsys):
    """A released file without a class token: GAP or the first patch? Without the option it is asked for."""
    config = vitcore.variant("ViT-Nano/4", image_size=8, num_classes=3, representation_size=None, pool="gap")
    vitcore.save(tmp_path / "gap.npz", jax.jit(lambda: vitcore.init(jax.random.key(3), config))(), config)
    bare = {name: array for name, array in np.load(tmp_path / "gap.npz").items() if "vitcore" not in name}
    np.savez(tmp_path / "gap.npz", **bare)
    seen = []

    def done(run, say, **_):
        seen.append(run)
        run.batches.close()
        return train.loop.Result(1, 1, 0.5, 1, 2, train.loop.Best(), False, 0.0, 0.0)

    monkeypatch.setattr(train.loop, "train", done)
    words = (*TINY, "--init", tmp_path / "gap.npz", "--data", sets, "--out", tmp_path / "o", "--tasks", "pets", "--heads", 4)
    run(*words, fails=True)
    assert "its pool is 'gap' or 'first'" in capsys.readouterr().err
    run(*words, "--init-pool", "gap", "--out", tmp_path / "told")
    assert [job.config.pool for job in seen] == ["gap"]
    assert vtab.identity(vtab.Vtab(init="a")).keys() == vtab.identity(vtab.Vtab(init="a", init_pool="gap")).keys() - {"init_pool"}


def test_choosing_by_hand():
    dev = {"pets": {"lr-0.1": {"accuracy": 0.5}, "lr-0.01": {"accuracy": 0.7}},
           "svhn": {"lr-0.1": {"accuracy": 0.9}, "lr-0.01": {"accuracy": 0.7}}}  # fmt: skip
    assert vtab.choose(dev, ["pets", "svhn"], (0.1, 0.01)) == 0.01  # equal means: the smaller
    assert vtab.choose(dev, ["svhn"], (0.1, 0.01)) == 0.1
    assert vtab.choose({}, ["svhn"], (0.3,)) == 0.3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--init is required"),
        (["--init", "W"], "--data DIRECTORY or --sources FILE is required"),
        (["--init", "W", "--data", "/no/such"], "none of the 19 tasks has data, the first because"),
        (["--init", "W", "--data", "S", "--tasks", "cats"], "--tasks cats: the tasks are caltech101"),
        (["--init", "W", "--data", "S", "--tasks", "pets", "--examples", "1000"], "20 images, VTAB-1k's 1000 are required"),
        (["--init", "W", "--sources", "W"], "{task: {data, train, test}} is required"),
        (["--init", "W", "--data", "S", "--runs", "0"], "--runs 0"),
        (["--init", "W", "--data", "S", "--keep-every", "0"], "--keep-every 0: a positive number is required"),
        (["--init", "W", "--data", "S", "--mesh", "4"], "--mesh 4: two positive sizes"),
        (["--init", "/no.npz", "--data", "S", "--examples", "20"], "/no.npz"),
    ],
)
def test_a_mistake_is_one_line(argv, words, weights, sets, tmp_path, capsys):
    known = {"W": weights, "S": sets}
    run(*(known.get(a, a) for a in argv), "--out", tmp_path / "o", fails=True)
    said = capsys.readouterr().err
    assert said.startswith("train.vtab: error: ")
    assert said.count("\n") == 1
    assert words in said
