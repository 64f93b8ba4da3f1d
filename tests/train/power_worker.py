"""A run as far as it writes: `python power_worker.py OUT KEEP SAVES`. A file OUT/../../ack/N says that save N is whole."""

import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from train.checkpoint import Checkpoints
from train.job import claim, place
from train.metrics import Recorder


def state(step):
    rng = np.random.default_rng(step)
    return {"params": {"w": jnp.asarray(rng.random((300, 40), np.float32)), "b": jnp.full(7, step)}, "step": jnp.int32(step)}


def main(out, keep, saves):
    claim(place(out), {"model": "small"}, {"model": "small", "keep": keep})
    with Recorder(out, total_steps=saves) as recorder, Checkpoints(os.path.join(out, "checkpoints"), keep=keep) as checkpoints:
        for step in range(1, saves + 1):
            recorder.write(step, loss=1.0)
            recorder.publish()
            checkpoints.save(step, state(step), {"n": step})
            checkpoints.wait()
            (Path(out).parents[1] / "ack" / str(step)).touch()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
