"""The device mesh of a run: parsed from "8x4", laid over the accelerators present, simulated on a CPU that has fewer."""

import contextlib
import glob
import os
import re
from functools import cache

import jax
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from vitcore.sharding import AXES, MeshShape

MOST_SIMULATED = 1024  # more take minutes to start and teach nothing

# Simulated devices take turns on the cores there are; XLA's patience with a late one is 40 s unless told otherwise.
_COLLECTIVE_FLAGS = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 --xla_cpu_collective_call_terminate_timeout_seconds=1800"
)


_TWO_CORES = ("TPU v2", "TPU v3")  # generations whose cores are devices of their own
_ALL = 2**40  # bytes: more than any model has


def parse(text: str) -> MeshShape:
    """ "8x4" -> MeshShape(data=8, model=4). Raises ValueError for anything else, zero and negative sizes included."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if not match or int(match[1]) < 1 or int(match[2]) < 1:
        raise ValueError(f"--mesh {text}: two positive sizes DATAxMODEL are required, e.g. --mesh 8x4 (8-way data, 4-way model)")
    return MeshShape(int(match[1]), int(match[2]))


def prepare(shape: MeshShape | None, processes: int = 1) -> None:
    """Set what JAX must know before it looks for devices: how many to simulate, should there be only a CPU.

    shape: None for all devices that there are, those that JAX's own settings simulate. processes: of the job, which share the
    simulated devices evenly. Call once, first thing in a job, after it has joined the others. Without effect on accelerators.
    """
    count = processes * _simulated() if shape is None else shape.data * shape.model
    if count % processes:
        raise ValueError(f"a mesh of {count} devices does not divide over {processes} processes: use a multiple of {processes}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not os.environ.get("JAX_PLATFORMS") and not any(
        map(glob.glob, ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd"))
    ):
        jax.config.update("jax_platforms", "cpu")  # an installed libtpu would otherwise look for its TPU, at length
    if shape is not None:
        with contextlib.suppress(RuntimeError):  # a caller who has started JAX keeps the devices he chose
            jax.config.update("jax_num_cpu_devices", min(count // processes, MOST_SIMULATED))
    if count > 1:
        flags = os.environ.get("XLA_FLAGS", "")
        if _COLLECTIVE_FLAGS not in flags:  # once: JAX's cache of compiled programs goes by this text, too
            os.environ["XLA_FLAGS"] = f"{flags} {_COLLECTIVE_FLAGS}".strip()
        # several steps in flight starve each other's collectives when devices outnumber cores: one at a time
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _simulated() -> int:
    """CPU devices that the user simulates by JAX's own settings: JAX_NUM_CPU_DEVICES goes before XLA_FLAGS, as in JAX."""
    asked = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    chosen: int = getattr(jax.config, "jax_num_cpu_devices")  # noqa: B009 (pyright does not know it)
    return max(1, chosen if chosen >= 0 else int(asked[-1]) if asked else 1)


def make(shape: MeshShape | None) -> tuple[Mesh, str]:
    """The mesh and one line that says what it lies on. None: every device on the data axis.

    In a job of several processes the mesh takes all devices, and each process's are neighbours along "data": it then reads one
    block of every batch. Raises ValueError where the mesh wants more devices than there are, or leaves some process without.
    """
    devices = jax.devices()
    shape = shape or MeshShape(len(devices), 1)
    count = shape.data * shape.model
    kind = devices[0].device_kind
    if count > len(devices):
        raise ValueError(
            f"--mesh {shape.data}x{shape.model} needs {count} devices, {len(devices)} x {kind} present: "
            f"use a mesh of at most {len(devices)}"
        )
    processes = {device.process_index for device in devices}
    if len(processes) > 1 and count != len(devices):
        raise ValueError(
            f"--mesh {shape.data}x{shape.model} has {count} devices, the {len(processes)} processes of this job "
            f"{len(devices)} x {kind}: use a mesh of all of them"
        )
    mesh = laid(shape, devices[:count])
    where = f"{count} x {kind}"
    if devices[0].platform == "cpu" and count > 1:
        where = f"{count} devices simulated on {os.cpu_count()} CPU cores"
    among = f" in {len(processes)} processes" if len(processes) > 1 else ""
    return mesh, f"mesh {shape.data}x{shape.model}: {where}{among}"


