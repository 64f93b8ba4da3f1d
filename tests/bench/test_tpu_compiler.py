"""The compiler tool: what it reports of programs whose costs are known, what it says when something is wrong."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from bench import hlo, llo
from bench.reports import Program
from bench.tpu_compiler import CompilerMissing, compile_programs
from kernels.device import DEVICES

HERE = "tests.bench.test_tpu_compiler"
ROWS, WIDTH, INNER = 256, 512, 5
S = jax.ShapeDtypeStruct


def product(devices, *, steps, inner=0):
    """A kernel of `steps` grid steps, each one product [ROWS, WIDTH] x [WIDTH, WIDTH], or `inner` of them in a loop in the step."""

    def kernel(x, w, o):
        def once(i, carry):
            y = jnp.dot(x[0] + i.astype(jnp.float32), w[...], preferred_element_type=jnp.float32)
            if not inner:
                o[0] = y
            else:
                o[0] += y
            return carry

        if inner:
            o[0] = jnp.zeros_like(o[0])
            jax.lax.fori_loop(0, inner, once, 0)
        else:
            once(jnp.int32(0), 0)

    def run(x, w):
        return pl.pallas_call(
            kernel,
            grid=(steps,),
            in_specs=[pl.BlockSpec((1, ROWS, WIDTH), lambda b: (b, 0, 0)), pl.BlockSpec((WIDTH, WIDTH), lambda b: (0, 0))],
            out_specs=pl.BlockSpec((1, ROWS, WIDTH), lambda b: (b, 0, 0)),
            out_shape=S((steps, ROWS, WIDTH), jnp.float32),
            name="product",
        )(x, w)

    return run, (S((steps, ROWS, WIDTH), jnp.float32), S((WIDTH, WIDTH), jnp.float32))


def layers(devices, *, depth):
    """A scan over `depth` layers: a loop whose body stands once in the program."""

    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    return run, (S((1024, 1024), jnp.bfloat16), S((depth, 1024, 1024), jnp.bfloat16))


def too_large(devices):
    return (lambda x: x * 2), (S((2**34,), jnp.float32),)


def aborts(devices):
    import os

    os.abort()


def forever(devices):
    while True:
        pass


def one(target, build, *, cycles=True, profile=False, seconds=120.0, **arguments):
    program = Program(build=f"{HERE}:{build}", arguments=arguments, name=build)
    return compile_programs(target, [program], cycles=cycles, profile=profile, seconds=seconds)[0]


@pytest.mark.parametrize("target", ["v3", "v5e"])
def test_cycles_grow_with_the_grid_and_with_loops_inside_it(target):
    def counted(**arguments):
        report = one(target, "product", **arguments)
        assert not report.error
        (kernel,) = report.kernels
        assert (kernel.kernel, kernel.source) == ("product", "schedule")
        assert kernel.schedule is not None
        assert kernel.schedule["assumed"] == 0
        return kernel.schedule

    few, many, looped = counted(steps=4), counted(steps=12), counted(steps=4, inner=INNER)
    step = (many["cycles"] - few["cycles"]) / 8
    bound = 2 * ROWS * WIDTH * WIDTH / DEVICES[target].flops_per_cycle
    assert bound < step < 8 * bound
    assert 4 * INNER * bound < looped["bundles"] + looped["delays"] < 4 * INNER * step
    moved = ROWS * WIDTH * 4
    if target == "v3":  # on v5e XLA may keep the arrays in VMEM, and then nothing moves
        assert many["dma_bytes"] - few["dma_bytes"] == 8 * 2 * moved


def test_the_schedule_agrees_with_the_profile_where_there_is_one():
    report = one("v5e", "product", steps=8, profile=True)
    (kernel,) = report.kernels
    assert kernel.source == "profile", kernel.error
    assert kernel.schedule is not None
    assert abs(kernel.schedule["cycles"] / kernel.cycles - 1) < 0.25


def test_a_loop_of_layers_counts_every_layer():
    one_layer, many = one("v3", "layers", depth=2), one("v3", "layers", depth=12)
    assert 4 < many.cycles / one_layer.cycles < 7
    assert max(trips for _, _, trips, _ in many.xla_top) == 12
    assert many.argument_bytes == 13 * 2 * 1024 * 1024


def test_memory_that_does_not_suffice_is_said_in_one_line():
    report = one("v3", "too_large", cycles=False)
    assert "\n" not in report.error
    assert "memory" in report.error


@pytest.mark.ci
@pytest.mark.slow  # it waits for a compiler that hangs
def test_an_abort_or_a_hang_costs_one_program_and_not_the_rest():
    programs = [
        Program(build=f"{HERE}:aborts"),
        Program(build=f"{HERE}:layers", arguments={"depth": 2}),
        Program(build=f"{HERE}:forever"),
        Program(build=f"{HERE}:nothing"),
    ]
    aborted, good, hung, unknown = compile_programs("v3", programs, seconds=30)
    assert "ended with -6" in aborted.error or "aborted" in aborted.error
    assert not good.error
    assert "not compiled within 30 s" in hung.error
    assert "nothing" in unknown.error


def test_bad_requests_are_refused_in_words(monkeypatch):
    with pytest.raises(ValueError, match="unknown TPU generation 'v9'; known: v2"):
        compile_programs("v9", [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing, match=r"pip install 'vitcore\[tpu-compiler\]'"):
        compile_programs("v3", [])


LOOP = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} add(%a, %b), backend_config={"window_config":{"kernel_window_bounds":[],"estimated_cycles":"100"}}
  %k = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp(mine))/pallas_call"}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(LIMIT)
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %zero = s32[] constant(0)
  %x = f32[8]{0} parameter(0)
  %t = (s32[], f32[8]) tuple(%zero, %x)
  %while = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %sum = f32[8]{0} all-reduce(%x), to_apply=%add
}
"""


