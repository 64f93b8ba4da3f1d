"""An option that a command has not is one line with the nearest that it has, in every command alike."""

import pytest

from train import evaluate, finetune, pretrain, pretrained
from train.data.inspect import Inspect
from train.data.job import run_job
from train.data.pack import Pack, run
from vitcore import export, inspect, weights
from vitcore.command_line import unknown

COMMANDS = {
    "train.data.pack": (lambda words: run_job(Pack, run, "train.data.pack", words), ["A", "B", "--resise", "3"], "--shorter-side"),
    "train.pretrain": (pretrain.main, ["--learing_rate=3"], "--learning-rate"),
    "train.finetune": (finetune.main, ["--int", "x"], "--init"),
    "train.evaluate": (evaluate.main, ["--no-allow-nonfinit"], "--no-allow-nonfinite"),
    "train.pretrained": (pretrained.main, ["A", "B", "--namin", "timm"], "--naming"),
    "train.data.inspect": (lambda words: run_job(Inspect, run, "train.data.inspect", words), ["A", "--splt", "train"], "--split"),
    "vitcore.export": (export.main, ["A", "B", "--platfoms", "cpu"], "--platforms"),
    "vitcore.inspect": (inspect.main, ["A", "--poll", "gap"], "--pool"),
    "vitcore.weights show": (weights.main, ["show", "A", "--hads", "3"], "--heads"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_nearest_option_is_said(name, capsys):
    main, words, near = COMMANDS[name]
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    word = next(word for word in words if word.startswith("--")).partition("=")[0].replace("_", "-")
    module = name.split()[0]
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: error: unknown option {word}: did you mean {near}? (python -m {module}")
    assert said.count("\n") == 1


def test_where_none_is_near_a_short_list_is_said():
    assert unknown(["--xyzzy"], ["--aaa", "--bbb"]) == "unknown option --xyzzy: there are --aaa, --bbb"
    assert unknown(["--xyzzy"], [f"--option-{i}" for i in range(30)]) == "unknown option --xyzzy"
    assert unknown(["a", "--aaa=1", "--", "--zzz"], ["--aaa"]) is None


def test_another_format_than_stablehlo_is_a_clear_no(capsys):
    assert export.main(["a.npz", "b.stablehlo", "--format", "onnx"]) == 2
    assert "--format onnx: StableHLO is what is written" in capsys.readouterr().err
    assert export.main(["a.npz", "b.onnx"]) == 2
    assert "b.onnx: StableHLO is what is written, not ONNX" in capsys.readouterr().err
