"""How the processes of a job meet at HOST:PORT, before they join through jax.distributed there.

To join is final: a process that joins under a rank that another one holds ends both, with an abort in C++ and nothing saved. So
each first says who it is. Process 0 listens at the address named, and at no other where that is one of this machine's own; the rest
connect and send one line of JSON, {"vitcore": count, "rank": rank}. Whoever sends anything else, or a rank that is taken, is turned
away and the others go on waiting. When all have come process 0 lets them go, closes, and jax's own service takes the port: whoever
comes later hears that instead, and knows that the job has begun. Everything here ends within its time and obeys a signal.
"""

import contextlib
import errno
import ipaddress
import json
import selectors
import socket
import time
from collections.abc import Callable

from train.files import parse_json

_POLL = 0.1  # seconds between two looks at the clock and at the signals
_HELLO = 5.0  # seconds for a line of a hundred bytes
_BEGUN = 15.0  # a job that is just ending still answers so long, and its continuation may be here already
_LINE = 4096  # bytes


class Missed(ValueError):
    """The processes did not all meet."""


class Told(Exception):
    """This process was asked to stop while it waited for the others."""


def split(address: str) -> tuple[str, int]:
    """("10.0.0.1", 8476) of "10.0.0.1:8476", ("::1", 8476) of "[::1]:8476"."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def bind_to(host: str) -> str | None:
    """The address that process 0 listens at: the one named. None for all there are, where a name stands for no address that other
    hosts can reach (some systems know their own name as 127.0.1.1) or the machine does not have it (a router translates it)."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
        literal = host == "localhost" or _is_address(host)
        if ipaddress.ip_address(found).is_loopback and not literal:
            return None
        with socket.socket(socket.AF_INET6 if ":" in str(found) else socket.AF_INET) as probe:
            probe.bind((found, 0))
    except OSError:
        return None
    return str(found)


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def meet(address: str, count: int, rank: int, *, timeout: float, asked: Callable[[], bool]) -> None:
    """Returns when every process of the job has come. asked: whether this one is to stop. Raises Missed with the reason in one line
    after `timeout` seconds, or at once where this process is not wanted; Told."""
    if rank == 0:
        _Host(address, count, time.monotonic() + timeout, timeout, asked).run()
    else:
        _visit(address, count, rank, time.monotonic() + timeout, timeout, asked)


