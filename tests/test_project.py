"""The project's own rules: who imports whom, what may be committed, one version, a pin for every dependency, a README that runs."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Set
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import demanded, misplaced

ROOT = Path(__file__).resolve().parent.parent
# Who may import whom: kernels <- vitcore <- train, and bench on top.
LAYERS = {
    "kernels": {"kernels"},
    "vitcore": {"kernels", "vitcore"},
    "train": {"kernels", "vitcore", "train"},
    "bench": {"kernels", "vitcore", "train", "bench"},
}
SOURCES = sorted(path for package in LAYERS for path in (ROOT / package).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked() -> list[Path]:
    """The files that a commit would hold: git's view, so that runs and environments in the checkout do not count."""
    if not (ROOT / ".git").exists():  # an unpacked archive: all that is there
        return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.as_posix()]
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def imported(source: str, package: str) -> set[str]:
    """Top-level names of what a module imports, anywhere in it; `package` is its own, for relative imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(package if node.level else (node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    upwards = imported(path.read_text(), package) & (set(LAYERS) | {"tests"}) - LAYERS[package]
    assert not upwards, f"{relative(path)} imports {sorted(upwards)}; {package} may import {sorted(LAYERS[package])}"


def test_the_import_rule_sees_every_form_of_import():
    source = "import numpy\nfrom . import x\ndef f():\n    import train.step as s\n    from bench.plots import draw\n"
    assert imported(source, "kernels") == {"numpy", "kernels", "train", "bench"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules_imported(source: str, module: str, known: Set[str], *, package: bool = False) -> set[str]:
    """The modules among `known` that this one imports, anywhere in it; package: it is an `__init__`.

    That a module's import runs the `__init__` of the packages around it does not count: no module can help it.
    """
    around = module.split(".") if package else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*around[: len(around) - node.level + 1], *([node.module] if node.module else [])] if node.level else [node.module]
            )
            origin = ".".join(filter(None, base))
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                found |= {name if name in known else origin} & known
    return found - {module}


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of modules each of which imports, by way of others, itself: the graph's strongly connected parts of two or more."""

    def reached(start: str) -> frozenset[str]:
        seen, rest = set(), [start]
        while rest:
            rest += (new := graph[rest.pop()] - seen)
            seen |= new
        return frozenset(seen)

    ways = {module: reached(module) for module in graph}
    return {frozenset(other for other in way if module in ways[other]) for module, way in ways.items() if module in way}


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions count: they hide a circle, they do not cut it."""
    known = {module_of(path): path for path in SOURCES}
    graph = {
        module: modules_imported(path.read_text(), module, known.keys(), package=path.name == "__init__.py")
        for module, path in known.items()
    }
    found = [f"{a} imports {b}" for circle in circles(graph) for a in sorted(circle) for b in sorted(graph[a] & circle)]
    assert not found, "modules that import each other; what both need belongs in a third:\n" + "\n".join(found)


def test_a_circle_is_seen_in_every_form_of_import():
    known = {"a", "a.x", "a.y", "a.z", "b"}
    sources = {
        "a": "",
        "a.x": "from a import y",
        "a.y": "def f():\n    from .z import g\n",
        "a.z": "import a.x as x",
        "b": "import numpy\nfrom a import x\nfrom b import c",
    }
    graph = {module: modules_imported(source, module, known, package=module == "a") for module, source in sources.items()}
    assert graph == {"a": set(), "a.x": {"a.y"}, "a.y": {"a.z"}, "a.z": {"a.x"}, "b": {"a.x"}}
    assert circles(graph) == {frozenset({"a.x", "a.y", "a.z"})}
    assert modules_imported("from . import x\nfrom .y import g", "a", known, package=True) == {"a.x", "a.y"}


@pytest.mark.parametrize("path", [path for path in SOURCES if not re.match(r"_[^_]", path.name)], ids=relative)
def test_module_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring or not path.read_text().strip(), f"{relative(path)} has no docstring"


MOST_LINES, MOST_ARGUMENTS = 60, 12  # of a function of the kernels, and of a call in them


def sprawling(source: str) -> list[str]:
    """The functions and the calls of a module that are larger than that; of `*some` or `**some` a call has one argument."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES:
                found.append(f"line {node.lineno}: {node.name} has {lines} lines, more than {MOST_LINES}")
        elif isinstance(node, ast.Call) and (count := len(node.args) + len(node.keywords)) > MOST_ARGUMENTS:
            found.append(
                f"line {node.lineno}: a call of {ast.unparse(node.func)} has {count} arguments, more than {MOST_ARGUMENTS}"
            )
    return found


