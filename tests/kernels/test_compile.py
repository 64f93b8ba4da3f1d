"""Every op, forward and backward, compiles for every TPU generation, and what it compiles to holds our kernels.

The compiler runs in a subprocess of its own for each generation. The fast tests take every op at ViT-B/16 on v3 and v5e; CI adds
the programs that stand for the whole grid of shapes and dtypes (`tests.kernels.grid`) and a training step on 32 cores;
`make test-all` compiles the grid whole, and the training steps of the larger models.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

from bench.reports import Program, Report
from bench.shapes import SHAPES, shape
from bench.tpu_compiler import TOPOLOGIES, compile_programs
from kernels.attention import plan as attention_plan
from kernels.attention.plan import Packed
from kernels.attention.tiling import Shape as AttentionShape
from kernels.by_xla import ByXLA
from kernels.device import DEVICES, MiB
from kernels.launch import Launch
from kernels.mlp import plan as mlp_plan
from tests.kernels import grid, models
from tests.kernels.grid import FAST, GRID, IRREGULAR, Case
from vitcore.ops import FUNCTIONS

# How the kernels of an op are called, and what marks one that only a backward pass has.
PREFIX = {
    "patch_embed": "patch_embed",
    "attention": "attention_core",
    "attention_half": "attention",
    "mlp_half": "mlp",
    "layer_norm": "layer_norm",
}
BACKWARD = ("backward", "gradient")
SECONDS = 600


def missing(op: str, report: Report) -> list[str]:
    """Which passes of an op hold no kernel of ours in a compiled program."""
    names = {k.kernel for k in report.kernels if k.kernel.startswith(PREFIX[op])}
    backward = {name for name in names if any(mark in name for mark in BACKWARD)}
    return ["forward"] * (not names - backward) + ["backward"] * (not backward)


def left_to_xla(case: Case) -> set[str]:
    """The passes, "forward" and "backward", of a half block that its plan leaves to XLA, but for those that are packed both."""
    config, device, dtype = shape(case.shape).config, DEVICES[case.target], jnp.dtype(case.dtype)
    if case.op == "attention_half":
        heads = config.num_heads, config.width // config.num_heads
        chosen: Any = attention_plan.choose(AttentionShape(case.batch, config.tokens, config.width, *heads, dtype), device)
    elif case.op == "mlp_half":
        chosen = mlp_plan.choose(mlp_plan.Shape(case.batch, config.tokens, config.width, config.mlp_dim, dtype.itemsize), device)
    else:
        return set()
    if isinstance(chosen.forward, Packed) and isinstance(chosen.backward, Packed):  # whose core is a kernel
        return set()
    return {name for name in ("forward", "backward") if isinstance(getattr(chosen, name), ByXLA)}


def compiled(cases: Iterable[Case]) -> dict[Case, Report]:
    """Reports on these programs, a compiler process a generation, two at a time: one alone leaves a core of two idle."""
    by_target: dict[str, list[Case]] = {}
    for case in cases:
        by_target.setdefault(case.target, []).append(case)

    def compile_all(target: str) -> list[Report]:
        return compile_programs(target, [case.program() for case in by_target[target]], seconds=SECONDS)

    longest_first = sorted(by_target, key=lambda target: -sum(case.cost() for case in by_target[target]))
    with ThreadPoolExecutor(2) as pool:
        reports = zip(longest_first, pool.map(compile_all, longest_first), strict=True)
        return {case: report for target, found in reports for case, report in zip(by_target[target], found, strict=True)}


def assert_kernels(reports: dict[Case, Report]) -> None:
    """Asserts that each program compiled, and holds the kernels that were written down for it, forward and backward ones.

    The gradient of an image is written down and not in the program, where nobody asks for it.
    """
    assert reports
    problems = []
    for case, report in reports.items():
        found = {kernel.kernel for kernel in report.kernels}
        written = {kernel.name for kernel in grid.kernels_of(case)}
        left = left_to_xla(case)
        wanted = {name for name in written if case.image or "image" not in name}
        if left:  # a pass of kernels alone: what it traces of the other, the compiler takes away
            wanted = {name for name in wanted if ("backward" in left) != any(mark in name for mark in BACKWARD)} & found
        if report.error:
            problems.append(f"{case.target} {report.name}: {report.error[:400]}")
        elif passes := sorted({*missing(case.op, report)} - left):
            problems.append(f"{case.target} {report.name}: no {' and '.join(passes)} kernel among {sorted(found)}")
        elif not wanted <= found <= written:
            problems.append(f"{case.target} {report.name}: kernels {sorted(found)} where {sorted(written)} were written down")
    assert not problems, "\n".join(problems)


FIRST, *OTHERS = grid.FIRST_TARGETS


@pytest.mark.parametrize("target", [FIRST, *(pytest.param(t, marks=[pytest.mark.ci, pytest.mark.slow]) for t in OTHERS)])
def test_every_op_compiles(target):
    assert_kernels(compiled(case for case in FAST if case.target == target))


def test_the_gradient_of_the_image_costs_nothing_where_nobody_asks():
    cases = [Case("v5e", "patch_embed", "B/16@224", image=image) for image in (True, False)]
    asked, not_asked = compiled(cases).values()
    assert "patch_embed_image_backward" in {k.kernel for k in asked.kernels}
    assert {k.kernel for k in not_asked.kernels} == {"patch_embed", "patch_embed_backward"}


# ---- the grid, and what stands for it


@pytest.fixture(scope="module")
def chosen() -> tuple[Case, ...]:
    return grid.representatives()


def test_what_is_compiled_stands_for_the_whole_grid(chosen):
    """Each kernel in each of its forms, and each op in each dtype and formulation on each generation."""
    held = frozenset().union(*map(grid.keys_of, (*FAST, *chosen)))
    assert len(GRID) == len(set(GRID)) == len(TOPOLOGIES) * len(FUNCTIONS) * (len(SHAPES) + 1)
    for case in GRID:
        assert grid.keys_of(case) <= held, f"nothing that CI compiles stands for {case}"
    assert {(c.target, c.op, c.dtype) for c in (*FAST, *chosen)} == {(c.target, c.op, c.dtype) for c in GRID}
    assert len(chosen) + len(FAST) < len(GRID) / 2, "the keys tell too much apart"


def test_another_decision_is_another_key(monkeypatch, chosen):
    """Less VMEM, so that the tilings decide otherwise; and a body made with another yes or no, which nothing stands for."""
    held = frozenset().union(*map(grid.keys_of, (*FAST, *chosen)))
    again, device = grid.kernels_of.__wrapped__, DEVICES["v5e"]

    def keys(case: Case, launch: Launch):
        monkeypatch.setattr(grid.programs, "launch_for", lambda _: launch)
        return grid.keys_of(case, again)

    for op in ("attention_half", "mlp_half", "patch_embed"):
        case = Case("v5e", op, "L/16@384")
        assert keys(case, Launch(device=device)) == grid.keys_of(case) <= held
        assert keys(case, Launch(device=replace(device, vmem_bytes=12 * MiB))) != grid.keys_of(case)
        assert not keys(case, Launch(device=device, interpret=True)) <= held


@pytest.fixture(scope="module")
def representatives(chosen) -> dict[Case, Report]:
    return compiled((*chosen, *IRREGULAR))


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("target", TOPOLOGIES)
def test_the_representatives_compile(target, representatives):
    assert_kernels({case: report for case, report in representatives.items() if case.target == target})


@pytest.fixture(scope="module")
def rest(chosen) -> dict[Case, Report]:
    """The grid without what the tests above compile."""
    return compiled(case for case in GRID if case not in FAST and case not in chosen)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TOPOLOGIES)
def test_the_rest_of_the_grid_compiles(target, rest):
    assert_kernels({case: report for case, report in rest.items() if case.target == target})


# model, mesh (data, model), parts of the global batch of 4096, blocks rematerialised
STEPS = [
    pytest.param("ViT-B/16", (8, 4), 1, False, marks=pytest.mark.ci, id="ViT-B/16"),
    pytest.param("ViT-L/16", (8, 4), 1, True, id="ViT-L/16"),
    pytest.param("ViT-H/14", (8, 4), 2, True, id="ViT-H/14"),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("model", "mesh", "parts", "remat"), STEPS)
def test_the_training_step_compiles_on_32_cores(model, mesh, parts, remat):
    arguments = {
        "model": model,
        "batch": 4096,
        "data": mesh[0],
        "axis": mesh[1],
        "accumulate": parts,
        "remat": remat,
        "dropout": 0.1,
    }
    program = Program(build="bench.programs:train_step", arguments=arguments, name=f"{model} training step")
    (report,) = compile_programs("v3", [program], topology="v3:4x4", seconds=1200)
    assert not report.error, report.error
    for op in FUNCTIONS:
        assert not missing(op, report), f"{op}: {[k.kernel for k in report.kernels]}"
    assert {"all-gather", "all-reduce"} <= report.collectives.keys(), report.collectives


# ---- whole models: convolutions, hybrids, axial attention, position embeddings


def test_what_is_compiled_stands_for_every_model_of_the_paper():
    """Each kind of unit, block, position and pool of every model that the paper names is in a program that the next test compiles,
    and of those on every generation all but what a position embedding adds to x."""
    everywhere = frozenset().union(*(models.kinds(model.config) for model in models.MODELS))
    once = frozenset().union(*(models.kinds(model.config) for model in models.POSITIONS))
    for name, config in models.CONFIGS.items():
        left = models.kinds(config) - everywhere
        assert left <= once, f"{name} has {left - once}, which nothing compiles"
        assert {kind for kind, *_ in left} <= {"position"}, f"{name} has {left}, which is compiled on one generation alone"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("target", "model"), models.cases())
def test_every_model_of_the_paper_compiles(target, model):
    reports = compile_programs(target, model.programs(), seconds=SECONDS)
    for report, wanted in zip(reports, model.kernels(target), strict=True):
        assert not report.error, f"{report.name}: {report.error}"
        found = {kernel.kernel for kernel in report.kernels}
        assert bool(found) == bool(wanted), "ResNets but axial ones are XLA's, and no ViT is"
        for part in wanted:
            assert any(part in name for name in found), f"{report.name}: no {part} among {sorted(found)}"
