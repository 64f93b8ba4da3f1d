"""Whether a step fits is said before the first one: from the program's memory analysis and the device's limit."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from train import loop, memory
from train.run import Clock, Shares

GiB = 2**30


def analysis(arguments=0.0, temporaries=0.0, results=0.0, aliased=0.0):
    sizes = dict(argument=arguments, temp=temporaries, output=results, alias=aliased, generated_code=0)
    return SimpleNamespace(**{f"{name}_size_in_bytes": int(size * GiB) for name, size in sizes.items()})


def test_what_is_needed_counts_donated_memory_once_and_three_batches_beside():
    found = memory.needed(analysis(arguments=3, temporaries=4, results=2, aliased=2), images=GiB)
    assert found == 10 * GiB


def test_a_step_that_fits_passes():
    memory.check(analysis(2, 4), GiB, limit=9 * GiB, kept=GiB, batch_size=64, parts=2, device="card")


def test_one_that_does_not_fit_is_refused_with_the_batch_that_would():
    """State of 2 GiB; what grows with the batch is 16 GiB of 8 GiB there are: half of 64 images, a multiple of the parts."""
    with pytest.raises(
        memory.TooLarge, match=r"64 images needs 18\.0 GiB on each card, which has 10\.0 GiB.*--batch-size 30 fits"
    ) as e:
        memory.check(analysis(2, 16), 0, limit=10 * GiB, kept=2 * GiB, batch_size=64, parts=10, device="card")
    assert "\n" not in str(e.value)


def test_where_the_state_alone_is_too_large_no_batch_is_named():
    with pytest.raises(memory.TooLarge) as e:
        memory.check(analysis(12, 16), 0, limit=10 * GiB, kept=12 * GiB, batch_size=64, parts=1, device="card")
    assert "--batch-size" not in str(e.value)
    assert "--remat" in str(e.value)


def test_a_cpu_has_no_limit():
    assert memory.limit_of(jax.devices()[0]) is None


def test_a_run_that_does_not_fit_ends_before_its_first_step_and_one_that_does_goes_on(tmp_path, monkeypatch, capfd):
    """The job itself, on a CPU that says what it has."""
    from train.pretrain import main

    options = ["--mesh", "2x1", "--steps", "2", "--batch-size", "32", "--subset", "64"]
    monkeypatch.setattr(memory, "limit_of", lambda device: 1000)
    assert main([*options, "--out", str(tmp_path / "small")]) == 2
    said = capfd.readouterr().err
    assert "a step of 32 images needs" in said
    assert not list((tmp_path / "small" / "checkpoints").glob("[0-9]*"))
    monkeypatch.setattr(memory, "limit_of", lambda device: 2**40)
    assert main([*options, "--out", str(tmp_path / "large")]) == 0


def test_waiting_is_said_where_it_is_more_than_a_twentieth():
    said = []
    of: Any = SimpleNamespace(simulated=False, say=said.append, shares=Shares())
    loop._Loop.say_times(of, Clock(10, 100.0), 4.0)
    assert not said
    loop._Loop.say_times(of, Clock(10, 100.0), 6.0)
    assert "6% of the steps' time the devices waited for images" in said[0]
    of.simulated = True
    loop._Loop.say_times(of, Clock(10, 100.0), 90.0)
    assert len(said) == 1


def test_what_evaluations_and_saves_take_is_said_where_it_is_more_than_a_twentieth():
    shares = Shares()
    shares.seconds = {"evaluations": 4.0, "saves": 2.0}
    assert not shares.lines(94.0, 0.0)
    shares.seconds = {"evaluations": 20.0, "saves": 2.0}
    assert "20% of the time went into evaluations: --eval-every" in shares.lines(78.0, 0.0)[0]
    with shares.of("saves"), shares.of("probes", count=False):
        pass
    assert shares.seconds["saves"] > 2
    assert "probes" not in shares.seconds
    assert not Shares().lines(0.0, 0.0)  # a run that was stopped at its first step
