"""Cycles of one Pallas kernel, counted by walking the VLIW schedule that the TPU compiler dumps for it.

`--xla_jf_dump_llo_text` writes `*-final_bundles.txt`: one line a bundle, the operations of a bundle between braces. A TensorCore
is in order and has no caches: a bundle takes one cycle, a `vdelay n` n more (v2 and v3 write them instead of empty bundles: a third
of a matrix product), and the only other waits are for DMAs. So the count is exact where control flow is: this module executes the
SCALAR operations of the schedule (loop counters, predicates, spilled scalars), follows the branches, counts what it passes, and
lets each DMA take its bytes over the HBM bandwidth plus a latency. Vector operations are not executed: their order is all that
costs.

What it is not: a simulator of values (a branch that depends on loaded data is taken to execute its region; a loop that does is an
error) or of HBM (no bank conflicts, no sharing with the other core). `bench.kernels --calibrate` compares it with the compiler's
own static profile where that exists.
"""

import re
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Bundles after a branch that execute before it takes effect, as the schedules show them.
_DELAY_SLOTS = {"v2": 1, "v3": 1, "v4": 1, "v5e": 4, "v5p": 4, "v6e": 4, "7x": 6}
# Bytes of one unit of `size_in_granules`.
_GRANULE = {"v2": 1024, "v3": 1024, "v4": 512, "v5e": 32, "v5p": 32, "v6e": 32, "7x": 32}
_DMA_LATENCY = 600  # cycles from the last byte's turn to the flag
_MOST_CYCLES = 20_000_000_000

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")


