"""`make transfer`: that it keeps what it promises, and that what is done is not done again."""

import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from train import transfer


def test_the_lines_and_the_picture(tmp_path):
    shots = {"1": [0.5, 0.6], "5": [0.7, 0.9], "10": [0.9, 0.9], "25": [0.95, 0.97]}
    result = {
        "fewshot": {"features": shots, "pixels": {k: [v - 0.1 for v in values] for k, values in shots.items()}},
        "finetune": {"rate": 0.1, "mean": 0.985, "std": 0.002, "final": {"0": {}, "1": {}}},
    }
    lines = transfer.describe(result)
    assert lines[1] == "5-shot, digits 5 to 9: 80.00% from the features, 70.00% from the pixels: +10.00 points"
    assert lines[-1] == "fine-tuned, digits 5 to 9: 98.50% +- 0.20% in 2 runs"
    transfer.draw(result, epath.Path(tmp_path / "t.png"))
    assert len(np.unique(np.asarray(Image.open(tmp_path / "t.png").convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_a_mistake_is_one_line(capsys):
    assert transfer.main(["--runs", "0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("train.transfer: error: --pretrain-steps")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_it_keeps_its_promise(tmp_path, capsys):
    """Above 97 % fine-tuned; five shots from the features beat the pixels by the stated margin."""
    argv = ["--out", str(tmp_path)]
    assert transfer.main(argv) == 0
    printed = capsys.readouterr().out
    held = json.loads((tmp_path / "transfer.json").read_text())
    assert held["finetune"]["mean"] > 0.97
    five = {what: np.mean(held["fewshot"][what]["5"]) for what in ("features", "pixels")}
    assert five["features"] > five["pixels"] + transfer.MARGIN
    assert f"fine-tuned, digits 5 to 9: {held['finetune']['mean']:.2%}" in printed
    before = (tmp_path / "transfer.json").read_text()
    assert transfer.main(argv) == 0
    assert "finished at step 1500" in capsys.readouterr().out
    assert (tmp_path / "transfer.json").read_text() == before