@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "kernels")], ids=relative)
def test_a_kernel_is_read_in_pieces(path):
    assert not sprawling(path.read_text())


def test_the_rule_on_pieces_counts_lines_and_arguments():
    function, call = "def f():\n" + "    x = 1\n" * MOST_LINES, "f(*a, " + ", ".join(f"k{i}=1" for i in range(MOST_ARGUMENTS)) + ")"
    assert sprawling(f"{function}{call}\n") == [
        "line 1: f has 61 lines, more than 60",
        "line 62: a call of f has 13 arguments, more than 12",
    ]
    assert not sprawling(function.removesuffix("    x = 1\n") + call.replace(", k1=1", "") + "\n")


# In two halves each, so that this file does not hold what it looks for.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.}$])/(wo" + r"rk|ro" + r"ot|tm" + r"p/v|ho" + r"me/\w+)/",
    "an option of a package index": "index" + "-url|trusted" + "-host|find" + "-links|PIP_" + "(INDEX|EXTRA|FIND)",
    "the host of a package index": "pypi" + r"\.org|python" + r"hosted\.org",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_of_one_machine_is_committed(what):
    found = [
        f"{relative(path)}:{number}: {line.strip()[:120]}"
        for path in tracked()
        for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1)
        if re.search(FORBIDDEN[what], line)
    ]
    assert not found, f"{what}:\n" + "\n".join(found)


def test_the_rule_on_machines_finds_what_it_looks_for():
    for what, line in {
        "a path of one machine": 'open("/ho' + 'me/ada/x")',
        "an option of a package index": "pip install --extra-index" + "-url X",
        "the host of a package index": "https://pypi" + ".org/simple",
    }.items():
        assert re.search(FORBIDDEN[what], line)


def test_version_stands_in_one_place():
    assert importlib.metadata.version("vitcore") == PROJECT["version"], "the installed version is another: run make test again"
    spelled = re.compile(r"""__version__\s*(:\s*str\s*)?=\s*["']""")
    assert not [relative(path) for path in SOURCES if spelled.search(path.read_text())]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[({re.escape(PROJECT['version'])}|Unreleased)\]", changes, re.MULTILINE)


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    every = [Requirement(text) for texts in [PROJECT["dependencies"], *extras] for text in texts]
    return [requirement for requirement in every if requirement.name != PROJECT["name"]]


