"""The losses against their definitions in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.losses import sigmoid_cross_entropy, softmax_cross_entropy
from train.step import StepOptions

shapes = st.sampled_from([(1, 1), (4, 2), (3, 10), (2, 1000)])  # few, for each one compiles anew; the seeds vary
seeds = st.integers(0, 2**31)
smoothings = st.sampled_from([0.0, 0.1, 0.5])


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def targets(labels, classes, smoothing):
    return (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes


def draw(shape, seed, scale=5.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal(shape)).astype(np.float32), rng.integers(0, shape[1], shape[0]), rng


@given(shapes, seeds, smoothings)
def test_softmax_is_its_definition(shape, seed, smoothing):
    logits, labels, _ = draw(shape, seed)
    expected = -(targets(labels, shape[1], smoothing) * log_softmax(logits.astype(np.float64))).sum(-1)
    found = softmax_cross_entropy(logits, labels, label_smoothing=smoothing)
    assert found.shape == shape[:1]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@given(shapes, seeds, smoothings)
def test_softmax_gradient_is_probabilities_less_targets(shape, seed, smoothing):
    logits, labels, _ = draw(shape, seed)
    found = jax.grad(lambda x: softmax_cross_entropy(x, labels, label_smoothing=smoothing).sum())(logits)
    expected = np.exp(log_softmax(logits.astype(np.float64))) - targets(labels, shape[1], smoothing)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@given(shapes, seeds)
def test_sigmoid_is_its_definition_for_one_label_and_for_many(shape, seed):
    logits, labels, rng = draw(shape, seed)
    x = logits.astype(np.float64)
    many = rng.integers(0, 2, shape).astype(np.float32)
    for given_labels, y in ((labels, np.eye(shape[1])[labels]), (many, many)):
        expected = -(y * -np.log1p(np.exp(-x)) + (1 - y) * -np.log1p(np.exp(x))).sum(-1)
        found = sigmoid_cross_entropy(logits, given_labels)
        assert found.shape == shape[:1]
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_sigmoid_gradient_is_probabilities_less_targets():
    logits, labels, _ = draw((4, 7), 0)
    found = jax.grad(lambda x: sigmoid_cross_entropy(x, labels).sum())(logits)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)) - np.eye(7)[labels], atol=1e-5)


@pytest.mark.parametrize("loss", [softmax_cross_entropy, sigmoid_cross_entropy])
def test_huge_logits_stay_finite_and_bfloat16_is_summed_in_float32(loss):
    huge = jnp.array([[1e4, -1e4, 0.0]])
    assert np.isfinite(loss(huge, jnp.array([1]))).all()
    assert float(loss(huge, jnp.array([0]))[0]) == pytest.approx(0.0 if loss is softmax_cross_entropy else np.log(2))
    logits = jnp.asarray(draw((3, 1000), 1)[0], jnp.bfloat16)
    np.testing.assert_array_equal(loss(logits, jnp.arange(3)), loss(logits.astype(jnp.float32), jnp.arange(3)))


def test_softmax_ignores_a_shift_and_an_untrained_head_costs_log_classes():
    logits, labels, _ = draw((5, 10), 2)
    np.testing.assert_allclose(softmax_cross_entropy(logits + 7, labels), softmax_cross_entropy(logits, labels), rtol=1e-4)
    np.testing.assert_allclose(softmax_cross_entropy(np.zeros((2, 10), np.float32), np.array([1, 2])), np.log(10), rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "logits", "labels", "words"),
    [
        (softmax_cross_entropy, np.zeros((2, 3), np.float32), np.zeros(3, int), "needs integers [2]"),
        (softmax_cross_entropy, np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), "needs integers [2]"),
        (softmax_cross_entropy, np.zeros((2, 3), np.float32), np.zeros(2, np.float32), "needs integers [2]"),
        (softmax_cross_entropy, np.zeros(3, np.float32), np.zeros(3, int), "floats [B, V]"),
        (sigmoid_cross_entropy, np.zeros((2, 3), int), np.zeros(2, int), "floats [B, V]"),
        (sigmoid_cross_entropy, np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32), "floats [2, 3]"),
        (sigmoid_cross_entropy, np.zeros((2, 3), np.float32), np.zeros((2, 3), int), "floats [2, 3]"),
    ],
)
def test_what_does_not_fit_is_refused(loss, logits, labels, words):
    with pytest.raises(ValueError, match=r"logits|labels") as error:
        loss(logits, labels)
    assert words in str(error.value)


def test_label_smoothing_is_a_share():
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0"):
        softmax_cross_entropy(np.zeros((1, 2), np.float32), np.zeros(1, int), label_smoothing=1.0)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_mixed_labels_are_a_mixed_target(loss):
    options = StepOptions(loss=loss, label_smoothing=0.1 if loss == "softmax" else 0.0)
    logits = jax.random.normal(jax.random.key(0), (4, 5))
    label, other, share = jnp.array([0, 1, 2, 3]), jnp.array([4, 1, 0, 2]), jnp.array([0.9, 0.3, 0.5, 1.0])
    target = share[:, None] * jax.nn.one_hot(label, 5) + (1 - share)[:, None] * jax.nn.one_hot(other, 5)
    log = jax.nn.log_softmax(logits)
    expected = {
        "softmax": -((0.9 * target + 0.1 / 5) * log).sum(-1),
        "sigmoid": -(target * jax.nn.log_sigmoid(logits) + (1 - target) * jax.nn.log_sigmoid(-logits)).sum(-1),
    }[loss]
    np.testing.assert_allclose(options.losses(logits, (label, other, share)), expected, rtol=1e-5)
