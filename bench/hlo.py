"""What a compiled TPU program costs, read from its text: the compiler's cycle estimate of every XLA operation, times its trips.

XLA writes `"window_config":{... "estimated_cycles":"N"}` on each operation it emitted. A `while` body stands in the text once and
runs `trips` times, so costs are multiplied through nested loops; trip counts come from the loop's own condition. Mosaic kernels,
and some physical copies and reshapes, carry no estimate here: all are listed with their trips, and `bench.yardstick` counts them
by their schedules. Code that several operations share is emitted, and dumped, once: `key` says which operations those are.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-<>]+) = (.*?) ([a-z][\w\-]*)\(")
_CYCLES = re.compile(r'"window_config":\{[^{}]*"estimated_cycles":"(\d+)"')
_OPERANDS = re.compile(r"%([\w.\-<>]+)")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_ASYNC = re.compile("-(start|done)$")


class ProgramError(ValueError):
    """The program's text does not say what it should; the message says where."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of a program. trips: how often it runs. cycles: of one run, by XLA's cost model (0 for a kernel).

    kind: the HLO opcode, or "kernel" for a Mosaic kernel, also one inside a fusion, or of a fusion around a collective that of the
    collective. source: the `op_name` that jax gave it. bytes: of a collective alone, the larger of what a core brings to it and
    what it takes away. groups: of a collective, its `replica_groups` (or pairs) as they are written. waits: of a collective's
    "-done", the name of its "-start". moved: bytes of its operands and results in HBM, as they lie there. key: equal for
    operations of one code. aliases: other names under which its schedule may be dumped.
    """

    name: str
    kind: str
    cycles: int
    trips: int
    source: str
    shape: str
    bytes: int = 0
    groups: str = ""
    waits: str = ""
    moved: int = 0
    key: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def kernel(self) -> str:
        """The `name=` of the pallas_call, from `jit(f)/transpose(jvp(NAME))/pallas_call`, else the instruction's name."""
        inside = re.search(r"([\w.\-]+)\)*/pallas_call$", self.source)
        return inside[1] if inside else re.sub(r"\.\d+$", "", self.name)


def collective(kind: str) -> str:
    """The collective that a kind names, of a "-start" or "-done" too; "" for what is none."""
    plain = _ASYNC.sub("", kind)
    return plain if plain in COLLECTIVES else ""


@dataclass(frozen=True)
class _Line:
    name: str
    shape: str
    opcode: str
    text: str

    def operands(self) -> list[str]:
        inside = self.text.split(f" {self.opcode}(", 1)[1]
        depth = 1
        for end, letter in enumerate(inside):
            depth += (letter in "({") - (letter in ")}")
            if depth == 0:
                return _OPERANDS.findall(inside[:end])
        return []

    def attribute(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-<>]+)", self.text)
        return found[1] if found else None


_CONTINUED = re.compile(r'\n(?="|\}[^\n])')


def _joined(text: str) -> list[str]:
    """Lines of the program; an instruction whose attributes hold line breaks (a kernel's metadata may) is one line."""
    return _CONTINUED.sub(" ", text).splitlines()


def _computations(text: str) -> tuple[dict[str, dict[str, _Line]], str]:
    found: dict[str, dict[str, _Line]] = {}
    entry, current = "", None
    for line in _joined(text):
        header = _HEADER.match(line)
        if header:
            current = found.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current[match[1]] = _Line(match[1], match[2], match[3], line)
    if not entry:
        raise ProgramError("no ENTRY computation in the compiled text; the format of this jax is not known to bench.hlo")
    return found, entry


def _constant(lines: dict[str, _Line], name: str) -> int | None:
    """The integer that `name` holds, looking through copies."""
    line = lines.get(name)
    while line is not None and line.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        operands = line.operands()
        line = lines.get(operands[0]) if operands else None
    if line is None or line.opcode != "constant":
        return None
    value = re.search(r"constant\((-?\d+)\)", line.text)
    return int(value[1]) if value else None


