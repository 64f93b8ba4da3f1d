"""The programs of the compile tests, op x shape x TPU generation x dtype, and the few of them that stand for all.

What decides a program is read off the kernels themselves: an op is traced forward and backward for a generation with a
`pallas_call` that only writes down what it is asked for. Of each kernel that is its `form`: its name; of every block whether it is
one row, a part or all of its array in each dimension, whether it ends within a register, and its dtype; its scratch; which arrays
share memory; and every yes or no that its body was made with. Two programs of the same forms take the same way through the tiling
and through the kernel bodies, and differ in extents.

The representatives are chosen so that

- every op is there at ViT-B/16 on every generation;
- and in every dtype, with each set of kernels that it is made of, on every generation;
- every form of a kernel is there, on the generation where it costs least to compile.

Forms are not asked for on each generation, because tilings know generations by their VMEM and operand types alone: those of v2 are
those of v3, and so on. `make test-all` compiles the grid whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache, partial
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from bench import programs
from bench.reports import Program
from bench.shapes import SHAPES, shape
from bench.tpu_compiler import TOPOLOGIES
from kernels.device import DEVICES, LANES, SUBLANES, Device
from vitcore.ops import FUNCTIONS

BATCH = 2  # kernels go image by image: more images are more grid steps, not another program


class Case(NamedTuple):
    """A cell of the grid: the forward and the backward pass of an op as one program."""

    target: str
    op: str
    shape: str
    dtype: str = "bfloat16"
    batch: int = BATCH
    image: bool = False  # with the gradient of the image
    keep: bool = False  # of a half block: with more than x kept for the backward pass

    def arguments(self) -> dict[str, Any]:
        rate = 0.1 if self.dtype == "bfloat16" and self.op != "layer_norm" else 0.0  # with dropout, where an op has it
        more = {"image": True} if self.image else {}
        more |= {"keep": True} if self.keep else {}
        return {
            "op": self.op,
            "shape": self.shape,
            "batch": self.batch,
            "dtype": self.dtype,
            "backward": True,
            "rate": rate,
            **more,
        }

    def program(self) -> Program:
        return Program(build="bench.programs:one_op", arguments=self.arguments(), name=f"{self.op} {self.shape} {self.dtype}")

    def cost(self) -> float:
        """About how long the compiler takes, with the op at 197 tokens of width 768 on v3 in seconds of a CPU."""
        config = shape(self.shape).config
        once = {"patch_embed": 2.5, "attention_half": 6.5, "mlp_half": 4.5, "layer_norm": 1.0}[self.op]
        return once * max(1.0, config.tokens * config.width / (197 * 768)) ** 0.5


FIRST = "B/16@224"
FIRST_TARGETS = ("v3", "v5e")
# Attention alone is in its half block, which may pad the heads where alone it does not fit.
GRID = tuple(
    Case(target, op, name, dtype)
    for target in sorted(TOPOLOGIES, key=lambda target: target not in FIRST_TARGETS)  # of equals the first is chosen
    for name in SHAPES
    for op in FUNCTIONS
    for dtype in ("bfloat16", "float32")
    if dtype == "bfloat16" or name == FIRST
)
# What the fast tests compile.
FAST = tuple(case for case in GRID if (case.shape, case.dtype) == (FIRST, "bfloat16") and case.target in FIRST_TARGETS)
# Beside the grid: short images, several a grid step; 5 tokens, less than a register, packed; float32 rows; the gradient of large
# images; half blocks that keep more than their input.
IRREGULAR = (
    Case("v3", "attention_half", "H/14@126", batch=64),
    Case("v3", "attention_half", "B/32@64", batch=64),
    Case("v5e", "attention_half", "B/32@64", batch=36),
    Case("v3", "layer_norm", "L/16@384", "float32"),
    Case("v5e", "patch_embed", "L/16@512", "float32", image=True),
    Case("v3", "mlp_half", FIRST, keep=True),
    Case("v3", "attention_half", FIRST, keep=True),
    Case("v3", "attention_half", "L/16@224", keep=True),
    Case("v3", "attention_half", "H/14@224", keep=True),
    Case("v5e", "mlp_half", FIRST, keep=True),
)


def _extent(block: Any, whole: int, register: int) -> str:
    rows = getattr(block, "block_size", block)
    rows = rows if isinstance(rows, int) else 1  # None, or jax's own word for it: one row, and the dimension is gone
    size = "one" if rows == 1 < whole else "all" if rows == whole else "part"
    return size if rows % register == 0 else f"{size}, ragged"


def _block(spec: pl.BlockSpec, array: Any) -> tuple[str, ...]:
    if spec.block_shape is None:
        return ("left in HBM", str(array.dtype))
    registers = [1] * len(spec.block_shape)
    registers[-1] = LANES
    if len(registers) > 1:
        registers[-2] = SUBLANES * (4 // array.dtype.itemsize)
    return (*map(_extent, spec.block_shape, array.shape, registers), str(array.dtype))


class Kernel(NamedTuple):
    """One `pallas_call` of a program: its name, the dtypes of its arrays, and its form, which holds both."""

    name: str
    dtypes: tuple[str, ...]
    form: tuple


def _switches(body: Any, name: str = "") -> Iterator[tuple[str, bool]]:
    """What is yes or no in that which a kernel's body was made with: its arguments, the variables around it, fields of records."""
    if isinstance(body, bool):
        yield name, body
    elif isinstance(body, partial):
        yield from _switches(body.func)
        for k, value in enumerate(body.args):
            yield from _switches(value, str(k))
        for key, value in body.keywords.items():
            yield from _switches(value, key)
    elif isinstance(body, FunctionType):
        for key, cell in zip(body.__code__.co_freevars, body.__closure__ or (), strict=True):
            yield from _switches(cell.cell_contents, key)
    elif is_dataclass(body) and not isinstance(body, Device):
        for field in fields(body):
            yield from _switches(getattr(body, field.name), field.name)


