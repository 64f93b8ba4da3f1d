"""The one count: code that operations share, kernels inside fusions, operations without a schedule, what bounds an operation."""

import pytest

from bench import hlo, yardstick
from kernels.device import DEVICES

PROGRAM = """HloModule m

%inside.1 (p: bf16[128,128]) -> bf16[128,128] {
  %p = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %t = bf16[128,128]{1,0:T(8,128)(2,1)} tanh(%p)
}

%inside.2 (q: bf16[128,128]) -> bf16[128,128] {
  %q = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %u = bf16[128,128]{1,0:T(8,128)(2,1)} tanh(%q)
}

%inside.3 (r: bf16[128,128]) -> bf16[128,128] {
  %r = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %k = bf16[128,128]{1,0:T(8,128)(2,1)} custom-call(%r), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/mine/pallas_call"}
}

ENTRY %main (x: bf16[128,128]) -> bf16[128,128] {
  %x = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  %one = bf16[128,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%inside.1, metadata={op_name="jit(f)/a/tanh"}, backend_config={"window_config":{"estimated_cycles":"900"}}
  %two = bf16[128,128]{1,0:T(8,128)(2,1)} fusion(%one), kind=kLoop, calls=%inside.2, metadata={op_name="jit(f)/b/tanh"}, backend_config={"window_config":{"estimated_cycles":"900"}}
  %hidden = bf16[128,128]{1,0:T(8,128)(2,1)} fusion(%two), kind=kCustom, calls=%inside.3
  %apart = bf16[8,128,197]{2,1,0:T(8,128)(2,1)} reshape(%hidden)
  ROOT %same = bf16[128,128]{1,0:T(8,128)(2,1)} bitcast(%hidden)
}
"""  # noqa: E501
PLAIN = "\n     0   :  { %1 = vnop }\n   0x1   :  { %2 = vdelay 98 }\n"
BUSY = "\n" + "".join(f"  {hex(i)}   :  {{ %{i} = vmatmul.bf16.gmra.mxu0 %v1_v1 }}\n" for i in range(100))


@pytest.fixture
def dumps(tmp_path):
    (tmp_path / "1-one-03-final_bundles.txt").write_text(PLAIN)
    (tmp_path / "2-k-03-final_bundles.txt").write_text(BUSY)
    return tmp_path


def lines(folder, target="v5e", text=PROGRAM):
    operations = hlo.operations(text)
    return {line.name: line for line in yardstick.lines(operations, yardstick.counts(operations, folder, target), target)}


def test_code_that_is_dumped_once_counts_wherever_it_runs(dumps):
    one = lines(dumps)["one"]
    assert (one.cycles, one.trips, one.source, one.model, one.bound) == (100, 2, "schedule", 900, "other")


def test_a_kernel_inside_a_fusion_is_a_kernel_and_counts(dumps):
    mine = lines(dumps)["mine"]
    assert (mine.kind, mine.source, mine.bound) == ("kernel", "schedule", "MXU")
    assert mine.cycles > 1500


def test_what_has_no_schedule_counts_by_its_bytes_in_hbm(dumps):
    apart = lines(dumps)["apart"]
    moved = 128 * 128 * 2 + 8 * 128 * 256 * 2  # in, and out padded to lanes
    assert (apart.source, apart.bytes, apart.bound) == ("bytes", moved, "HBM")
    assert apart.cycles == round(moved / DEVICES["v5e"].hbm_bytes_per_cycle)


def test_a_schedule_that_cannot_be_followed_leaves_the_cost_model(dumps):
    (dumps / "1-one-03-final_bundles.txt").write_text("not a schedule")
    one = lines(dumps)["one"]
    assert (one.source, one.cycles, one.trips) == ("cost model", 900, 2)
    assert "no bundles found" in one.error


def test_totals_and_shares(dumps):
    found = list(lines(dumps).values())
    parts = yardstick.split(found)
    assert parts["MXU"] + parts["HBM"] + parts["other"] == yardstick.total(found) == sum(x.cycles * x.trips for x in found)
    assert parts["uncounted"] == lines(dumps)["apart"].total
    assert "without a schedule" in yardstick.table(found)
    last = [yardstick.table(found, **images).splitlines()[-1] for images in ({}, {"images": 4})]
    assert f"{yardstick.total(found):,} cycles in all (compiler estimate)" in last[0]
    assert f"{yardstick.total(found) / 4:,.0f} cycles an image (compiler estimate)" in last[1]


def test_different_code_is_not_taken_for_the_same(dumps):
    other = PROGRAM.replace(
        "ROOT %u = bf16[128,128]{1,0:T(8,128)(2,1)} tanh(%q)", "ROOT %u = bf16[128,128]{1,0:T(8,128)(2,1)} exponential(%q)"
    )
    other = other.replace("jit(f)/b/tanh", "jit(f)/b/exp")
    assert lines(dumps, text=other)["two"].source == "cost model"


def test_a_device_of_two_cores_has_the_bound_of_two():
    assert yardstick.flops_per_cycle("v5p") == 2 * DEVICES["v5p"].flops_per_cycle
    assert yardstick.flops_per_cycle("v3") == DEVICES["v3"].flops_per_cycle


def test_bytes_in_hbm_are_padded_to_tiles_and_leave_other_memories_out():
    assert hlo.hbm_bytes("bf16[128,12,197,197]{2,3,1,0:T(8,128)(2,1)}") == 128 * 12 * 200 * 256 * 2
    assert hlo.hbm_bytes("(f32[1576]{0:T(1024)S(1)}, f32[8,128]{1,0:T(8,128)})") == 8 * 128 * 4
