"""Checkpoints and a whole run on gs://, by the same code as on a disk, against a bucket that lives in the test's own process."""

import subprocess
import sys
import textwrap

import pytest

from tests.train.fault_jobs import JOB, ROOT, environment

pytestmark = pytest.mark.faults


def in_a_process(code):
    before = """
        from tests.train import fake_bucket
        from tests.train.fake_bucket import Bucket
        fake_bucket.serve()
        """
    code = textwrap.dedent(before) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def test_checkpoints_in_a_bucket():
    """Saved, kept by number, verified, put aside and restored; the arrays through tensorstore's own driver for gs://."""
    done = in_a_process(
        """
        import jax.numpy as jnp
        from train.checkpoint import Checkpoints, abstract
        state = {"w": jnp.arange(70000.0), "b": jnp.ones(3)}
        where = "gs://bucket/runs/a/checkpoints"
        with Checkpoints(where, keep=2) as checkpoints:
            assert not checkpoints.begun()
            for step in (1, 2, 3):
                checkpoints.save(step, state, {"n": step})
        assert any("POST /upload" in request for request in fake_bucket.REQUESTS), "tensorstore wrote elsewhere"
        assert any("/3/state/ocdbt.process_0/d/" in name for name in Bucket.store)
        with Checkpoints(where, keep=2) as checkpoints:
            assert checkpoints.begun()
            assert checkpoints.steps() == (2, 3)
            found, extra = checkpoints.restore(None, abstract(state))
            assert extra == {"n": 3}
            assert (found["w"] == state["w"]).all()
        name = next(name for name in Bucket.store if "/3/state/ocdbt.process_0/d/" in name)
        data = bytearray(Bucket.store[name].getvalue())
        data[100] ^= 1
        Bucket.store[name].seek(0)
        Bucket.store[name].write(bytes(data))
        said = []
        with Checkpoints(where, keep=2, say=said.append) as checkpoints:
            found, extra = checkpoints.restore(None, abstract(state))
            assert extra == {"n": 2}
            assert len(said) == 1 and "put aside as 3.damaged" in said[0], said
            checkpoints.save(3, state, {"n": 3})
            checkpoints.wait()
            assert checkpoints.steps() == (2, 3)
        # a save that was killed: its name is there, what says it is whole is not
        for name in [name for name in Bucket.store if "/checkpoints/3/" in name and name.endswith("commit_success.txt")]:
            del Bucket.store[name]
        with Checkpoints(where, keep=2) as checkpoints:
            found, extra = checkpoints.restore(None, abstract(state))
            assert extra == {"n": 2}
        print("well")
        """
    )
    assert done.stdout == "well\n", done.stdout + done.stderr


def test_a_run_in_a_bucket_stops_and_resumes():
    job = [*JOB, "--mesh", "1x1", "--steps", "9", "--eval-every", "4", "--checkpoint-every", "4"]
    done = in_a_process(
        f"""
        import json, os, signal
        import train.loop
        from train import pretrain
        options = {job!r} + ["--out", "gs://bucket/runs/b"]
        make = train.loop.make_train_step
        def stopping(*args):
            step = make(*args)
            def wrapped(state, *batch):
                if int(state.step) == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(state, *batch)
            return wrapped
        train.loop.make_train_step = stopping
        assert pretrain.main(options) == 0
        train.loop.make_train_step = make
        assert pretrain.main(options) == 0
        names = {{name.split("/runs/b/")[1].split("/")[0] for name in Bucket.store}}
        assert names == {{"config.json", "metrics.jsonl", "curves.png", "checkpoints", "checkpoints.begun"}}, names
        lines = Bucket.store["/bucket/runs/b/metrics.jsonl"].getvalue().decode().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))
        """
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "asked to stop at step 6" in done.stdout
    assert "resuming at step 6 from gs://bucket/runs/b/checkpoints" in done.stdout
    assert "finished at step 9" in done.stdout
