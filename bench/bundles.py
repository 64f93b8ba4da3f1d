"""The VLIW schedules that the TPU compiler dumps (`*-final_bundles.txt`), as data: what `bench.llo` follows.

One line is a bundle, the operations of a bundle stand between braces. Kept of them: the SCALAR operations (loop counters,
predicates, spilled scalars, branches, DMAs), which decide what runs how often; the delays; and the operations of the MXUs,
which take longer than a bundle. Other vector operations are not kept: their order is all that costs, and the bundles count it.
"""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

# Bytes of one unit of `size_in_granules`.
GRANULE = {"v2": 1024, "v3": 1024, "v4": 512, "v5e": 32, "v5p": 32, "v6e": 32, "7x": 32}
# Cycles that one operation keeps an MXU busy, by generation and the type of its rows: a product takes the rows of a register
# (8 of float32, 16 of bfloat16, 32 of 8 bits), of which a 128 x 128 array takes one a cycle and a 256 x 256 one two.
_ROWS = {"f32": 8, "bf16": 16, "s8": 32, "u8": 32, "f8e4m3": 32, "f8e5m2": 32}
_ROWS_PER_CYCLE = {"v2": 1, "v3": 1, "v4": 1, "v5e": 1, "v5p": 1, "v6e": 2, "7x": 2}


class ScheduleError(ValueError):
    """The schedule cannot be followed; the message says where."""


