"""How the processes of a job meet: strangers, the same job started twice, processes that do not come, signals meanwhile."""

import os
import signal
import socket
import threading
import time

import pytest

from tests.train.fault_jobs import free_port, start, start_two, steps
from train import meeting

pytestmark = pytest.mark.faults
RUN = ["--mesh", "2x1", "--steps", "100000", "--eval-every", "100000", "--checkpoint-every", "4", "--heartbeat-timeout", "10"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


class Guest(threading.Thread):
    """A process that meets the others, in a thread."""

    def __init__(self, address, count, rank, *, timeout=20.0, asked=lambda: False):
        super().__init__(daemon=True)
        self.what, self.result = (address, count, rank, timeout, asked), None
        self.start()

    def run(self):
        address, count, rank, timeout, asked = self.what
        try:
            meeting.meet(address, count, rank, timeout=timeout, asked=asked)
            self.result = "met"
        except (meeting.Missed, meeting.Told) as error:
            self.result = str(error)

    def end(self, seconds=25.0) -> str:
        self.join(seconds)
        return str(self.result)


def test_all_meet_in_whatever_order_they_come():
    address = f"localhost:{free_port()}"
    guests = []
    for rank in (3, 1, 0, 2):
        guests.append(Guest(address, 4, rank))
        time.sleep(0.2)
    assert [guest.end() for guest in guests] == ["met"] * 4


def test_strangers_are_turned_away_and_the_others_still_meet():
    port = free_port()
    guests = [Guest(f"127.0.0.1:{port}", 2, 0)]
    time.sleep(0.3)
    said = []
    for words in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01" * 3000,
        b'{"vitcore": 3, "rank": 1}\n',
        b'{"vitcore": 2, "rank": 0}\n',
        b"",
        b"[" * 4000 + b"\n",  # beyond the stack of Python's own reader
        b'{"vitcore": 2, "rank": 1e999}\n',
        b'{"vitcore": 2, "rank": NaN}\n',
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.settimeout(10)
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            try:
                said.append(stranger.recv(1000))
            except ConnectionError:
                said.append(b"")
    silent = socket.create_connection(("127.0.0.1", port))
    assert [b"refused" in answer for answer in said] == [False, False, True, True, False, False, False, False]
    guests.append(Guest(f"127.0.0.1:{port}", 2, 1))
    assert [guest.end() for guest in guests] == ["met"] * 2
    silent.close()


def test_a_rank_that_comes_twice_is_refused_and_the_first_meets():
    address = f"localhost:{free_port()}"
    guests = [Guest(address, 3, 0), Guest(address, 3, 1)]
    time.sleep(0.5)
    assert Guest(address, 3, 1).end() == "process 1 of 3 has come already: it was started twice"
    assert "is in use, by this job started a second time" in Guest(address, 3, 0).end()
    guests.append(Guest(address, 3, 2))
    assert [guest.end() for guest in guests] == ["met"] * 3


def test_a_guest_that_dies_while_it_waits_may_come_again():
    port = free_port()
    guests = [Guest(f"localhost:{port}", 3, 0)]
    time.sleep(0.3)
    with socket.create_connection(("localhost", port)) as first:
        first.sendall(b'{"vitcore": 3, "rank": 1}\n')
        time.sleep(0.5)
    guests += [Guest(f"localhost:{port}", 3, rank) for rank in (1, 2)]
    assert [guest.end() for guest in guests] == ["met"] * 3


def test_who_does_not_come_is_named_within_the_timeout():
    address = f"localhost:{free_port()}"
    began = time.monotonic()
    guests = [Guest(address, 4, rank, timeout=2) for rank in (0, 2)]
    words = f"processes 1, 3 of 4 did not come to {address} within 2 s (--join-timeout)"
    assert [guest.end() for guest in guests] == [words, words]
    assert Guest(address, 4, 1, timeout=1).end() == f"process 0 of 4 was not at {address} within 1 s (--join-timeout)"
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_is_obeyed_while_a_process_waits(rank):
    asked = threading.Event()
    address = f"localhost:{free_port()}"
    guests = [Guest(address, 3, k, asked=asked.is_set if k == rank else lambda: False) for k in (0, 1)]
    time.sleep(0.5)
    asked.set()
    assert "asked to stop" in guests[rank].end(3)
    if rank == 0:
        assert guests[1].end(3) == "process 0 was asked to stop"


def test_process_0_listens_at_the_address_named_alone():
    assert meeting.bind_to("localhost") in ("127.0.0.1", "::1")
    assert meeting.bind_to("127.0.0.1") == "127.0.0.1"
    assert meeting.bind_to("192.0.2.7") is None  # no address of this machine
    assert meeting.split("[::1]:80") == ("::1", 80)


# --- jobs -------------------------------------------------------------------------------------------------------------------


def listeners(port) -> set[str]:
    """The addresses, as the kernel writes them, at which somebody listens on a port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in open(table).read().splitlines()[1:]:  # noqa: SIM115
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.split(":")[1], 16) == port:
                found.add(local.split(":")[0])
    return found


def test_strangers_and_a_second_start_leave_a_running_job_alone(tmp_path, cache):
    """Both ranks of the same job once more, and whatever else connects: each is refused in one line, the job goes on and saves."""
    port = free_port()
    options = [*RUN, "--out", tmp_path / "run"]
    at = [["--distributed", f"localhost:{port},2,{rank}"] for rank in range(2)]
    jobs = [start(tmp_path, *at[rank], *options, cache=cache, name=f"rank{rank}", faults=["say-train@3"]) for rank in range(2)]
    jobs[0].reach("AT train")
    assert {address[-8:] for address in listeners(port)} == {"0100007F"}  # 127.0.0.1, perhaps as an address of version 6
    second = [start(tmp_path, *at[rank], *options, cache=cache, name=f"second{rank}") for rank in range(2)]
    for words in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(3000)):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(words)
    assert [job.end(60) for job in second] == [2, 2], second[1].stderr
    assert "is in use, by this job started a second time" in second[0].stderr
    assert "is a job that has begun" in second[1].stderr
    assert all(job.stderr.count("error: ") == 1 and "Traceback" not in job.stderr for job in second)
    assert [job.process.poll() for job in jobs] == [None, None], jobs[0].stderr + jobs[1].stderr
    jobs[1].term()
    assert [job.end() for job in jobs] == [0, 0], jobs[0].stderr + jobs[1].stderr
    assert steps(tmp_path / "run")


def test_a_killed_peer_ends_the_job_and_costs_nothing_saved(tmp_path, cache):
    options = [*RUN, "--checkpoint-wait", "--out", tmp_path / "run"]
    jobs = start_two(tmp_path, *options, faults=["say-train@7"], cache=cache)
    jobs[1].reach("AT train")
    before = steps(tmp_path / "run")
    jobs[1].process.kill()
    assert jobs[1].end() == -signal.SIGKILL
    assert jobs[0].end(25) != 0, jobs[0].stderr  # jax ends it, with a message of its own
    assert before == [4]
    assert steps(tmp_path / "run") == before


def test_a_job_whose_other_process_does_not_come_ends_in_one_line_and_on_a_signal(tmp_path):
    options = [*RUN, "--out", tmp_path / "run"]
    alone = start(tmp_path, "--distributed", f"localhost:{free_port()},2,0", *options, "--join-timeout", "3", name="alone")
    waiting = start(tmp_path, "--distributed", f"localhost:{free_port()},2,1", *options, name="waiting")
    assert alone.end(90) == 2
    assert "process 1 of 2 did not come to " in alone.stderr
    time.sleep(1)
    waiting.term()
    assert waiting.end(10) == 128 + signal.SIGTERM
    assert "asked to stop before it began (asked to stop): nothing was changed" in waiting.stderr
    assert not (tmp_path / "run").exists()
