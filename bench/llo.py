"""Cycles of one operation of a TPU program, kernel or XLA fusion, counted by walking the schedule that the compiler dumps for it.

`--xla_jf_dump_llo_text` writes `*-final_bundles.txt`: one line a bundle, the operations of a bundle between braces. A TensorCore
is in order and has no caches: a bundle takes one cycle, a `vdelay n` n more (v2 and v3 write them instead of empty bundles: a
third of a matrix product). Two things make it wait: an MXU that is still busy with the rows it was given (a register of 16 rows of
bfloat16 keeps a 128 x 128 array busy for 16 cycles, and the schedules of v4 and later issue them faster than that), and DMAs.
So the
count is exact where control flow is: this module executes the SCALAR operations of the schedule (loop counters, predicates, spilled
scalars), follows the branches, counts what it passes, keeps a clock for each MXU, and lets each DMA take its bytes over the HBM
bandwidth plus a latency. Vector operations are not executed: their order is all that costs.

What it is not: a simulator of values (a branch that depends on loaded data is taken to execute its region; a loop that does is an
error) or of HBM (no bank conflicts, no sharing with the other core). `bench.kernels --calibrate` compares it with the compiler's
own static profile where that exists.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

from bench.bundles import GRANULE, Machine, Op, Program, ScheduleError

# Bundles after a branch that execute before it takes effect, as the schedules show them.
_DELAY_SLOTS = {"v2": 1, "v3": 1, "v4": 1, "v5e": 4, "v5p": 4, "v6e": 4, "7x": 6}
_DMA_LATENCY = 600  # cycles from the last byte's turn to the flag
_MOST_CYCLES = 20_000_000_000
_QUEUE = 32  # cycles of work that an MXU holds before the next product must wait

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")


@dataclass(frozen=True, kw_only=True)
class Count:
    """What one call of an operation costs by its schedule.

    cycles: bundles + delays + mxu_stalls + stalls. bundles, delays: executed. mxu_stalls: cycles waiting for a busy MXU.
    stalls: for DMAs. mxu_busy: cycles that the busiest MXU works. dma_bytes: moved over HBM. guessed: DMAs whose size the
    scalars do not tell, taken as their whole window. static_bundles: length of the program. assumed: branches on data, taken to
    execute their region. units: unit -> share of its slots that executed bundles and delays used, in [0, 1] ("FILL" and "SPILL":
    register spills, of the load and store slots).
    """

    cycles: int
    bundles: int
    delays: int
    stalls: int
    dma_bytes: int
    static_bundles: int
    assumed: int
    units: dict[str, float]
    mxu_stalls: int = 0
    mxu_busy: int = 0
    guessed: int = 0

    @property
    def issue(self) -> int:
        """Cycles without those waiting for DMAs: what the core itself needs."""
        return self.bundles + self.delays + self.mxu_stalls


class _Walk:
    """One execution of a program from its first bundle to its last."""

    def __init__(self, program: Program, target: str, bytes_per_cycle: float):
        self.program, self.bandwidth = program, bytes_per_cycle
        self.slots, self.granule = _DELAY_SLOTS[target], GRANULE[target]
        self.machine = Machine()
        self.executed = [0] * (len(program.ops) + 1)
        self.passed = [0] * (len(program.ops) + 1)  # +1 where a run of plain bundles begins, -1 after it: summed up at the end
        self.now = self.stalls = self.free = 0
        self.moved = self.assumed = self.guessed = 0
        self.flags: dict[int, deque[float]] = defaultdict(deque)
        units = 1 + max((unit for bundle in program.mxu for unit, _ in bundle), default=0)
        self.mxu, self.busy, self.mxu_stalls = [0] * units, [0] * units, 0
        self.products = [i for i, bundle in enumerate(program.mxu) if bundle]
        self.clock = [0]
        for delay in program.delays:
            self.clock.append(self.clock[-1] + 1 + delay)
        self.runs: dict[tuple, tuple[int, tuple[int, ...], tuple[int, ...]]] = {}

    def _guard(self, op: Op) -> int | None:
        if op.predicate is None:
            return 1
        value = self.machine.read("%" + op.predicate)
        return None if value is None else (1 - value if op.negated else value)

    def _size(self, op: Op, descriptor: int | None) -> int:
        """Bytes of a DMA. v2 and v3 keep its granules in word 6 of a descriptor in scalar memory, the others in a register."""
        size, _, window = op.extra
        granules = None
        if isinstance(size, int):
            return size
        if descriptor is not None:
            word = self.machine.memory.get(descriptor + 6)
            granules = None if word is None else word & 0xFFFFF
        elif size:
            granules = self.machine.read(size)
        if granules is None:
            self.guessed += 1
            return window
        return granules * self.granule

    def _issue(self, op: Op) -> None:
        flag_text = op.extra[1]
        descriptor = None
        if flag_text:
            flag = self.machine.read(flag_text)
        else:  # v2 and v3: the flag is the eighth word of the descriptor
            descriptor = self.machine.read(op.args[0])
            flag = None if descriptor is None else self.machine.memory.get(descriptor + 7)
        size = self._size(op, descriptor)
        start = max(self.now, self.free)
        self.free = start + size / self.bandwidth
        self.moved += size
        self.flags[self._key(flag)].append(self.free + _DMA_LATENCY)

    @staticmethod
    def _key(flag: int | None) -> int:
        return -1 if flag is None else flag & ~0x1C00

    def _wait(self, op: Op) -> None:
        flag = self.machine.read(op.args[0]) if op.args else None
        queue = self.flags[self._key(flag)]
        if queue:
            stall = max(0, round(queue.popleft() - self.now))
            self.now += stall
            self.stalls += stall

    def _product(self, unit: int, cycles: int) -> None:
        """One operation given to an MXU, which waits while that holds more than it can."""
        ready = self.mxu[unit] - _QUEUE
        if ready > self.now:
            self.mxu_stalls += ready - self.now
            self.now = ready
        self.mxu[unit] = max(self.mxu[unit], self.now) + cycles
        self.busy[unit] += cycles

    def _run(self, begin: int, end: int) -> None:
        """Executes the bundles [begin, end), none of which has scalar operations."""
        self.passed[begin] += 1
        self.passed[end] -= 1
        first, last = bisect_left(self.products, begin), bisect_left(self.products, end)
        length = self.clock[end] - self.clock[begin]
        if first == last:
            self.now += length
            return
        before = self.now
        key = (begin, end, *(max(0, t - before) for t in self.mxu))  # a loop's steady state: seen before
        known = self.runs.get(key)
        if known is None:
            busy, stalls = list(self.busy), self.mxu_stalls
            for index in self.products[first:last]:
                self.now = before + self.clock[index] - self.clock[begin] + self.mxu_stalls - stalls
                for unit, cycles in self.program.mxu[index]:
                    self._product(unit, cycles)
            waited = self.mxu_stalls - stalls
            left = tuple(t - before for t in self.mxu)
            self.runs[key] = waited, left, tuple(b - a for a, b in zip(busy, self.busy, strict=True))
        else:
            waited, left, worked = known
            self.mxu_stalls += waited
            self.mxu = [before + t for t in left]
            self.busy = [a + b for a, b in zip(self.busy, worked, strict=True)]
        self.now = before + length + waited

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
        for unit, cycles in self.program.mxu[index]:
            self._product(unit, cycles)
        self.executed[index] += 1
        self.now += 1 + self.program.delays[index]
        return target

    def run(self) -> None:
        index, last = 0, len(self.program.ops)
        while index < last:
            plain = self.program.plain[index]
            if plain > index:
                self._run(index, plain)
                index = plain
                continue
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
        running = 0
        for i, change in enumerate(self.passed):
            running += change
            self.executed[i] += running
        self.executed.pop()


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
    """The Count of the operation whose `*-final_bundles.txt` is `schedule`. ScheduleError where it cannot be followed."""
    program = Program(schedule.read_text(), target)
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
        mxu_stalls=walk.mxu_stalls,
        mxu_busy=max(walk.busy),
        guessed=walk.guessed,
    )
