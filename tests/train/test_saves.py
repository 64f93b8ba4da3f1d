"""What a save spares: arrays that are not compressed, checksums by several threads; and that older steps are read as before."""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import checkpoint, manifest, saved
from train.checkpoint import Checkpoints, abstract


def size(directory) -> int:
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(directory) for name in names)


def compressing():
    context = saved.handlers()
    context.array.saving.use_compression = True
    return context


def test_arrays_are_written_as_they_are_and_compressed_ones_of_before_are_read(tmp_path, monkeypatch):
    state = {"kernel": jnp.zeros((512, 1024)).at[0].set(jnp.arange(1024.0)), "step": jnp.int32(1)}
    monkeypatch.setattr(checkpoint, "handlers", compressing)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state, {})
    monkeypatch.undo()
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(2, state | {"step": jnp.int32(2)}, {})
        checkpoints.wait()
        assert size(tmp_path / "c" / "1") < 2**20 < 2**21 <= size(tmp_path / "c" / "2")
        for step in (1, 2):
            held, _ = checkpoints.restore(step, abstract(state))
            np.testing.assert_array_equal(np.asarray(held["kernel"]), np.asarray(state["kernel"]))
            assert int(held["step"]) == step


@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 250, 300, 1001])
def test_the_checksum_of_a_file_is_that_of_its_pieces(tmp_path, monkeypatch, length):
    monkeypatch.setattr(manifest, "_PIECE", 100)
    monkeypatch.setattr(manifest, "_CHUNK", 7)
    content = np.random.default_rng(length).bytes(length)
    (tmp_path / "file").write_bytes(content)
    with ThreadPoolExecutor(3) as pool:
        for most in (None, length, length + 50):
            assert manifest._measure(tmp_path / "file", pool, most=most) == (length, zlib.crc32(content))
    manifest.write(tmp_path)
    assert manifest.faults(tmp_path) == []
    for place in {0, length // 2, length - 1} if length else ():
        (tmp_path / "file").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert manifest.faults(tmp_path) == ["file is not what was written (checksum)"]
    (tmp_path / "file").write_bytes(content + b"more")
    assert manifest.faults(tmp_path) == [f"file has more bytes, {length} were written"]


def test_a_large_state_is_measured_by_several_threads(tmp_path, monkeypatch):
    """Nearly all of a step is one file."""
    monkeypatch.setattr(manifest, "_PIECE", 2**18)
    read, pieces = manifest._read, []

    def seen(path, start=0, length=None, **more):
        pieces.append((os.path.basename(path), start))
        return read(path, start, length, **more)

    monkeypatch.setattr(manifest, "_read", seen)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"kernel": jax.random.normal(jax.random.key(0), (512, 1024))}, {})
    assert len({start for _, start in pieces}) > 4
