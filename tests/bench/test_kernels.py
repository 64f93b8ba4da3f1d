"""`bench.kernels`: everybody computes the same attention, errors are seen, times and cycles stand in their rows."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from bench import accuracy, programs
from bench.kernels import Kernels, run
from bench.peers import attention as peers
from kernels.device import DEVICES
from tests import oracle

SAME: dict[str, Any] = dict(op="attention", shape="B/16@224", dtype="float32", target="v3")


@pytest.mark.parametrize("name", ["ours", "jax.nn", "flash", "splash"])
def test_everybody_computes_the_same_attention(name):
    assert accuracy.error(name=name, backward=name in ("jax.nn", "flash"), **SAME) < 1e-5


def test_an_error_is_seen(monkeypatch):
    honest = peers.plain
    monkeypatch.setattr("jax.nn.dot_product_attention", lambda q, k, v, implementation: honest(q, k, v) * 1.01)
    assert accuracy.error(name="jax.nn", backward=False, **SAME) == pytest.approx(0.01, rel=0.01)


def test_errors_of_ops_are_of_their_dtype():
    same: dict[str, Any] = dict(op="layer_norm", shape="B/16@224", backward=True, target="v3")
    assert accuracy.error(name="ours", dtype="float32", **same) < 1e-5
    assert 1e-4 < accuracy.error(name="ours", dtype="bfloat16", **same) < 2e-2


def test_times_on_the_cpu(capsys):
    rows = run(Kernels(target=(), op=("layer_norm",), batch=1, dtype="float32", seconds=0.05))
    assert [(r["name"], r["backward"], r["measured"]) for r in rows] == [("reference", False, True), ("reference", True, True)]
    assert all(r["median"] > 0 and r["error"] < 1e-4 for r in rows)
    printed = capsys.readouterr().out
    assert "measured" in printed
    assert "a CPU has no kernels of ours: the reference stands for them" in printed


def test_what_only_the_compiler_can_answer_wants_a_target():
    with pytest.raises(ValueError, match="ask the compiler: name a --target"):
        Kernels(whole="ViT-B/16")


@pytest.mark.ci
@pytest.mark.slow
def test_cycles_and_errors_of_everybody_on_a_target(capsys):
    rows = run(Kernels(target=("v5e",), op=("attention",), batch=2, peers=True, errors=True))
    for r in rows:
        for name in ("ours", "xla", "jax.nn", "flash", "splash"):
            assert r[name]["cycles"] > 0, (name, r[name]["error"])
            assert r["errors"][name] < 2e-2
    forward, both = rows
    assert all(both[name]["cycles"] > forward[name]["cycles"] for name in ("ours", "xla", "jax.nn", "flash", "splash"))
    printed = capsys.readouterr().out
    assert "compiler estimate" in printed
    assert "interpreted" in printed


@pytest.mark.parametrize("kernels", [False, True])
def test_the_attention_of_an_axial_layer_by_itself(kernels):
    """Between its norms, by XLA and by our kernels, and the layer."""
    device = SimpleNamespace(device_kind=DEVICES["v3"].kind)
    for backward in (False, True):
        arguments = {"length": 14, "channels": 64, "images": 2, "kernels": kernels, "backward": backward}
        fn, shapes = programs.axial_lines([device], **arguments)
        names = {"attention_lines_forward", *(("attention_lines_queries", "attention_lines_keys") if backward else ())}
        assert {*oracle.kernels_in(fn, *shapes)} == (names if kernels else set())
        first, *_ = jax.tree.leaves(jax.eval_shape(fn, *shapes))
        assert first.shape[-3:] == (28, 14, 128 if backward else 64)  # q and k half as wide as v
        fn, shapes = programs.axial_lines([device], **arguments, whole=True)
        assert names <= {*oracle.kernels_in(fn, *shapes)} or not kernels
        assert jax.tree.leaves(jax.eval_shape(fn, *shapes))[0].shape == (2, 14, 14, 64)
