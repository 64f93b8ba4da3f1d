"""Dropout in the Hopper half blocks where no card is: the product by Mosaic GPU's interpreter, the halves on plain products.

The interpreter gives each name of a shared buffer memory of its own, and that of jax 0.10.2 knows no load with a layout: both are
replaced here. The half blocks' own arithmetic, what they drop forward and backward, is run with XLA's products, norms and attention
in place of the kernels, and the epilogues as they are.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dropout as drop
from kernels.attention.hopper import half as attention_hopper
from kernels.attention.reference import AttentionWeights
from kernels.hopper import product as kernel
from kernels.hopper.epilogue import Epilogue
from kernels.hopper.plan import Tiles
from kernels.layer_norm import gpu as layer_norm
from kernels.mlp import hopper as mlp_hopper
from kernels.mlp.reference import MLPWeights
from tests import oracle
from tests.kernels import test_gpu

RATE = 0.3


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the product's kernel on two simulated processors."""
    from jax._src.pallas.mosaic_gpu.interpret import params

    own = kernel._kernel

    def with_both_names(*refs, **options):
        *arrays, x, w, given, made, ready, free, arrived = refs
        return own(*arrays, (x, x), w, (given, given), (made, made), ready, free, arrived, **options)

    monkeypatch.setattr(kernel, "_kernel", with_both_names)
    monkeypatch.setattr(kernel, "_pair", plgpu.SMEM)
    monkeypatch.setattr(kernel, "load", lambda ref, *_, **__: ref[...])
    monkeypatch.setattr(kernel.parts, "column_sums", lambda x: x.reshape(4, 16, 64).sum(1).reshape(-1))
    monkeypatch.setattr(kernel, "PROCESSORS", 2)
    with params.force_gpu_interpret_mode():
        yield


def dropout(column=5):
    return drop.Dropout(RATE, jnp.int32(11), 3, column)


IN_TURN = Tiles(stages=2, cluster=1, given=1, made=1)
# halves of a tile, more slices than slots, and what the epilogue reads through the ring
BY_RING = Tiles(stages=3, cluster=1, alternate=False, given=0, made=2)


@pytest.mark.parametrize(
    ("e", "t"),
    [
        (Epilogue(bias=True, residual=0.5, dropout=RATE), IN_TURN),
        pytest.param(Epilogue(slope="tanh", dropout=RATE, sums=True), IN_TURN, marks=pytest.mark.slow),
        pytest.param(Epilogue(bias=True, gelu="tanh", keep=True, dropout=RATE), IN_TURN, marks=pytest.mark.slow),
        (Epilogue(bias=True, residual=0.5, dropout=RATE), BY_RING),
        pytest.param(Epilogue(slope="tanh", dropout=RATE, sums=True), BY_RING, marks=pytest.mark.slow),
    ],
    ids=lambda a: a.kind if isinstance(a, Epilogue) else "ring" if a is BY_RING else "in-turn",
)
def test_the_kernel_drops_what_every_implementation_does(interpreted, e, t):
    """Bit by bit the mask of `drop.apply_rows`, with rows of padding and a first column; and the epilogue's values."""
    m, k, n, rows, tokens = 256, 64, 128, 16, 15
    r = np.random.default_rng(0)
    x, w, beside = (jnp.asarray(r.standard_normal(s) * c, jnp.bfloat16) for s, c in (((m, k), 1), ((k, n), k**-0.5), ((m, n), 1)))
    bias = jnp.asarray(r.standard_normal(n), jnp.float32)
    mask = drop.vectors((m, n), rows, dropout(), drop.MLP_HIDDEN, 5, tokens=tokens)
    given = (bias if e.bias else None, beside if e.beside else None)
    found = kernel.product(x, w, *given, mask, e=e, t=t)
    y = x.astype(jnp.float32) @ w.astype(jnp.float32)
    kept = drop.apply_rows(jnp.ones((m, n)), rows, dropout(), drop.MLP_HIDDEN, 5, tokens=tokens) > 0
    expected = e(y, *(None if a is None else a.astype(jnp.float32) for a in given), kept)
    expected = *expected, *[expected[0].sum(0)] * e.sums
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8, atol=1e-3)
    if not e.residual:
        np.testing.assert_array_equal(np.asarray(found[0]) == 0, ~np.asarray(kept))
        assert e.outputs == 1 or e.keep or not np.asarray(found[1])[~np.asarray(kept)].any()


