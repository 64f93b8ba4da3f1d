"""Whether a step fits is said before the first one: from the program's memory analysis and the device's limit."""

from types import SimpleNamespace

import jax
import pytest

from train import loop, memory

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
    of = SimpleNamespace(simulated=False, say=said.append)
    loop._Loop.say_waiting(of, 0.04)
    assert not said
    loop._Loop.say_waiting(of, 0.06)
    assert "6% of the time the devices waited for images" in said[0]
    loop._Loop.say_waiting(SimpleNamespace(simulated=True, say=said.append), 0.9)
    assert len(said) == 1
