"""Where the seconds of a save go: `python -m bench.saves [--model ViT-B/16] [--folder PATH] [--saves 3]`.

The state is a model's parameters and Adam's two moments, float32 values whose mantissas are noise as in trained ones, on the first
device. It is saved by the trainer's own code; then as many bytes are written to one plain file and synced: what the disk takes. A
line a save:

    blocks     until the caller may go on (copies to the host)
    arrays     until tensorstore has written and synced what it was given
    checksums  of every file, read back
    commit     syncs of all else, the renames, and the removal of the step before
    whole      until the step is on the disk under its name
"""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from train import checkpoint, manifest, saved
from train.checkpoint import Checkpoints
from train.signals import before_the_end
from vitcore import init, variant


@dataclass(frozen=True, kw_only=True)
class Saves:
    """A save, and where its seconds go."""

    model: str = "ViT-B/16"
    """Of whose parameters and moments the state is made."""
    folder: Path = Path(tempfile.gettempdir())
    """On the disk to write to; nothing is left in it."""
    saves: int = 3
    compress: bool = False
    """Compress arrays by zstd, as runs did once."""


def state_of(model: str) -> dict[str, Any]:
    """Parameters and both moments of a model, of its shapes, in noise."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), variant(model)))
    leaves, tree = jax.tree.flatten({name: shapes for name in ("params", "mu", "nu")})
    noise = jax.jit(jax.random.uniform, static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [noise(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)])


def plain(folder: Path, size: int) -> tuple[float, float]:
    """Seconds to write so many bytes to one file, and to sync it."""
    block, path, begun = os.urandom(2**24), folder / "plain", time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
        written = time.perf_counter()
        os.fsync(file.fileno())
    synced = time.perf_counter()
    path.unlink()
    return written - begun, synced - written


def study(options: Saves) -> list[dict[str, float]]:
    """The seconds of each save; prints them."""
    if options.saves < 1:
        raise ValueError(f"--saves {options.saves}: at least 1 is required")
    state = jax.block_until_ready(state_of(options.model))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    work = Path(tempfile.mkdtemp(prefix="vitcore-saves-", dir=options.folder))
    before_the_end(lambda: shutil.rmtree(work, ignore_errors=True))
    write, measured, rows = manifest.write, [], []

    def measuring(directory):
        begun = time.perf_counter()
        write(directory)
        measured.append((begun, time.perf_counter()))

    def compressing():
        context = saved.handlers()
        context.array.saving.use_compression = options.compress
        return context

    manifest.write, checkpoint.handlers = measuring, compressing
    try:
        with Checkpoints(work / "checkpoints", keep=1) as checkpoints:
            for step in range(1, options.saves + 1):
                begun = time.perf_counter()
                checkpoints.save(step, state | {"step": jnp.int32(step)}, {})
                blocked = time.perf_counter()
                checkpoints.wait()
                whole = time.perf_counter()
                summed, done = measured[-1]  # the state's; that of the rest is done long before
                rows.append(
                    {"blocks": blocked - begun, "arrays": summed - blocked, "checksums": done - summed, "commit": whole - done,
                     "whole": whole - begun}
                )  # fmt: skip
                parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in rows[-1].items())
                print(f"save {step} of {size / 1e9:.2f} GB: {parts}", flush=True)
        written, synced = plain(work, size)
        print(f"one file of as many bytes in {options.folder}: written in {written:.2f} s, synced in {synced:.2f} s")
    finally:
        manifest.write, checkpoint.handlers = write, saved.handlers
        shutil.rmtree(work, ignore_errors=True)
    return rows


if __name__ == "__main__":
    study(tyro.cli(Saves, description=__doc__))
