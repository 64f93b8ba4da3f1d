"""What is installed for good: one top-level name, whatever else lies beside it; and an editable installation as it was."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_project import ROOT, relative, tracked

HOSTILE = "raise SystemExit('a file of the user, which is not ours')\n"


def rewrite():
    spec = importlib.util.spec_from_file_location("vitcore_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from kernels import x", "from vitcore.kernels import x"),
        ("from  train.data import x, y", "from  vitcore.train.data import x, y"),
        ("import jax, bench.hlo as b", "import jax, vitcore.bench.hlo as b"),
        ("def f():\n    from bench import (\n        x,\n    )", "def f():\n    from vitcore.bench import (\n        x,\n    )"),
        ("from . import train", None),
        ("from trainer import x\nimport benchmark", None),
        ("train.loop(train.data)  # train.loop", None),
        ('x = "é", "python -m train.loop"', 'x = "é", "python -m vitcore.train.loop"'),
        ('"""See `train.data.x`, train.data."""', '"""See `vitcore.train.data.x`, vitcore.train.data."""'),
        ('f"train.data.{m}, {train.data} {{train.loop}}"', 'f"vitcore.train.data.{m}, {train.data} {{vitcore.train.loop}}"'),
        ('f"kernels.{op}.tpu"', 'f"vitcore.kernels.{op}.tpu"'),
        ('"train.bin", "/data/train.loop", "the end of a train."', None),
        ('"vitcore.train.loop", "my-train.loop", b"train.loop"', None),
    ],
)
def test_names_move_where_they_are_modules(before, after):
    known = {"train", "train.loop", "train.data", "bench", "bench.hlo", "kernels", "kernels.mlp"}
    assert rewrite().rewritten(before, known) == (before if after is None else after)


def test_an_import_that_cannot_move_is_refused():
    with pytest.raises(ValueError, match=r"line 2: import train\.loop: say `from"):
        rewrite().rewritten("x = 1\nimport train.loop", {"train.loop"})


def run(*command, cwd: Path, path: Path | None = None, code: int = 0) -> str:
    """A command far from the checkout: nothing of it on the path. Returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is committed, or would be: a build writes into its source."""
    copy = tmp_path_factory.mktemp("source")
    for path in tracked():
        (copy / relative(path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / relative(path))
    return copy


@pytest.fixture(scope="module")
def site(source, tmp_path_factory) -> Path:
    """Where the wheel is installed; beside it nothing, and in the build folder what an earlier build may have left."""
    folder = tmp_path_factory.mktemp("wheel")
    (source / "build" / "lib" / "train").mkdir(parents=True)
    (source / "build" / "lib" / "train" / "old.py").write_text("")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel, cwd=folder)
    return folder / "site"


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A user's folder with files and packages of our names in it."""
    for name in ("train", "bench", "kernels"):
        (tmp_path / f"{name}.py").write_text(HOSTILE)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(HOSTILE)
    return tmp_path


@pytest.mark.ci
@pytest.mark.slow
def test_the_wheel_owns_one_name(site):
    version = importlib.metadata.version("vitcore")
    assert {path.name for path in site.iterdir()} == {"vitcore", f"vitcore-{version}.dist-info", "bin"}
    ours = {path.relative_to(ROOT).as_posix() for name in ("kernels", "train", "bench") for path in (ROOT / name).rglob("*.py")}
    theirs = {path.relative_to(site / "vitcore").as_posix() for path in (site / "vitcore").rglob("*.py")}
    assert ours <= theirs
    assert {"kernels/py.typed", "py.typed", "bench/calibration.json"} <= {
        path.relative_to(site / "vitcore").as_posix() for path in (site / "vitcore").rglob("*") if path.suffix != ".py"
    }


ALL = """
import importlib, pkgutil, sys
import vitcore
names = [m.name for m in pkgutil.walk_packages(vitcore.__path__, "vitcore.") if "peers" not in m.name]
for name in names:
    importlib.import_module(name)
ours = {name.split(".")[0] for name in sys.modules} & {"kernels", "train", "bench"}
print(vitcore.__version__, len(names), ours or "none", vitcore.__file__)
"""


@pytest.mark.ci
@pytest.mark.slow
def test_every_module_is_imported_from_within(site, hostile):
    said = run(sys.executable, "-c", ALL, cwd=hostile, path=site).split()[-4:]
    assert said[0] == importlib.metadata.version("vitcore")
    assert int(said[1]) > 80
    assert said[2:] == ["none", str(site / "vitcore" / "__init__.py")]


@pytest.mark.ci
@pytest.mark.slow
def test_the_main_job_runs_beside_a_user_s_files_of_our_names(site, hostile):
    """By the command and by the module, from pre-training to an evaluation of what came of it."""
    command = [sys.executable, site / "bin" / "vitcore"]
    options = ["--mesh", "2x1", "--model", "ViT-Nano/4", "--batch-size", "32", "--steps", "3", "--checkpoint-every", "2"]
    run(*command, "pretrain", *options, "--out", "run", cwd=hostile, path=site)
    log = [json.loads(line) for line in (hostile / "run" / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3
    again = run(sys.executable, "-m", "vitcore.train.pretrain", *options, "--out", "run", cwd=hostile, path=site)
    assert "resuming at step 3" in again, again
    assert "top-1: " in run(*command, "evaluate", "--init", "run", "--data", "digits", cwd=hostile, path=site)
    assert "no job is called 'pretrian'" in run(*command, "pretrian", cwd=hostile, path=site, code=2)
    assert "finetune" in run(*command, "--help", cwd=hostile, path=site)
    assert HOSTILE[18:40] in run(sys.executable, "-c", "import train", cwd=hostile, path=site, code=1), "the files are in the way"


@pytest.mark.ci
@pytest.mark.slow
def test_an_editable_installation_has_the_names_of_the_checkout(source, tmp_path):
    build = f"from setuptools import build_meta as b; b.build_editable({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        text = "".join(held.read(name).decode() for name in held.namelist() if not name.endswith("/"))
    for name in ("kernels", "vitcore", "train", "bench"):
        assert repr(name) + ": " + repr(str(source / name)) in text
    assert "vitcore = train.command:main" in text
