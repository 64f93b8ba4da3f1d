"""Times one implementation of one op on the device present, and its error there against float64; a process of its own.

python -m bench.kernel_trial < request.json        {"op", "name", "shape", "batch", "dtype", "backward", "seconds"}
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp

from bench.accuracy import error
from bench.marked import say
from bench.programs import one_op
from bench.timing import measure
from train import mesh as meshes


def main() -> None:
    request = json.load(sys.stdin)
    meshes.prepare(None)
    seconds, name = request.pop("seconds"), request.pop("name")
    kernels: Any = {"ours": True, "reference": False}.get(name, name)
    fn, shapes = one_op(jax.devices(), **request, kernels=kernels)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [0.1 * jax.random.normal(k, s.shape, jnp.float32).astype(s.dtype) for k, s in zip(keys, shapes, strict=True)]
    call = jax.jit(fn)

    def once():
        jax.block_until_ready(call(*arrays))

    timing = measure(once, seconds=seconds)
    off = error(op=request["op"], name=name, shape=request["shape"], dtype=request["dtype"], backward=request["backward"],
                target="here", full=True)  # fmt: skip
    say({**asdict(timing), "error": off})


if __name__ == "__main__":
    main()
