"""How processes that a launcher started find each other: SLURM, Open MPI, GKE, Cloud TPU, indexed jobs of Kubernetes."""

import importlib.machinery
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import types

import jax
import pytest

from tests.train.fault_jobs import ROOT, environment, free_port
from train import distributed, launchers, meeting

pytestmark = pytest.mark.faults

NO_CLUSTER = ["PMI_SIZE", "TORCHELASTIC_RUN_ID",
              "SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri", "JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST",
              "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_SKIP_MDS_QUERY", "JAX_COORDINATOR_ADDRESS",
              "JAX_COORDINATOR_PORT"]  # fmt: skip
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-4]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3",
       "OMPI_COMM_WORLD_LOCAL_RANK": "0"}  # fmt: skip
GKE = {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1",
       "MEGASCALE_NUM_SLICES": "1"}  # fmt: skip

METADATA = {"agent-worker-number": "3", "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2,c:3:10.0.0.3,d:4:10.0.0.4"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1", "HOSTNAME": "localhost"}
WHERE = {"SLURM": ("node1:61447", 4, 2), "Open MPI": ("10.96.0.1:62624", 8, 3), "GKE": ("t-0:8482", 2, 1),
         "Cloud TPU": ("10.0.0.1:8482", 4, 3), "Kubernetes": ("train-0.jaxpods:55527", 3, 1)}  # fmt: skip

# What jax asks of the package kubernetes, answered as the server of a cluster would, for an indexed job "train" of three pods
KUBERNETES = """
import os
import re
from types import SimpleNamespace as Record

BROKEN = ""


class ApiException(Exception):
    status, reason = 403, "Forbidden"


def load_incluster_config():
    from jax._src.clusters.k8s_cluster import K8sCluster

    if BROKEN == "account":
        raise LookupError("Service host/port is not set.\\nIs this a cluster?")
    K8sCluster._namespace = classmethod(lambda cls: "default")  # jax reads it from a file of the pod


class Core:
    def list_namespaced_pod(self, namespace, field_selector):
        if BROKEN == "forbidden":
            raise ApiException
        owner = Record(kind="Job", controller=True)
        metadata = Record(name="train-1", labels={"job-name": "train"}, owner_references=[owner])
        return Record(items=[Record(metadata=metadata, spec=Record(subdomain=None if BROKEN == "service" else "jaxpods"))])

    def list_namespaced_service(self, namespace):
        return Record(items=[])


class Batch:
    def read_namespaced_job(self, name, namespace):
        return Record(metadata=Record(name=name, labels={}), spec=Record(parallelism=int(os.environ.get("PODS", "3"))))


config = Record(load_incluster_config=load_incluster_config)
client = Record(CoreV1Api=Core, BatchV1Api=Batch, exceptions=Record(ApiException=ApiException))
"""


@pytest.fixture
def laptop(monkeypatch):
    for name in NO_CLUSTER:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_where_nothing_says_otherwise(laptop):
    assert launchers.parse("auto") is None
    assert launchers.parse("off") is None


@pytest.mark.parametrize(("environment", "name", "count"), [(SLURM, "SLURM", 4), (MPI, "Open MPI", 8), (GKE, "GKE", 2)])
def test_launchers_are_recognised(laptop, environment, name, count):
    for key, value in environment.items():
        laptop.setenv(key, value)
    if name == "GKE":
        laptop.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
        laptop.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", lambda key: ("", 404))
    found = launchers.parse("auto")
    assert found is not None
    host, index = {"SLURM": ("node1", 2), "Open MPI": ("10.96.0.1", 3), "GKE": ("t-0", 1)}[name]
    assert (found.name, found.count, found.index, found.address.rpartition(":")[0]) == (name, count, index, host)
    laptop.setenv("JAX_COORDINATOR_PORT", "7777")
    assert launchers.parse("auto").address == f"{host}:7777"  # pyright: ignore[reportOptionalMemberAccess]
    laptop.setenv("JAX_COORDINATOR_ADDRESS", "another:8888")
    assert launchers.parse("auto").address == "another:8888"  # pyright: ignore[reportOptionalMemberAccess]
    assert launchers.parse("off") is None


def test_a_cloud_tpu_is_recognised_by_its_metadata(laptop):
    laptop.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    laptop.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", lambda key: (METADATA.get(key, ""), 200))
    found = launchers.parse("auto")
    assert found is not None
    assert (found.name, found.count, found.index, found.address) == ("Cloud TPU", 4, 3, "10.0.0.1:8482")


def test_a_launcher_of_one_process_is_none(laptop):
    for key, value in (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).items():
        laptop.setenv(key, value)
    assert launchers.parse("auto") is None


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpiexec (PMI) started this as one of 2 processes"),
        ({"PMI_SIZE": "2"}, "mpiexec (PMI) started this as one of 2 processes"),
        ({"RANK": "0", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, "torchrun started this as one of 4 processes"),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({"PMI_RANK": "1"}, None),
        ({"WORLD_SIZE": "4", "RANK": "0"}, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_processes_of_a_launcher_that_jax_does_not_ask_do_not_each_train_alone(laptop, environment, words):
    for key, value in environment.items():
        laptop.setenv(key, value)
    if words is None:
        assert launchers.parse("auto") is None
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        launchers.parse("auto")
    assert launchers.parse("off") is None


WHOLE = {"SLURM": SLURM, "Open MPI": MPI, "GKE": GKE, "Cloud TPU": {}, "Kubernetes": POD}


@pytest.fixture
def started(laptop):
    """Makes this process look as one that a launcher has started."""

    def become(name, environment=None):
        for key in WHOLE[name]:
            laptop.delenv(key, raising=False)
        for key, value in (WHOLE[name] if environment is None else environment).items():
            laptop.setenv(key, value)
        in_vm = name in ("GKE", "Cloud TPU")
        answers = METADATA if name == "Cloud TPU" else {}
        laptop.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", in_vm)
        laptop.setattr(
            "jax._src.clusters.cloud_tpu_cluster.get_metadata", lambda key: (answers.get(key, ""), 200 if key in answers else 404)
        )
        if name == "Kubernetes":
            package = types.ModuleType("kubernetes")
            exec(KUBERNETES, package.__dict__)
            package.__spec__ = importlib.machinery.ModuleSpec("kubernetes", None)
            laptop.setitem(sys.modules, "kubernetes", package)
            for method in ("_pod", "_job", "_headless_svc", "_controller"):
                getattr(launchers.clusters.K8sCluster, method).cache_clear()
        return package if name == "Kubernetes" else None

    return become


@pytest.mark.parametrize("name", ["SLURM", "Open MPI", "GKE"])
def test_a_launcher_whose_environment_is_not_whole_is_one_line_or_a_process_alone(started, name):
    """Each of its variables missing, or nonsense, or a number that is out of range."""
    said = []
    for key in WHOLE[name]:
        for value in (None, "nonsense", "", "-1", "99"):
            started(name, {k: v for k, v in (WHOLE[name] | {key: value}).items() if v is not None})
            try:
                found = launchers.parse("auto")
            except ValueError as error:
                said.append(str(error))
            else:
                assert found is None or 0 <= found.index < found.count
    assert len(said) > 3
    assert all("\n" not in line and "--distributed HOST:PORT" in line for line in said)


@pytest.mark.parametrize("name", WHOLE)
def test_processes_of_a_launcher_meet_before_they_join(started, laptop, name):
    """So that one that does not come is named, and a signal obeyed: jax's own join would end them by an abort."""
    started(name)
    met = []

    def meet(address, count, rank, *, timeout, asked):
        met.append((address, count, rank, timeout))
        raise meeting.Missed("process 2 did not come")

    laptop.setattr(meeting, "meet", meet)
    laptop.setattr(jax.distributed, "initialize", lambda *args, **kwargs: pytest.fail("it joined"))
    with pytest.raises(ValueError, match="process 2 did not come"):
        distributed.start(launchers.parse("auto"), heartbeat=10, shutdown=10, join=7)
    assert met == [(*WHERE[name], 7)]


def test_a_first_host_without_an_address_yet_is_waited_for_where_a_signal_is_obeyed(started, laptop):
    """Not within jax's detection, which sleeps five seconds between two looks and hears nothing."""
    laptop.setattr("socket.gethostbyname", lambda name: pytest.fail("jax waits for it"))
    laptop.setattr("time.sleep", lambda seconds: pytest.fail("jax waits for it"))
    started("GKE")
    assert launchers.parse("auto") == launchers.Layout(name="GKE", address="t-0:8482", count=2, index=1)


def test_a_signal_is_obeyed_while_a_launcher_is_asked(started, laptop):
    """A metadata server that does not answer holds jax's detection for six minutes."""
    started("Cloud TPU")
    asked, answer = threading.Event(), threading.Event()
    laptop.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", lambda key: answer.wait(60) and pytest.fail("it answers"))
    laptop.setattr(launchers, "asked", asked.is_set)
    threading.Timer(0.5, asked.set).start()
    began = time.monotonic()
    with pytest.raises(meeting.Told, match="asked to stop"):
        launchers.parse("auto")
    assert time.monotonic() - began < 5
    answer.set()


def test_a_pod_is_a_rank_only_in_an_indexed_job(started, laptop):
    laptop.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert launchers.parse("auto") is None  # a notebook's pod
    laptop.setenv("JOB_COMPLETION_INDEX", "1")
    laptop.setitem(sys.modules, "kubernetes", None)
    laptop.setattr(launchers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package kubernetes, which asks for the others, is missing"):
        launchers.parse("auto")


def test_what_kubernetes_answers_is_one_line(started):
    """No permission, no account in the pod, a job that is no indexed one of several, an index beyond its pods, no service."""
    package = started("Kubernetes")
    assert launchers.parse("auto") == launchers.Layout(name="Kubernetes", address="train-0.jaxpods:55527", count=3, index=1)
    cases = [
        ("account", "Service host/port is not set", {}),
        ("forbidden", "Kubernetes API Error: 403 - Forbidden", {}),
        ("service", "Pods within a job need a headless service", {}),
        ("", "process 7 of 3", {"JOB_COMPLETION_INDEX": "7"}),
        ("", "invalid literal", {"JOB_COMPLETION_INDEX": "x"}),
    ]
    for broken, words, changed in cases:
        package = started("Kubernetes", POD | changed)
        package.BROKEN = broken
        with pytest.raises(ValueError, match=words) as caught:
            launchers.parse("auto")
        assert "\n" not in str(caught.value)
        assert "this looks like Kubernetes" in str(caught.value)


def test_hosts_of_a_tpu_where_jax_finds_none_are_no_processes_alone(laptop):
    """Without libtpu each host of a slice would train by itself on its CPU, and say nothing."""
    for key, value in GKE.items():
        laptop.setenv(key, value)
    with pytest.raises(ValueError, match=r"TPU_WORKER_HOSTNAMES names 2 hosts of a TPU, and jax finds no TPU here: install libtpu"):
        launchers.parse("auto")
    laptop.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert launchers.parse("auto") is None
    assert launchers.parse("off") is None


JOIN = """
    import sys
    from train import distributed
    from train.job import JobOptions, end, guard
    def work(stop):
        JobOptions(join_timeout=int(sys.argv[1])).join()
        print(distributed.gather([distributed.rank(), distributed.count()]), flush=True)
    end(guard("a job", work, saves=False))
    """
OF_TWO = {
    "GKE": lambda rank: {"JAX_FORCE_TPU_INIT": "1", "TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": rank,
                         "MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"},
    "SLURM": lambda rank: {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": rank,
                           "SLURM_LOCALID": rank},
    "Open MPI": lambda rank: {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
                              "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank},
    "Kubernetes": lambda rank: POD | {"JOB_COMPLETION_INDEX": rank, "PODS": "2"},
}  # fmt: skip


def joining(folder, name, rank, port, timeout=60):
    (folder / "kubernetes").mkdir(exist_ok=True)
    (folder / "kubernetes" / "__init__.py").write_text(KUBERNETES)
    found = {k: v for k, v in environment().items() if k not in NO_CLUSTER} | OF_TWO[name](str(rank))
    where = "JAX_COORDINATOR_ADDRESS" if name == "Kubernetes" else "JAX_COORDINATOR_PORT"
    found[where] = f"localhost:{port}" if name == "Kubernetes" else str(port)
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([str(folder)] if name == "Kubernetes" else [])])
    words = [sys.executable, "-c", textwrap.dedent(JOIN), str(timeout)]
    return subprocess.Popen(words, cwd=ROOT, env=found, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    "name", ["GKE", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SLURM", "Open MPI", "Kubernetes"))]
)
def test_two_processes_of_a_launcher_join_and_one_alone_is_told_who_is_missing(tmp_path, name):
    port = free_port()
    jobs = [joining(tmp_path, name, rank, port) for rank in (1, 0)]
    said = [job.communicate(timeout=100) for job in jobs]
    assert [out for out, _ in said] == ["[[0, 2], [1, 2]]\n"] * 2, said
    assert [job.returncode for job in jobs] == [0, 0]
    alone = joining(tmp_path, name, 0, port := free_port(), timeout=2)
    err = alone.communicate(timeout=60)[1]
    assert alone.returncode == 2
    assert f"--distributed {name}: process 1 of 2 did not come to localhost:{port} within 2 s".replace(
        "localhost", "127.0.0.1" if name == "Open MPI" else "localhost"
    ) in err  # fmt: skip
    assert err.count("error: ") == 1
    assert "Traceback" not in err


def test_open_mpi_five_wants_the_first_host(laptop):
    laptop.setenv("OMPI_COMM_WORLD_SIZE", "2")
    laptop.setenv("OMPI_COMM_WORLD_RANK", "1")
    with pytest.raises(ValueError, match="give --distributed HOST:PORT with the name of its host"):
        launchers.parse("auto")
    assert launchers.parse("node1:8476") == launchers.Layout(name="node1:8476", address="node1:8476", count=2, index=1)


def test_layouts_by_hand(laptop):
    assert launchers.parse("10.0.0.1:8476,4,3") == launchers.Layout(name="10.0.0.1:8476", address="10.0.0.1:8476", count=4, index=3)
    for text in ("yes", "host", "host:0,1,0", "host:99999,1,0", "host:80,2", "host:80,2,2", "host:80,x,1", ":80,1,0"):
        with pytest.raises(ValueError, match="--distributed"):
            launchers.parse(text)
    with pytest.raises(ValueError, match="how many processes, and which one this is, must follow"):
        launchers.parse("host:80")
