"""Tables and pictures of the studies that are a job's own: VTAB (Figure 2, Table 9) and throughput (Figure 12)."""

from collections.abc import Mapping
from typing import Any

from train import vtab_results as vtab
from train.files import write_atomically
from train.studies import paper
from train.studies.records import Run, Setting, Study

Results = Mapping[str, Mapping[str, Any]]


def table(study: Study, results: Results, setting: Setting, lines: list[str]) -> str:
    """Markdown: what the job found, the paper's numbers beside. lines: said below."""
    out = [f"# {study.title}", ""]
    for result in results.values():
        if "vtab" in result:
            out += [f"Ours, pre-trained on {setting.data}; budget {setting.budget:g}, seed {setting.seed}.", ""]
            out += _vtab(result["vtab"])
        elif "rows" in result:
            out += [*_throughput(result["rows"]), ""]
    return "\n".join([*out, *lines]) + "\n"


def draw(study: Study, runs: list[Run], results: Results, setting: Setting, out) -> None:
    """OUT/NAME.png. ValueError where the picture of a run of bench.throughput is gone."""
    path = out / f"{study.name}.png"
    for run in runs:
        if run.job == "vtab":
            found = results[run.name]["vtab"]
            title = f"{vtab.title_of(found)}: pre-trained on {setting.data}, budget {setting.budget:g}"
            vtab.draw(found, path, title, paper.TABLE_9)
        elif run.job == "throughput":
            drawn = out / "runs" / run.name / "throughput.png"
            if not drawn.exists():
                gone = out / "results" / f"{run.name}.json"
                raise ValueError(f"{drawn} is gone: remove {gone}; the same command then draws it again of what it has timed")
            write_atomically(path, drawn.read_bytes())


def _vtab(found: Mapping[str, Any]) -> list[str]:
    """Our tasks beside the paper's Table 9; toys, which are not VTAB, above it."""
    ours, heads = vtab.accuracies(found["final"], found["rate"]), [f"paper, {name}" for name in paper.TABLE_9]
    lines = []
    if found.get("toys"):
        lines += ["Eight small tasks made of the digits 5 to 9 and two photographs; they are not VTAB.", ""]
        lines += ["| group | task | ours |", "|---|---|---|"]
        lines += [f"| {group} | {name} | {ours[task]:.2%} |" for task, (name, group) in vtab.TOYS.items() if task in ours]
        lines += [f"| {group} | mean of {one['tasks']} | {one['mean']:.2%} |" for group, one in found["means"].items()]
        lines += ["", "The paper's own: VTAB-1k.", ""]
    own = [] if lines else ["ours"]
    lines += ["| " + " | ".join(["task", *own, *heads]) + " |", "|" + "---|" * (1 + len(own) + len(heads))]
    for i, (task, (name, _)) in enumerate(vtab.TASKS.items()):
        mine = [f"{ours[task]:.1%}" if task in ours else "no data"] if own else []
        lines.append("| " + " | ".join([name, *mine, *(f"{values[i]}%" for values in paper.TABLE_9.values())]) + " |")
    theirs = [vtab.means(dict(zip(vtab.TASKS, values, strict=True)), vtab.TASKS) for values in paper.TABLE_9.values()]
    for group in ("all", *vtab.GROUPS):
        one = found["means"][group]
        mine = [f"{one['mean']:.1%} ({one['tasks']} of {one['of']})" if one["tasks"] else "no data"] if own else []
        lines.append("| " + " | ".join([f"mean, {group}", *mine, *(f"{mean[group]['mean']:.1f}%" for mean in theirs)]) + " |")
    return [*lines, ""]


def _throughput(rows: list[Mapping[str, Any]]) -> list[str]:
    """What was timed, a row for each model and input size."""
    devices = dict.fromkeys(f"{row.get('device', row['where'])}, {row['dtype']}" for row in rows)
    lines = [f"Measured here, on {'; '.join(devices)}. The paper's figure prints no numbers.", ""]
    lines += ["| model | input [px] | pass | batch | images/s | largest batch |", "|---|---|---|---|---|---|"]
    for row in rows:
        rate, largest = row.get("images_per_second"), row.get("largest_batch")
        cells = [row["model"], row["size"], row["mode"], row.get("batch") or "", f"{rate:,.0f}" if rate else "not in time"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{largest:,}" if largest else ""])) + " |")
    return lines
