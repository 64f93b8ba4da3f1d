"""The device mesh of a run: parsed from "8x4", laid over the accelerators present, simulated on a CPU that has fewer."""

import contextlib
import glob
import os
import re

import jax
from jax.sharding import AxisType, Mesh

from vitcore.sharding import AXES, MeshShape

MOST_SIMULATED = 1024  # more take minutes to start and teach nothing

# Simulated devices take turns on the cores there are; XLA's patience with a late one is 40 s unless told otherwise.
_COLLECTIVE_FLAGS = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 --xla_cpu_collective_call_terminate_timeout_seconds=1800"
)


def parse(text: str) -> MeshShape:
    """ "8x4" -> MeshShape(data=8, model=4). Raises ValueError for anything else, zero and negative sizes included."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if not match or int(match[1]) < 1 or int(match[2]) < 1:
        raise ValueError(f"--mesh {text}: two positive sizes DATAxMODEL are required, e.g. --mesh 8x4 (8-way data, 4-way model)")
    return MeshShape(int(match[1]), int(match[2]))


def prepare(shape: MeshShape | None) -> None:
    """Set what JAX must know before it looks for devices: how many to simulate, should there be only a CPU.

    Call once, first thing in a job. Without effect on accelerators.
    """
    count = 1 if shape is None else shape.data * shape.model
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not os.environ.get("JAX_PLATFORMS") and not any(
        map(glob.glob, ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd"))
    ):
        jax.config.update("jax_platforms", "cpu")  # an installed libtpu would otherwise look for its TPU, at length
    with contextlib.suppress(RuntimeError):  # a caller who has started JAX keeps the devices he chose
        jax.config.update("jax_num_cpu_devices", min(count, MOST_SIMULATED))
    if count > 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COLLECTIVE_FLAGS}".strip()
        # several steps in flight starve each other's collectives when devices outnumber cores: one at a time
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def make(shape: MeshShape | None) -> tuple[Mesh, str]:
    """The mesh and one line that says what it lies on. None: every device on the data axis.

    Raises ValueError where the mesh wants more devices than an accelerator has.
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
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:count])
    if devices[0].platform == "cpu" and count > 1:
        return mesh, f"mesh {shape.data}x{shape.model}: {count} devices simulated on {os.cpu_count()} CPU cores"
    return mesh, f"mesh {shape.data}x{shape.model}: {count} x {kind}"