def _trips(computations: dict[str, dict[str, _Line]], where: dict[str, _Line], loop: _Line) -> int:
    """How often a while's body runs: limit minus start, for the counted loops that lax.scan and fori_loop make."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    if known:
        return int(known[1])
    condition = computations[loop.attribute("condition") or ""]
    initial = where[loop.operands()[0]]

    def resolve(name: str) -> tuple[int | None, int | None]:
        """(value inside the condition or before the loop, tuple index)"""
        line = condition.get(name)
        if line is not None and line.opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", line.text)
            k = int(index[1]) if index else 0
            return (_constant(where, initial.operands()[k]) if initial.opcode == "tuple" else None), k
        return _constant(condition, name), None

    compare = next((x for x in condition.values() if x.opcode in ("compare", "fusion") and "ROOT" in x.text), None)
    if compare is not None:
        values = [resolve(name) for name in compare.operands()]
        numbers = [v for v, _ in values if v is not None]
        if len(values) == 2 and len(numbers) == 2:
            return abs(numbers[1] - numbers[0]) + ("direction=LE" in compare.text or "direction=GE" in compare.text)
        if compare.opcode == "fusion" and len(numbers) == 1:  # the limit was fused into the comparison
            inner = computations[compare.attribute("calls") or ""]
            limits = [v for name in inner if (v := _constant(inner, name)) is not None]
            if len(limits) == 1:
                return abs(limits[0] - numbers[0])
    raise ProgramError(f"the trip count of the loop %{loop.name} cannot be read from its condition")


_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)\w*\[([\d,]*)\]")


def _bytes(shape: str) -> int:
    """Bytes of every array in an HLO shape, tuples too; padding and layouts left out."""
    total = 0
    for kind, extents in _ARRAY.findall(shape):
        size = 1 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8
        for extent in extents.split(","):
            size *= int(extent) if extent else 1
        total += size
    return total


def _collective_bytes(line: _Line, lines: dict[str, _Line]) -> int:
    """The larger of a collective's operands and result; of a start, whose result is (operands, results, ...), the rest of it."""
    brought = sum(_bytes(lines[name].shape) for name in line.operands() if name in lines)
    taken = _bytes(line.shape)
    if line.opcode.endswith("-start") and line.shape.startswith("("):
        taken -= brought
    return max(brought, taken)


_TILED = re.compile(r"\b(pred|bf16|[fsuc]\d+)\w*\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
# Opcodes that name, group or wait for what is there, and cost nothing themselves.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "bitcast",
        "tuple",
        "get-tuple-element",
        "after-all",
        "opt-barrier",
        "partition-id",
        "replica-id",
        "domain",
        "add-dependency",
        "custom-call",
    ]
)


