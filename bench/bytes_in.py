"""Patch embedding from bytes on the GPU that is present: one kernel beside XLA's passes, alone and in whole models.

    python -m bench.bytes_in [--models ViT-B/16 ViT-L/16] [--batch 128] [--seconds 1]

Each program runs so long alone, by turns, in this process; what is printed are the medians of their turns. `vitcore.ops.GPU` does
not take bytes by default: this says whether it should.
"""

import argparse
import statistics
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels.attention.hopper.plan import not_hopper
from kernels.patch_embed import gpu
from kernels.patch_embed.hopper_plan import Shape, refuses
from kernels.patch_embed.reference import to_unit

TURNS = 4
WAYS = {"floats": False, "bytes": True}


def rate(run, seconds: float) -> float:
    """Seconds a call of run(), which starts work on the device and returns it."""
    jax.block_until_ready(run())
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        jax.block_until_ready([run() for _ in range(10)][-1])
        calls += 10
    return (time.perf_counter() - start) / calls


def by_turns(programs: dict, seconds: float) -> dict[str, float]:
    """The median seconds a call of each program."""
    for run in programs.values():
        rate(run, seconds)
    found = [{name: rate(run, seconds) for name, run in programs.items()} for _ in range(TURNS)]
    return {name: statistics.median(turn[name] for turn in found) for name in programs}


def op(config, batch: int):
    """The op on bytes, from an image to tokens in bfloat16, each way; and the gradients of its parameters."""
    p = jax.eval_shape(partial(_init, config), jax.random.key(0))["patch_embed"]
    keys = iter(jax.random.split(jax.random.key(0), 9))
    kernel, bias, cls, position = (
        jax.random.normal(next(keys), shape) * 0.02
        for shape in (p["kernel"].shape, (config.width,), (config.width,), (config.tokens, config.width))
    )
    images = _images(config, batch)
    g = jax.random.normal(next(keys), (batch, config.tokens, config.width), jnp.bfloat16)

    def forward(own, *w):
        if own:
            return gpu.patch_embed(images, *w, dtype=jnp.bfloat16)
        return gpu.patch_embed(to_unit(images).astype(jnp.bfloat16), *w)

    def gradients(own, *w):
        return jax.vjp(partial(forward, own), *w)[1](g)

    w = (kernel, bias, cls, position)
    compiled = {(what.__name__, way): jax.jit(partial(what, own)) for what in (forward, gradients) for way, own in WAYS.items()}
    apart = [jnp.asarray(compiled["forward", way](*w), jnp.float32) for way in WAYS]
    print(
        f"{config.width}: largest difference {jnp.abs(apart[0] - apart[1]).max():.4f} of {jnp.abs(apart[0]).max():.2f}", flush=True
    )
    return {f"op {what}, {way}": partial(run, *w) for (what, way), run in compiled.items()}


def whole(config, batch: int, mode: str):
    """The model's logits, or a training step with Adam, each way."""
    import optax

    from train.step import StepOptions, make_init, make_train_step
    from vitcore.context import Context
    from vitcore.model import forward
    from vitcore.ops import GPU

    programs = {}
    for way, own in WAYS.items():
        ops = GPU._replace(bytes=own)
        images = _images(config, batch)
        if mode == "forward":
            cast = jax.jit(lambda key: jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim > 2 else a, _init(config, key)))
            context = Context(ops=ops, dtype=jnp.bfloat16)
            run = jax.jit(lambda p, x, context=context: forward(p, x, config, context))
            programs[f"{mode}, {way}"] = partial(run, cast(jax.random.key(0)), images)
            continue
        options = StepOptions(ops=ops, dtype=jnp.bfloat16)
        mesh = Mesh([[jax.devices()[0]]], ("data", "model"))
        tx = optax.adam(1e-4)
        step, labels = make_train_step(config, mesh, tx, options), jnp.zeros((batch,), jnp.int32)
        held = [make_init(config, mesh, tx, options)(jax.random.key(0))]

        def train(step=step, held=held, images=images, labels=labels):
            held[0], metrics = step(held[0], images, labels)
            return metrics["loss"]

        programs[f"{mode}, {way}"] = train
    return programs


def _init(config, key):
    from vitcore import init

    return init(key, config)


def _images(config, batch: int):
    return jax.random.bits(jax.random.key(1), (batch, *config.image_shape, 3), jnp.uint8)


def main(argv: list[str] | None = None) -> int:
    from vitcore import variant

    parser = argparse.ArgumentParser(prog="bench.bytes_in", description="Patch embedding from bytes on the GPU that is present")
    parser.add_argument("--models", nargs="+", default=["ViT-B/16", "ViT-L/16"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--parts", nargs="+", choices=("op", "forward", "train"), default=["op", "forward", "train"])
    args = parser.parse_args(argv)
    if (why := not_hopper()) is not None:
        print(f"bench.bytes_in: {why}: nothing of ours would run", file=sys.stderr)
        return 2
    print(jax.devices()[0].device_kind, flush=True)
    for model in args.models:
        try:
            config = variant(model, num_classes=1000)
        except ValueError as error:
            parser.error(str(error))
        rows, columns = config.grid
        shape = Shape(
            batch=args.batch, channels=3, rows=rows, columns=columns, patch=config.patch_size, width=config.width,
            tokens=config.tokens, first=config.class_tokens,
        )  # fmt: skip
        if (why := refuses(shape, jnp.bfloat16)) is not None:
            print(f"{model}: {why}", flush=True)
            continue
        for part in args.parts:
            programs = op(config, args.batch) if part == "op" else whole(config, args.batch, part)
            for name, seconds in by_turns(programs, args.seconds).items():
                print(f"{model} {name}: {1e6 * seconds:.1f} us a call, {args.batch / seconds:,.0f} images/s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