def test_operations_are_multiplied_by_their_loops():
    found = {op.name: op for op in hlo.operations(LOOP.replace("LIMIT", "7"))}
    assert (found["x"].cycles, found["x"].trips) == (100, 7)
    assert (found["k"].kind, found["k"].trips, found["k"].kernel) == ("kernel", 7, "mine")
    assert found["sum"].kind == "all-reduce"


def test_a_loop_without_a_count_is_an_error_and_not_one_trip():
    with pytest.raises(hlo.ProgramError, match="trip count of the loop %while"):
        hlo.operations(LOOP.replace("%limit = s32[] constant(LIMIT)", "%limit = s32[] add(%i, %i)"))


SCHEDULE = """
     0   :  { %s1_s0 = smov 0  ;;  %s9_s9 = smov 4 } /* Start region 1 */
   0x1 LB: > { %s4_s2 = sadd.s32 1, %s2_s1  ;;  %7 = vdelay 2  ;;  %s2_s1 = sphi %s1_s0, %s5_s1 } /* Start region 2 */
   0x2   : > { %s5_s1 = smov %s4_s2 }
   0x3   : > { %p5_p0 = scmp.ge.s32.totalorder %s4_s2, LIMIT }
   0x4   : > { %6 = sbr.rel (!%p5_p0) target = $region2 }
   0x5   :  { %8 = vnop }
   0x6   :  { %9 = vnop }
"""


def count(text: str, tmp_path: Path) -> llo.Count:
    file = tmp_path / "final_bundles.txt"
    file.write_text(text)
    return llo.count(file, None, target="v3", bytes_per_cycle=400.0)


def test_a_schedule_is_followed_through_its_loop(tmp_path):
    counted = count(SCHEDULE.replace("LIMIT", "10"), tmp_path)
    # ten times the four bundles of the loop and the one after its branch, and two more
    assert (counted.bundles, counted.delays) == (10 * 5 + 2, 10 * 2)
    assert counted.cycles == counted.bundles + counted.delays


def test_a_loop_that_depends_on_data_is_an_error(tmp_path):
    text = SCHEDULE.replace("LIMIT", "%s77_s7").replace("%s9_s9 = smov 4", "%s77_s7 = sld [smem:[#allocation3]]")
    with pytest.raises(llo.ScheduleError, match="depends on data"):
        count(text, tmp_path)


def test_the_command_refuses_what_it_does_not_know():
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "bench.kernels", *arguments], capture_output=True, text=True, timeout=120)

    unknown = run("--shape", "B/99@224")
    assert unknown.returncode == 2
    assert "unknown shape 'B/99@224': did you mean 'B/16@224'? known: B/16@224" in unknown.stderr
    assert run("--target", "v1").returncode == 2
