"""One trial on the devices present, in a process of its own, which dies alone when memory ends. `bench.device_study` starts it.

    python -m bench.trial < request.json        one JSON object a line on stdout, after a mark

A request is {"task": "describe" | "sweep" | "fits", "library": "vitcore" | "timm" | "transformers", ...}:
- describe: platform, device kind, count, memory, and the rate of a large matrix product in the dtype asked for;
- sweep: images/s at `batches`, one line each as it is measured, until it stops rising or `budget` seconds are over;
- fits: whether one step at `batch` runs;
- edge: the largest batch whose bytes are there, by compiling alone: for a CPU, whose memory has no end until other programs die.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import edge
from bench.marked import out_of_memory, say
from bench.timing import Stepper, measure, predicted, still_rising
from train.signals import end_with_parent as end_with_parent  # done when `train` is imported

_STARTED = time.monotonic()
_CPU_SHARE = 0.8  # of the memory that is free: the rest is the machine's


def free_memory() -> int:
    """Bytes that this machine can give without swapping, and that this process may take."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, AttributeError):  # Linux alone says what of it is free
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(ImportError, ValueError):
        import resource

        for what in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            soft, _ = resource.getrlimit(what)
            if soft != resource.RLIM_INFINITY:
                free = min(free, soft)
    return int(free * _CPU_SHARE)


def _mesh(text: str | None):
    from train import mesh as meshes

    shape = meshes.parse(text or "1x1")
    meshes.prepare(shape)
    return meshes.make(shape)[0]


def _vitcore(request: dict[str, Any]) -> Callable[[int], Stepper]:
    """Our model: a function batch -> Stepper."""
    mesh = _mesh(request["mesh"])
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import NamedSharding

    from train.mesh import rows
    from train.shards import choose, laid_for
    from train.step import StepOptions, make_init, make_train_step
    from vitcore import apply_on, init, partition_specs, variant
    from vitcore.ops import BY_NAME, resolve
    from vitcore.pixels import to_unit

    dropout = {"dropout": request["dropout"]} if request.get("dropout") else {}
    config = variant(request["model"], image_size=request["size"], num_classes=1000, **dropout)
    dtype = jnp.dtype(request["dtype"])
    ops = resolve(None if request["ops"] == "auto" else BY_NAME[request["ops"]])
    shard = choose(request.get("shard", "auto"), config, mesh, dtype)
    if request["mode"] != "forward":  # which `apply_on` runs, on the two axes
        mesh = laid_for(shard, mesh, config)
    split = NamedSharding(mesh, rows(mesh))
    key = jax.random.key(0)

    def compiled(fn, *arguments):
        done = fn.lower(*arguments).compile()
        memory = done.memory_analysis()
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        return done, used

    def images(batch):
        make = jax.jit(partial(jax.random.bits, shape=(batch, *config.image_shape, 3), dtype=jnp.uint8), out_shardings=split)
        return make(jax.random.key(1))

    def shapes(batch):
        return jax.ShapeDtypeStruct((batch, *config.image_shape, 3), jnp.uint8, sharding=split)

    if request["mode"] == "forward":
        specs = jax.tree.map(partial(NamedSharding, mesh), partition_specs(config, mesh), is_leaf=_is_spec)

        def weights(key):
            # matrices once in the dtype of the products, where XLA would cast them at every call; kernels cast as they need
            params = init(key, config)
            xla = jax.default_backend() != "tpu" or ops is BY_NAME["reference"]
            return jax.tree.map(lambda a: a.astype(dtype) if a.ndim > 2 and xla else a, params)

        params = jax.jit(weights, out_shardings=specs)(key)
        model = apply_on(mesh, config, ops=ops, dtype=dtype)
        whole = jax.jit(lambda params, images: model(params, to_unit(images)))  # bytes in, as jobs have their images

        def forward(batch):
            step, used = compiled(whole, params, shapes(batch))
            x: list[Any] = []

            def run():
                if not x:
                    x.append(images(batch))
                step(params, x[0]).block_until_ready()

            return Stepper(run, used)

        return forward

    tx = optax.adam(1e-3)
    options = StepOptions(ops=ops, dtype=dtype, remat=request["remat"], shard=shard)
    state = [make_init(config, mesh, tx, options)(key)]
    step_of = make_train_step(config, mesh, tx, options)

    def train(batch):
        labels = jax.device_put(np.arange(batch, dtype=np.int32) % 1000, split)
        step, used = compiled(step_of, state[0], shapes(batch), labels)
        x: list[Any] = []

        def run():
            if not x:
                x.append(images(batch))
            state[0], metrics = step(state[0], x[0], labels)
            jax.block_until_ready((state[0], metrics))

        return Stepper(run, used)

    return train


