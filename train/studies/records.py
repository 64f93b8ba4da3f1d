"""What a study is: runs of the jobs, where each stands in the study's table, and how the table is drawn.

A run is the command line of a job. A pre-training begins a group; what measures it names it in `after` and gets its directory as
--init. So a beginning is there once, however many runs go on from it, and a group is the smallest part that a study is cut into.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Job = Literal["pretrain", "finetune", "fewshot", "vtab", "throughput"]
MODULES: dict[Job, str] = {
    "pretrain": "train.pretrain",
    "finetune": "train.finetune",
    "fewshot": "train.fewshot",
    "vtab": "train.vtab",
    "throughput": "bench.throughput",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a job. name: in its study, and of its directory. options: words of the job's command line, but for --init and
    --out. after: the name of the pre-training that it starts from. at: where a pre-training stands in the study, {"model":
    "ViT-B/16"}."""

    name: str
    job: Job
    options: tuple[str, ...]
    after: str | None = None
    at: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a study is made for. toy: models that two cores train in minutes, or those of the paper. data, to: sources to pre-train
    on, and to transfer to. budget: share of the steps. vtab: the directory of VTAB's sets."""

    toy: bool
    data: str
    to: str
    budget: float = 1.0
    seed: int = 0
    vtab: str | None = None

    @property
    def digits(self) -> bool:
        """Whether the embedded digits, grey images of 8x8, are what it pre-trains on."""
        return self.data.partition(":")[0] == "digits"

    def steps(self, steps: float) -> int:
        """Of a run that takes `steps` at the full budget."""
        return max(1, round(steps * self.budget))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table or figure of the paper.

    runs: (setting) -> its runs, a pre-training before what follows it. x: the column along which it is drawn, a number or a name.
    line: the column with a line, or colour, of its own for each value; None for one. log: whether x is logarithmic. paper: the
    paper's rows, each with columns of `Run.at` and "paper", a share; one that has all of a run's `at` stands in that run's row.
    paper_what: what these measure. paper_x: the column that stands for x there. note: what differs from the paper. speed: whether
    its rows have "images/s", of a run of bench.throughput, along whose inverse it is then drawn a second time.
    """

    name: str
    title: str
    runs: Callable[[Setting], list[Run]]
    x: str = ""
    line: str | None = None
    log: bool = False
    xlabel: str = ""
    paper: tuple[dict[str, Any], ...] = ()
    paper_what: str = ""
    paper_x: str = ""
    note: str = ""
    speed: bool = False


def words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Options as the words of a command line; None and False leave one out, True is a flag, a tuple several values."""
    out: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        out.append(f"--{name.replace('_', '-')}")
        if value is not True:
            out += [f"{v:g}" if isinstance(v, float) else str(v) for v in (value if isinstance(value, tuple) else (value,))]
    return tuple(out)


def groups(runs: list[Run]) -> list[list[Run]]:
    """The runs by what they begin with, each group in order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.after or run.name, []).append(run)
    return list(found.values())


def part_of(runs: list[Run], costs: Mapping[str, float], part: int, parts: int) -> list[Run]:
    """The runs of part 1 ... parts: every run is in exactly one, with what it starts from, and the parts cost about the same: the
    dearest group first, each to the part that has least so far."""
    load = [0.0] * parts
    mine: list[list[Run]] = []
    each = groups(runs)
    for group in sorted(each, key=lambda group: (-sum(costs[run.name] for run in group), group[0].name)):
        least = load.index(min(load))
        load[least] += sum(costs[run.name] for run in group) or 1e-9
        if least == part - 1:
            mine.append(group)
    return [run for group in each if group in mine for run in group]