def hbm_bytes(shape: str) -> int:
    """Bytes that the arrays of an HLO shape fill in HBM, padded to their tiles; not what lies in another memory, `S(1)`."""
    total = 0
    for kind, extents, order, rest in _TILED.findall(shape):
        if re.search(r"S\([1-9]\d*\)", rest):
            continue
        size = 1 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8 or 1
        sides = [int(e) for e in extents.split(",") if e]
        minor = [sides[int(o)] for o in order.split(",") if o] if order else sides[::-1]
        tile = re.match(r"T\(([\d,]+)\)", rest)
        for i, t in enumerate(reversed(tile[1].split(",")) if tile else ()):
            if i < len(minor):
                minor[i] = -(-minor[i] // int(t)) * int(t)
        total += size * prod(minor)
    return total


def _moved(line: _Line, lines: dict[str, _Line], called: dict[str, _Line] | None) -> int:
    """Bytes in HBM that an operation reads and writes, each array once; of slices only what is sliced, in a fusion too."""
    operands = [lines[name].shape for name in line.operands() if name in lines]
    if line.opcode in ("slice", "dynamic-slice", "gather"):
        return 2 * hbm_bytes(line.shape)
    if line.opcode == "dynamic-update-slice" and len(operands) > 1:
        return 2 * hbm_bytes(operands[1])
    whole = hbm_bytes(line.shape) + sum(map(hbm_bytes, operands))
    for inner in (called or {}).values():
        source = (called or {}).get((inner.operands() or [""])[0])
        while source is not None and source.opcode == "bitcast":
            source = (called or {}).get(source.operands()[0])
        if source is None or source.opcode != "parameter":
            continue
        if inner.opcode == "dynamic-slice":
            whole += hbm_bytes(inner.shape) - hbm_bytes(source.shape)
        elif inner.opcode == "dynamic-update-slice":  # in place: neither what it changes nor the result moves whole
            update = (called or {}).get(inner.operands()[1])
            whole += (hbm_bytes(update.shape) if update else 0) - 2 * hbm_bytes(source.shape)
    return max(0, whole)


def _key(line: _Line, lines: dict[str, _Line], called: dict[str, _Line] | None) -> str:
    """A digest of all that decides an operation's code: what it computes, the shapes and layouts of what goes in and comes out."""
    names: dict[str, str] = {}

    def plain(text: str) -> str:
        text = re.sub(r", metadata=\{[^}]*\}|, backend_config=.*|, frontend_attributes=.*", "", text)
        return _OPERANDS.sub(lambda m: names.setdefault(m[0], f"%{len(names)}"), text)

    own = re.sub(r"calls=%?[\w.\-<>]+", "", line.text)
    parts = [plain(own.replace("ROOT ", "")), *(lines[name].shape for name in line.operands() if name in lines)]
    parts += [plain(inner.text) for inner in (called or {}).values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")


# libtpu's asynchronous collectives of v5e and later: a fusion that starts one, products that send its pieces as they go, and one
# that waits for the rest.
_FUSED_START, _FUSED_BESIDE, _FUSED_DONE = "async-collective-start", "async_collective_fusion", "async-collective-done"


def _sends(line: _Line, lines: dict[str, _Line], called: dict[str, _Line] | None) -> tuple[str, _Line | None]:
    """(kind, the collective itself) of an operation that sends, also one wrapped by XLA: a reduce-scatter whose slices are padded
    is a fusion around an all-reduce, an asynchronous one a computation that is started. ("", None) for what sends nothing."""
    if collective(line.opcode):
        if not line.opcode.endswith("-done"):
            return line.opcode, line
        return line.opcode, None
    if line.opcode == "async-done":
        start = lines.get((line.operands() or [""])[0])
        while start is not None and start.opcode == "async-update":
            start = lines.get((start.operands() or [""])[0])
        return ("async-done", None) if start is not None and start.opcode == "async-start" else ("", None)
    if line.name.startswith(_FUSED_DONE):
        return "async-done", None
    inner = next((x for x in (called or {}).values() if collective(x.opcode)), None)
    if inner is None or (line.attribute("calls") or "").startswith(_FUSED_BESIDE):
        return "", None
    if line.opcode == "async-start" or line.name.startswith(_FUSED_START):
        return f"{inner.opcode}-start", inner
    scatters = inner.opcode == "all-reduce" and _bytes(line.shape) < _bytes(inner.shape)
    return ("reduce-scatter" if scatters else inner.opcode), inner


def _kernel_in(computation: dict[str, _Line]) -> _Line | None:
    """The Mosaic kernel of a fused computation."""
    return next((line for line in computation.values() if _is_kernel(line)), None)


def _sent(line: _Line, lines: dict[str, _Line], kind: str, inner: _Line | None) -> dict:
    """The fields of an `Operation` that sends, or waits for one."""
    if inner is None:
        fused = line.name.replace(_FUSED_DONE, _FUSED_START)  # of the same number
        return {"kind": kind, "cycles": 0, "waits": fused if fused != line.name else (line.operands() or [""])[0]}
    groups = _GROUPS.search(inner.text)
    moved = _collective_bytes(replace(line, shape=inner.shape) if line.name.startswith(_FUSED_START) else line, lines)
    return {"kind": kind, "cycles": 0, "bytes": moved, "groups": groups[1] if groups else ""}


def _is_kernel(line: _Line) -> bool:
    return line.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in line.text


def operations(text: str) -> list[Operation]:
    """Every operation of a compiled program that costs cycles, with its trips: XLA's own, kernels and collectives.

    text: `compiled.as_text()`. Fused computations count as the one fusion they are. ProgramError for a loop that is not counted.
    """
    return [op for op in schedule(text) if not op.waits]


def schedule(text: str) -> list[Operation]:
    """`operations` in the order in which a core runs them, and between them where it waits for a collective that it has started."""
    computations, entry = _computations(text)

    def walk(name: str, trips: int) -> Iterator[Operation]:
        lines = computations[name]
        for line in lines.values():
            called = computations.get(line.attribute("calls") or "") if line.opcode in ("fusion", "async-start") else None
            inner = line if _is_kernel(line) else _kernel_in(called or {})
            source = re.search(r'op_name="([^"]*)"', (inner or line).text)
            cycles = _CYCLES.search(line.text)
            op = Operation(
                name=line.name,
                kind=line.opcode,
                cycles=int(cycles[1]) if cycles else 0,
                trips=trips,
                source=source[1] if source else "",
                shape=line.shape,
            )
            if line.opcode == "while":
                yield from walk(line.attribute("body") or "", trips * _trips(computations, lines, line))
            elif line.opcode == "call":
                yield from walk(line.attribute("to_apply") or "", trips)
            elif line.opcode == "conditional":
                names = re.findall(r"(?:true_computation|false_computation)=%([\w.\-]+)", line.text)
                names += _OPERANDS.findall(m[1]) if (m := re.search(r"branch_computations=\{([^}]*)\}", line.text)) else []
                yield from max((list(walk(n, trips)) for n in names), key=lambda ops: sum(o.cycles * o.trips for o in ops))
            elif (sent := _sends(line, lines, called))[0]:
                yield replace(op, **_sent(line, lines, *sent))
            elif inner is not None:
                key, moved = _key(line, lines, called), _moved(line, lines, called)
                yield replace(op, kind="kernel", cycles=0, key=key, moved=moved, aliases=() if inner is line else (inner.name,))
            elif line.opcode.endswith(("-start", "-update", "-done")) or (line.opcode in _FREE and not op.cycles):
                continue
            else:
                yield replace(op, key=_key(line, lines, called), moved=_moved(line, lines, called))

    return list(walk(entry, 1))
