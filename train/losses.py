"""The two losses of pre-training, one value an example, so that the caller weighs and sums them over its mesh."""

import jax
import jax.numpy as jnp


def softmax_cross_entropy(logits, labels, *, label_smoothing: float = 0.0):
    """-sum_v q_v log softmax(logits)_v with q = (1 - a) onehot(label) + a / V, a = label_smoothing in [0, 1).

    logits [B, V] any float; labels [B] int in [0, V). A row that only fills up a batch needs a label in range too: its weight is
    the caller's. Computed in float32. Returns [B] float32. Raises ValueError for shapes or types that do not fit.
    """
    logits, labels = _wide(logits), jnp.asarray(labels)
    if labels.shape != logits.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels {labels.dtype}{list(labels.shape)}: softmax needs integers [{logits.shape[0]}]")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing}: must be in [0, 1)")
    log_p = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return -((1.0 - label_smoothing) * right + label_smoothing * log_p.mean(-1))


def sigmoid_cross_entropy(logits, labels):
    """-sum_v y_v log sigmoid(logits_v) + (1 - y_v) log sigmoid(-logits_v): summed over the classes, as in the release.

    logits [B, V] any float; labels [B] int in [0, V), or [B, V] float in [0, 1] (multi-hot). Computed in float32. Returns [B]
    float32. Raises ValueError for shapes or types that do not fit.
    """
    logits, labels = _wide(logits), jnp.asarray(labels)
    if labels.shape == logits.shape[:1] and jnp.issubdtype(labels.dtype, jnp.integer):
        labels = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    if labels.shape != logits.shape or not jnp.issubdtype(labels.dtype, jnp.floating):
        want = f"integers [{logits.shape[0]}] or floats {list(logits.shape)}"
        raise ValueError(f"labels {labels.dtype}{list(labels.shape)}: the sigmoid loss needs {want}")
    labels = labels.astype(logits.dtype)
    return -(labels * jax.nn.log_sigmoid(logits) + (1.0 - labels) * jax.nn.log_sigmoid(-logits)).sum(-1)


def _wide(logits):
    logits = jnp.asarray(logits)
    if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits {logits.dtype}{list(logits.shape)}: a loss needs floats [B, V]")
    return logits.astype(jnp.float32)