def laid(shape: MeshShape, devices) -> Mesh:
    """The mesh of as many devices, neighbours where their links are; those of each process are neighbours along "data"."""
    mesh = jax.make_mesh((shape.data, shape.model), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
    if len({device.process_index for device in devices}) > 1:
        rows = sorted(range(shape.data), key=lambda i: (sorted({d.process_index for d in mesh.devices[i]}), i))
        mesh = Mesh(mesh.devices[rows], AXES, axis_types=mesh.axis_types)
    return mesh


def parted(mesh: Mesh, rest: int) -> Mesh:
    """The mesh with its data axis in two, "data" and "rest", the second of so many neighbours; with rest=1 the mesh itself.

    The data axis is both, in that order, so every device keeps its images. A matrix whose rows do not divide over all of it has
    rows split over "data" and columns over "rest".
    """
    if rest == 1:
        return mesh
    data, model = mesh.devices.shape
    return Mesh(mesh.devices.reshape(data // rest, rest, model), ("data", "rest", "model"), axis_types=(AxisType.Auto,) * 3)


def cores_apart(mesh: Mesh) -> bool:
    """Whether neighbours along the data axis are the two cores of a chip of v2 or v3, and the mesh has no model axis."""
    line = mesh.devices.reshape(-1)
    if line[0].device_kind not in _TWO_CORES or mesh.devices.shape[-1] > 1 or len(line) % 2:
        return False
    return [device.coords for device in line[::2]] == [device.coords for device in line[1::2]]


def compiler_options(mesh: Mesh, together: bool) -> dict[str, str]:
    """What XLA is told of a training step on the mesh. On v2 and v3 all-gathers run beside kernels if it is, and only then; the
    generations behind take no notice of it. together: on GPUs one collective brings all parameters together and one sums all
    gradients, for kernels beside which none should run (`Ops.alone`): not where layers come one by one, for lack of memory."""
    # one of this process's own: another's could not be compiled for here, and all must come to the same program
    device = next((d for d in mesh.devices.flat if d.process_index == jax.process_index()), mesh.devices.flat[0])
    if shape_of(mesh).data == 1:
        return {}
    if device.device_kind in _TWO_CORES:
        asked = {"xla_enable_async_all_gather": "true"}
    elif device.platform == "gpu" and together:
        asked = {f"xla_gpu_{name}_combine_threshold_bytes": str(_ALL) for name in ("all_gather", "reduce_scatter")}
    else:
        return {}
    return asked if _known(device, tuple(asked.items())) else {}


@cache
def _known(device, options: tuple[tuple[str, str], ...]) -> bool:
    """Whether the compiler of a device knows these options: one that does not refuses them."""
    one = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x).lower(one).compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def shape_of(mesh: Mesh) -> MeshShape:
    """What the model must know of a mesh that `make` or `parted` made."""
    return MeshShape.of(mesh, (("data", "rest"), "model") if "rest" in mesh.axis_names else AXES)


def rows(mesh: Mesh) -> P:
    """Where batches lie: split over the data axis."""
    over = shape_of(mesh).over_data
    return P(over) if len(over) > 1 else P(*over)


def whole_rows(images: int, mesh: Mesh) -> int:
    """`images`, rounded up to a number that divides over the data axis."""
    data = shape_of(mesh).data
    return -(-images // data) * data


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process holds the devices of the index-th of `count` equal blocks of the data axis.

    Processes that share a block (the model axis crosses them) read the same rows. Raises ValueError where the devices of a
    process are no block.
    """
    data = shape_of(mesh).data
    mine = [i for i, row in enumerate(mesh.devices.reshape(data, -1)) if any(d.process_index == jax.process_index() for d in row)]
    if not mine or mine != list(range(mine[0], mine[0] + len(mine))) or data % len(mine) or mine[0] % len(mine):
        raise ValueError(
            f"process {jax.process_index()} holds the rows {mine} of the mesh's {data}: they must be one of equal blocks of "
            "neighbours: choose a mesh whose data axis divides, or is divided by, the number of processes"
        )
    return mine[0] // len(mine), data // len(mine)
