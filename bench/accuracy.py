"""Errors of the kernels and of their peers against float64, in a process of its own: what stands in the rows of `bench.kernels`.

    python -m bench.accuracy < requests.json        one line of JSON each

Where no device runs an implementation it is interpreted on the CPU, at two images of 4 x 4 patches: the width, heads and head width
of the named shape, 17 tokens. The error is the largest absolute difference over the largest true value; of value and gradients the
worst. The truth is the reference in float64.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import programs
from bench.device_study import start
from bench.marked import say
from bench.peers import attention as peers
from bench.shapes import SHAPES
from kernels.device import DEVICES
from kernels.launch import Launch
from vitcore import ViTConfig, variant
from vitcore.ops import BY_NAME, REFERENCE

IMAGES, PATCHES = 2, 4
WHERE = f"interpreted, {IMAGES} images of {PATCHES} x {PATCHES} patches"


def of_jobs(target: str, jobs, sides) -> dict[int, dict[str, Any]]:
    """Job -> implementation -> error against float64, or why there is none. In a process on the CPU: nothing runs on a TPU.

    jobs: (what, FLOPs, builder, arguments) as `bench.kernels` has them; those of single ops are compared. sides: for each job its
    implementations (name, the builder's `kernels`).
    """
    asked, places = [], []
    for i, ((_, _, build, arguments), names) in enumerate(zip(jobs, sides, strict=True)):
        if not build.endswith(":op_alone"):
            continue
        for name, _ in names:
            same = {key: arguments[key] for key in ("op", "shape", "dtype", "backward", "keep") if key in arguments}
            asked.append({**same, "name": "reference" if name == "xla" else name, "target": target})
            places.append((i, name))
    answers, problem = start(asked, seconds=60.0 * len(asked), module="bench.accuracy", platform="cpu")
    found: dict[int, dict[str, Any]] = {}
    for k, (i, name) in enumerate(places):
        answer = answers[k] if k < len(answers) else {"failed": problem}
        found.setdefault(i, {})[name] = answer.get("error", answer.get("failed"))
    return found


def _arrays(shapes, seed: int) -> list[np.ndarray]:
    """Float64 arrays that look like activations and weights: matrices scaled by their rows."""
    rng = np.random.default_rng(seed)

    def one(shape):
        rows = int(np.prod(shape.shape[:-1])) if len(shape.shape) == 4 else shape.shape[-2] if len(shape.shape) > 1 else 1
        return rng.standard_normal(shape.shape) * (rows**-0.5 if len(shape.shape) > 1 else 0.3)

    return [rng.standard_normal(shapes[0].shape), *map(one, shapes[1:])]


def _both(fn: Callable, backward: bool, arrays, cotangent) -> list[np.ndarray]:
    def run(arrays, cotangent):
        value, pullback = jax.vjp(fn, *arrays)
        return (value, *pullback(cotangent.astype(value.dtype))) if backward else (value,)

    return [np.asarray(a).astype(np.float64) for a in jax.jit(run)(tuple(arrays), cotangent)]


def _worst(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    return max(float(np.abs(f - t).max() / max(np.abs(t).max(), 1e-30)) for f, t in zip(found, truth, strict=True))


def _attention(name: str, config: ViTConfig, dtype, launch: Launch):
    """(attention over [B, T, N, H] by `name`, shapes of its arrays): layouts changed inside."""
    t, n, h = config.tokens, config.num_heads, config.width // config.num_heads
    one = peers.peer(name, tokens=t, heads=n, launch=launch, interpret=bool(launch.interpret))
    shape = jax.ShapeDtypeStruct((IMAGES, t, n, h), dtype)
    return (lambda *qkv: one.unpack(one.fn(*one.pack(*qkv)))), (shape,) * 3


def error(
    *, op: str, name: str, shape: str, dtype: str, backward: bool, target: str, full: bool = False, keep: bool = False
) -> float:
    """The error of implementation `name` of an op. target: whose tiles, interpreted; "here": as it runs on the device present.

    full: at the tokens of the named shape, instead of 17. keep: as in `programs.one_op`.
    """
    config = SHAPES[shape].config
    if not full:
        config = variant(SHAPES[shape].model, image_size=PATCHES * config.patch_size, num_classes=1000)
    here = target == "here"
    launch = programs.launch_for(jax.devices()[0]) if here and name == "ours" else None
    launch = launch or Launch(device=DEVICES["v3" if here else target], interpret=not here)
    kind = jnp.dtype(dtype)
    if op == "attention":
        fn, shapes = _attention(name, config, kind, launch)
        truth_of, _ = _attention("reference", config, kind, launch)
    else:
        fn, shapes = programs.op_of(
            op, config, IMAGES, kind, launch=launch if name == "ours" else None,
            ops=REFERENCE if name == "ours" else BY_NAME[name], keep=keep,
        )  # fmt: skip
        truth_of, _ = programs.op_of(op, config, IMAGES, kind, launch=None)
    arrays = _arrays(shapes, seed=7)
    rounded = [jnp.asarray(a, s.dtype) for a, s in zip(arrays, shapes, strict=True)]
    out = jax.eval_shape(fn, *shapes)
    cotangent = np.random.default_rng(8).standard_normal(out.shape)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = [jnp.asarray(np.asarray(a).astype(np.float64)) for a in rounded]
        truth = _both(truth_of, backward, exact, jnp.asarray(np.asarray(jnp.asarray(cotangent, out.dtype)).astype(np.float64)))
    interpreting = contextlib.nullcontext()
    if not here and name == "flash":
        from jax.experimental.pallas import tpu as pltpu

        interpreting = pltpu.force_tpu_interpret_mode()
    with interpreting:
        return _worst(_both(fn, backward, rounded, jnp.asarray(cotangent, out.dtype)), truth)


def main() -> None:
    for request in json.load(sys.stdin):
        answer: dict[str, Any]
        try:
            answer = {"error": error(**request)}
        except Exception as problem:  # some implementations do not run everywhere: the row says why
            answer = {"failed": " ".join(f"{type(problem).__name__}: {problem}".split())[:300]}
        say(answer)


if __name__ == "__main__":
    main()
