"""The attention core's timing where no card is: what it refuses, and that both sides compute the same."""

import jax
import numpy as np
import pytest

from bench import attention_core


def test_without_a_card_nothing_is_timed(capsys):
    assert attention_core.main([]) == 2
    assert "nothing of ours would run" in capsys.readouterr().err


@pytest.mark.parametrize("argument", [["--tokens", "0"], ["--tokens", "385"], ["--width", "96"], ["--batch", "-1"]])
def test_shapes_that_no_kernel_takes_are_refused(argument, capsys):
    with pytest.raises(SystemExit) as end:
        attention_core.main(argument)
    assert end.value.code == 2
    assert argument[0] in capsys.readouterr().err


def test_what_is_timed_is_attention_and_its_gradients(monkeypatch):
    """cuDNN's side with XLA's attention in its place: the row of padding is no token, and gets no gradient."""
    attend = attention_core.attend
    monkeypatch.setattr(attention_core, "attend", lambda q, k, v, tokens, by: attend(q, k, v, tokens, "xla"))
    given = attention_core.arrays("cuDNN", 2, 7, 3, 64)
    assert [a.shape for a in given] == [(2, 8, 3, 64)] * 4
    o, gradients = attention_core.passes("cuDNN", 7)["forward + backward"](*given)
    short = [a[:, :7] for a in given]
    expected, pull = jax.vjp(lambda q, k, v: attend(q, k, v, 7, "xla"), *short[:3])
    np.testing.assert_allclose(np.asarray(o[:, :7], np.float32), np.asarray(expected, np.float32), atol=0.02)
    for a, b in zip(gradients, pull(short[3]), strict=True):
        np.testing.assert_allclose(np.asarray(a[:, :7], np.float32), np.asarray(b, np.float32), atol=0.05)
        assert not np.asarray(a[:, 7:], np.float32).any()
