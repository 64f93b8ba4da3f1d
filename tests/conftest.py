"""Settings of every test: eight simulated CPU devices, hypothesis profiles, no skips in CI, a clean interpreter after a failure.

Tests run on the CPU, whatever the machine has; `VITCORE_TEST_PLATFORM=tpu` (or cuda) runs them there instead. A test that
wants another number of devices starts a subprocess.
"""

import atexit
import functools
import importlib.metadata
import itertools
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

# Before jax is imported, and for the subprocesses of tests too.
PLATFORM = os.environ["JAX_PLATFORMS"] = os.environ.get("VITCORE_TEST_PLATFORM", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# A test compiles for much longer than it computes, and most of that is LLVM polishing loops that run once, and MLIR before it.
# XLA's own passes, which decide what is computed, stay as a user has them. With XLA_FLAGS set, as by CI for most slow tests and by
# `make test-all`, a user's whole compiler is tested.
if PLATFORM == "cpu" and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # a later one has no other emitters, and a flag it lacks ends it
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if "VITCORE_TEST_SCRATCH" not in os.environ:  # of a session: its first process makes and removes it
    os.environ["VITCORE_TEST_SCRATCH"] = tempfile.mkdtemp(prefix="vitcore-test-")
    atexit.register(shutil.rmtree, os.environ["VITCORE_TEST_SCRATCH"], ignore_errors=True)
os.environ.setdefault("VITCORE_CACHE", os.environ["VITCORE_TEST_SCRATCH"])  # kept indices of data: not into the user's own cache

import hypothesis
import jax
import pytest

if PLATFORM == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)  # not by environment: subprocesses choose their own number
    # A program of which a test has made a function anew is read, not compiled again. The folder is of this process alone, so none
    # is read while it is written; those that tests start and kill have nothing of it. Below a tenth of a second it would not pay.
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="compiled-", dir=os.environ["VITCORE_TEST_SCRATCH"]))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    assert len(jax.devices()) == 8  # now, or the first job that a test runs would start JAX with that job's number of devices

# Compilation dominates an example, so no deadline and few examples; the profile "many" gives more, and "one" a single example.
hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=20, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("default"), derandomize=True)
hypothesis.settings.register_profile("one", parent=hypothesis.settings.get_profile("ci"), max_examples=1)
hypothesis.settings.register_profile("many", parent=hypothesis.settings.get_profile("default"), max_examples=500)
hypothesis.settings.load_profile(os.environ.get("VITCORE_HYPOTHESIS") or ("ci" if os.environ.get("CI") else "default"))


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a skipped test is a failure of the run (CI)")
    parser.addoption("--one-each", action="store_true", help="of every test the first of its parameters only")


def misplaced(markers: set[str]) -> str:
    """Why a test with these markers would run in no part of CI, or in the wrong one; empty where it does not."""
    if "ci" in markers and "slow" not in markers:
        return "ci means that CI runs a slow test; this one is not marked slow"
    if "ci" in markers and markers & {"faults", "peers"}:
        return "CI runs the faults and the peers that are not slow; ci says nothing of them"
    if "clock" in markers and "faults" not in markers:
        return "clock parts the faults in those beside others and those alone; this one is not marked faults"
    return ""


OUR_MARKS = {"slow", "ci", "faults", "clock", "peers", "gpu"}


@functools.cache
def demanded(expression: str) -> frozenset[str]:
    """Which of our marks every test has that fits `-m expression`."""
    names = sorted(set(re.findall(r"[a-z_]+", expression)) - {"and", "or", "not"})
    if not OUR_MARKS.issuperset(names) or not re.fullmatch(r"[a-z_ ()]*", expression):
        return frozenset()
    cases = [dict(zip(names, held, strict=True)) for held in itertools.product((False, True), repeat=len(names))]
    try:
        fitting = [{name for name in names if case[name]} for case in cases if not names or eval(expression, {}, case)]
    except SyntaxError:  # pytest says so itself
        return frozenset()
    return frozenset(set.intersection(*fitting)) if fitting else frozenset()


@functools.cache
def words(path: Path) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z_]+", path.read_text()))


def pytest_ignore_collect(collection_path, config):
    """A file without a mark that `-m` demands is not imported; all files together take a process twelve seconds."""
    if collection_path.match("test_*.py") and demanded(config.getoption("markexpr")) - words(collection_path):
        return True
    return None


def pytest_collection_modifyitems(config, items):
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if why := misplaced(marks):
            raise pytest.UsageError(f"{item.nodeid}: {why}")
        if unsaid := (marks & OUR_MARKS) - words(item.path):
            raise pytest.UsageError(f"{item.nodeid}: its file has no word {', '.join(unsaid)}, so pytest -m would not look there")
    if config.getoption("--one-each"):
        first: dict[str, pytest.Item] = {}
        for item in sorted(items, key=lambda item: item.get_closest_marker("slow") is not None):
            first.setdefault(item.nodeid.partition("[")[0], item)
        kept = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


class NoSkips:
    """Fails the run when a test, or a whole file, was skipped; an expected failure (xfail) is not a skip."""

    def __init__(self):
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.skipped:
            self.skipped.append(report.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        """A process of pytest-xdist has ended: a file it skipped as a whole is known to it alone."""
        self.skipped += [name for name in getattr(node, "workeroutput", {}).get("skipped", ()) if name not in self.skipped]

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["skipped"] = self.skipped
        if self.skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.skipped:
            terminalreporter.write_line(f"--no-skips: {len(self.skipped)} skipped: {', '.join(self.skipped)}", red=True)


def pytest_configure(config):
    if config.getoption("--no-skips"):
        config.pluginmanager.register(NoSkips(), "vitcore-no-skips")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After a failure, forget the TPU interpreter's memory and semaphores: they would fail the next test as well."""
    report = yield
    pallas_tpu = sys.modules.get("jax.experimental.pallas.tpu")
    if report.failed and pallas_tpu is not None:
        pallas_tpu.reset_tpu_interpret_mode_state()
    return report