def _kernel(body: Callable, name: str, grid_spec, arrays, outputs, aliases) -> Kernel:
    arrays = arrays[grid_spec.num_scalar_prefetch :]
    inputs = tuple(map(_block, grid_spec.in_specs, arrays))
    results = tuple(map(_block, grid_spec.out_specs, outputs))
    scratch = tuple(
        (type(s).__name__, len(getattr(s, "shape", ())), str(getattr(s, "dtype", ""))) for s in grid_spec.scratch_shapes
    )
    form = (name, inputs, results, scratch, tuple(aliases.items()), tuple(sorted(set(_switches(body)))))
    return Kernel(name, tuple(str(a.dtype) for a in arrays), form)


@cache
def kernels_of(case: Case) -> tuple[Kernel, ...]:
    """The kernels of a program, in the order in which they are asked for; nothing is compiled, and no kernel's body traced."""
    found: list[Kernel] = []

    def record(body, *, name, grid_spec, out_shape, input_output_aliases, **__):
        def run(*arrays):
            found.append(_kernel(body, name, grid_spec, arrays, out_shape, input_output_aliases))
            return [jnp.zeros(out.shape, out.dtype) for out in out_shape]

        return run

    device = SimpleNamespace(device_kind=DEVICES[case.target].kind)
    with mock.patch.object(pl, "pallas_call", record):
        function, arguments = programs.one_op([device], **case.arguments())
        jax.eval_shape(function, *arguments)
    return tuple(found)


def keys_of(case: Case, trace: Callable[[Case], tuple[Kernel, ...]] = kernels_of) -> frozenset[tuple]:
    """All that has to be compiled somewhere for this program to be stood for."""
    kernels = trace(case)
    made_of = (case.target, case.op, case.dtype, frozenset((kernel.name, kernel.dtypes) for kernel in kernels))
    return frozenset({made_of, *(kernel.form for kernel in kernels)})


def representatives() -> tuple[Case, ...]:
    """The cells of `GRID` that, with `FAST`, hold every key of it: ViT-B/16 on every generation, then again and again the cell with
    the most new keys for its cost."""
    keys = {case: keys_of(case) for case in GRID}
    first = [case for case in GRID if (case.shape, case.dtype) == (FIRST, "bfloat16")]
    held = frozenset().union(*(keys[case] for case in first))
    chosen = [case for case in first if case not in FAST]
    while True:
        best = max(GRID, key=lambda case: len(keys[case] - held) / case.cost())
        if not keys[best] - held:
            return tuple(chosen)
        chosen.append(best)
        held |= keys[best]
