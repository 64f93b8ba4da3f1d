"""Several processes as one job, through jax.distributed: how they find each other, agree, and end together.

    --distributed auto             Cloud TPU, GKE, Kubernetes, SLURM or Open MPI, where the environment says so; else one process
    --distributed off              one process, whatever the environment says
    --distributed HOST:PORT,N,ID   process ID of N; process 0 listens on HOST:PORT, where all of them meet first (train/meeting.py)

What is agreed on goes through the key-value store that jax.distributed keeps on process 0, beside the devices: it works while
they hang. A process that fails writes there why; a thread in each of the others waits for that, says it and ends its process, in
well under a second. A process that dies without a word is noticed by the missing heartbeat.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
import typing
from collections import defaultdict

import jax
import numpy as np
from jax._src import distributed  # the store has no public name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train import meeting
from train.launchers import Layout
from train.launchers import parse as parse
from train.signals import Stop, asked

_FAILED = "vitcore/failed"
_STOP = "vitcore/stop"
_PATIENCE = 24 * 3600  # seconds a process waits for another that is alive: what hangs is the watchdog's
_SEEN = 20.0  # seconds until a network file system shows one host what another has written
_LINGER = 1.0  # seconds from a failure to the end of process 0, and of the store with it, which would abort whoever is still there


def start(layout: Layout | None, *, heartbeat: int, shutdown: int, join: int = 300) -> None:
    """Joins the job; returns when every process has. heartbeat: seconds of silence after which a process counts as dead;
    shutdown: seconds that the end waits for the others; join: seconds that they have to come. Raises ValueError where that fails,
    `meeting.Told` where this process is asked to stop meanwhile. Before anything asks for devices. A job within a job, whose
    process has joined, may say it again."""
    if layout is None or _client() is not None:
        return
    # JAX's own notice of preemption would be one counter shared with Orbax, which turns it back; `Stop` has another way
    jax.config.update("jax_enable_preemption_service", False)
    bind = None
    try:
        meeting.meet(layout.address, layout.count, layout.index, timeout=join, asked=asked)
        host, port = meeting.split(layout.address)
        place = meeting.bind_to(host)
        if place is not None and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            bind = f"[{place}]:{port}" if ":" in place else f"{place}:{port}"
        jax.distributed.initialize(
            layout.address,
            layout.count,
            layout.index,
            initialization_timeout=join,
            coordinator_bind_address=bind,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=shutdown,
        )
    except meeting.Missed as error:
        raise ValueError(f"--distributed {layout.name}: {error}") from error
    except meeting.Told:
        raise
    except Exception as error:  # also of jax's detection of local devices, which asks services over the network
        raise ValueError(f"--distributed {layout.name}: {' '.join(str(error).split())[:300]}") from error
    _hear(_end_with_the_others, "failures of other processes")


def count() -> int:
    """Processes of this job; known before the devices are."""
    return distributed.global_state.num_processes or 1


def rank() -> int:
    """Which one this is; 0 writes the logs."""
    return distributed.global_state.process_id or 0


def _end_with_the_others() -> None:
    reason = _await(_client(), _FAILED)
    if reason is not None and not reason.startswith(f"{rank()}:"):
        sys.stdout.flush()
        print(f"process {rank()}: ends because process {reason}", file=sys.stderr, flush=True)
        _linger()
        os._exit(1)


def _linger() -> None:
    """Process 0 goes last: the others fetch the reason, and end with codes of their own."""
    if rank() == 0:
        threading.Event().wait(_LINGER)


def _await(client, key: str) -> str | None:
    """The value of a key, once a process has set it; None when the job has ended, or process 0 died, which the heartbeat ends."""
    while True:
        try:
            return client.blocking_key_value_get(key, 3600_000)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return None


def fail(reason: str) -> None:
    """Tells the other processes that this one ends, and why: they end too. Returns; the caller then leaves by `os._exit`, since an
    ordinary exit would wait for the others."""
    client = _client()
    if client is None:
        return
    with contextlib.suppress(Exception):  # another was first, and its is the cause; or process 0 is gone: they know
        client.key_value_set(_FAILED, f"{rank()}: {' '.join(reason.split())[:500]}")
    _linger()


_shared: set[int] = set()


def share(stop: Stop) -> None:
    """From now on, when one process is asked to stop, all are, in well under a second; also one that waits for data while the
    others hang in the reduction it has not come to. They then agree by `AnyProcess` before which step they stop."""
    client = _client()
    if client is None or id(stop) in _shared:
        return
    _shared.add(id(stop))

    def tell():
        stop.wait()
        with contextlib.suppress(Exception):  # the job has ended, or process 0 has died, which the heartbeat ends
            client.key_value_set(_STOP, str(rank()), allow_overwrite=True)

    def hear():
        if _await(client, _STOP) is not None:
            stop.ask()

    threading.Thread(target=tell, daemon=True, name="this process's stop").start()
    _hear(hear, "stops of other processes")


_hearing: list[threading.Thread] = []  # threads that wait in the store's client, in C++


def _hear(work, name: str) -> None:
    _hearing.append(threading.Thread(target=work, daemon=True, name=name))
    _hearing[-1].start()


def leave() -> None:
    """The orderly end: waits for every process, up to the shutdown timeout, and frees the store."""
    if _client() is not None:
        jax.distributed.shutdown()
        for thread in _hearing:  # one that comes back from C++ while the interpreter ends would end the process by SIGABRT
            thread.join(_LINGER)


def _client() -> typing.Any:
    """The key-value store."""
    return distributed.global_state.client


_calls: dict[str, int] = defaultdict(int)


def _next(tag: str) -> str:
    """A name of its own for each call, the same on every process, since all make the same calls in the same order."""
    _calls[tag] += 1
    return f"vitcore/{tag}/{_calls[tag]}"


def broadcast(value):
    """Process 0's JSON-able value, on every process. Every process calls it."""
    if count() == 1:
        return value
    client, key = _client(), _next("broadcast")
    if rank() == 0:
        client.key_value_set(key, json.dumps(value))
    return json.loads(client.blocking_key_value_get(key, _PATIENCE * 1000))


