"""The search for the largest batch, on memories made up here: it ends, it is right, it takes few attempts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.edge import Attempt, default_step, search


class Memory:
    """A device of `limit` bytes on which batch b takes fixed + slope * b, and `bend` more for each image beyond `knee`."""

    def __init__(self, limit, fixed=0, slope=1, knee=10**9, bend=0, *, tells=True):
        self.limit, self.tells, self.tried = limit, tells, []
        self.bytes = lambda b: fixed + slope * b + bend * max(0, b - knee)

    def attempt(self, batch):
        assert batch not in self.tried, f"batch {batch} tried twice"
        self.tried.append(batch)
        used = self.bytes(batch)
        why = "" if used <= self.limit else "out of memory"
        known = {"used": used, "limit": self.limit} if self.tells else {}
        return Attempt(batch=batch, fits=not why, why=why, **known)

    def largest(self, step):
        return max((b for b in range(0, 20_000, step) if b == 0 or self.bytes(b) <= self.limit), default=0)


def test_two_attempts_predict_and_two_prove():
    memory = Memory(10_000, fixed=900, slope=7)
    found = search(memory.attempt, start=64, step=1)
    assert (found.batch, found.beyond, found.complete) == (1300, 1301, True)
    assert memory.tried == [64, 128, 1300, 1301]
    assert found.why == "out of memory"


def test_bytes_that_are_not_affine_still_end_at_the_edge():
    memory = Memory(10_000, fixed=100, slope=1, knee=500, bend=9)
    found = search(memory.attempt, start=16, step=1)
    assert found.batch == memory.largest(1)
    assert found.complete
    assert len(memory.tried) <= 12


def test_a_cliff_that_no_prediction_sees_is_found_by_bisection():
    """Bytes say that 22,000 fit; what ends it at 5,000 tells nothing of its bytes: predictions must not creep towards it."""
    memory = Memory(15_480_000, fixed=24_000, slope=701)
    tried = []

    def attempt(batch):
        tried.append(batch)
        return memory.attempt(batch) if batch <= 4986 else Attempt(batch=batch, fits=False, limit=15_480_000, why="refused")

    found = search(attempt, start=64, step=1)
    assert (found.batch, found.beyond, found.complete) == (4986, 4987, True)
    assert len(tried) <= 3 + 15


@given(
    st.integers(1, 5000), st.integers(0, 3000), st.integers(1, 9), st.sampled_from([1, 3, 8]), st.integers(1, 200), st.booleans()
)
def test_the_edge_is_the_edge(limit, fixed, slope, step, start, tells):
    memory = Memory(limit, fixed, slope, tells=tells)
    found = search(memory.attempt, start=start, step=step, tries=60)
    assert found.complete
    assert found.batch == memory.largest(step)
    assert found.beyond - found.batch == step


def test_what_does_not_fit_at_all_is_said():
    memory = Memory(10, fixed=50)
    found = search(memory.attempt, start=32, step=1)
    assert (found.batch, found.beyond, found.complete) == (0, 1, True)


def test_batches_stay_multiples_of_the_data_axis():
    memory = Memory(5_000, fixed=100, slope=3)
    found = search(memory.attempt, start=24, unit=24)
    assert all(b % 24 == 0 for b in memory.tried)
    assert found.batch <= memory.largest(24) < found.batch + default_step(found.batch) * 24 + 24


def test_limits_on_attempts_and_time_are_no_proof():
    assert not search(Memory(10**8).attempt, start=1, step=1, tries=2).complete
    late = search(Memory(100).attempt, start=1, in_time=lambda: False)
    assert (late.batch, late.complete) == (0, False)
    capped = search(Memory(10**8).attempt, start=1, most=4096)
    assert (capped.batch, capped.beyond, capped.complete) == (4096, 0, False)


@pytest.mark.parametrize(("batch", "step"), [(1, 1), (64, 1), (1000, 8), (4096, 64)])
def test_the_default_step_is_under_two_percent(batch, step):
    assert default_step(batch) == step