class ScheduleError(ValueError):
    """The schedule cannot be followed; the message says where."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """What one call of a kernel costs by its schedule.

    cycles: bundles + delays + stalls. bundles, delays: executed. stalls: cycles waiting for DMAs. dma_bytes: moved over HBM, both
    ways. static_bundles: length of the program. assumed: branches on data, taken to execute their region. units: unit -> share of
    its slots that executed bundles and delays used, in [0, 1] ("FILL" and "SPILL": register spills, of the load and store slots).
    """

    cycles: int
    bundles: int
    delays: int
    stalls: int
    dma_bytes: int
    static_bundles: int
    assumed: int
    units: dict[str, float]


_HEAD = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:[ >]*\{", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_OP = re.compile(r"%(\S+) = (\S+)(.*)", re.S)
_PREDICATE = re.compile(r"\((!?)%([^)\s]+)\)")
_SELECT = re.compile(r"\((!?)%(\w+), *([^)]+)\)")  # `smov (%p1, %s2), 3`: 3 where p1 holds, else s2
_WINDOW = re.compile(r"window_bounds: \(([\d, ]*)\)")
_ELEMENT = re.compile(r"element_size_in_bytes: (\d+)")
_GRANULES = re.compile(r"size_in_granules=\*/(\S+?)[,\s]")
_FLAG = re.compile(r"dst_syncflagno=\*/([^,]+?)(?:,|\s*/\*)")
_SYMBOL = re.compile(r"#(\w+)\](?: *\+ *\$?(0x[0-9a-f]+|\d+))?|#(\w+) *\+ *\$?(0x[0-9a-f]+|\d+)\]")
_SCALAR = re.compile(r"^(s(?!hal|tv)|p(?:or|and|nand|nor|xor|neg|mov|phi|nxor)|scalar_|int_to_ptr|dma|vdelay)")


@dataclass(frozen=True)
class _Op:
    out: str
    name: str
    args: tuple[str, ...]
    negated: bool
    predicate: str | None
    extra: tuple = ()
    otherwise: str = ""  # the value where the predicate does not hold


def _wrap(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _unsigned(value: int) -> int:
    return value % 2**32


_BINARY: dict[str, Callable[[int, int], int]] = {
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "sand": lambda a, b: a & b,
    "sor": lambda a, b: a | b,
    "sxor": lambda a, b: a ^ b,
    "smin": min,
    "smax": max,
    "sshll": lambda a, b: a << b,
    "sshrl": lambda a, b: _unsigned(a) >> b,
    "sshra": lambda a, b: a >> b,
    "sdiv": lambda a, b: int(a / b) if b else 0,
    "srem": lambda a, b: a - b * int(a / b) if b else 0,
    "por": lambda a, b: a | b,
    "pand": lambda a, b: a & b,
    "pxor": lambda a, b: a ^ b,
    "pnand": lambda a, b: 1 - (a & b),
    "pnor": lambda a, b: 1 - (a | b),
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


class _Machine:
    """The scalar state: registers by their SSA and by their physical name, scalar memory, the time of each write for phis."""

    def __init__(self):
        self.values: dict[str, int | None] = {}
        self.times: dict[str, int] = {}
        self.memory: dict[int, int | None] = {}
        self.symbols: dict[str, int] = {}
        self.clock = 0

    def write(self, name: str, value: int | None) -> None:
        self.clock += 1
        physical = name.rsplit("_", 1)[-1]
        for key in (name, "/" + physical):
            self.values[key] = value
            self.times[key] = self.clock

    def read(self, text: str) -> int | None:
        text = text.strip()
        if text.startswith("%"):
            name = text[1:]
            return self.values[name] if name in self.values else self.values.get("/" + name.rsplit("_", 1)[-1])
        if "#" in text:
            symbol = _SYMBOL.search(text)
            if symbol is None:
                return None
            name, offset = (symbol[1], symbol[2]) if symbol[1] else (symbol[3], symbol[4])
            base = self.symbols.setdefault(name, (len(self.symbols) + 1) << 18)
            return base + (int(offset, 0) if offset else 0)
        try:
            return _wrap(int(text.lstrip("$"), 0))
        except ValueError:
            return None

    def address(self, text: str) -> int | None:
        """Address of `[smem:[#allocation5 + $0x3]]`, `[smem:[%s5_s2 + $0x3]]`, `[smem:%s5_s2]`."""
        if "#" in text:
            return self.read(text)
        register = re.search(r"%[\w]+", text)
        offset = re.search(r"\+ *\$?(0x[0-9a-f]+|\d+)", text)
        base = self.read(register[0]) if register else None
        return None if base is None else base + (int(offset[1], 0) if offset else 0)

    def run(self, op: _Op) -> None:
        """Executes one scalar operation that is neither branch nor DMA."""
        kind = op.name.split(".")[0]
        if kind == "sst":
            address = self.address(op.args[0])
            if address is not None:
                self.memory[address] = self.read(op.args[1])
            return
        if kind == "sld":
            address = self.address(op.args[0])
            self.write(op.out, None if address is None else self.memory.get(address))
            return
        if kind in ("sphi", "pphi"):
            known = [a.strip()[1:] for a in op.args if a.strip().startswith("%")]
            latest = max(known, key=lambda n: self.times.get(n, -1), default=None)
            self.write(op.out, self.read("%" + latest) if latest else None)
            return
        values = [self.read(a) for a in op.args]
        self.write(op.out, _evaluate(kind, op.name, values))


def _evaluate(kind: str, name: str, values: list[int | None]) -> int | None:
    if kind in ("smov", "pmov", "int_to_ptr"):
        return values[-1] if values else None
    if kind == "pneg":
        return None if values[0] is None else 1 - values[0]
    if kind == "scalar_select":
        chosen, yes, no = values[-3:]
        return (yes if yes == no else None) if chosen is None else (yes if chosen else no)
    if kind in ("pand", "por", "pnand", "pnor") and None in values:  # known all the same where one operand decides
        decides = 0 if kind in ("pand", "pnand") else 1
        return int(kind in ("por", "pnand")) if decides in values else None
    if len(values) < 2 or values[0] is None or values[1] is None:
        return None
    if kind == "scmp":
        _, relation, form = name.split(".")[:3]
        a, b = (_unsigned(values[0]), _unsigned(values[1])) if form.startswith("u") else (values[0], values[1])
        return int(_COMPARE[relation](a, b))
    if kind == "scalar_lea":
        return _wrap(values[0] + values[1])
    if kind in _BINARY:
        result = _BINARY[kind](values[0], values[1])
        return result if kind.startswith("p") else _wrap(result)
    return None


def _parse_op(text: str, raw: str, granule: int) -> _Op | None:
    match = _OP.match(text.strip())
    if match is None:
        return None
    out, name, rest = match[1], match[2], match[3]
    if not _SCALAR.match(name):
        return None
    select = _SELECT.search(rest)
    if select is not None:
        args = tuple(a for a in rest.replace(select[0], "", 1).split(",") if a.strip())
        return _Op(out, name, args, bool(select[1]), select[2], otherwise=select[3])
    predicate = _PREDICATE.search(rest)
    if predicate is not None:
        rest = rest.replace(predicate[0], "", 1)
    negated, guard = (bool(predicate[1]), predicate[2]) if predicate else (False, None)
    if name == "vdelay":
        return _Op(out, name, (rest.strip(),), negated, guard)
    if name.startswith("sbr"):
        region = re.search(r"\$region(\d+)", rest)
        return _Op(out, name, (region[1] if region else "",), negated, guard)
    if name.startswith("dma") and not name.startswith("dma.done"):
        return _Op(out, name, tuple(rest.split(",")), negated, guard, _dma(raw, granule))
    rest = re.sub(r"\[(resolvable|thread):\$?\w+\]", "", rest).strip().lstrip(",")
    args = tuple(a for a in rest.split(",") if a.strip())
    if name == "sst" and len(args) == 1:  # `sst [smem:[...]] %s1_s1`: no comma between the two
        target, _, value = args[0].strip().rpartition(" ")
        args = (target, value)
    return _Op(out, name, args, negated, guard)


def _dma(raw: str, granule: int) -> tuple[int | str, str]:
    """(bytes of a DMA, or the register with its granules; its flag operand) from the text with its comments."""
    flag = _FLAG.search(raw)
    window, element = _WINDOW.search(raw), _ELEMENT.search(raw)
    if window and element:
        size = int(element[1])
        for extent in window[1].split(","):
            size *= int(extent) if extent.strip() else 1
        return size, flag[1] if flag else ""
    granules = _GRANULES.search(raw)
    if granules is None:
        return 0, flag[1] if flag else ""
    return (int(granules[1]) * granule if granules[1].isdigit() else granules[1]), flag[1] if flag else ""


def _split_ops(body: str) -> list[str]:
    """The operations of a bundle, comments kept: split at `;;` outside comments."""
    hidden = _COMMENT.sub(lambda m: m[0].replace(";;", "::"), body)
    return hidden.split(";;")


class _Program:
    """A parsed schedule: the scalar operations of each bundle, the bundle at which each region starts, the delays."""

    def __init__(self, text: str, granule: int):
        heads = list(_HEAD.finditer(text))
        if not heads:
            raise ScheduleError("no bundles found in the schedule dump; the format of this libtpu is not known to bench.llo")
        self.ops: list[list[_Op]] = []
        self.regions: dict[str, int] = {}
        self.delays: list[int] = []
        for i, head in enumerate(heads):
            chunk = text[head.end() : heads[i + 1].start() if i + 1 < len(heads) else len(text)]
            for region in _START.findall(chunk):
                self.regions.setdefault(region, i)
            ops = []
            for raw in _split_ops(chunk):
                op = _parse_op(_COMMENT.sub("", raw).split("}")[0], raw, granule)
                if op is not None:
                    ops.append(op)
            self.delays.append(sum(int(op.args[0]) for op in ops if op.name == "vdelay"))
            # a bundle lists its phis last, but they name what the rest of it reads
            self.ops.append(sorted((op for op in ops if op.name != "vdelay"), key=lambda op: op.name not in ("sphi", "pphi")))


class _Walk:
    """One execution of a program from its first bundle to its last."""

    def __init__(self, program: _Program, target: str, bytes_per_cycle: float):
        self.program, self.bandwidth = program, bytes_per_cycle
        self.slots, self.granule = _DELAY_SLOTS[target], _GRANULE[target]
        self.machine = _Machine()
        self.executed = [0] * len(program.ops)
        self.now = self.stalls = self.free = 0
        self.moved = self.assumed = 0
        self.flags: dict[int, deque[float]] = defaultdict(deque)

    def _guard(self, op: _Op) -> int | None:
        if op.predicate is None:
            return 1
        value = self.machine.read("%" + op.predicate)
        return None if value is None else (1 - value if op.negated else value)

    def _issue(self, op: _Op) -> None:
        size, flag_text = op.extra
        if isinstance(size, str):
            granules = self.machine.read(size)
            size = 0 if granules is None else granules * self.granule
        if flag_text:
            flag = self.machine.read(flag_text)
        else:  # v2 and v3: the flag is the eighth word of a descriptor in scalar memory
            descriptor = self.machine.read(op.args[0])
            flag = None if descriptor is None else self.machine.memory.get(descriptor + 7)
        start = max(self.now, self.free)
        self.free = start + size / self.bandwidth
        self.moved += size
        self.flags[self._key(flag)].append(self.free + _DMA_LATENCY)

    @staticmethod
    def _key(flag: int | None) -> int:
        return -1 if flag is None else flag & ~0x1C00

    def _wait(self, op: _Op) -> None:
        flag = self.machine.read(op.args[0]) if op.args else None
        queue = self.flags[self._key(flag)]
        if queue:
            stall = max(0, round(queue.popleft() - self.now))
            self.now += stall
            self.stalls += stall

    def _bundle(self, index: int) -> str | None:
        """Executes one bundle; returns the region a taken branch goes to."""
        target = None
        for op in self.program.ops[index]:
            holds = self._guard(op)
            if op.name.startswith("sbr"):
                if holds is None:
                    if self.program.regions.get(op.args[0], len(self.program.ops)) <= index:
                        raise ScheduleError(f"the loop that ends at bundle {index} depends on data; its trip count is unknown")
                    self.assumed += 1
                elif holds:
                    target = op.args[0]
                continue
            if op.otherwise and holds != 1:
                self.machine.write(op.out, self.machine.read(op.otherwise) if holds == 0 else None)
                continue
            if holds == 0:
                continue
            if op.name.startswith("dma.done"):
                self._wait(op)
            elif op.name.startswith("dma"):
                self._issue(op)
            else:
                self.machine.run(op)
        self.executed[index] += 1
        self.now += 1 + self.program.delays[index]
        return target

    def run(self) -> None:
        index, last = 0, len(self.program.ops)
        while index < last:
            target = self._bundle(index)
            index += 1
            if target is not None:
                for slot in range(index, min(index + self.slots, last)):
                    self._bundle(slot)
                if target not in self.program.regions:
                    raise ScheduleError(f"branch at bundle {index - 1} to region {target}, which the schedule does not mark")
                index = self.program.regions[target]
            if self.now > _MOST_CYCLES:
                raise ScheduleError(f"more than {_MOST_CYCLES:.0e} cycles: the loop around bundle {index} does not end")


def _units(path: Path, executed: list[int], cycles: int) -> dict[str, float]:
    """Share of each unit's slots in use, from the per-bundle utilization table beside the schedule."""
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("== UTILIZATION"))
    capacity = [int(n) for n in lines[start - 1].split()]
    totals = [0] * len(capacity)
    for count, line in zip(executed, lines[start + 1 :], strict=False):
        if count:
            for unit, used in enumerate(line.split()):
                totals[unit] += count * int(used)
    return {u: t / (c * cycles) if c and cycles else 0.0 for u, t, c in zip(UNITS, totals, capacity, strict=False)}


def count(schedule: Path, utilization: Path | None, *, target: str, bytes_per_cycle: float) -> Count:
    """The Count of the kernel whose `*-final_bundles.txt` is `schedule`. ScheduleError where it cannot be followed."""
    program = _Program(schedule.read_text(), _GRANULE[target])
    walk = _Walk(program, target, bytes_per_cycle)
    walk.run()
    bundles = sum(walk.executed)
    delays = sum(n * d for n, d in zip(walk.executed, program.delays, strict=True))
    return Count(
        cycles=round(walk.now),
        bundles=bundles,
        delays=delays,
        stalls=walk.stalls,
        dma_bytes=walk.moved,
        static_bundles=len(program.ops),
        assumed=walk.assumed,
        units=_units(utilization, walk.executed, bundles + delays) if utilization else {},
    )
