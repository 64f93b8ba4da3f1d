"""A run that is killed under one --shard goes on under another: what is split over the data axis is no part of what a run is."""

import numpy as np
import pytest

from tests.train.fault_jobs import JOB, held, losses, start
from train import pretrain

pytestmark = pytest.mark.faults

WORDS = ["--mesh", "2x1", "--steps", "10", "--eval-every", "5", "--checkpoint-every", "4", "--checkpoint-wait", "--clip-norm", "1"]


def run(*options):
    assert pretrain.main([*JOB, *WORDS, *map(str, options)]) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run("--shard", "parameters", "--out", out)
    return out


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("optimizer", "parameters"),
        pytest.param("parameters", "optimizer", marks=pytest.mark.slow),
        pytest.param("parameters", "none", marks=pytest.mark.slow),
        pytest.param("none", "parameters", marks=pytest.mark.slow),
    ],
)
def test_killed_under_one_it_resumes_under_another(whole, tmp_path, capsys, before, after):
    out = tmp_path / "run"
    job = start(tmp_path, *WORDS, "--shard", before, "--out", out, faults=["say-train@7"])
    job.reach("AT train")
    job.process.kill()
    job.process.wait()
    assert f"--shard {before}" in job.stdout
    run("--shard", after, "--out", out)
    said = capsys.readouterr().out
    assert "resuming at step 4" in said
    assert f"--shard {after}" in said
    found, expected = losses(out), losses(whole)
    assert [line[0] for line in found] == list(range(1, 11))
    np.testing.assert_allclose(
        [line[1:3] for line in found], [line[1:3] for line in expected], rtol=1e-5
    )  # sums over devices are grouped in another way: float32's rounding
    (x, _), (y, _) = held(out, 10), held(whole, 10)
    assert x.keys() == y.keys()
    for name in x:
        np.testing.assert_allclose(x[name], y[name], rtol=1e-4, atol=1e-5, err_msg=name)
