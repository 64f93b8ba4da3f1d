"""How a kernel is started: compiled or interpreted, with its cost and memory limit, under any mesh.

Every kernel op takes a static keyword `launch=`. A kernel inside `shard_map(..., check_vma=True)` must say over which mesh axes its
outputs vary; `call` gives them the union of what its inputs vary over. Gradients are then right if the op's arrays vary alike
BEFORE its custom_vjp: `vary_alike` casts the replicated ones (parameters), and the transpose of that cast is the sum over the
devices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.device import Device, from_kind
from kernels.settings import in_kernels
from kernels.stacked import Stacked
from kernels.vmem import limit, round_up

WHOLE_VMEM = False  # every kernel may take all of it, as the compiler's static profile of some wants it (bench)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where and how kernels run; hashable, passed as a static argument.

    device: the tiles are chosen for it. interpret: False compiles with Mosaic; `pltpu.InterpretParams` simulates a TPU's memories
    on a CPU (races, uninitialised memory); True evaluates the kernel as plain jax operations where jax can: its evaluator does not
    know what varies over a mesh, and there `call` takes InterpretParams() instead. `jax.checkpoint` refuses those: simulation has
    side effects. Simulated devices talk to the CPU's thread pool: a mesh of 2 wants 4 threads (`NPROC=8`).
    needs: bytes of VMEM that the plan counts for one kernel; None: it may take all there is.
    """

    device: Device
    interpret: bool | pltpu.InterpretParams = False
    needs: int | None = None

    def within(self, needs: int | None) -> "Launch":
        """The launch of a kernel that needs so many bytes of VMEM."""
        return replace(self, needs=needs)


def here() -> Launch:
    """The Launch for the devices of this process: compiled on a TPU, interpreted on a CPU. ValueError elsewhere."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return Launch(device=from_kind("cpu"), interpret=pltpu.InterpretParams())
    return Launch(device=from_kind(device.device_kind))


def varying(*arrays) -> frozenset[str]:
    """The mesh axes over which at least one of the arrays (trees of them) varies; empty outside shard_map."""
    return reduce(frozenset.union, (jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(arrays)), frozenset())


def vary_alike(*arrays):
    """The arrays (trees of them), each cast to vary over every mesh axis that any of them varies over. Call it before a custom_vjp.

    The cast is free; its transpose sums a parameter's gradient over the devices that shared the parameter.
    """
    axes = varying(*arrays)

    def cast(a):
        missing = axes - varying(a)
        return lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a

    return tuple(jax.tree.map(lambda a: cast(jnp.asarray(a)), a) for a in arrays)


def call(
    kernel: Callable,
    *,
    launch: Launch,
    name: str,
    grid: Sequence[int],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shapes: Sequence[tuple[Sequence[int], jnp.dtype] | Stacked],
    semantics: Sequence[Any],
    cost: pl.CostEstimate,
    scratch: Sequence = (),
    prefetch: int = 0,
    aliases: dict[int, int] | None = None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """A thin `pl.pallas_call`: returns a function of the kernel's arrays that returns the tuple of its outputs.

    out_shapes: (shape, dtype) pairs. semantics: "parallel" or "arbitrary" for each grid dimension. prefetch: how many leading
    arrays are int32 scalars, in SMEM and known to the index maps. aliases: {array: output} that share their memory.
    An array may be `Stacked`: the kernel, its specs and index maps see the weight alone. An out_shape may be, too: that output is
    written in its place, and returned is the whole array, which must not be used otherwise.
    """
    stacked = any(isinstance(o, Stacked) for o in out_shapes)
    wanted = [tuple(o.array.shape if isinstance(o, Stacked) else o[0]) for o in out_shapes]
    padded = bool(aliases) and launch.interpret is not False and not stacked
    shapes: Any = _padded(out_shapes, in_specs, out_specs, prefetch, aliases or {}) if padded else out_shapes

    def run(*arrays):
        if stacked or any(isinstance(a, Stacked) for a in arrays):
            plain, arrays = _in_place(kernel, arrays, in_specs, out_specs, shapes, prefetch, aliases or {})
            options = {"launch": launch, "name": name, "grid": grid, "semantics": semantics, "cost": cost, "scratch": scratch}
            return call(**plain, **options)(*arrays)
        arrays = list(vary_alike(*arrays))
        for a, k in (aliases or {}).items() if padded else ():
            arrays[a] = jnp.pad(arrays[a], [(0, n - m) for n, m in zip(shapes[k][0], arrays[a].shape, strict=True)])
        axes = jax.sharding.ManualAxisType(varying=varying(*arrays))
        interpret = pltpu.InterpretParams() if launch.interpret is True and axes.varying else launch.interpret
        return pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct(tuple(s), d, manual_axis_type=axes) for s, d in shapes],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=prefetch,
                grid=tuple(grid),
                in_specs=list(in_specs),
                out_specs=list(out_specs),
                scratch_shapes=list(scratch),
            ),
            input_output_aliases=aliases or {},
            interpret=interpret,
            name=name,
            cost_estimate=cost,
            compiler_params=pltpu.CompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=_vmem(launch)),
        )(*arrays)

    def traced(*arrays):
        with in_kernels():
            found = run(*arrays)
        return tuple(a[tuple(map(slice, shape))] for a, shape in zip(found, wanted, strict=True)) if padded else tuple(found)

    return traced


def _vmem(launch: Launch) -> int:
    """The bytes of VMEM that a kernel may take."""
    whole = WHOLE_VMEM or launch.needs is None
    return launch.device.vmem_bytes if whole else limit(launch.device, launch.needs or 0)


def _padded(out_shapes, in_specs, out_specs, prefetch: int, aliases: dict[int, int]) -> list:
    """The shapes of outputs as the interpreter returns them: those that share an array's memory padded to whole blocks."""
    shapes = list(out_shapes)
    for a, k in aliases.items():
        (shape, dtype), given = shapes[k], in_specs[a - prefetch].block_shape
        shapes[k] = _in_blocks(_in_blocks(shape, given), out_specs[k].block_shape), dtype
    return shapes


