"""What a save costs the training: the time it blocks, for ViT-B/16's state, beside a step; and what --checkpoint-wait costs.

python -m pytest -m "faults and slow" -s tests/train/test_faults_save.py
"""

import subprocess
import sys
import textwrap

import pytest

from tests.train.fault_jobs import ROOT, environment

pytestmark = [pytest.mark.faults, pytest.mark.clock, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_save_blocks_a_fraction_of_a_step(tmp_path):
    """The copy of the arrays is all that the loop waits for; writing, checksums and the commit go on beside the next steps. The
    state has parameters and both moments, 1.0 GB; a step of more than these 16 images only makes the ratio smaller."""
    code = f"""
        import time, jax, numpy as np
        from train.checkpoint import Checkpoints
        from train.optim import optimizer, schedule
        from train.step import StepOptions, make_init, make_train_step
        from vitcore import variant
        config = variant("ViT-B/16")
        mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        tx = optimizer(schedule(base_lr=1e-3, total_steps=100), base_lr=1e-3)
        state = make_init(config, mesh, tx, StepOptions())(jax.random.key(0))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        step = make_train_step(config, mesh, tx, StepOptions())
        images, labels = np.zeros((16, 224, 224, 3), np.float32), np.zeros(16, np.int32)
        def timed(function):
            begun = time.perf_counter()
            result = function()
            return result, time.perf_counter() - begun
        def steps(state, n):
            taken = []
            for _ in range(n):
                (state, _), t = timed(lambda: jax.block_until_ready(step(state, images, labels)))
                taken.append(t)
            return state, taken
        state, taken = steps(state, 4)
        plain, blocked, beside, whole = min(taken[1:]), [], [], []
        with Checkpoints({str(tmp_path / "c")!r}, keep=1) as checkpoints:
            for number in (1, 2, 3):
                begun = time.perf_counter()
                blocked.append(timed(lambda: checkpoints.save(number, state, {{}}))[1])
                state, taken = steps(state, 1)
                beside += taken
                checkpoints.wait()
                whole.append(time.perf_counter() - begun)
            waited = timed(lambda: (checkpoints.save(4, state, {{}}), checkpoints.wait()))[1]
        ratios = sorted(b / plain for b in blocked)
        print(f"ViT-B/16 state of {{size / 1e9:.2f}} GB: a save blocks {{sorted(blocked)[1]:.3f}} s",
              f"(median of 3, from {{min(blocked):.3f}} to {{max(blocked):.3f}}) and is whole after {{min(whole):.2f}} s,",
              f"with --checkpoint-wait after {{waited:.2f}} s;",
              f"a step of 16 images takes {{plain:.2f}} s, beside a save {{min(beside):.2f}} s")
        print(f"blocked / step: {{ratios[1]:.4f}} (median of 3, from {{ratios[0]:.4f}} to {{ratios[2]:.4f}}), "
              f"with --checkpoint-wait {{waited / plain:.2f}}")
        print("ratio", ratios[1])
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert "state of 1.0" in done.stdout
    assert float(done.stdout.split("ratio ")[1]) < 0.5
