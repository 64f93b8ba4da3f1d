"""The compiler's process: reads programs, one a line, compiles each for the TPU it was started for, writes one report a line.

Started by `bench.tpu_compiler`, which watches it: libtpu ends its process where one of its CHECKs fails. The first line on stdin is
the request (target, topology, where dumps go, what to keep), each further line a program. A program whose lowered text has been
compiled before is answered from the cache.
"""

import hashlib
import importlib
import json
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from bench import hlo, links, llo, yardstick
from bench.reports import Cache, Kernel, Program, Report, profiles
from bench.tpu_compiler import MARK
from kernels import launch
from train.signals import before_the_end


def main() -> None:
    request = json.loads(sys.stdin.readline())
    before_the_end(lambda: shutil.rmtree(Path(request["dumps"]).parent, ignore_errors=True))
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_traceback_in_locations_limit", 0)  # the text of a kernel holds no paths and lines: it is its key
    launch.WHOLE_VMEM = request["whole_vmem"]
    devices = topologies.get_topology_desc(topology_name=request["topology"], platform="tpu").devices
    for line in sys.stdin:
        asked = json.loads(line)
        report = _compile(Program(**asked["program"]), devices, {**request, "cycles": asked["cycles"]})
        print(MARK + json.dumps(asdict(report)), flush=True)


def _compile(program: Program, devices, request: dict) -> Report:
    import jax

    name = program.name or program.build
    started = time.monotonic()
    try:
        module, function = program.build.split(":")
        fn, arguments = getattr(importlib.import_module(module), function)(devices, **program.arguments)
        jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
        lowered = jitted.lower(*_placed(arguments, devices[0]))
        cache = Cache(Path(request["cache"]), request) if request["cache"] else None
        digest = hashlib.sha256(lowered.as_text().encode()).hexdigest() if cache else ""
        if cache and (known := cache.load(digest, request["cycles"])) is not None:
            return replace(known, name=name)
        try:
            compiled = lowered.compile()
        except Exception as error:
            report = _failed(name, request, error, started)
            if cache and "RESOURCE_EXHAUSTED" in report.error:  # what does not fit today does not fit tomorrow
                cache.save(digest, request["cycles"], report)
            return report
    except Exception as error:  # the compiler's message is the result: it is reported, not hidden
        return _failed(name, request, error, started)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None  # what only a backend other than XLA's may leave out
    seconds = time.monotonic() - started
    scheduled = hlo.schedule(text)
    operations = [op for op in scheduled if not op.waits]
    xla = [op for op in operations if op.kind != "kernel"]
    ours = [op for op in operations if op.kind == "kernel"]
    counted = yardstick.counts(operations, Path(request["dumps"]), request["target"]) if request["cycles"] else {}
    kernels = tuple(_kernel(op, counted.get(op.name)) for op in ours)
    if request.get("profile"):
        kernels = profiles(Path(request["dumps"]))
    _clear(Path(request["dumps"]))
    collectives: dict[str, int] = {}
    moved: dict[str, int] = {}
    for op in xla:
        if opcode := hlo.collective(op.kind):
            collectives[opcode] = collectives.get(opcode, 0) + op.trips
            moved[opcode] = moved.get(opcode, 0) + op.trips * op.bytes
    top = sorted(xla, key=lambda op: -op.cycles * op.trips)[:12]
    report = Report(
        name=name,
        target=request["target"],
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        live_bytes=getattr(memory, "peak_memory_in_bytes", 0),
        kernels=kernels,
        lines=yardstick.lines(operations, counted, request["target"]) if counted else (),
        xla_cycles=sum(op.cycles * op.trips for op in xla),
        xla_top=tuple((op.name, op.cycles, op.trips, op.source) for op in top if op.cycles),
        collectives=collectives,
        collective_bytes=moved,
        timeline=_timeline(scheduled, counted, request["target"], _placed_at(arguments)) if counted else (),
        text=text if request["text"] else "",
    )
    if cache:
        cache.save(digest, request["cycles"], replace(report, text=""))
    return report


def _failed(name: str, request: dict, error: Exception, started: float) -> Report:
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return Report(name=name, target=request["target"], error=message[:1500], seconds=time.monotonic() - started)


def _placed(arguments, device):
    """The argument trees with every leaf that names no sharding placed on `device`."""
    import jax

    here = jax.sharding.SingleDeviceSharding(device)

    def place(leaf):
        if getattr(leaf, "sharding", None) is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    return jax.tree.map(place, arguments)


def _placed_at(arguments) -> list[tuple[tuple[int, ...], int]]:
    """(coordinates of the chip, core of it) of the devices of the program's mesh, in its order; empty for a program on one."""
    import jax

    meshes = (getattr(getattr(leaf, "sharding", None), "mesh", None) for leaf in jax.tree.leaves(arguments))
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    return [(tuple(d.coords), d.core_on_chip) for d in mesh.devices.flat] if mesh is not None and mesh.devices.size > 1 else []


def _timeline(scheduled, counted, target: str, places) -> tuple[links.Event, ...]:
    """The program as `links.played` takes it; () for one on one device."""
    events: list[links.Event] = []
    for op in scheduled if places else ():
        kind = hlo.collective(op.kind)
        if op.waits:
            events.append(links.Event("done", name=op.waits))
        elif kind:
            what = "start" if op.kind.endswith("-start") else "send"
            events.append(links.Event(what, 0, kind, op.bytes, op.trips, op.name, links.reach_of(op.groups, places)))
        elif cycles := yardstick.cycles(op, counted[op.name], target):
            before = events.pop().cycles if events and events[-1].what == "compute" else 0
            events.append(links.Event("compute", before + cycles))
    return tuple(events)


def _kernel(op: hlo.Operation, count: llo.Count | str | None) -> Kernel:
    """A kernel of the program; count: of its schedule, or why there is none, or None where nobody asked."""
    blank = Kernel(name=op.name, kernel=op.kernel, trips=op.trips)
    if count is None:
        return blank
    if isinstance(count, str):
        return replace(blank, error=count)
    return replace(blank, cycles=count.cycles, source="schedule", schedule=asdict(count))


def _clear(folder: Path) -> None:
    for file in folder.glob("*.*"):
        if file.is_file():
            file.unlink()


if __name__ == "__main__":
    main()
