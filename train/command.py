"""The command `vitcore`, which starts any job by its name: `vitcore pretrain --mesh 8x4` is `python -m train.pretrain --mesh 8x4`.

An installed vitcore has its jobs within the package, `python -m vitcore.train.pretrain`; the command is the same for both.
"""

import runpy
import sys

JOBS = {
    "pretrain": ("train.pretrain", "pre-train a ViT"),
    "finetune": ("train.finetune", "fine-tune one"),
    "evaluate": ("train.evaluate", "measure one on a labelled set"),
    "fewshot": ("train.fewshot", "few-shot evaluation of frozen features"),
    "transfer": ("train.transfer", "pre-training to transfer, end to end, on handwritten digits"),
    "study": ("train.study", "a table or figure of the paper, for your data and budget"),
    "vtab": ("train.vtab", "nineteen tasks of a thousand images each"),
    "pack": ("train.data.pack", "any source to ArrayRecord shards"),
    "inspect": ("train.data.inspect", "what is in a source, and what augmentation makes of it"),
    "dedup": ("train.data.dedup", "near-duplicates of test images in a training set"),
    "pretrained": ("train.pretrained", "a run's parameters as a file of weights"),
    "weights": ("vitcore.weights", "what is in a file of weights; another form of it"),
    "look": ("vitcore.inspect", "what a model has learned: filters, positions, attention"),
    "export": ("vitcore.export", "a model as one file, for a program without this library"),
}


def usage() -> str:
    width = max(map(len, JOBS))
    jobs = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in JOBS.items())
    return f"usage: vitcore JOB [OPTIONS]; vitcore JOB --help lists the options of a job\n\n{jobs}"


def main() -> int:
    """Runs the job that the first word of the command line names, as `python -m` would. Returns the exit code of a wrong name."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("vitcore"))
        return 0
    if words[0] not in JOBS:
        print(f"vitcore: error: no job is called {words[0]!r}; there are {', '.join(JOBS)}", file=sys.stderr)
        return 2
    sys.argv = [f"vitcore {words[0]}", *words[1:]]
    runpy.run_module(JOBS[words[0]][0], run_name="__main__", alter_sys=True)
    return 0