# What is imported under another name than its distribution's.
DISTRIBUTIONS = {"PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}
# timm is installed beside the extra `peers`, without its dependency torchvision, and a stand-in is imported for that.
BESIDE = {"timm", "torchvision"}


def outside(source: str) -> tuple[set[str], set[str]]:
    """(needed to import the module, wanted somewhere in it): the distributions that it imports."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    tree = ast.parse(source)
    within = {inner for node in ast.walk(tree) if isinstance(node, functions) for inner in ast.walk(node)}
    always: set[str] = set()
    anywhere: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {(node.module or "").split(".")[0]}
        else:
            continue
        names -= {*sys.stdlib_module_names, *LAYERS}
        found = {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in names}
        anywhere |= found
        always |= set() if node in within else found
    return always, anywhere


def test_what_is_imported_is_declared():
    """What a module needs to be imported is a dependency; what a function asks for may be of an extra."""
    needed = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    declared = {canonicalize_name(requirement.name) for requirement in requirements()} | BESIDE
    problems = []
    for path in SOURCES:
        always, anywhere = outside(path.read_text())
        problems += [f"{relative(path)}: {name} is no dependency" for name in sorted(always - needed)]
        problems += [f"{relative(path)}: {name} is declared nowhere" for name in sorted(anywhere - declared)]
    assert not problems, "pyproject.toml:\n" + "\n".join(problems)


def test_the_rule_on_imports_tells_functions_from_modules():
    source = (
        "import os, PIL.Image\nfrom . import x\ntry:\n    import jax\nfinally:\n    pass\ndef f():\n    from orbax.a import b\n"
    )
    assert outside(source) == ({"pillow", "jax"}, {"pillow", "jax", "orbax-checkpoint"})


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_dependency_has_one_pin_that_fits(python):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins: dict[str, list[str]] = {}
    for pin in map(Requirement, lines):
        (version,) = pin.specifier
        assert version.operator == "==", f"constraints.txt: {pin} is not a pin"
        if pin.marker is None or pin.marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"}):
            pins.setdefault(canonicalize_name(pin.name), []).append(version.version)
    for requirement in requirements():
        found = pins.get(canonicalize_name(requirement.name), [])
        assert len(found) == 1, f"{requirement.name}: {len(found)} pins in constraints.txt for Python {python}, wants one"
        assert requirement.specifier.contains(found[0]), f"pyproject.toml wants {requirement}, constraints.txt says {found[0]}"


def test_packages_are_found_and_typed():
    for package in LAYERS:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            assert (folder / "__init__.py").is_file(), f"{relative(folder)} has no __init__.py: it would be missing from the wheel"
    assert all((ROOT / package / "py.typed").is_file() for package in ("kernels", "vitcore"))


def test_commands_in_the_documents_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        modules = set(re.findall(r"python -m ((?:train|bench)\.[a-z_.]+[a-z_])", text))
        missing = [module for module in sorted(modules) if importlib.util.find_spec(module) is None]
        assert not missing, f"{name} names python -m {missing}: no such module"
        # A command is in backquotes or starts a line; "make sure" in a sentence is not one.
        wanted = set(re.findall(r"(?:^[ \t$]*|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
        assert wanted <= targets, f"{name} names make {sorted(wanted - targets)}: no such target"
        assert wanted, f"{name} names no make command"


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--no-skips"], 1)])
@pytest.mark.parametrize("skip", ["def test_x():\n    pytest.skip('why')", "pytest.skip('why', allow_module_level=True)"])
def test_no_skips_turns_a_skip_into_a_failure(tmp_path, options, status, skip):
    (tmp_path / "test_skips.py").write_text(f"import pytest\ndef test_passes():\n    pass\n{skip}\n")
    (tmp_path / "test_passes.py").write_text("def test_passes():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", *options, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("--no-skips: 1 skipped" in done.stdout) == bool(options)


MARKS = {"slow ci": True, "faults clock": True, "faults slow clock": True, "ci": False, "slow ci faults": False, "clock": False}


@pytest.mark.parametrize(("marks", "right"), MARKS.items())
def test_a_marker_that_would_be_overlooked_is_known(marks, right):
    """Of the tests beside the fast ones CI runs `ci and not faults and not peers`, and of faults and peers those not slow."""
    assert (misplaced(set(marks.split())) == "") == right


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("import pytest\n@pytest.mark.ci\ndef test_x():\n    pass\n", "ci means that CI runs a slow test"),
        ("import pytest\n@getattr(pytest.mark, 'sl' + 'ow')\ndef test_x():\n    pass\n", "its file has no word slow"),
    ],
)
def test_a_marker_that_would_be_overlooked_is_refused(tmp_path, test, why):
    (tmp_path / "test_marks.py").write_text(test)
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert f"test_marks.py::test_x: {why}" in done.stderr


DEMANDED = {
    "ci and not faults and not peers": {"ci"}, "faults and clock and not slow": {"faults", "clock"}, "peers": {"peers"},
    "not slow and not faults": set(), "slow or ci": set(), "(slow or ci) and clock": {"clock"}, "": set(), "ci and": set(),
    "hypothesis": set(), "clock(alone=True)": set(),
}  # fmt: skip


@pytest.mark.parametrize(("expression", "marks"), DEMANDED.items())
def test_a_file_is_passed_over_for_marks_that_every_test_must_have(expression, marks):
    assert demanded(expression) == marks
