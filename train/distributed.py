"""Several processes as one job, through jax.distributed: how they find each other, agree, and end together.

    --distributed auto             Cloud TPU, GKE, SLURM or Open MPI, where the environment says so; else one process
    --distributed off              one process, whatever the environment says
    --distributed HOST:PORT,N,ID   process ID of N; process 0 listens on HOST:PORT, where all of them meet first (train/meeting.py)

What is agreed on goes through the key-value store that jax.distributed keeps on process 0, beside the devices: it works while
they hang. A process that fails writes there why; a thread in each of the others waits for that, says it and ends its process, in
well under a second. A process that dies without a word is noticed by the missing heartbeat.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import threading
import time
import typing
from collections import defaultdict
from dataclasses import dataclass

import jax
import numpy as np
from jax._src import clusters, distributed  # the store and the detection have no public name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train import meeting
from train.signals import Stop, asked

_FAILED = "vitcore/failed"
_STOP = "vitcore/stop"
_PATIENCE = 24 * 3600  # seconds a process waits for another that is alive: what hangs is the watchdog's
_SEEN = 20.0  # seconds until a network file system shows one host what another has written
_LINGER = 1.0  # seconds from a failure to the end of process 0, and of the store with it, which would abort whoever is still there


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a process is to join: what jax.distributed.initialize is told (None: it asks the environment), and a name for people."""

    name: str
    address: str | None = None
    count: int | None = None
    index: int | None = None
    meets: tuple[str, int] | None = None  # where they meet before, and which one this is, where a launcher's environment says both


def parse(text: str) -> Layout | None:
    """The value of --distributed; None for a process on its own. Raises ValueError for anything else, and where a launcher of
    several processes is recognised that cannot be asked."""
    if text == "off":
        return None
    if text == "auto":
        return _detect()
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d+)(?:,(\d+),(\d+))?", text)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError(
            f"--distributed {text}: auto, off or HOST:PORT,N,ID is required, e.g. 10.0.0.1:8476,4,0 for the first process of four"
        )
    count, index = (match[3], match[4]) if match[3] else (os.environ.get(_RANKS[0]), os.environ.get(_RANKS[1]))
    if count is None or index is None:
        raise ValueError(f"--distributed {text}: how many processes, and which one this is, must follow: {text},N,ID")
    if not 0 <= int(index) < int(count):
        raise ValueError(f"--distributed {text}: process {index} of {count}; ID must lie in 0..N-1")
    return Layout(name=f"{match[1]}:{match[2]}", address=f"{match[1]}:{match[2]}", count=int(count), index=int(index))


_RANKS = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")  # of mpirun, every version
_NAMES = {"SlurmCluster": "SLURM", "OmpiCluster": "Open MPI", "GkeTpuCluster": "GKE", "GceTpuCluster": "Cloud TPU"}


def _detect() -> Layout | None:
    """The launcher that the environment shows, if it started more than one process."""
    in_pod = {"JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"} <= os.environ.keys()
    if in_pod and "TPU_WORKER_HOSTNAMES" not in os.environ:
        if importlib.util.find_spec("kubernetes") is None:
            raise ValueError(
                "this is a pod of an indexed Kubernetes job, and the package kubernetes, which asks for the others, is missing: "
                "pip install 'jax[k8s]', or give --distributed HOST:PORT,N,ID, or --distributed off for a job of one pod"
            )
        known = [clusters.K8sCluster]
    else:
        # any pod has Kubernetes' variables, a notebook's too; only an indexed job has ranks
        every = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
        known = [kind for kind in every if kind is not clusters.K8sCluster]
    found = next((kind for kind in known if _is_present(kind)), None)
    if found is None:
        if int(os.environ.get(_RANKS[0], "1")) > 1:
            raise ValueError(
                "mpirun started several processes but, as from version 5 on, does not say where the first one is: "
                "give --distributed HOST:PORT with the name of its host"
            )
        return None
    name = _NAMES.get(found.__name__, "Kubernetes")
    try:
        count, meets = found.get_process_count(), None
        if count > 1 and found.__name__ in _OF_A_PROCESS:
            found.get_local_process_id()  # what jax will ask
            meets = found.get_coordinator_address(None, None), found.get_process_id()
    except (KeyError, ValueError, AttributeError, TypeError, OSError, RuntimeError) as error:
        raise ValueError(
            f"--distributed auto: this looks like {name}, whose environment does not say which processes there are "
            f"({type(error).__name__}: {error}): give --distributed HOST:PORT,N,ID, or --distributed off for one process"
        ) from error
    return Layout(name=name, count=count, meets=meets) if count > 1 else None


# What a launcher sets for each process that it starts; a shell within its allocation has the rest of its variables, and not these
_OF_A_PROCESS = {"SlurmCluster": ("SLURM_PROCID", "SLURM_NTASKS"), "OmpiCluster": _RANKS}


def _is_present(kind) -> bool:
    return kind.is_env_present() and all(name in os.environ for name in _OF_A_PROCESS.get(kind.__name__, ()))


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
        if layout.address is not None and layout.count is not None and layout.index is not None:
            meeting.meet(layout.address, layout.count, layout.index, timeout=join, asked=asked)
            host, port = meeting.split(layout.address)
            place = meeting.bind_to(host)
            bind = None if place is None else f"[{place}]:{port}" if ":" in place else f"{place}:{port}"
        elif layout.meets is not None and layout.count is not None:
            meeting.meet(layout.meets[0], layout.count, layout.meets[1], timeout=join, asked=asked)
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
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--distributed {layout.name}: {' '.join(str(error).split())[:300]}") from error
    threading.Thread(target=_end_with_the_others, daemon=True, name="failures of other processes").start()


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

    for work in (tell, hear):
        threading.Thread(target=work, daemon=True, name="stops of other processes").start()


def leave() -> None:
    """The orderly end: waits for every process, up to the shutdown timeout, and frees the store."""
    if _client() is not None:
        jax.distributed.shutdown()


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