def plain_product(x, w, bias=None, beside=None, mask=None, *, e, turned=False):
    whole = jnp.concatenate(list(w if w.ndim == 3 else w[None]), axis=1).astype(x.dtype)
    y = jnp.matmul(x, whole.T if turned else whole, preferred_element_type=jnp.float32)
    mask = None if mask is None else drop.keep(mask[0][:, None], mask[1][None], e.dropout)
    made = e(y, None if bias is None else bias.reshape(-1), None if beside is None else beside.astype(jnp.float32), mask)
    return *(a.astype(x.dtype) for a in made), *[made[0].sum(0)] * e.sums


def plain_rows_forward(x, scale, bias, *, eps):
    z, kept = layer_norm.forward(eps, x, scale, bias)
    return z, *kept[1:3]


def plain_rows_backward(x, dz, g, mean, r, scale, bias, *, beside):
    found = layer_norm.backward(None, (x, mean, r, scale), dz, beside * g.astype(jnp.float32))
    return found[0], layer_norm.normalised(x, mean, r, scale, bias), *found[1:], g.astype(jnp.float32).sum(0)


def plain_attention(q, k, v, tokens):
    logits = jnp.einsum("btnh,bsnh->bnts", q, k[:, :tokens]).astype(jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits).astype(q.dtype), v[:, :tokens])


@pytest.fixture
def on_xla(monkeypatch):
    """The half blocks of our kernels with XLA in the place of each kernel."""
    for module in (mlp_hopper, attention_hopper):
        monkeypatch.setattr(module, "product", plain_product)
        monkeypatch.setattr(module, "rows", SimpleNamespace(forward=plain_rows_forward, backward=plain_rows_backward))

    def apart(a, n):
        return a[:, :, :n], a[:, :, n : 2 * n], a[:, :, 2 * n :]

    def backward(q, k, v, g, tokens):
        grads = jax.vjp(partial(plain_attention, tokens=tokens), *apart(q, q.shape[2] // 3))[1](g)
        return (jnp.concatenate(grads, axis=2),)

    monkeypatch.setattr(attention_hopper, "forward", lambda q, k, v, tokens, n: plain_attention(*apart(q, n), tokens))
    monkeypatch.setattr(attention_hopper, "backward", backward)


@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.slow), RATE])
def test_the_mlp_half_agrees_with_the_reference(on_xla, rate):
    options = {"gelu": "quick", "residual_scale": 0.5, "dropout": dropout() if rate else None}
    ours = oracle.flat(partial(mlp_hopper.mlp_half, eps=1e-6, **options), MLPWeights)
    args = test_gpu.arrays(2, 7, 64, 128, 1, jnp.bfloat16, 3)
    oracle.check(ours, partial(test_gpu.rounding_mlp_half, **options), args, names=("x", *MLPWeights._fields))


@pytest.mark.parametrize("by", ["hopper", "xla"])
@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.slow), RATE])
def test_the_attention_half_agrees_with_the_reference(on_xla, by, rate):
    """With our core, which takes q, k and v in one array, and with another's, which takes three."""
    options = {"num_heads": 2, "residual_scale": 0.5, "dropout": dropout() if rate else None}
    ours = oracle.flat(partial(attention_hopper.attention_half, by=by, tokens=7, eps=1e-6, **options), AttentionWeights)
    args = test_gpu.arrays(2, 7, 64, 48, 3, jnp.bfloat16, 4)
    oracle.check(ours, partial(test_gpu.rounding_attention_half, **options), args, names=("x", *AttentionWeights._fields))


@pytest.mark.parametrize("form", ["mlp", "attention"])
def test_rows_behind_the_tokens_take_no_place_in_the_mask(on_xla, form):
    """Images of 7 rows, of which 5 are tokens, drop what images of 5 do."""
    _, *w = test_gpu.arrays(1, 1, 64, 64, 1 if form == "mlp" else 3, jnp.bfloat16, 0)
    x = test_gpu.arrays(3, 7, 64, 64, 1, jnp.bfloat16, 1)[0]
    options = {"dropout": dropout(), "residual_scale": 1.0, "eps": 1e-6}
    if form == "mlp":
        half = partial(mlp_hopper.mlp_half, weights=MLPWeights(*w), gelu="tanh", **options)
    else:
        half = partial(attention_hopper.attention_half, weights=AttentionWeights(*w), num_heads=2, by="hopper", **options)
    np.testing.assert_array_equal(half(x, tokens=5)[:, :5], half(x[:, :5], tokens=5))
