"""Which processes there are and where the first one is: as --distributed says, or as what started this process says.

jax recognises the launchers (jax/_src/clusters) and says how many processes there are, which one this is and where they find the
first. All three are asked for here, whatever the launcher, so that the processes meet there before they join (train/meeting.py):
a process that does not come is named, a signal is obeyed meanwhile, and the same job started twice is refused. What jax's own
waiting for the first host's name does, the meeting does too.
"""

import importlib.util
import os
import re
import threading
import types
import typing
from dataclasses import dataclass

from jax._src import clusters  # the detection has no public name

from train import meeting
from train.signals import asked

_POLL = 0.1  # seconds between two looks at the signals
_WORDS = 500  # characters of a launcher's own message


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Several processes: where they meet, HOST:PORT, how many they are, which one this is, and a name for people."""

    name: str
    address: str
    count: int
    index: int


def parse(text: str) -> Layout | None:
    """The value of --distributed; None for a process on its own. Raises ValueError for anything else, and where a launcher of
    several processes is recognised that cannot be asked; `meeting.Told` where this process is asked to stop meanwhile."""
    if text == "off":
        return None
    if text == "auto":
        return _while_listening(_detect)
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


def _while_listening(work: typing.Callable[[], Layout | None]) -> Layout | None:
    """What `work` returns or raises; Told, within `_POLL`, where this process is asked to stop: the services that Kubernetes and
    Cloud TPU ask over the network may take a minute not to answer."""
    done: list = []

    def run():
        try:
            done.append((work(), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="detection of the launcher")
    thread.start()
    while thread.is_alive():
        thread.join(_POLL)
        if asked() and thread.is_alive():
            raise meeting.Told("asked to stop")
    found, error = done[0]
    if error is not None:
        raise error
    return found


_RANKS = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")  # of mpirun, every version
_NAMES = {"SlurmCluster": "SLURM", "OmpiCluster": "Open MPI", "GkeTpuCluster": "GKE", "GceTpuCluster": "Cloud TPU"}

# What a launcher sets for each process that it starts; a shell within its allocation has the rest of its variables, and not these
_OF_A_PROCESS = {"SlurmCluster": ("SLURM_PROCID", "SLURM_NTASKS"), "OmpiCluster": _RANKS}

# Launchers that jax does not ask: what each says of the number of processes, its name, and what else it sets
_OTHERS = {"PMI_SIZE": ("mpiexec (PMI)", None), "WORLD_SIZE": ("torchrun", "TORCHELASTIC_RUN_ID")}


def _detect() -> Layout | None:
    """The launcher that the environment shows, if it started more than one process."""
    hosts = [name for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES") if os.environ.get(name)]
    if {"JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"} <= os.environ.keys() and not hosts:
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
    kind = None
    try:
        for kind in known:
            if kind.is_env_present() and all(name in os.environ for name in _OF_A_PROCESS.get(kind.__name__, ())):
                return _layout(kind)
    except Exception as error:  # jax's detection asks services over the network, through packages with errors of their own
        words = " ".join(str(error).split())[:_WORDS]
        raise ValueError(
            f"--distributed auto: this looks like {_name(kind)}, whose environment does not say which processes there are "
            f"({type(error).__name__}: {words}): give --distributed HOST:PORT,N,ID, or --distributed off for one process"
        ) from error
    if os.environ.get(_RANKS[0], "1") != "1":
        raise ValueError(
            "mpirun started several processes but, as from version 5 on, does not say where the first one is: "
            "give --distributed HOST:PORT with the name of its host"
        )
    for size, (started, another) in _OTHERS.items():
        if os.environ.get(size, "1").strip() not in ("", "1") and (another is None or another in os.environ):
            raise ValueError(
                f"{started} started this as one of {os.environ[size]} processes, and jax does not find the others by it: give each "
                "--distributed HOST:PORT,N,ID, or --distributed off for processes that have nothing to do with one another"
            )
    if hosts and "," in os.environ[hosts[0]]:
        raise ValueError(
            f"{hosts[0]} names {os.environ[hosts[0]].count(',') + 1} hosts of a TPU, and jax finds no TPU here: install libtpu "
            "(pip install 'vitcore[tpu]'), or give --distributed HOST:PORT,N,ID, or --distributed off for one process"
        )
    return None


def _name(kind) -> str:
    return _NAMES.get(getattr(kind, "__name__", ""), "Kubernetes")


def _layout(kind) -> Layout | None:
    count = int(kind.get_process_count())
    if count <= 1:
        return None
    index = int(kind.get_process_id())
    kind.get_local_process_id()  # what jax will ask
    if not 0 <= index < count:
        raise ValueError(f"process {index} of {count}")
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or _first_host(kind, os.environ.get("JAX_COORDINATOR_PORT"))
    host, port = meeting.split(address)
    if not host or not 0 < port < 65536:
        raise ValueError(f"the first process would be at {address}")
    return Layout(name=_name(kind), address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}", count=count, index=index)


def _first_host(kind, port: str | None) -> str:
    """HOST:PORT of process 0 by jax's rule for this launcher, without its waiting until that name is known: `meeting` waits, and
    obeys signals."""
    found = kind.get_coordinator_address
    if not hasattr(kind, "wait_for_coordinator"):
        return found(None, port)
    asks = types.SimpleNamespace(_get_worker_list_in_slice=kind._get_worker_list_in_slice, wait_for_coordinator=lambda *_: None)
    return found.__func__(asks, 0, port)
