"""Every op, forward and backward, compiles for every TPU generation, and what it compiles to holds our kernels.

The compiler runs in a subprocess of its own for each generation. In the fast tests every generation takes every op at ViT-B/16,
and v3 and v5e the largest and the least regular shapes too; the whole product of shapes and generations, and training steps on
32 cores, are slow tests.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from bench.shapes import SHAPES
from bench.tpu_compiler import TOPOLOGIES, Program, Report, compile_programs
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
BATCH = 2  # kernels go image by image: more images are more grid steps, not another program
SECONDS = 240


def both(op: str, shape: str, batch: int = BATCH, **arguments) -> Program:
    """An op's forward and backward pass as one program."""
    arguments = {"op": op, "shape": shape, "batch": batch, "backward": True, **arguments}
    label = " ".join(str(v) for k, v in arguments.items() if k not in ("batch", "backward"))
    return Program(build="bench.programs:one_op", arguments=arguments, name=label)


def rate_of(op: str) -> float:
    """With dropout, where an op has it."""
    return 0.0 if op == "layer_norm" else 0.1


def missing(op: str, report: Report) -> list[str]:
    """Which passes of an op hold no kernel of ours in a compiled program."""
    names = {k.kernel for k in report.kernels if k.kernel.startswith(PREFIX[op])}
    backward = {name for name in names if any(mark in name for mark in BACKWARD)}
    return ["forward"] * (not names - backward) + ["backward"] * (not backward)


def assert_kernels(programs: list[Program], reports: list[Report]) -> None:
    """Asserts that each program compiled, and holds kernels of its op for the forward and for the backward pass."""
    problems = []
    for program, report in zip(programs, reports, strict=True):
        if report.error:
            problems.append(f"{report.name}: {report.error[:400]}")
        elif passes := missing(program.arguments["op"], report):
            problems.append(f"{report.name}: no {' and '.join(passes)} kernel among {[k.kernel for k in report.kernels]}")
    assert not problems, f"{reports[0].target}:\n" + "\n".join(problems)


@pytest.mark.parametrize("target", TOPOLOGIES)
def test_every_op_compiles(target):
    programs = [both(op, "B/16@224", rate=rate_of(op)) for op in FUNCTIONS]  # attention alone is in its half block
    assert_kernels(programs, compile_programs(target, programs, seconds=SECONDS))


@pytest.mark.parametrize(
    ("target", "program"),
    [
        ("v3", both("patch_embed", "H/14@518", rate=0.1)),
        ("v3", both("attention_half", "H/14@224", rate=0.1)),
        ("v3", both("attention_half", "H/14@126", batch=64)),  # short images, several a grid step
        ("v3", both("attention_half", "B/32@64", batch=64)),  # 5 tokens, less than a register
        ("v3", both("mlp_half", "H/14@518", rate=0.1)),
        ("v3", both("layer_norm", "L/16@384", dtype="float32")),
        ("v5e", both("patch_embed", "L/16@512", dtype="float32", image=True)),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name.replace(" ", "-"),
)
def test_large_and_irregular_shapes_compile(target, program):
    assert_kernels([program], compile_programs(target, [program], seconds=SECONDS))


def test_the_gradient_of_the_image_costs_nothing_where_nobody_asks():
    with_, without = (both("patch_embed", "B/16@224", image=image) for image in (True, False))
    asked, not_asked = compile_programs("v5e", [with_, without], seconds=SECONDS)
    assert "patch_embed_image_backward" in {k.kernel for k in asked.kernels}
    assert {k.kernel for k in not_asked.kernels} == {"patch_embed", "patch_embed_backward"}


def at_every_shape() -> list[Program]:
    """Attention alone is in its half block, which may pad the heads where alone it does not fit."""
    rest = [shape for shape in SHAPES if shape != "B/16@224"]  # which the fast tests compile in bfloat16
    programs = [both(op, shape, rate=rate_of(op)) for shape in rest for op in FUNCTIONS]
    return programs + [both(op, "B/16@224", dtype="float32") for op in FUNCTIONS]


@pytest.fixture(scope="module")
def every_report() -> dict[str, list[Report]]:
    """Reports on `at_every_shape()`, one compiler process a generation, two at a time: one alone leaves a core of two idle."""
    compile_all = partial(compile_programs, programs=at_every_shape(), seconds=600)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TOPOLOGIES, pool.map(compile_all, TOPOLOGIES), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", TOPOLOGIES)
def test_every_op_at_every_shape(target, shape, every_report):
    pairs = [pair for pair in zip(at_every_shape(), every_report[target], strict=True) if pair[0].arguments["shape"] == shape]
    assert len(pairs) == len(FUNCTIONS)
    assert_kernels(*map(list, zip(*pairs, strict=True)))


# model, mesh (data, model), parts of the global batch of 4096, blocks rematerialised
STEPS = [("ViT-B/16", (8, 4), 1, False), ("ViT-L/16", (8, 4), 1, True), ("ViT-H/14", (8, 4), 2, True)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("model", "mesh", "parts", "remat"), STEPS, ids=[s[0] for s in STEPS])
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