def _in_blocks(shape, block) -> tuple[int, ...]:
    """A shape rounded up to whole blocks: None for an array that is not cut, or of an axis for single indices of it."""
    return shape if block is None else tuple(round_up(n, m or 1) for n, m in zip(shape, block, strict=True))


def _in_place(kernel, arrays, in_specs, out_specs, out_shapes, prefetch: int, aliases: dict[int, int]):
    """(arguments of `call`, arrays) without `Stacked`: one more scalar array says where they lie, index maps look there, and the
    arrays of outputs are inputs that share their memory."""
    places: list[Any] = [item.at if isinstance(item, Stacked) else None for item in (*arrays[prefetch:], *out_shapes)]
    firsts, total = [], 0
    for at in places:
        firsts.append(total)
        total += 0 if at is None else at.shape[0]
    into = {k: item for k, item in enumerate(out_shapes) if isinstance(item, Stacked)}

    def indices(n: int, at):
        return tuple(at[firsts[n] + k] for k in range(places[n].shape[0])) if places[n] is not None else ()

    def moved(n: int, spec: Any) -> pl.BlockSpec:
        if spec.block_shape is None:  # a whole array in HBM: the kernel is given a part of it
            return spec
        block = *(None,) * (0 if places[n] is None else places[n].shape[0]), *spec.block_shape
        return pl.BlockSpec(block, lambda *a: (*indices(n, a[-1]), *spec.index_map(*a[:-1])), pipeline_mode=spec.pipeline_mode)

    def inner(*refs):
        scalars, at, refs = refs[:prefetch], refs[prefetch], [*refs[prefetch + 1 :]]
        del refs[len(in_specs) : len(in_specs) + len(into)]
        for n, spec in enumerate((*in_specs, *out_specs)):
            if spec.block_shape is None and places[n] is not None:
                refs[n] = refs[n].at[indices(n, at)]
        kernel(*scalars, *refs)

    specs = [moved(n, spec) for n, spec in enumerate((*in_specs, *out_specs))]
    given = [a.array if isinstance(a, Stacked) else a for a in arrays]
    at = jnp.concatenate([at for at in places if at is not None]).astype(jnp.int32)
    shared = {a + (a >= prefetch): k for a, k in aliases.items()}
    shared |= {1 + len(given) + m: k for m, k in enumerate(into)}
    plain = {
        "kernel": inner,
        "in_specs": [*specs[: len(in_specs)], *[pl.BlockSpec(memory_space=pl.ANY) for _ in into]],
        "out_specs": specs[len(in_specs) :],
        "out_shapes": [(o.array.shape, o.dtype) if isinstance(o, Stacked) else o for o in out_shapes],
        "prefetch": prefetch + 1,
        "aliases": shared,
    }
    return plain, [*given[:prefetch], at, *given[prefetch:], *(item.array for item in into.values())]
