"""Commands of bench: what a user mistypes is one line that says what was meant."""

import pytest

from bench.kernels import Kernels
from bench.options import command, parse
from bench.throughput import Throughput


@pytest.mark.parametrize(
    ("cls", "words", "said"),
    [
        (Kernels, ["--targt", "v3"], "unknown option --targt: did you mean --target?"),
        (Throughput, ["--modles=ViT-B/16"], "unknown option --modles: did you mean --models?"),
        (Throughput, ["--no-larges"], "unknown option --no-larges: did you mean --no-largest?"),
        (Kernels, ["--shape", "B/99@224"], "unknown shape 'B/99@224': did you mean 'B/16@224'? known: B/16@224"),
        (Kernels, ["--whole", "ViT-B/16"], "--whole, --largest-batch and --calibrate ask the compiler: name a --target"),
        (Throughput, ["--target", "v9"], "v9"),
        (Kernels, ["--batch", "many"], "many"),
    ],
)
def test_what_is_mistyped_is_said_in_one_line(cls, words, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(cls, "bench.x", words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_good_options_arrive():
    assert parse(Kernels, "bench.kernels", ["--target", "v3", "v5e", "--no-peers"]).target == ("v3", "v5e")
    assert not parse(Kernels, "bench.kernels", ["--no-peers"]).peers


def test_a_command_ends_with_2_and_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--batch", "0"])
    assert command(Kernels, "bench.kernels", lambda options: 0) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench.kernels: --batch, --step and --remat-every must be positive")
    assert said.count("\n") == 1