def gather(value) -> list:
    """Every process's JSON-able value, in the order of their ranks, on every process. Every process calls it."""
    if count() == 1:
        return [value]
    client, key = _client(), _next("gather")
    client.key_value_set(f"{key}/{rank()}", json.dumps(value))
    return [json.loads(client.blocking_key_value_get(f"{key}/{i}", _PATIENCE * 1000)) for i in range(count())]


def agree(**what) -> None:
    """Raises ValueError, on every process alike, where the processes do not hold the same: agree(config=..., code=...), of
    JSON-able values. What is short is named; of the rest, hashes are compared."""
    if count() == 1:
        return
    held = gather({name: _short(value) for name, value in what.items()})
    for name in what:
        values = [entry.get(name) for entry in held]
        if len(set(values)) > 1:
            usual = max(values, key=values.count)
            odd = [str(i) for i, value in enumerate(values) if value != usual]
            raise ValueError(
                f"the processes differ in {name}: process {', '.join(odd[:8])} of {count()} holds another one than the rest "
                f"({values[int(odd[0])]}, {usual}): start all with the same options, the same data and the same code"
            )


def _short(value) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 100 else hashlib.sha256(text.encode()).hexdigest()[:16]


def check_shared(directory) -> None:
    """Raises ValueError, on every process alike, where they do not all see the same directory, which exists on process 0: every
    process writes its part of a checkpoint there. On gs:// they do."""
    if count() == 1 or "://" in str(directory):
        return
    token = broadcast(f".shared-{os.urandom(8).hex()}")
    path = os.path.join(directory, token)
    if rank() == 0:
        with open(path, "x"):
            pass
    broadcast(None)
    deadline = time.monotonic() + _SEEN
    while not (seen := os.path.exists(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [str(i) for i, one in enumerate(gather(seen)) if not one]
    if rank() == 0:
        os.unlink(path)
    if blind:
        raise ValueError(
            f"--out {directory} is not shared: process {', '.join(blind[:8])} of {count()} does not see what process 0 writes "
            "there: give a directory on a file system that all hosts have in common, or gs://"
        )


class AnyProcess:
    """Whether any process says so: one small reduction over the mesh's devices, in step with the training steps.

    Every process calls it at the same points of the program. Alone it costs nothing.
    """

    def __init__(self, mesh):
        self._alone = count() == 1
        if not self._alone:
            self._place = NamedSharding(mesh, P(mesh.axis_names))
            self._size = mesh.devices.size
            self._max = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))

    def __call__(self, mine: bool) -> bool:
        if self._alone:
            return mine
        flags = jax.make_array_from_callback((self._size,), self._place, lambda i: np.full(1, mine, np.int32))
        return bool(self._max(flags))
