"""Reports of the TPU compiler that were kept: which program they answer for, and what becomes of a damaged one."""

import json
import os

import pytest

from bench.reports import Cache, Program, Report
from bench.tpu_compiler import CACHE, compile_programs

REQUEST = {"target": "v3", "topology": "v3:2x2", "whole_vmem": False}
KEPT = Report(name="n", target="v3", live_bytes=7, xla_top=(("a", 1, 2, "cost model"),), collectives={"all-gather": 3})

BUILDER = """
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

S = jax.ShapeDtypeStruct((8, 128), jnp.float32)

def add(x, o):
    o[...] = x[...] + TERM

def build(devices):
    return (lambda x: pl.pallas_call(add, out_shape=S, name="add")(x)), (S,)
"""


def saved(folder):
    cache = Cache(folder, REQUEST)
    cache.save("digest", False, KEPT)
    (file,) = folder.iterdir()
    return cache, file


def test_a_report_comes_back_whole(tmp_path):
    cache, _ = saved(tmp_path)
    found = cache.load("digest", False)
    assert found is not None
    assert found.cached
    assert (found.live_bytes, found.xla_top, found.collectives) == (7, KEPT.xla_top, KEPT.collectives)
    assert cache.load("digest", True) is None, "it has no cycles"
    assert cache.load("another", False) is None


@pytest.mark.parametrize("option", [{"target": "v2"}, {"topology": "v3:4x4"}, {"whole_vmem": True}], ids=str)
def test_other_options_are_another_report(tmp_path, option):
    saved(tmp_path)
    assert Cache(tmp_path, {**REQUEST, **option}).load("digest", False) is None


def test_other_versions_are_another_report(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setattr("bench.reports._version", lambda package: f"{package} of tomorrow")
    assert Cache(tmp_path, REQUEST).load("digest", False) is None


@pytest.mark.parametrize("damage", ["empty", "cut", "a byte", "bytes", "no digest", "other JSON"])
def test_a_damaged_report_is_ignored_and_replaced(tmp_path, damage):
    cache, file = saved(tmp_path)
    good = file.read_bytes()
    digest, text = good.split(b"\n", 1)
    file.write_bytes(
        {
            "empty": b"",
            "cut": good[:-9],
            "a byte": good.replace(b'"live_bytes": 7', b'"live_bytes": 8'),
            "bytes": b"\xff\xfe" * 99,
            "no digest": text,
            "other JSON": digest + b"\n" + json.dumps({"kernels": []}).encode(),
        }[damage]
    )
    assert file.read_bytes() != good
    assert cache.load("digest", False) is None
    cache.save("digest", False, KEPT)
    assert cache.load("digest", False) is not None


def test_a_report_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    cache = Cache(tmp_path, REQUEST)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        cache.save("digest", False, KEPT)
    assert cache.load("digest", False) is None


def test_a_program_is_known_by_its_text_alone(tmp_path, monkeypatch):
    """The folder that the environment names answers for a kernel of the same text, wherever its source lies; not for another."""

    def compiled(folder, before, term):
        (tmp_path / folder).mkdir()
        module = f"built_{folder}"
        (tmp_path / folder / f"{module}.py").write_text(before + BUILDER.replace("TERM", term))
        monkeypatch.syspath_prepend(tmp_path / folder)
        (report,) = compile_programs("v3", [Program(build=f"{module}:build", name=folder)])
        assert not report.error
        assert [kernel.kernel for kernel in report.kernels] == ["add"]
        assert report.name == folder
        return report.cached

    monkeypatch.setenv(CACHE, str(tmp_path / "kept"))
    assert not compiled("first", "", "1.0")
    assert compiled("second", "# further down\n\n", "1.0")
    assert not compiled("third", "", "2.0")
    monkeypatch.delenv(CACHE)
    assert not compiled("fourth", "", "1.0")
