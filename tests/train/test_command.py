"""`vitcore JOB`: every job has a name there, and what is no job is refused in a line."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from train import command

ROOT = Path(__file__).resolve().parents[2]
MAIN = "__name__ == '__main__'"


def test_every_job_has_a_name():
    """Every module that `python -m` runs, of those that make something of data, models and files."""
    jobs = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("train", "vitcore")
        for path in (ROOT / package).rglob("*.py")
        if any(isinstance(node, ast.If) and ast.unparse(node.test) == MAIN for node in ast.parse(path.read_text()).body)
    }
    jobs.remove("train.data.trial")  # the process in which train.data.suspects looks at images again
    assert {module for module, _ in command.JOBS.values()} == jobs


def test_a_job_is_started_with_its_options():
    code = "from train.command import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "weights", "show", "none.npz"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "none.npz" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("words", "code", "said"), [
    ([], 2, "usage: vitcore JOB"),
    (["--help"], 0, "usage: vitcore JOB"),
    (["pretrian"], 2, "no job is called 'pretrian'; there are pretrain, finetune"),
    (["--version"], 0, "."),
])  # fmt: skip
def test_without_a_job_it_says_which_there_are(monkeypatch, capsys, words, code, said):
    monkeypatch.setattr(sys, "argv", ["vitcore", *words])
    assert command.main() == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_the_modules_are_there():
    assert all(importlib.util.find_spec(module) for module, _ in command.JOBS.values())
