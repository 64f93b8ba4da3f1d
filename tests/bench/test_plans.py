"""`bench.kernels --plan`: what is printed is the plan that the op takes."""

import pytest

from bench import plans
from bench.kernels import Kernels, run
from bench.shapes import OPS, SHAPES
from kernels.attention.plan import FusedForward, GeneralForward
from kernels.device import DEVICES


@pytest.mark.parametrize("op", [op for op in OPS if op != "attention"])  # by itself it pads no heads, and may be refused
def test_every_op_has_a_plan_at_every_shape_on_every_generation(op):
    for device in DEVICES.values():
        for shape in SHAPES:
            assert plans.lines(plans.plan_of(op, shape, 64, "bfloat16", device), device)


def test_generations_differ_by_their_plans():
    v3, v5e = (plans.plan_of("attention_half", "B/16@224", 64, "bfloat16", DEVICES[name]) for name in ("v3", "v5e"))
    assert isinstance(v3.forward, FusedForward)
    assert isinstance(v5e.forward, GeneralForward)


def test_plans_are_printed_and_returned(capsys):
    records = run(Kernels(plan=True, target=("v3",), op=("attention_half", "mlp_half")))
    printed = capsys.readouterr().out
    assert [r["op"] for r in records] == ["attention_half", "mlp_half"]
    assert all(line in printed for r in records for line in r["plan"])
    assert "FusedForward" in printed
    with pytest.raises(ValueError, match="name a --target"):
        Kernels(plan=True)


def test_a_plan_with_other_values_keeps_the_rest():
    chosen = plans.plan_of("attention_half", "B/16@224", 64, "bfloat16", DEVICES["v6e"])
    changed = plans.changed(chosen, {"backward": {"core": {"lags": [1, 1]}}})
    assert changed.backward.core.lags == (1, 1) != chosen.backward.core.lags
    assert changed.backward.project == chosen.backward.project
    with pytest.raises(ValueError, match="CoreTiles has no field laps; it has images, lanes"):
        plans.changed(chosen, {"backward": {"core": {"laps": [1]}}})
