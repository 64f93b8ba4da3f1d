"""The table of ratios: extrapolation from two depths, the better of two peers, errors in their row."""

import re
from typing import Any

import pytest

from bench.ratios import Ratios, extrapolated, line, row
from bench.reports import Kernel, Report
from bench.yardstick import Line

BLOCK = {True: 100, False: 150, "flax": 130}


class Fake:
    """Answers as the compiler would for a model of `depth` blocks between an embedding of 1,000 cycles and a head."""

    def compile(self, program, *, cycles):
        depth = program.arguments.get("depth", 12)
        total = 1000 + BLOCK[program.arguments["kernels"]] * depth
        if program.arguments["model"] == "ViT-L/16":
            return Report(name="", target="v3", error="RESOURCE_EXHAUSTED")
        lines = (Line(name="all", kind="fusion", trips=1, cycles=total, source="schedule", bound="MXU"),)
        return Report(name="", target="v3", lines=lines, xla_cycles=2 * total, kernels=(Kernel(name="k", trips=1, cycles=0),))


FAKE: Any = Fake()


def test_two_depths_give_a_third():
    assert extrapolated(1200, 1300, (2, 3), 12) == 2200
    assert extrapolated(1200, 1400, (2, 4), 12) == 2200


@pytest.mark.parametrize("depths", [(), (2, 3)])
def test_the_peer_is_the_better_of_the_two(depths):
    found = row(FAKE, Ratios(depths=depths, reference=True, batch=1), "v3", "ViT-B/16", "forward")
    assert (found["ours"], found["flax"], found["reference"]) == (2200, 2560, 2800)
    assert found["peer"] == "flax"
    assert found["ratio"] == pytest.approx(2560 / 2200)
    assert found["ours older"] == 4400
    assert ("*" in line(found)) == bool(depths)


def test_what_does_not_compile_stands_in_its_row():
    found = row(FAKE, Ratios(), "v3", "ViT-L/16", "train")
    assert "RESOURCE_EXHAUSTED" in line(found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(depths=(3,)), "--depths 3: two rising depths are required"),
        (dict(depths=(3, 2)), "--depths 3 2: two rising"),
        (dict(batch=0), "--batch 0: a positive number is required"),
        (dict(model=("ViT-Z/16",)), "unknown model 'ViT-Z/16': did you mean"),
    ],
)
def test_bad_options_are_one_clear_line(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Ratios(**options)
