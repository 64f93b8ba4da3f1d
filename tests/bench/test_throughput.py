"""`bench.throughput` as its user meets it: bad input, a study on the CPU, a study by the compiler, what is kept, what is drawn."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from bench import calibration, device_study, plots, slices, tables
from bench.cases import Case, Notebook, cases
from bench.reports import Cache, Kernel, Program, Report
from bench.target_study import first_batch, out_of_hbm, program_of, too_much
from bench.throughput import Throughput, run
from bench.timing import still_rising, summary
from bench.tpu_compiler import Compiler, CompilerMissing
from bench.yardstick import Line

# ---- bad input: one clear line each, before anything is measured or compiled

BAD = [
    (dict(models=("ViT-Z/16",)), "unknown model 'ViT-Z/16': did you mean"),
    (
        dict(models=("ViT-H/14",), sizes=(64,)),
        "--sizes 64 is not divisible by the patch of ViT-H/14: use a multiple of 14, e.g. 70",
    ),
    (dict(models=("ViT-B/16",), sizes=(-16,)), "--sizes -16: a positive number is required"),
    (dict(target=("v3",), mesh="8x8", slice="4x4"), "a mesh of 64 devices is larger than the v3 slice 4x4, which has 32"),
    (dict(target=("v5e",), mesh="64x8"), "a mesh of 512 devices is larger than the largest v5e slice, 16x16 chips with 256"),
    (dict(target=("v3",), mesh="4x4", slice="3x5"), "--slice 3x5: v3 comes in slices of 2x2, 4x4"),
    (dict(target=("v3",), mesh="8"), "--mesh 8: two positive sizes DATAxMODEL are required"),
    (dict(target=("v3",), mesh="1x5", models=("ViT-B/16",)), "num_heads=12 is not divisible by the model axis"),
    (dict(target=("v3",), mesh="4x2", models=("ViT-B/16",), batch_sizes=(6,)), "--batch-sizes 6 is not divisible by the data axis"),
    (dict(target=("v3",), peer=("timm",)), "--peer timm runs on a device and --target compiles for none: use --peer flax"),
    (dict(peer=("flax",)), "--peer flax is compiled for a TPU: name a --target"),
    (dict(target=("v3",), peer=("flax",), remat=True), "--peer trains without rematerialisation"),
    (dict(target=("v3",), ops=("gpu",)), "--ops gpu runs on a GPU and --target compiles for a TPU"),
    (dict(slice="4x4"), "--slice belongs to --target"),
    (dict(target=("v3",), models=("R50x1",), sizes=(16,)), "image_size=16: the ResNet divides it by 32, at least that many"),
    (dict(target=("v3",), models=("R50x1",), mesh="1x3"), "the groups of GroupNorm=32 is not divisible by the model axis"),
    (dict(target=("v3",), models=("R50+ViT-B/16",), peer=("flax",)), "--peer flax has plain Vision Transformers alone"),
    (
        dict(target=("v3",), models=("R+Ti/16",), sizes=(48,)),
        "--sizes 48 is not divisible by the patch of R+Ti/16: use a multiple of 32",
    ),
    (dict(step=0), "--step 0: a positive number is required"),
    (dict(steps=5), "--steps belongs to --job"),
    (dict(job=True, target=("v3",)), "--job --target wants to know the slice: add --slice"),
    (dict(job=True, target=("v3",), slice="4x4", steps=5), "--steps is of a job that runs, and --target compiles only"),
    (dict(job=True, target=("v3",), slice="4x4", mesh="auto"), "--job is of one mesh: run --mesh auto without --job first"),
    (dict(job=True, target=("v3",), slice="4x4", batch_sizes=(100,)), "--batch-sizes 100 is not divisible by the data axis of 32"),
    (dict(mesh="auto"), "--mesh auto asks the TPU compiler: name a --target and a slice"),
    (dict(mesh="auto", target=("v3",)), "--mesh auto wants to know the slice: add --slice"),
    (dict(mesh="auto", target=("v3",), slice="4x5"), "--slice 4x5: v3 comes in slices of 2x2, 4x4"),
    (dict(mesh="auto", target=("v3",), devices=0), "--devices 0: a positive number is required"),
    (dict(mesh="auto", target=("v3",), devices=32, depths=(3, 2)), "--depths 3 2: two rising depths are required"),
    (dict(mesh="auto", target=("v3",), devices=32, peer=("flax",)), "--peer flax runs on one core and --mesh auto compares"),
    (dict(mesh="auto", target=("v3",), devices=8, mode=("train",), batch_sizes=(3,)), "no mesh of 8 devices suits (8x1: 3 images"),
    (dict(devices=8), "--devices belongs to --mesh auto"),
    (dict(target=("v3",), depths=(1, 2)), "--depths belongs to --mesh auto and to --job --target"),
    (dict(job=True, images=0), "--images 0: a positive number is required"),
    (dict(job=True, data=pathlib.Path("/nowhere")), "--data /nowhere has no train/"),
    (dict(dropout=0.1), "--dropout 0.1 belongs to training: add --mode train"),
    (dict(dropout=1.5, mode=("train",)), "--dropout 1.5: a rate in [0, 1) is required"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_bad_input_is_one_clear_line(options, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        run(Throughput(**options, out=tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_packages_are_named_with_how_to_install_them(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing, match=r"libtpu not installed.*pip install 'vitcore\[tpu-compiler\]'"):
        run(Throughput(target=("v3",), models=("ViT-Ti/16",), sizes=(32,), out=tmp_path))
    with pytest.raises(ValueError, match="--peer timm needs torch and timm: pip install torch timm"):
        Throughput(peer=("timm",))


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    options: dict[str, Any] = dict(target=("v3",), models=("ViT-Ti/16",), sizes=(32,))
    with pytest.raises(ValueError, match=r"cannot be written.*name a directory"):
        run(Throughput(**options, out=tmp_path / "file" / "out"))
    (tmp_path / "throughput.json").write_text('{"not": "ours"}')
    with pytest.raises(ValueError, match="is not a study of this program"):
        run(Throughput(**options, out=tmp_path))


def test_the_command_ends_with_2_and_one_line():
    def command(*words):
        return subprocess.run([sys.executable, "-m", "bench.throughput", *words], capture_output=True, text=True, timeout=120)

    unknown = command("--target", "v9")
    assert unknown.returncode == 2
    assert "v9" in unknown.stderr + unknown.stdout
    model = command("--target", "v3", "--models", "ViT-Q/16")
    assert (model.returncode, model.stderr.count("\n")) == (2, 1)
    assert model.stderr.startswith("bench.throughput: unknown model 'ViT-Q/16'")


# ---- parts


def test_cases_move_sizes_only_when_asked():
    same: dict[str, Any] = dict(where="v3", modes=("forward",), ops=("fused",), peers=(), dtype="bfloat16")
    moved = cases(models=["ViT-H/14", "ViT-B/32"], sizes=[64, 128, 224, 384, 512], move=True, **same)
    assert [c.size for c in moved] == [70, 126, 224, 378, 518, 64, 128, 224, 384, 512]
    assert [c.asked for c in moved[:5]] == [64, 128, 224, 384, 512]


@pytest.mark.parametrize("mesh", [None, "1x1"])
@pytest.mark.parametrize(("mode", "build"), [("train", "train_step"), ("forward", "whole_forward")])
def test_the_peer_is_compiled_and_not_our_kernels_under_its_name(mode, build, mesh):
    same: dict[str, Any] = dict(where="v3", model="ViT-B/16", size=224, asked=224, mode=mode, dtype="bfloat16", mesh=mesh)
    program = program_of(Case(**same, library="flax", ops=""), 8)
    assert program.build == f"bench.programs:{build}"
    assert program.arguments["kernels"] == "flax"
    assert program_of(Case(**same, ops="fused"), 8).arguments["kernels"] is True


def test_slices_are_the_smallest_that_hold_the_mesh():
    assert slices.topology("v3", 32) == ("v3:4x4", 32)
    assert slices.topology("v3", 33) == ("v3:4x8", 64)
    assert slices.topology("v5e", 32) == ("v5e:4x8", 32)
    assert slices.topology("7x", 8) == ("tpu7x:2x2x1", 8)
    assert slices.topology("v5e", 4, "4x4") == ("v5e:4x4", 16)


def test_the_compiler_s_words_on_memory_are_understood():
    error = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total (36.5G) exceeds available HBM (15.48G)."
    assert out_of_hbm(error)
    assert too_much(error) == (int(36.5 * 2**30), int(15.48 * 2**30))
    assert not out_of_hbm("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem")
    assert too_much("anything else") == (0, 0)


def test_a_sweep_goes_on_while_throughput_rises():
    assert still_rising([10, 20, 40])
    assert still_rising([10, 20, 20.1])
    assert not still_rising([10, 20, 20.1, 19])
    timing = summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing.median == 3.0
    assert timing.spread == (100.0 - 1.0) / 3.0


def test_every_model_of_the_paper_is_a_case():
    """A ResNet but an axial one is one case whatever the ops are, of any size, and begins at the batch of patches of 16 pixels."""
    models = ("R50x1", "R50+ViT-B/16", "R50+ViT-B/32", "Axial-ViT-B/32", "AxialResNet-50", "R+Ti/16")
    same = dict(where="v3", modes=("train",), peers=(), dtype="bfloat16", mesh=None, slice=None, remat=0)
    found = cases(models=models, sizes=(100, 224), ops=("fused", "reference"), move=True, **same)  # pyright: ignore
    sizes = {model: sorted({c.size for c in found if c.model == model}) for model in models}
    assert sizes == {m: [96 if m in ("R+Ti/16", "Axial-ViT-B/32") else 100, 224] for m in models}
    assert {c.ops for c in found if c.model == "R50x1"} == {"xla"}
    assert {c.ops for c in found if c.model == "AxialResNet-50"} == {"fused", "reference"}
    assert len(found) == 2 * (1 + 5 * 2)
    large = {c.model: c for c in found if c.size == 224}
    assert (large["R50x1"].tokens, large["R50+ViT-B/16"].tokens) == (196, 197)
    assert first_batch(large["R50x1"]) == first_batch(large["R50+ViT-B/16"])
    assert program_of(large["R50x1"], 8).arguments["kernels"] is False


def test_a_sweep_begins_at_the_same_tokens_for_every_size():
    def at(size, mesh=None):
        return first_batch(Case(where="v3", model="ViT-B/16", size=size, asked=size, mode="train", dtype="bfloat16", mesh=mesh))

    assert at(224) == 64
    assert at(224, "8x4") == 512
    assert (at(64), at(512)) == (512, 8)


def row(**changes):
    fields = dict(
        where="v3", model="ViT-B/16", size=224, asked=224, mode="forward", dtype="bfloat16", library="vitcore", ops="fused"
    )
    fields |= dict(
        mesh=None, slice=None, remat=False, compiler_estimate=True, images_per_second=1000.0, batch=64, largest_batch=512
    )
    return {**fields, **changes}


def test_estimates_are_called_estimates_in_table_and_picture():
    rows = [row(), row(ops="reference", images_per_second=500.0), row(asked=384, size=384, images_per_second=300.0)]
    text = "\n".join([tables.header(rows), *map(tables.line, rows), *tables.compared(rows)])
    assert "compiler estimate: nothing below was measured" in text
    assert "ViT-B/16@224 forward: fused runs at 2.00 x reference (compiler estimate)" in text
    figure = plots.picture(rows, title="t")
    left, right = figure.axes
    assert {left.get_xscale(), left.get_yscale(), right.get_xscale(), right.get_yscale()} == {"log"}
    assert "compiler estimate" in left.get_ylabel()
    assert [np.size(line.get_xdata()) for line in left.lines] == [2, 1]
    measured = [row(compiler_estimate=False, device="cpu", spread=0.01, flops_per_second=1e12, share_of_matmul=0.5)]
    assert "estimate" not in tables.header(measured) + plots.picture(measured, title="t").axes[0].get_xlabel()


def test_one_size_is_drawn_as_bars_with_names_and_numbers():
    rows = [row(largest_batch=None), row(model="R50x1", ops="xla", images_per_second=2500.0, largest_batch=None)]
    (axes,) = plots.picture(rows, title="t").axes  # no empty panel of largest batches
    bars: Any = axes.patches
    assert [bar.get_width() for bar in bars] == [2500.0, 1000.0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["R50x1, XLA", "ViT-B/16, our kernels"]
    assert [text.get_text() for text in axes.texts] == ["2,500", "1,000"]
    assert axes.get_xlabel() == "images/s, compiler estimate"
    assert axes.get_title() == "inference, 224 px: peak images/s"


def test_a_picture_holds_its_labels(tmp_path):
    rows = [
        row(model=m, asked=s, size=s, images_per_second=5e4 / s, ops=o)
        for m in ("a", "b")
        for s in (64, 512)
        for o in ("fused", "x")
    ]
    figure = plots.picture(rows, title="a title")
    figure.canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    texts = [t for axes in figure.axes for t in [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels()]]
    boxes = [t.get_window_extent() for t in [*texts, *figure.texts] if t.get_text()]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= width and b.y1 <= height for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    (made,) = plots.pictures(rows, tmp_path)
    assert made.read_bytes()[:4] == b"\x89PNG"


def test_rows_are_kept_for_the_same_study_alone(tmp_path, monkeypatch):
    case = Case(where="v3", model="ViT-B/16", size=224, asked=224, mode="forward", dtype="bfloat16", ops="fused")
    Notebook(tmp_path, about={}, settings={"step": 1}).add(case, {"complete": True, "figure": 7})
    again = Notebook(tmp_path, about={}, settings={"step": 1})
    assert (again.kept(case) or {})["figure"] == 7
    assert Notebook(tmp_path, about={}, settings={"step": 2}).kept(case) is None
    assert Notebook(tmp_path, about={}, settings={"step": 1}, fresh=True).kept(case) is None
    monkeypatch.setattr("bench.cases.sources", lambda: "edited")
    assert Notebook(tmp_path, about={}, settings={"step": 1}).kept(case) is None
    Notebook(tmp_path, about={}, settings={}).add(case, {"complete": False})
    monkeypatch.undo()
    assert Notebook(tmp_path, about={}, settings={}).kept(case) is None


def test_the_cache_answers_for_the_same_program_and_machine(tmp_path):
    request = {"target": "v3", "topology": "v3:2x2"}
    line = Line(name="k", kind="kernel", trips=2, cycles=5, source="schedule", bound="MXU")
    kernels = (Kernel(name="k", trips=2, cycles=5),)
    report = Report(name="p", target="v3", kernels=kernels, lines=(line,), xla_top=(("a", 1, 2, "s"),))
    cache = Cache(tmp_path, request)
    cache.save("digest", True, report)
    bare, whole = cache.load("digest", False), cache.load("digest", True)
    assert bare is not None
    assert bare.cycles == 10
    assert whole is not None
    assert whole.cached
    assert cache.load("other", True) is None
    assert Cache(tmp_path, {**request, "topology": "v3:4x4"}).load("digest", True) is None
    cache.save("bytes", False, report)
    assert cache.load("bytes", True) is None, "a report without cycles answered who asked for cycles"
    for file in tmp_path.iterdir():
        file.write_text("damaged")
    assert cache.load("digest", True) is None


def test_deviations_of_the_schedule_are_said_beside_what_they_weigh_on(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "FILE", tmp_path / "calibration.json")
    calibration.table.cache_clear()
    records = [dict(target="v5e", kernel="k", schedule=s, profile=100) for s in (95, 70)]
    records.append(dict(target="v5e", kernel="good", schedule=101, profile=100))
    calibration.save(records)

    def note(name):
        return calibration.note(
            "v5e", Report(name="", target="v5e", kernels=(Kernel(name=name, kernel=name, trips=1, cycles=9, source="schedule"),))
        )

    assert "k -30%" in note("k")
    assert note("good") == "" == note("unknown")
    calibration.save([dict(target="v5e", kernel="good", schedule=150, profile=100)])
    assert calibration.table()["v5e"] == {"k": -0.3, "good": 0.5}, "what was not calibrated again was forgotten"
    calibration.table.cache_clear()


# ---- trials on the CPU


def request(**changes):
    same: dict[str, Any] = dict(
        task="sweep", library="vitcore", model="ViT-Nano/4", size=8, mode="forward", ops="auto", dtype="float32", mesh=None
    )
    same |= dict(remat=False, platform="cpu", memory=2**30, compile="off", data=1, batches=[1, 2], seconds=0.05, budget=60)
    return {**same, **changes}


def test_a_trial_that_dies_or_hangs_says_why():
    _, error = device_study.start(request(model="ViT-Z/1"), seconds=60)
    assert "unknown model 'ViT-Z/1'" in error
    started = time.monotonic()
    _, error = device_study.start(request(), seconds=0.5)
    assert "ended after" in error
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_what_memory_there_is_decides_on_a_cpu():
    ask = request(task="edge", start=4, step=1, most=16, budget=50, mode="train")
    (*_, whole), error = device_study.start(ask, seconds=60)
    assert (whole["edge"]["batch"], whole["edge"]["complete"], error) == (16, False, "")
    of_four = whole["edge"]["attempts"][0]
    assert (of_four["batch"], of_four["fits"]) == (4, True)
    (*_, less), _ = device_study.start({**ask, "memory": of_four["used"]}, seconds=60)
    found = less["edge"]
    assert (found["batch"], found["beyond"], found["complete"]) == (4, 5, True)
    assert "more bytes" in next(a["why"] for a in found["attempts"] if a["batch"] == 5)
    (ran,), error = device_study.start(request(task="fits", batch=4, mode="train"), seconds=60)
    assert (ran["fits"], error) == (True, "")


def test_a_study_on_the_cpu(tmp_path, capsys):
    options = Throughput(
        models=("ViT-Nano/4",), sizes=(8,), mode=("forward", "train"), batch_sizes=(1, 4), seconds=0.05, largest=False, out=tmp_path
    )
    rows = run(options)
    printed = capsys.readouterr().out
    assert "a matrix product of 2048^3 runs at" in printed
    for r in rows:
        assert r["compiler_estimate"] is False
        assert {s["batch"] for s in r["sweep"]} == {1, 4}
        assert r["images_per_second"] == max(s["images_per_second"] for s in r["sweep"])
        assert 0 < r["share_of_matmul"] < 1
        assert r["largest_batch"] is None if "largest_batch" in r else True
    assert json.loads((tmp_path / "throughput.json").read_text())["rows"] == rows
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


def test_an_interrupted_study_continues(tmp_path, monkeypatch):
    devices = dict(platform="cpu", kind="cpu", count=1, mesh_devices=1, memory=2**30, dtype="float32", matmul_side=8)
    devices |= dict(auto="reference", matmul_flops=1e12, matmul_spread=0.0, jax="0")
    asked = []

    def measure(case, *_, **__):
        asked.append(("rate", case.size))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return dict(device="cpu", compiler_estimate=False, sweep=[], error="", swept=True, images_per_second=case.size, batch=1)

    def largest(case, *_, **__):
        asked.append(("batch", case.size))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return dict(largest_batch=case.size, limited_by="memory")

    monkeypatch.setattr("bench.throughput.describe", lambda *_, **__: devices)
    monkeypatch.setattr("bench.throughput.measure", measure)
    monkeypatch.setattr("bench.throughput.largest", largest)
    options = Throughput(models=("ViT-Ti/16",), sizes=(32, 64), out=tmp_path)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(options)
    rows = run(options)
    assert asked == [("rate", 32), ("rate", 64), ("rate", 64), ("batch", 32), ("batch", 64), ("batch", 64)]
    assert [(r["images_per_second"], r["largest_batch"]) for r in rows] == [(32, 32), (64, 64)]
    assert len(json.loads((tmp_path / "throughput.json").read_text())["rows"]) == 2


# ---- studies by the compiler


def test_a_study_by_the_compiler_is_kept_cached_and_called_what_it_is(tmp_path, capsys):
    same: dict[str, Any] = dict(
        target=("v3",), models=("ViT-Ti/16",), sizes=(32,), ops=("fused", "reference"), batch_sizes=(8, 16), cache=tmp_path / "c"
    )
    first = run(Throughput(**same, largest=False, out=tmp_path / "a"))
    assert [r["error"] for r in first] == ["", ""]
    for r in first:
        assert r["compiler_estimate"] is True
        assert 0 < r["flop_utilisation"] < 1
        assert r["images_per_second"] == pytest.approx(r["batch"] * 0.94e9 / r["cycles"])
        assert r["compilations"] == 2
    assert first[0]["kernel_cycles"] > 0 == first[1]["kernel_cycles"]
    assert "compiler estimate" in capsys.readouterr().out
    kept = run(Throughput(**same, largest=False, out=tmp_path / "a"))
    assert kept == first
    assert "2 of 2 cases are there from an earlier run" in capsys.readouterr().out
    again = run(Throughput(**same, largest=False, out=tmp_path / "b"))
    assert [r["compilations"] for r in again] == [0, 0]
    assert [r["cycles"] for r in again] == [r["cycles"] for r in first]


def test_the_same_program_from_other_code_is_cached_too(tmp_path, monkeypatch):
    program = Program(build="bench.programs:one_op", arguments=dict(op="layer_norm", shape="B/16@224", batch=8))
    with Compiler("v3", cache=tmp_path) as compiler:
        assert not compiler.compile(program).cached
    monkeypatch.setattr("bench.tpu_compiler._BUILDING", ("bench/shapes.py",))  # as after an edit that changes nothing
    with Compiler("v3", cache=tmp_path) as compiler:
        assert compiler.compile(program).cached


@pytest.mark.ci
@pytest.mark.slow
def test_the_largest_batch_compiles_and_one_more_does_not(tmp_path):
    """Forward: a compilation takes seconds, of a training step half a minute. docs/throughput.md shows it for one."""
    options: dict[str, Any] = dict(target=("v3",), models=("ViT-Ti/16",), sizes=(224,), batch_sizes=(64,), step=1)
    (r,) = run(Throughput(**options, out=tmp_path, cache=tmp_path / "c"))
    assert r["edge_proved"]
    assert r["beyond"] == r["largest_batch"] + 1
    assert "Ran out of memory" in r["beyond_error"]
    assert r["largest_bytes"] < 15.5 * 2**30


@pytest.mark.ci
@pytest.mark.slow
def test_a_mesh_says_whether_it_fits_and_what_it_sends(tmp_path, capsys):
    options: dict[str, Any] = dict(
        target=("v3",),
        models=("ViT-Ti/16",),
        sizes=(64,),
        mode=("train",),
        mesh="2x1",
        shard="parameters",
        out=tmp_path,
        cache=tmp_path / "c",
    )
    (r,) = run(Throughput(**options, batch_sizes=(32,), largest=False))
    assert r["topology"] == "v3:2x2"
    assert r["collectives"]["all-gather"] > 0
    assert r["collective_bytes"]["all-gather"] > 2 * 12 * 4 * 192 * 192
    assert "a core's collectives in a step" in capsys.readouterr().out