class _Host:
    """Process 0, waiting for the others."""

    def __init__(self, address, count, deadline, timeout, asked):
        self.address, self.count, self.deadline, self.timeout, self.asked = address, count, deadline, timeout, asked
        self.seats: dict[int, socket.socket] = {}
        self.unknown: dict[
            socket.socket, tuple[float, bytes]
        ] = {}  # connected, and have not said who they are: since when, what so far

    def run(self) -> None:
        host, port = split(self.address)
        place = bind_to(host)
        family = socket.AF_INET6 if place is None or ":" in place else socket.AF_INET
        try:
            both = place is None and socket.has_dualstack_ipv6()
            listener = socket.create_server(
                (place or "", port), family=family if place or both else socket.AF_INET, dualstack_ipv6=both, backlog=256
            )
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise Missed(f"cannot listen at {self.address}: {error.strerror}") from error
            text = "is in use, by this job started a second time or by another program: end that, or choose another port"
            raise Missed(f"{self.address} {text}") from error
        self.poll = selectors.DefaultSelector()
        with listener, self.poll:
            listener.setblocking(False)
            self.poll.register(listener, selectors.EVENT_READ)
            try:
                while len(self.seats) < self.count - 1:
                    self.wait(listener)
            except (Missed, Told) as error:
                self.answer({"refused": str(error)})
                raise
        self.answer({"go": True})

    def wait(self, listener) -> None:
        for key, _ in self.poll.select(_POLL):
            if key.fileobj is listener:
                with contextlib.suppress(OSError):
                    guest, _ = listener.accept()
                    guest.setblocking(False)
                    self.unknown[guest] = time.monotonic(), b""
                    self.poll.register(guest, selectors.EVENT_READ)
            else:
                self.hear(key.fileobj)
        for guest, (since, _) in list(self.unknown.items()):
            if time.monotonic() - since > _HELLO:
                self.turn_away(guest)
        if self.asked():
            raise Told("process 0 was asked to stop")
        if time.monotonic() > self.deadline:
            absent = [str(rank) for rank in range(1, self.count) if rank not in self.seats]
            who = f"process{'es' * (len(absent) > 1)} {', '.join(absent[:8])}{', ...' * (len(absent) > 8)} of {self.count}"
            raise Missed(f"{who} did not come to {self.address} within {self.timeout:g} s (--join-timeout)")

    def hear(self, guest) -> None:
        try:
            data = guest.recv(_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        rank = next((rank for rank, seat in self.seats.items() if seat is guest), None)
        if rank is not None:  # one that waits says no more: it has gone
            if not data:
                del self.seats[rank]
                self.close(guest)
            return
        since, before = self.unknown[guest]
        self.unknown[guest] = since, before + data
        if b"\n" not in before + data:
            if not data or len(before) > _LINE:
                self.turn_away(guest)
            return
        try:
            said = parse_json((before + data).split(b"\n")[0])
            count, rank = int(said["vitcore"]), int(said["rank"])
        except (ValueError, KeyError, TypeError, OverflowError):  # OverflowError: of 1e999
            return self.turn_away(guest)
        if count != self.count or not 0 < rank < self.count:
            return self.turn_away(guest, f"process 0 is the first of {self.count}, this one says that it is {rank} of {count}")
        if rank in self.seats:
            return self.turn_away(guest, f"process {rank} of {count} has come already: it was started twice")
        del self.unknown[guest]
        self.seats[rank] = guest

    def turn_away(self, guest, why: str | None = None) -> None:
        del self.unknown[guest]
        if why is not None:
            _send(guest, {"refused": why})
        self.close(guest)

    def close(self, guest) -> None:
        self.poll.unregister(guest)
        guest.close()

    def answer(self, what: dict) -> None:
        for guest in self.seats.values():
            _send(guest, what)
        for guest in (*self.seats.values(), *self.unknown):
            guest.close()


def _send(guest, what: dict) -> None:
    with contextlib.suppress(OSError):
        guest.setblocking(True)
        guest.settimeout(1)
        guest.sendall(json.dumps(what).encode() + b"\n")


def _visit(address, count, rank, deadline, timeout, asked) -> None:
    """Another process, come to process 0."""
    begun = None
    while True:
        answer = _ask(address, {"vitcore": count, "rank": rank}, deadline, asked)
        if answer is not None and answer.get("go"):
            return
        if answer is not None and "refused" in answer:
            raise Missed(answer["refused"])
        begun = None if answer is None else begun or time.monotonic()
        if begun is not None and time.monotonic() - begun > min(_BEGUN, timeout):
            raise Missed(f"at {address} is a job that has begun, or another program: end that, or choose another port")
        if time.monotonic() > deadline:
            raise Missed(f"process 0 of {count} was not at {address} within {timeout:g} s (--join-timeout)")
        _pause(asked)


def _ask(address, hello: dict, deadline: float, asked) -> dict | None:
    """Process 0's answer; {} of something else that listens there; None where nobody does."""
    try:
        with socket.create_connection(split(address), timeout=2) as host:
            host.sendall(json.dumps(hello).encode() + b"\n")
            host.settimeout(_POLL)
            said = b""
            while b"\n" not in said and time.monotonic() < deadline + 2:  # process 0's word is better than none
                if asked():
                    raise Told("asked to stop")
                try:
                    data = host.recv(_LINE)
                except TimeoutError:
                    continue
                if not data:
                    return {} if said else None
                said += data
                if not said.startswith(b"{"):
                    return {}
        found = parse_json(said.split(b"\n")[0])
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}
    except OSError:
        return None


def _pause(asked) -> None:
    for _ in range(3):
        if asked():
            raise Told("asked to stop")
        time.sleep(_POLL)
