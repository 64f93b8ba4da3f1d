"""Batches drawn ahead: order, state, errors, and a wait that can be given up."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from train.feed import Feed, Kept


class Numbers:
    """0, 1, ... up to `end`; the state is the next one. Waits for `gate` before number `slow`."""

    def __init__(self, end=5, slow=None):
        self.at, self.end, self.slow, self.gate, self.closed = 0, end, slow, threading.Event(), False

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.slow:
            self.gate.wait()
        if self.at == self.end:
            raise StopIteration
        self.at += 1
        return self.at - 1

    def get_state(self):
        return {"next": self.at}

    def close(self):
        self.closed = True


class Slow(Numbers):
    """Whose state takes a while to read: in a draw nothing changes meanwhile, elsewhere the next is drawn."""

    def get_state(self):
        time.sleep(0.05)
        return super().get_state()


@pytest.mark.parametrize("kind", [Numbers, Slow])
def test_order_and_the_state_of_what_was_given_out(kind):
    numbers = kind()
    with Feed(numbers) as feed:
        assert feed.state == {"next": 0}
        for i in range(5):
            assert feed.next() == i
            assert feed.state == {"next": i + 1}  # not of the one drawn ahead
        assert feed.next() is None
    assert numbers.closed
    assert not feed.stuck


def test_an_iterator_that_is_wanted_no_more_is_closed_beside_the_caller():
    numbers = Numbers()
    with Feed(numbers) as feed:
        assert feed.next(more=False) == 0
        feed.end()
        deadline = time.monotonic() + 20
        while not numbers.closed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert numbers.closed
        assert feed.state == {"next": 1}
    assert not feed.stuck


def test_an_iterator_of_which_a_batch_is_ahead_is_not_closed_before_the_caller_leaves():
    numbers = Numbers()
    with Feed(numbers) as feed:
        assert feed.next() == 0
        feed.end()
        assert feed.next() == 1
        assert not numbers.closed
    assert numbers.closed


def test_one_is_drawn_ahead_unless_there_is_no_need():
    for more, drawn in ((True, 2), (False, 1)):
        numbers = Numbers()
        with Feed(numbers) as feed:
            feed.next(more=more)
            deadline = time.monotonic() + 20
            while numbers.at < drawn and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            assert numbers.at == drawn


def test_an_error_comes_where_its_batch_would():
    def numbers():
        yield 0
        raise OSError("gone")

    with Feed(numbers()) as feed:
        assert feed.next() == 0
        with pytest.raises(OSError, match="gone"):
            feed.next()


def test_a_wait_is_given_up_and_the_thread_that_waits_is_known():
    numbers = Numbers(slow=1)
    begun = time.monotonic()
    with Feed(numbers) as feed:
        assert feed.next() == 0
        assert feed.next(lambda: time.monotonic() > begun + 0.3) is None
        assert feed.state == {"next": 1}
    assert feed.stuck
    assert not numbers.closed  # a thread is in it
    assert time.monotonic() < begun + 30
    numbers.gate.set()


def test_what_was_given_up_is_not_lost():
    numbers = Numbers(slow=1)
    with Feed(numbers) as feed:
        assert feed.next() == 0
        assert feed.next(lambda: True) is None
        numbers.gate.set()
        assert feed.next() == 1


def test_a_wait_counts_as_idle_only_once_the_devices_have_ended():
    for ends, least, most in ((0.0, 0.15, 1.0), (0.1, 0.05, 0.19), (9.0, 0.0, 0.0)):
        numbers = Numbers(slow=1)
        with Feed(numbers) as feed:
            assert feed.next() == 0
            begun = time.perf_counter()
            threading.Timer(0.2, numbers.gate.set).start()
            assert feed.next(busy=lambda begun=begun, ends=ends: time.perf_counter() < begun + ends) == 1
            taken = time.perf_counter() - begun
            assert least <= feed.idle <= most + taken - 0.2, (ends, feed.idle, taken)
            assert feed.next() == 2


def test_no_wait_is_no_idleness():
    with Feed(Numbers()) as feed:
        feed.next()
        while not feed._ahead.done():  # pyright: ignore[reportOptionalMemberAccess]
            time.sleep(0.01)
        feed.next()
        assert feed.idle == 0


def test_a_small_set_is_read_once():
    """The second pass gives the first one's batches, though the reader used its memory again; a larger set is read each time, and
    so is one of which a pass was ended early."""
    read = []

    class Batches:
        def __init__(self):
            self.buffer, self.closed = np.zeros(4), 0
            read.append(self)

        def __iter__(self):
            for k in range(3):
                self.buffer[:] = k
                yield {"image": self.buffer}

        def close(self):
            self.closed += 1

    kept = Kept(Batches, 96)
    broken: Any = kept()
    next(broken)
    broken.close()
    assert len(read) == 1
    assert read[0].closed
    for _ in range(3):
        assert [batch["image"][0] for batch in kept()] == [0, 1, 2]
    assert len(read) == 2
    assert read[1].closed
    kept = Kept(Batches, 95)
    for _ in range(2):
        assert [batch["image"][0] for batch in kept()] == [0, 1, 2]
    assert len(read) == 4