def _is_spec(x) -> bool:
    from jax.sharding import PartitionSpec

    return isinstance(x, PartitionSpec)


def _steps(request: dict[str, Any]) -> Callable[[int], Stepper]:
    if request["library"] == "vitcore":
        return _vitcore(request)
    from bench.peers.on_torch import peer

    return peer(request)


def sweep(request: dict[str, Any]) -> None:
    """Times each batch size until throughput stops rising; says why it ended."""
    if request["library"] != "vitcore" and request["data"] > 1:
        from bench.peers import ddp

        ddp.sweep(request)
        return
    make = _steps(request)
    rates: list[float] = []
    compiling = 0.0  # seconds, the longest yet
    batches = list(request["batches"])
    while batches:
        batch = batches.pop(0)
        begun = time.monotonic()
        if rates:
            more = compiling + predicted(batch / rates[-1], seconds=request["seconds"])
            if begun - _STARTED + more > request["budget"]:
                say({"end": f"no time for batch {batch}"})
                return
        try:
            stepper = make(batch)
            compiling = max(compiling, time.monotonic() - begun)
            timing = measure(stepper.run, seconds=request["seconds"])
        except Exception as error:
            if not out_of_memory(error):
                raise
            if not rates and batch > request["data"]:
                batches = [batch // 2]
                continue
            say({"end": f"out of memory at batch {batch}"})
            return
        rates.append(batch / timing.median)
        say({"batch": batch, "images_per_second": rates[-1], **asdict(timing), "used": stepper.used})
        if not still_rising(rates):
            say({"end": "throughput stopped rising"})
            return
    say({"end": "all batch sizes measured"})


def fits(request: dict[str, Any]) -> None:
    """One step at one batch size; the line says whether it ran, and its bytes."""
    limit = request["memory"]
    try:
        stepper = _steps(request)(request["batch"])
        stepper.run()
        say({"fits": True, "used": stepper.used, "limit": limit})
    except Exception as error:
        if not out_of_memory(error):
            raise
        say({"fits": False, "used": 0, "limit": limit, "why": " ".join(str(error).split())[:300]})


def largest(request: dict[str, Any]) -> None:
    """Searches the edge in this process, since nothing runs: a step is compiled, and its bytes are compared with what is free."""
    make, limit = _steps(request), request["memory"]  # what was free when the study began

    def attempt(batch: int) -> edge.Attempt:
        say({"tries": batch})
        used = make(batch).used
        why = "more bytes than this machine has free" if used > limit else ""
        return edge.Attempt(batch=batch, fits=not why, used=used, limit=limit, why=why)

    found = edge.search(
        attempt,
        start=request["start"],
        step=request["step"],
        unit=request["data"],
        most=request["most"],
        in_time=lambda: time.monotonic() - _STARTED < request["budget"],
    )
    say({"edge": asdict(found)})


def describe(request: dict[str, Any]) -> None:
    """The devices, and FLOP/s of a square matrix product on one of them."""
    mesh = _mesh(request["mesh"])
    import jax
    import jax.numpy as jnp

    from train.build import cores
    from vitcore.ops import BY_NAME, resolve

    device = mesh.devices.flat[0]
    dtype = jnp.dtype(request["dtype"] or ("float32" if device.platform == "cpu" else "bfloat16"))
    side = 2048 if device.platform == "cpu" else 8192
    a, b = (jax.device_put(jax.random.normal(jax.random.key(i), (side, side), dtype), device) for i in (0, 1))
    product = jax.jit(jnp.dot)

    def once():
        product(a, b).block_until_ready()

    timing = measure(once, seconds=max(1.0, request["seconds"]), warmup=2 if device.platform == "cpu" else 50)  # clocks rise first
    memory = (device.memory_stats() or {}).get("bytes_limit", 0) if device.platform != "cpu" else free_memory()
    say(
        {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": len(jax.devices()),
            "mesh_devices": mesh.devices.size,
            "memory": memory,
            "dtype": dtype.name,
            "matmul_side": side,
            "matmul_flops": 2 * side**3 / timing.median,
            "matmul_spread": timing.spread,
            "jax": jax.__version__,
            "auto": next((name for name, ops in BY_NAME.items() if ops is resolve(None)), "auto"),
            "cores": cores(),
        }
    )


def main() -> None:
    request = json.load(sys.stdin)
    {"describe": describe, "sweep": sweep, "fits": fits, "edge": largest}[request["task"]](request)


if __name__ == "__main__":
    main()
