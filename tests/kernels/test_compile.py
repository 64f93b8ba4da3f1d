"""Every op, forward and backward, compiles for every TPU generation, and what it compiles to holds our kernels.

The compiler runs in a subprocess of its own for each generation. In the fast tests every generation takes every op at ViT-B/16,
and v3 and v5e the largest and the least regular shapes too; the whole product of shapes and generations, and training steps on
32 cores, are slow tests.
"""

import pytest

from bench.shapes import OPS, SHAPES
from bench.tpu_compiler import TOPOLOGIES, Program, Report, compile_programs

# Kernels that forward and backward must hold, by the names of their pallas_calls.
KERNELS = {
    "patch_embed": {"patch_embed", "patch_embed_backward"},
    "attention": {"attention_core_forward", "attention_core_backward"},
    "attention_half": {"attention_forward", "attention_backward"},
    "mlp_half": {"mlp_half_forward", "mlp_half_backward"},
    "layer_norm": {"layer_norm_forward", "layer_norm_backward"},
}
BATCH = 2  # kernels go image by image: more images are more grid steps, not another program
SECONDS = 240


def both(op: str, shape: str, **arguments) -> Program:
    """An op's forward and backward pass as one program."""
    arguments = {"op": op, "shape": shape, "batch": BATCH, "backward": True, **arguments}
    label = " ".join(str(v) for k, v in arguments.items() if k not in ("batch", "backward"))
    return Program(build="bench.programs:one_op", arguments=arguments, name=label)


def assert_kernels(programs: list[Program], reports: list[Report]) -> None:
    """Asserts that each program compiled and holds the kernels of its op, and no program only some of them."""
    problems = []
    for program, report in zip(programs, reports, strict=True):
        missing = KERNELS[program.arguments["op"]] - {k.kernel for k in report.kernels}
        if report.error:
            problems.append(f"{report.name}: {report.error[:400]}")
        elif missing:
            problems.append(f"{report.name}: no kernel {sorted(missing)} among {[k.kernel for k in report.kernels]}")
    assert not problems, f"{reports[0].target}:\n" + "\n".join(problems)


@pytest.mark.parametrize("target", TOPOLOGIES)
def test_every_op_compiles(target):
    programs = [both(op, "B/16@224") for op in OPS]
    assert_kernels(programs, compile_programs(target, programs, seconds=SECONDS))


@pytest.mark.parametrize(
    ("target", "program"),
    [
        ("v3", both("patch_embed", "H/14@518")),
        ("v3", both("patch_embed", "L/16@512", dtype="float32", rate=0.1)),
        ("v5e", both("patch_embed", "H/14@518", image=True)),
        ("v3", both("attention_half", "H/14@224", rate=0.1)),
        ("v3", both("mlp_half", "H/14@518", rate=0.1)),
        ("v5e", both("attention_half", "H/14@518")),
        ("v3", both("layer_norm", "L/16@384", dtype="float32")),
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


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", TOPOLOGIES)
def test_every_op_at_every_shape(target, shape):
    programs = [both(op, shape, rate=0.1 if op in ("attention_half", "mlp_half", "patch_embed") else 0.0) for op in OPS]
    if shape == "B/16@224":
        programs += [both(op, shape, dtype="float32") for op in OPS]
    assert_kernels(programs, compile_programs(target, programs, seconds=600))


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
    held = {k.kernel for k in report.kernels}
    wanted = set.union(*(KERNELS[op] for op in OPS if op != "attention"))
    assert wanted <= held, f"no kernel {sorted(wanted - held)} in the step, which holds {sorted(held)}"
    assert {"all-gather", "all-reduce"} <= report.collectives.keys(), report.collectives
