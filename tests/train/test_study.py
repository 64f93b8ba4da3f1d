"""The paper's experiments as data: every run is one that its job takes, parts share them out, what is done is not done again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

import train.loop
from train import pretrain, study, vtab_results
from train.metrics import read
from train.optim import sgd
from train.options import parse
from train.signals import Stop
from train.studies import catalogue, cost, execute, others, paper, report
from train.studies.catalogue import STUDIES
from train.studies.records import Run, Setting, Study, groups, part_of

TOY = Setting(toy=True, data="digits:0-4", to="digits:5-9")
PAPER = Setting(toy=False, data="folder:jft", to="folder:imagenet", vtab="sets")
HAS_MASKED = "objective" in {field.name for field in dataclasses.fields(pretrain.Pretrain)}


@pytest.mark.parametrize("setting", [TOY, PAPER], ids=["toy", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_run_is_one_that_its_job_takes(name, setting):
    runs = STUDIES[name].runs(setting)
    assert runs
    assert {run.after for run in runs if run.after} <= {run.name for run in runs if run.job == "pretrain"}
    if name == "masked" and not HAS_MASKED:
        with pytest.raises(ValueError, match=r"train\.pretrain as it is here: unknown option --objective"):
            execute.check(runs)
        return
    execute.check(runs)
    costs = cost.of_runs(runs, setting)
    assert all(costs[run.name] > 0 for run in runs if run.job in ("pretrain", "finetune", "vtab"))
    if setting is TOY:
        tenth = STUDIES[name].runs(dataclasses.replace(setting, budget=0.1))
        assert sum(cost.of_runs(tenth, setting).values()) == pytest.approx(sum(costs.values()) / 10, rel=0.1)


def test_own_images_are_shrunk_to_what_a_toy_takes():
    mine = Setting(toy=True, data="folder:mine", to="folder:mine")
    for run in [run for run in STUDIES["fig5"].runs(mine) if run.job == "pretrain"]:
        side = cost.resolved(run).image_size
        assert side == (32 if run.at["family"].startswith("ResNet") else 16)


def test_a_wrong_option_of_a_run_is_said_before_anything_runs():
    with pytest.raises(ValueError, match=r"^x is not to be had of train.pretrain as it is here: unknown model 'ViT-Q/4'"):
        execute.check([Run(name="x", job="pretrain", options=("--model", "ViT-Q/4"))])


def test_table_6_costs_what_the_paper_says():
    runs = [run for run in STUDIES["fig5"].runs(PAPER) if run.job == "pretrain"]
    costs = cost.of_runs(runs, PAPER)
    for run, row in zip(runs, paper.TABLE_6, strict=True):
        assert costs[run.name] / 1e18 == pytest.approx(row["exaFLOPs"], rel=0.035), run.name
    assert cost.core_days(cost.V3_FLOPS * 86_400) == pytest.approx(1)


@pytest.mark.parametrize("name", ["table5", "fig8", "fig12"])
def test_parts_share_out_the_runs(name):
    runs = STUDIES[name].runs(TOY)
    costs = cost.of_runs(runs, TOY)
    each = groups(runs)
    for parts in (1, 2, 3, 8, 40):
        shares = [part_of(runs, costs, part, parts) for part in range(1, parts + 1)]
        assert sorted(run.name for share in shares for run in share) == sorted(run.name for run in runs)
        for share in shares:
            names = {run.name for run in share}
            assert all(run.after is None or run.after in names for run in share)  # nobody waits for another part
        loads = [sum(costs[run.name] for run in share) for share in shares]
        assert max(loads) - min(loads) <= max(sum(costs[run.name] for run in group) for group in each) + 1
    assert part_of(runs, costs, 1, 1) == [run for group in each for run in group]


# --- running ------------------------------------------------------------------------------------------------------------------


def _two(setting):
    runs = []
    for name in ("a", "b"):
        runs.append(Run(name=name, job="pretrain", options=(), at={"x": name}))
        runs.append(Run(name=f"{name}.fewshot", job="fewshot", options=(), after=name))
    return runs


def _begin(one, out):
    """As a job leaves its directory."""
    (out / "runs" / one.name).mkdir(exist_ok=True)
    (out / "runs" / one.name / "config.json").write_text("{}")


@pytest.fixture
def fake(monkeypatch):
    """A study of two pre-trainings with a measurement each, whose jobs only note that they were called; its notes."""
    done: list[str] = []
    interrupted: set[str] = set()

    def run(one, out, shared, stop):
        if one.name in interrupted:
            interrupted.remove(one.name)
            return None
        done.append(one.name)
        _begin(one, out)
        return {"value": 0.5, "steps": 3, "of_steps": 3}

    monkeypatch.setitem(STUDIES, "fake", Study(name="fake", title="A fake", runs=_two, x="x"))
    monkeypatch.setattr(execute, "run", run)
    return done, interrupted


def test_an_interrupted_study_goes_on(fake, tmp_path, capsys):
    done, interrupted = fake
    interrupted.add("b")
    words = ["fake", "--out", str(tmp_path / "s")]
    assert study.main(words) == 0
    assert done == ["a", "a.fewshot"]
    assert "asked to stop in b: the same command goes on there" in capsys.readouterr().out
    assert not (tmp_path / "s" / "fake.png").exists()
    assert study.main(words) == 0
    assert done == ["a", "a.fewshot", "b", "b.fewshot"]
    assert "| a | 3 |" in capsys.readouterr().out
    assert len(np.unique(np.asarray(Image.open(tmp_path / "s" / "fake.png").convert("L")))) > 20
    assert study.main(words) == 0
    assert len(done) == 4


def test_the_last_part_makes_the_table(fake, tmp_path, capsys):
    done, _ = fake
    out = ["--out", str(tmp_path / "s")]
    assert study.main(["fake", "--part", "2/2", *out]) == 0
    assert "2 of 4 runs are done" in capsys.readouterr().out
    assert study.main(["fake", "--part", "1/2", *out]) == 0
    assert sorted(done) == ["a", "a.fewshot", "b", "b.fewshot"]
    assert (tmp_path / "s" / "fake.md").exists()


def test_another_study_or_a_damaged_result_is_refused(fake, tmp_path, capsys):
    out = ["--out", str(tmp_path / "s")]
    assert study.main(["fake", *out]) == 0
    assert study.main(["fake", "--budget", "2", *out]) == 2
    assert "holds another run (budget 1.0 there, 2.0 now" in capsys.readouterr().err
    for damage, said in (("{", "results/a.json is damaged"), ("{}", "results/a.json is damaged (it has no value): remove it")):
        (tmp_path / "s" / "results" / "a.json").write_text(damage)
        assert study.main(["fake", *out]) == 2
        assert said in capsys.readouterr().err


def test_a_pretraining_that_is_gone_is_said(fake, tmp_path, capsys):
    """Its result is there, so that it would not be done again, and its measurement is not."""
    out = ["--out", str(tmp_path / "s")]
    assert study.main(["fake", *out]) == 0
    (tmp_path / "s" / "results" / "a.fewshot.json").unlink()
    (tmp_path / "s" / "runs" / "a" / "config.json").unlink()
    assert study.main(["fake", *out]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/s/runs/a, which a.fewshot starts from, is gone: remove {tmp_path}/s/results/a.json" in error


def test_list_runs_nothing(fake, capsys):
    done, _ = fake
    assert study.main(["table8", "--list", "--part", "1/8"]) == 0
    said = capsys.readouterr().out
    assert "2 runs in part 1 of 8" in said
    assert "core-days on TPUv3" in said
    assert not done


@pytest.mark.parametrize(("words", "said"), [
    (["tabel8"], "no study is called 'tabel8': did you mean table8 or"),
    (["xyz"], "no study is called 'xyz': there are table5,"),
    (["table8", "--buget", "2"], "unknown option --buget: did you mean --budget?"),
    (["table8", "--budget", "0"], "--budget 0.0: a number above 0 is required"),
    (["table8", "--budget", "nan"], "--budget nan: a number above 0 is required"),
    (["table8", "--part", "9/8"], "--part 9/8: PART/PARTS is required, from 1/8 to 8/8"),
    (["table8", "--part", "two"], "--part two: PART/PARTS is required"),
    (["table8", "--seed", "-1"], "--seed -1: a number from 0"),
    (["table8", "--scale", "paper"], "--scale paper: --data is required"),
    (["fig2", "--scale", "paper", "--data", "digits"], "this study wants --vtab DIRECTORY"),
])  # fmt: skip
def test_a_mistake_is_one_line(words, said, capsys):
    assert study.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.study: error: {said}")
    assert error.count("\n") == 1


# --- table and picture --------------------------------------------------------------------------------------------------------


def test_the_papers_number_stands_in_the_row_of_its_own():
    rows = [{"position": row["position"], "exaFLOPs": 1e-6, "steps": 9, "validation": 0.9, "fewshot": 0.5} for row in paper.TABLE_8]
    text = report.table(STUDIES["table8"], rows, TOY)
    assert "| 1d-shared | 9 | 1e-06 | 90.00% | 50.00% | 64.29% |" in text
    assert "The paper's own" not in text
    rows = [{"model": "R14x1", "optimizer": "SGD", "exaFLOPs": 1e-6, "steps": 9, "validation": 0.9, "finetune": None}]
    text = report.table(STUDIES["table7"], rows, TOY)
    assert "| R14x1 | SGD | 9 | 1e-06 | 90.00% |  |" in text
    assert "| R50x1 | SGD | average | 88.79% |" in text


@pytest.mark.parametrize("name", ["table5", "table7", "fig8"])
def test_every_picture_is_drawn_of_all_that_is_measured(name, tmp_path):
    runs = STUDIES[name].runs(TOY)
    results = {run.name: {"value": 0.5 + 0.01 * i, "steps": 1, "of_steps": 2} for i, run in enumerate(runs)}
    results[runs[0].name]["value"] = None  # it diverged
    costs = cost.of_runs(runs, TOY)
    rows = report.rows_of(runs, results, costs)
    assert len(rows) == sum(run.job == "pretrain" for run in runs)
    assert rows[1]["exaFLOPs"] == pytest.approx(costs[next(run.name for run in runs[1:] if run.job == "pretrain")] / 2e18)
    report.draw(STUDIES[name], rows, TOY, epath.Path(tmp_path / "p.png"))
    assert len(np.unique(np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_axial_models_stand_by_compute_and_by_what_was_timed(tmp_path):
    runs = STUDIES["fig13"].runs(TOY)
    results = {run.name: {"value": 0.5, "steps": 1, "of_steps": 1} for run in runs if run.job != "throughput"}
    results |= {run.name: {"rows": []} for run in runs if run.job == "throughput"}
    results["throughput-32"]["rows"] = [{"model": "R14x0.5", "images_per_second": 250.0}, {"model": "AxialResNet-14x0.5"}]
    rows = report.rows_of(runs, results, cost.of_runs(runs, TOY))
    assert {row["model"]: row["images/s"] for row in rows}["R14x0.5"] == 250.0
    assert sum(row["images/s"] is None for row in rows) == 5  # not timed
    text = report.table(STUDIES["fig13"], rows, TOY)
    assert "| model | steps | exaFLOPs | images/s | validation | 5-shot linear |" in text
    report.draw(STUDIES["fig13"], rows, TOY, epath.Path(tmp_path / "p.png"))
    wide, _ = Image.open(tmp_path / "p.png").size
    assert wide > 1200  # two panels


@pytest.mark.parametrize("toys", [True, False])
def test_vtab_stands_beside_the_papers_numbers(toys, tmp_path):
    """In the rows of the paper's tasks; toys apart from them. A model's means are those that the paper prints."""
    tasks = vtab_results.TOYS if toys else {"pets": vtab_results.TASKS["pets"]}
    final = {task: {"lr-0.01-seed-0": {"accuracy": 0.25}} for task in tasks}
    means = vtab_results.means(vtab_results.accuracies(final, 0.01), vtab_results.TOYS if toys else vtab_results.TASKS)
    found = {"toys": toys, "final": final, "rate": 0.01, "missing": {}, "means": means}
    runs, results = STUDIES["fig2"].runs(TOY), {"vtab": {"value": 0.25, "vtab": found}}
    text = others.table(STUDIES["fig2"], results, TOY, ["at scale"])
    assert ("they are not VTAB" in text) == toys
    assert ("| Structured | Count | 25.00% |" in text) == toys
    assert ("| Pets | 25.0% | 97.2% | 96.7% | 92.7% |" in text) != toys
    assert ("| Camelyon | no data | 83.3% |" in text) != toys
    assert "| 77.6% | 76.3% | 72.7% |" in text  # Table 9's last column
    others.draw(STUDIES["fig2"], runs, results, TOY, epath.Path(tmp_path))
    wide, high = Image.open(tmp_path / "fig2.png").size
    assert (wide < 1.5 * high) == toys  # the paper's in a row of their own


def test_what_is_not_there_is_said_before_anything_is_trained(tmp_path, capsys):
    for words, said in (
        (["table8", "--to", "folder:nowhere"], "cannot read the folder"),
        (["table8", "--to", "digits:12"], "has no class 12"),
        (["fig2", "--vtab", str(tmp_path)], f"--vtab {tmp_path}: no folder of VTAB's tasks is there"),
    ):
        assert study.main([*words, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- what pre-training has for them -------------------------------------------------------------------------------------------


def test_sgd_with_decay_is_the_rule_written_down():
    """m = momentum m + g + wd w, w -= lr m; biases do not decay."""
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}
    tx = sgd(lambda step: 0.1, momentum=0.9, weight_decay=0.01)
    state = tx.init(params)
    want = {name: np.asarray(value, np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in want.items()}
    for step in range(3):
        grads = {name: jnp.full_like(value, step + 1.0) for name, value in params.items()}
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name in want:
            m[name] = 0.9 * m[name] + (step + 1.0) + (0.01 * want[name] if name == "kernel" else 0.0)
            want[name] = want[name] - 0.1 * m[name]
    for name in want:
        np.testing.assert_allclose(params[name], want[name], rtol=1e-5)
    with pytest.raises(ValueError, match="weight_decay=-1"):
        sgd(lambda step: 0.1, weight_decay=-1)


@pytest.mark.parametrize(("words", "said"), [
    (["--sgd", "0.9"], "--learning-rate and --weight-decay are required"),
    (["--sgd", "1", "--learning-rate", "1", "--weight-decay", "0"], "a momentum in [0, 1) is required"),
    (["--model", "R50x1", "--depth", "3"], "--depth 3: R50x1 is a ResNet"),
    (["--width", "0"], "--width 0: a positive number is required"),
    (["--width", "30"], "width=30 is not divisible by num_heads=4"),
])  # fmt: skip
def test_a_shape_or_optimizer_that_does_not_fit_is_one_line(words, said, capsys):
    assert pretrain.main([*words, "--image-size", "32" if "R50x1" in words else "8"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


TINY = ("--recipe", "digits", "--width", "16", "--depth", "1", "--mlp-dim", "16", "--num-heads", "2", "--representation-size", "0",
        "--batch-size", "32", "--steps", "6", "--eval-every", "3", "--checkpoint-every", "3", "--data", "digits:0-4")  # fmt: skip


@pytest.mark.slow
@pytest.mark.ci
def test_a_real_study_stopped_in_the_middle_of_a_run(monkeypatch, tmp_path, capsys):
    """SIGTERM's way at step 4 of the second of two runs: each step of each run is taken once."""

    def runs(setting):
        return [
            Run(name="adam", job="pretrain", options=TINY, at={"optimizer": "Adam"}),
            Run(name="adam.finetune", job="finetune", options=("--data", "digits:5-9", "--steps", "2"), after="adam"),
            Run(name="sgd", job="pretrain", options=(*TINY, "--sgd", "0.9", "--learning-rate", "0.01", "--weight-decay", "0.0001"),
                at={"optimizer": "SGD"}),
            Run(name="sgd.fewshot", job="fewshot", options=("--data", "digits:5-9", "--shots", "5"), after="sgd"),
        ]  # fmt: skip

    monkeypatch.setitem(STUDIES, "fake", Study(name="fake", title="A fake", runs=runs, x="optimizer"))
    stop, taken = Stop(), []
    step = train.loop._Loop.step

    def counted(self, batch):
        metrics = step(self, batch)
        taken.append((epath.Path(self.spec.directory).name, self.now.step))
        if taken.count(("sgd", 4)) and len(taken) == 12:
            stop.ask()
        return metrics

    monkeypatch.setattr(train.loop._Loop, "step", counted)
    args = parse(study.StudyOptions, "train.study", ["fake", "--mesh", "1x1", "--out", str(tmp_path / "s")])
    study.run(args, stop)
    assert "asked to stop in sgd" in capsys.readouterr().out
    assert taken[-1] == ("sgd", 4)
    study.run(args, Stop())
    assert sorted(taken) == sorted(
        [(name, i) for name in ("adam", "sgd") for i in range(1, 7)] + [("adam.finetune", 1), ("adam.finetune", 2)]
    )
    rows = json.loads((tmp_path / "s" / "rows.json").read_text())
    assert [row["steps"] for row in rows] == [6, 6]
    assert 0 < rows[0]["finetune"] < 1
    assert 0 < rows[1]["fewshot"] < 1
    assert [r["step"] for r in read(tmp_path / "s" / "runs" / "sgd" / "metrics.jsonl")][-1] == 6


def test_aliases_are_studies():
    assert all(of in STUDIES for of in catalogue.ALIASES.values())
    assert catalogue.study_of("table6") is STUDIES["fig5"]