_HEAD = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:[ >]*\{", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_OP = re.compile(r"%(\S+) = (\S+)(.*)", re.S)
_PREDICATE = re.compile(r"\((!?)%([^)\s]+)\)")
_SELECT = re.compile(r"\((!?)%(\w+), *([^)]+)\)")  # `smov (%p1, %s2), 3`: 3 where p1 holds, else s2
_WINDOW = re.compile(r"window_bounds: \(([\d, ]*)\)")
_ELEMENT = re.compile(r"element_size_in_bytes: (\d+)")
_GRANULES = re.compile(r"size_in_granules=\*/(\S+?)[,\s]")
_MXU = re.compile(r"= vmatmul\.(?:\w+\.)*?(f32|bf16|s8|u8|f8e\w+)(?:\.\w+)*?\.g?mxu(\d)")
_FLAG = re.compile(r"dst_syncflagno=\*/([^,]+?)(?:,|\s*/\*)")
_SYMBOL = re.compile(r"#(\w+)\](?: *\+ *\$?(0x[0-9a-f]+|\d+))?|#(\w+) *\+ *\$?(0x[0-9a-f]+|\d+)\]")
_SCALAR = re.compile(r"^(s(?!hal|tv)|p(?:or|and|nand|nor|xor|neg|mov|phi|nxor)|scalar_|int_to_ptr|dma|vdelay)")


@dataclass(frozen=True)
class Op:
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
    "smulhi": lambda a, b: (_unsigned(a) * _unsigned(b)) >> 32,
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


class Machine:
    """The scalar state: registers by their SSA and by their physical name, scalar memory, the time of each write for phis."""

    def __init__(self):
        self.values: dict[str, int | None] = {}
        self.times: dict[str, int] = {}
        self.memory: dict[int, int | None] = {}
        self.symbols: dict[str, int] = {}
        self.clock = 0
        self.quotients: deque[int | None] = deque()  # results of divisions that wait to be popped

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

    def run(self, op: Op) -> None:
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
        if kind == "sdivrem":
            a, b = (None if v is None else _unsigned(v) for v in values[:2])
            both = (None, None) if a is None or not b else (a // b, a % b)
            self.quotients += {"kDiv": both[:1], "kRem": both[1:]}.get(op.extra[0], both)
            return
        if kind == "spop" and self.quotients:
            self.write(op.out, self.quotients.popleft())
            return
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


def _parse_op(text: str, raw: str, granule: int) -> Op | None:
    match = _OP.match(text.strip())
    if match is None:
        return None
    out, name, rest = match[1], match[2], match[3]
    if not _SCALAR.match(name):
        return None
    select = _SELECT.search(rest)
    if select is not None:
        args = tuple(a for a in rest.replace(select[0], "", 1).split(",") if a.strip())
        return Op(out, name, args, bool(select[1]), select[2], otherwise=select[3])
    predicate = _PREDICATE.search(rest)
    if predicate is not None:
        rest = rest.replace(predicate[0], "", 1)
    negated, guard = (bool(predicate[1]), predicate[2]) if predicate else (False, None)
    if name == "vdelay":
        return Op(out, name, (rest.strip(),), negated, guard)
    if name.startswith("sbr"):
        region = re.search(r"\$region(\d+)", rest)
        return Op(out, name, (region[1] if region else "",), negated, guard)
    if name.startswith("dma") and not name.startswith("dma.done"):
        return Op(out, name, tuple(a for a in rest.split(",") if a.strip()), negated, guard, _dma(raw, granule))
    if name.startswith("sdivrem"):
        wanted = re.search(r"/\* (kDiv\w*|kRem\w*)", raw)
        return Op(out, name, tuple(rest.split(",")), negated, guard, (wanted[1] if wanted else "",))
    rest = re.sub(r"\[(resolvable|thread):\$?\w+\]", "", rest).strip().lstrip(",")
    args = tuple(a for a in rest.split(",") if a.strip())
    if name == "sst" and len(args) == 1:  # `sst [smem:[...]] %s1_s1`: no comma between the two
        target, _, value = args[0].strip().rpartition(" ")
        args = (target, value)
    return Op(out, name, args, negated, guard)


def _dma(raw: str, granule: int) -> tuple[int | str, str, int]:
    """(bytes of a DMA, or the register with its granules; its flag operand; bytes of its whole window) from text with comments.

    A window may be cut at an array's edge, or moved by several DMAs: it is the size of last resort.
    """
    flag = _FLAG.search(raw)
    window, element = _WINDOW.search(raw), _ELEMENT.search(raw)
    whole = 0
    if window and element:
        whole = int(element[1])
        for extent in window[1].split(","):
            whole *= int(extent) if extent.strip() else 1
    granules = _GRANULES.search(raw)
    size: int | str = "" if granules is None else int(granules[1]) * granule if granules[1].isdigit() else granules[1]
    return size, flag[1] if flag else "", whole


def _split_ops(body: str) -> list[str]:
    """The operations of a bundle, comments kept: split at `;;` outside comments."""
    hidden = _COMMENT.sub(lambda m: m[0].replace(";;", "::"), body)
    return hidden.split(";;")


class Program:
    """A parsed schedule.

    ops: bundle -> its scalar operations. regions: name -> the bundle it starts at. delays: bundle -> cycles beside its own. mxu:
    bundle -> (MXU, cycles it is busy) of its products. plain: bundle -> the first bundle from there on that has scalar operations.
    """

    def __init__(self, text: str, target: str):
        heads = list(_HEAD.finditer(text))
        if not heads:
            raise ScheduleError("no bundles found in the schedule dump; the format of this libtpu is not known to bench.bundles")
        granule, rate = GRANULE[target], _ROWS_PER_CYCLE[target]
        self.ops: list[list[Op]] = []
        self.regions: dict[str, int] = {}
        self.delays: list[int] = []
        self.mxu: list[list[tuple[int, int]]] = []
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
            self.mxu.append([(int(unit), _ROWS[kind] // rate) for kind, unit in _MXU.findall(chunk)])
            # a bundle lists its phis last, but they name what the rest of it reads
            self.ops.append(sorted((op for op in ops if op.name != "vdelay"), key=lambda op: op.name not in ("sphi", "pphi")))
        self.plain = list(range(len(heads) + 1))
        for i in range(len(heads) - 1, -1, -1):
            self.plain[i] = i if self.ops[i] else self.plain[i + 1]
