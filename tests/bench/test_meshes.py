"""Meshes of a slice by the compiler: collectives in a program's text, what links need for them, the best mesh, a job's needs.

The compiler is a stub here, but for one real compilation: its reports are made by hand.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bench import links, mesh_picture, mesh_study, plots, slice_job, slices
from bench.cases import Case
from bench.hlo import operations, schedule
from bench.links import Event, Reach, groups_of, played, reach_of, seconds
from bench.reports import Program, Report, from_json
from bench.throughput import Throughput, run
from bench.tpu_compiler import Compiler
from bench.yardstick import Line
from vitcore import variant

V3 = (4, 4)
PROGRAM = """HloModule m

%all-reduce-scatter (input: f32[1280,128]) -> f32[96,128] {
  %input = f32[1280,128]{1,0} parameter(0)
  %pad = f32[1536,128]{1,0} pad(%input), padding=0_256x0_0
  %all-reduce.1 = f32[1536,128]{1,0} all-reduce(%pad), replica_groups={{0,2},{1,3}}, to_apply=%sum
  ROOT %slice = f32[96,128]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={96,128}
}

%gathering (p: bf16[8,128]) -> bf16[32,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %g = bf16[32,128]{1,0} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (a: bf16[8,128], f: f32[1280,128]) -> f32[96,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %f = f32[1280,128]{1,0} parameter(1)
  %start = ((bf16[8,128]{1,0}), bf16[32,128]{1,0}) async-start(%a), calls=%gathering
  %work = f32[1280,128]{1,0} fusion(%f), kind=kLoop, backend_config={"window_config":{"estimated_cycles":"50"}}
  %done = bf16[32,128]{1,0} async-done(%start)
  %second = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  %third = bf16[32,128]{1,0} all-gather-done(%second)
  ROOT %scattered = f32[96,128]{1,0} fusion(%work), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_collectives_are_found_wherever_the_compiler_hides_them():
    """In an asynchronous computation, in a fusion that pads and scatters; with their groups, and where a core waits for them."""
    found = [(op.name, op.kind, op.bytes, op.groups, op.waits) for op in schedule(PROGRAM)]
    whole = 32 * 128 * 2
    assert found == [
        ("start", "all-gather-start", whole, "[1,4]<=[4]", ""),
        ("work", "fusion", 0, "", ""),
        ("done", "async-done", 0, "", "start"),
        ("second", "all-gather-start", whole, "{{0,1,2,3}}", ""),
        ("third", "all-gather-done", 0, "", "second"),
        ("scattered", "reduce-scatter", 1280 * 128 * 4, "{{0,2},{1,3}}", ""),
    ]
    assert [op.name for op in operations(PROGRAM)] == ["start", "work", "second", "scattered"]


def test_groups_are_read_in_both_spellings():
    assert groups_of("{{0,2},{1,3}}") == [[0, 2], [1, 3]]
    assert groups_of("[2,2]<=[4]") == [[0, 1], [2, 3]]
    assert groups_of("[2,2]<=[2,2]T(1,0)") == [[0, 2], [1, 3]]
    assert groups_of("{}") == []


def places(columns, rows, cores=2):
    """Devices chip by chip, a column of chips after the other along x first."""
    return [((x, y, 0), core) for y in range(rows) for x in range(columns) for core in range(cores)]


def test_where_the_members_of_a_group_stand():
    here = places(4, 4)
    assert reach_of("", here) == Reach(2, ((0, 4), (1, 4)), 1)
    pairs = "[16,2]<=[32]"  # the two cores of a chip
    assert reach_of(pairs, here) == Reach(2, (), 1)
    rows = "[8,4]<=[4,4,2]T(0,2,1)"  # a core of each chip along x
    assert reach_of(rows, here) == Reach(1, ((0, 4),), 1)
    far = "{{0,4},{2,6}}"  # every other chip of the first row
    assert reach_of(far, here) == Reach(1, ((0, 2),), 2)


def test_seconds_of_collectives_at_the_published_rates():
    """By hand: 82 GB/s a link and direction on v3, 412 GB/s of HBM between the cores of a chip, no ring on 4 chips."""
    size, rate, hbm = 82_000_000, 82e9, 412e9
    whole = Reach(2, ((0, 4), (1, 4)))

    def of(kind, reach, target="v3", chips=V3, trips=1):
        return seconds(Event("send", 0, kind, size, trips, "x", reach), target, chips)

    gather = size * 15 / 16 / (2 * rate) + size / 2 / hbm
    assert of("all-gather", whole) == pytest.approx(gather)
    assert of("reduce-scatter", whole, trips=3) == pytest.approx(3 * gather)
    assert of("all-reduce", whole) == pytest.approx(2 * gather)
    assert of("all-reduce", Reach(2, ())) == pytest.approx(size / hbm)  # on the chip
    line = size * 3 / 4 / rate
    assert of("all-gather", Reach(1, ((0, 4),))) == pytest.approx(2 * line)  # the other core's group on the same links
    assert of("all-gather", Reach(1, ((0, 2),), 2)) == pytest.approx(size / 2 / rate * 2 * 2)
    ring = Reach(1, ((0, 16),))
    assert of("all-gather", ring, "v5e", (16, 16)) == pytest.approx(size * 15 / 16 / (2 * 50e9))
    assert of("all-to-all", Reach(1, ((0, 4), (1, 8))), "v5e", (4, 8)) == pytest.approx(size * 8 / 4 / 50e9)


def test_what_runs_beside_a_collective_is_not_waited_for():
    reach, v5e = Reach(1, ((0, 4), (1, 8))), (4, 8)
    send = Event("send", 0, "all-gather", 10**8, 1, "a", reach)
    taken = seconds(send, "v5e", v5e)
    cycles = round(taken * 1.5e9)
    work = Event("compute", cycles)
    waited = played([work, send, work], "v5e", v5e)
    assert (waited.exposed, waited.communication) == (pytest.approx(taken), pytest.approx(taken))
    start, done = send._replace(what="start"), Event("done", name="a")
    assert played([start, work, done], "v5e", v5e).exposed == pytest.approx(0, abs=1e-9)
    half = Event("compute", cycles // 2)
    assert played([start, half, done, half], "v5e", v5e).exposed == pytest.approx(taken / 2, rel=1e-6)
    second = start._replace(name="b")  # the links are taken until the first is through
    both = played([start, second, work, done, Event("done", name="b")], "v5e", v5e)
    assert both.exposed == pytest.approx(taken, rel=1e-6)


def test_every_generation_has_links_and_hosts():
    assert set(links.LINKS) == set(slices.HOSTS) == {"v2", "v3", "v4", "v5e", "v5p", "v6e", "7x"}
    assert all(fabric.source for fabric in links.LINKS.values())
    assert slices.closed("v5e", (8, 16))[:2] == (False, True)
    assert slices.closed("v3", (16, 16))[:2] == (False, False)
    assert slices.closed("v4", (4, 4, 4)) == (True, True, True)


def test_a_report_comes_back_from_json_with_its_timeline():
    event = Event("send", 0, "all-gather", 8, 2, "x", Reach(2, ((0, 4),), 1))
    report = Report(name="p", target="v3", timeline=(Event("compute", 5), event))
    assert from_json(json.loads(json.dumps(asdict(report)))) == report


# ---- the studies, the compiler stubbed


class Stub:
    """Answers for programs at the compiler's boundary: a million cycles a block and image, twice as many on a model axis."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, target, *, topology, **_):
        self.request = {"target": target, "topology": topology}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def compile(self, program, *, cycles=False):
        a = program.arguments
        Stub.asked.append({"build": program.build.partition(":")[2], **a})
        if a.get("shard") == "none" and a["model"] == "ViT-L/16":
            return Report(name="p", target="v3", error="RESOURCE_EXHAUSTED: Used 17.00G of 15.48G hbm. Exceeded")
        depth = a.get("depth") or 12
        work = depth * 10**6 * a["batch"] // a["data"] // a["axis"] * (1 + (a["axis"] > 1)) + 10**6
        line = Line(name="op", kind="fusion", trips=1, cycles=work, source="schedule", bound="MXU")
        send = Event("send", 0, "all-reduce", depth * 10**7, 1, "s", Reach(2, ((0, 4), (1, 4))))
        return Report(
            name="p", target=self.request["target"], lines=(line,), timeline=(Event("compute", work), send),
            live_bytes=depth * 2**28 + 2**27, alias_bytes=depth * 2**26, temporary_bytes=2**27, output_bytes=12,
            collectives={"all-reduce": depth},
            collective_bytes={"all-reduce": depth * 10**7},
        )  # fmt: skip


@pytest.fixture
def stubbed(monkeypatch):
    Stub.asked = []
    monkeypatch.setattr(mesh_study, "Compiler", Stub)
    monkeypatch.setattr(slice_job, "Compiler", Stub)
    return Stub


def test_the_meshes_of_a_slice_are_compared_and_the_best_is_named(stubbed, tmp_path, capsys):
    options: dict[str, Any] = dict(target=("v3",), mesh="auto", slice="4x4", mode=("train",), models=("ViT-B/16",), out=tmp_path)
    rows = run(Throughput(**options))
    assert [(r["mesh"], r["shard"]) for r in rows] == [
        ("32x1", "optimizer"), ("16x2", "optimizer"), ("8x4", "optimizer"), ("32x1", "parameters"), ("32x1", "none"),
    ]  # fmt: skip
    assert {(a["depth"], a["whole_plan"], a["batch"]) for a in stubbed.asked} == {(2, True, 4096), (3, True, 4096)}
    first = rows[0]
    compute = (12 * 10**6 * 128 + 10**6) / 0.94e9  # extrapolated to twelve blocks
    waiting = 2 * 12 * 10**7 * (15 / 16 / (2 * 82e9) + 1 / 2 / 412e9)
    assert first["compute_seconds"] == pytest.approx(compute)
    assert first["exposed_seconds"] == pytest.approx(waiting)
    assert first["images_per_second"] == pytest.approx(4096 / (compute + waiting))
    assert first["bytes"] == 12 * 2**28 + 2**27
    assert first["collectives"] == {"all-reduce": 12}
    said = capsys.readouterr().out
    assert "4x8: num_heads=12 is not divisible by the model axis" in said
    assert "82 GB/s" in said
    assert "compiler estimate" in said
    assert "best: --mesh 32x1 --shard optimizer" in said
    assert (tmp_path / "meshes.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "meshes.json").read_text())["rows"] == rows
    before = len(stubbed.asked)
    assert run(Throughput(**options)) == rows  # nothing is compiled again
    assert len(stubbed.asked) == before


def test_a_mesh_that_does_not_fit_is_no_best(stubbed, tmp_path, capsys):
    options: dict[str, Any] = dict(target=("v3",), mesh="auto", devices=4, mode=("train",), models=("ViT-L/16",), out=tmp_path)
    rows = run(Throughput(**options, shard="none", batch_sizes=(64,)))
    assert [r["fits"] for r in rows] == [False] * 3
    assert "no mesh fits: fewer images, --remat, or a larger slice" in capsys.readouterr().out
    assert rows[0]["bytes"] == 17 * 2**30


def test_an_error_of_the_compiler_ends_the_row_and_the_command(stubbed, tmp_path, monkeypatch):
    monkeypatch.setattr(Stub, "compile", lambda *_, **__: Report(name="p", target="v3", error="the compiler aborted: a check"))
    (row,) = run(Throughput(target=("v3",), mesh="auto", devices=1, mode=("train",), out=tmp_path))
    assert row["error"] == "the compiler aborted: a check"
    assert not row["complete"]


def test_forward_passes_are_compared_without_shards(stubbed, tmp_path):
    rows = run(Throughput(target=("v3",), mesh="auto", devices=2, models=("ViT-Ti/16",), depths=(), batch_sizes=(8,), out=tmp_path))
    assert [r["mesh"] for r in rows] == ["2x1"]
    assert stubbed.asked == [{**stubbed.asked[0], "build": "mesh_forward", "data": 2, "axis": 1}]
    assert "depth" not in stubbed.asked[0]


def test_a_job_s_needs_of_memory_and_hosts(stubbed, tmp_path, capsys):
    (row,) = run(Throughput(job=True, target=("v3",), slice="4x4", models=("ViT-B/16",), out=tmp_path))
    assert [a["build"] for a in stubbed.asked] == ["eval_step", "train_step", "train_step"]
    images = 4096 // 32 * 224 * 224 * 3
    assert row["state_bytes"] == 12 * 2**26
    assert row["step_bytes"] == 12 * 2**28 + 2**27
    assert row["evaluation_bytes"] == 12 * 2**26 + 2**27 + 12 + images
    assert row["together_bytes"] == row["step_bytes"] + 3 * images
    assert row["hosts"] == 4  # of 8 cores
    assert row["needs"] == pytest.approx(row["images_per_second"] / 4)
    assert row["decodes"]["pillow"] == 48 * 488
    said = capsys.readouterr().out
    assert "96 hardware threads" in said
    assert json.loads((tmp_path / "job.json").read_text())["rows"][0]["model"] == "ViT-B/16"


def test_a_picture_of_meshes_is_drawn_again_from_its_file(stubbed, tmp_path, monkeypatch):
    run(Throughput(target=("v3",), mesh="auto", devices=2, models=("ViT-Ti/16",), batch_sizes=(8,), out=tmp_path))
    (tmp_path / "meshes.png").unlink()
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path / "meshes.json")])
    assert plots.main() == 0
    assert (tmp_path / "meshes.png").exists()
    assert mesh_picture.pictures([], Path("/nowhere")) == []


def test_meshes_that_suit_a_model():
    found, left = mesh_study.meshes(variant("ViT-B/16"), 32, 4096)
    assert [shape[:2] for shape in found] == [(32, 1), (16, 2), (8, 4)]
    assert len(left) == 3
    assert [shape[:2] for shape in mesh_study.meshes(variant("ViT-B/16"), 32, 16)[0]] == [(16, 2), (8, 4)]


@pytest.mark.slow
def test_a_real_step_on_four_cores_is_placed_and_played(tmp_path):
    """A tiny step by libtpu: the model's sums stay on a chip on 2x2, and gradients go over links."""
    same: dict[str, Any] = dict(target=("v3",), mesh="auto", devices=4, mode=("train",), models=("ViT-S/32",), sizes=(64,))
    rows = run(Throughput(**same, batch_sizes=(32,), shard="optimizer", depths=(1, 2), out=tmp_path, cache=tmp_path / "c"))
    assert [r["mesh"] for r in rows] == ["4x1", "2x2"]
    for row in rows:
        assert row["error"] == ""
        assert 0 < row["exposed_seconds"] <= row["communication_seconds"] * 1.001
        assert row["fits"]
    assert rows[1]["collectives"]["all-reduce"] > rows[0]["collectives"].get("all-reduce", 0)


@pytest.mark.slow
@pytest.mark.ci
def test_a_step_of_v3_gathers_beside_its_kernels_and_scatters_its_gradients():
    """Over the cores of each chip and then over the chips; over all of them at once libtpu sums them whole."""
    arguments = dict(model="ViT-B/16", batch=512, data=32, depth=1, shard="optimizer", whole_plan=True)
    with Compiler("v3", topology="v3:4x4", text=True) as compiler:
        report = compiler.compile(Program(build="bench.programs:train_step", arguments=arguments))
    assert not report.error
    assert report.collectives["reduce-scatter"] >= 8
    assert report.collective_bytes["all-reduce"] < report.collective_bytes["reduce-scatter"] / 8  # of vectors alone
    running, beside = set(), 0
    for op in schedule(report.text):
        if op.kind == "all-gather-start":
            running.add(op.name)
        running.discard(op.waits)
        beside += bool(running) and op.kind == "kernel"
    assert beside >= 3  # of the patch embedding and the two halves of the block


def test_cases_take_the_shard_of_the_whole_model():
    case = Case(where="v3", model="ViT-H/14", size=224, asked=224, mode="train", dtype="bfloat16", ops="fused")
    assert mesh_study.resolved(case, mesh_study.MeshShape(32, 1), "auto").shard == "parameters"
    assert mesh_study.resolved(case, mesh_study.MeshShape(1, 4), "auto").shard == "none"
    programs = mesh_study.programs(mesh_study.resolved(case, mesh_study.MeshShape(32, 1), "auto"), 64, (2, 3))
    assert [(d, p.arguments["shard"], p.arguments["whole_plan"]) for d, p in programs] == [
        (2, "parameters", True),
        (3, "parameters", True),
    ]
    pairs = mesh_study.programs(replace(case, remat=2), 64, (2, 3))  # whole groups of blocks
    assert [(d, p.arguments["depth"]) for d, p in pairs] == [(4, 4), (6, 6)]
