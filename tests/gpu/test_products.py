"""The Hopper products with epilogues, the norm of rows and the half blocks made of them, on a card, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dropout as drop
from kernels.attention import gpu as attention_gpu
from kernels.attention import reference as attention
from kernels.hopper.epilogue import Epilogue
from kernels.hopper.plan import READS, Tiles, refuses, tiles
from kernels.hopper.product import product
from kernels.layer_norm import gpu as layer_norm
from kernels.layer_norm import rows
from kernels.mlp import gpu as mlp_gpu
from kernels.mlp import reference as mlp
from tests import oracle
from tests.kernels import test_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]

EPILOGUES = [
    Epilogue(),
    Epilogue(bias=True),
    *(Epilogue(bias=True, gelu=form, keep=form == "tanh") for form in ("tanh", "quick", "erf")),
    Epilogue(bias=True, residual=1.0),
    Epilogue(residual=0.5),
    *(Epilogue(slope=form) for form in ("tanh", "quick", "erf")),
    Epilogue(bias=True, gelu="tanh", keep=True, dropout=0.1),
    Epilogue(bias=True, residual=1.0, dropout=0.1),
    Epilogue(slope="tanh", dropout=0.1),
    Epilogue(slope="tanh", sums=True),
]
OTHERS = [
    Tiles(stages=3),
    Tiles(cluster=1, given=1, made=1),
    Tiles(columns=192, stages=3, given=1, made=4),
    Tiles(rows=64, columns=256, stages=4),
    Tiles(columns=256, stages=3, alternate=False),
    Tiles(rows=256, stages=4, alternate=False, given=1, made=1),
    Tiles(columns=256, stages=4, alternate=False, given=0, made=2),
    Tiles(stages=5, cluster=1, given=0, made=2),
]


def array(r, *shape, scale=1.0, dtype=jnp.bfloat16):
    return jnp.asarray(r.standard_normal(shape) * scale, dtype)


def dropped(e: Epilogue, m: int, n: int):
    """(the mask as a product takes it, or None; 0 or 1 / (1 - rate) by element), with rows of padding and a first column."""
    if not e.dropout:
        return None, 1.0
    site = {"dropout": drop.Dropout(e.dropout, jnp.int32(77), 1234567), "site": drop.MLP_HIDDEN, "column": 768, "tokens": 49}
    return drop.vectors((m, n), 50, **site), np.asarray(drop.apply_rows(jnp.ones((m, n)), 50, **site), np.float64)


def agrees(e: Epilogue, t: Tiles, m: int, k: int, n: int, *, groups: int = 1, turned: bool = False):
    """Each output is as near to float64 as one rounding of it is."""
    r = np.random.default_rng(0)
    x, w = array(r, m, k), array(r, groups, *((n, k // groups) if turned else (k, n // groups)), scale=k**-0.5)
    bias = array(r, n, dtype=jnp.float32) if e.bias else None
    beside = array(r, m, n) if e.beside else None
    mask, kept = dropped(e, m, n)
    found = product(x, w, bias, beside, mask, e=e, t=t, turned=turned)
    with jax.enable_x64(True):
        wide: list = [None if a is None else jnp.asarray(np.asarray(a), jnp.float64) for a in (x, w, bias, beside)]
        whole = jnp.concatenate([a.T if turned else a for a in wide[1]], axis=0 if turned else 1)
        y = wide[0] @ whole + (0 if wide[2] is None else wide[2])
        if e.slope:
            h, pull = jax.vjp(mlp.GELUS[e.slope], wide[3])
            true = (y * pull(jnp.ones_like(y))[0] * kept, h * kept)
        elif e.gelu:
            true = (mlp.GELUS[e.gelu](y) * kept, y)
        else:
            true = (y * kept if wide[3] is None else y * kept + e.residual * wide[3],)
        true = [np.asarray(a) for a in true]
    assert len(found) == e.outputs + e.sums
    if e.sums:
        np.testing.assert_allclose(found[-1], true[0].sum(0), rtol=1e-4, atol=1e-4 * np.abs(true[0]).sum(0).max())
    for a, b in zip(found, true, strict=False):
        error, largest = np.abs(np.asarray(a, np.float64) - b).max(), np.abs(b).max()
        assert error <= oracle.FACTOR * 2.0**-9 * largest, (e, t, error / largest)


@pytest.mark.parametrize("e", EPILOGUES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(192, 384), (768, 128)])
def test_a_product_and_its_epilogue(e, k, n):
    """Rows that are no multiple of a tile; the tiles of the table."""
    agrees(e, tiles(k, n, e.kind), 1000, k, n, turned=bool(e.slope))


@pytest.mark.parametrize("t", OTHERS, ids=str)
@pytest.mark.parametrize("kind", ["gelu", *READS])
def test_other_tiles(t, kind):
    e = {
        "gelu": Epilogue(bias=True, gelu="tanh", keep=True),
        "residual": Epilogue(residual=1.0),
        "slope": Epilogue(slope="tanh", sums=True),
    }[kind]
    agrees(e, t, 1000, 320, 768, turned=kind == "slope")


@pytest.mark.parametrize("m", [1, 129, 25344])
def test_few_rows_and_many_tiles_a_block(m):
    agrees(Epilogue(bias=True, residual=1.0), tiles(384, 384, "residual"), m, 384, 384)


@pytest.mark.parametrize("turned", [False, True])
def test_matrices_beside_each_other(turned):
    agrees(Epilogue(), tiles(384, 384, "plain"), 300, 1152 if turned else 384, 384 if turned else 1152, groups=3, turned=turned)


@pytest.mark.parametrize(("m", "d"), [(1, 128), (1001, 384), (2500, 768), (300, 1280)])
def test_the_norm_of_rows(m, d):
    r = np.random.default_rng(m)
    x, dz, g = array(r, m, d, scale=3.0) + 1, array(r, m, d), array(r, m, d)
    scale, bias = array(r, d, dtype=jnp.float32), array(r, d, dtype=jnp.float32)
    found = rows.forward(x, scale, bias, eps=1e-6)
    z, kept = layer_norm.forward(1e-6, x, scale, bias)
    for a, b in zip(found, (z, *kept[1:3]), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2**-7, atol=1e-5)
    dx, dscale, dbias = layer_norm.backward(1e-6, kept, dz)
    again = rows.backward(x, dz, g, *found[1:], scale, bias, beside=0.5)
    wide = np.asarray(dx, np.float32) + 0.5 * np.asarray(g, np.float32)
    for a, b in zip(again, (wide, z, dscale, dbias, np.asarray(g, np.float32).sum(0)), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= 2**-6 * np.abs(b).max()


@pytest.mark.parametrize(("form", "t", "d", "f"), [("tanh", 50, 384, 1536), ("quick", 37, 256, 512), ("erf", 37, 128, 768)])
@pytest.mark.parametrize(("scale", "rate"), [(1.0, 0.0), (0.5, 0.1)])
def test_the_mlp_half(form, t, d, f, scale, rate):
    r = np.random.default_rng(t)
    assert refuses(jnp.dtype(jnp.bfloat16), d, f) is None
    weights = [array(r, d) + 1, array(r, d), array(r, d, f, scale=d**-0.5), array(r, f), array(r, f, d, scale=f**-0.5), array(r, d)]
    options = {"gelu": form, "residual_scale": scale, "dropout": drop.Dropout(rate, jnp.int32(5), 7, 512) if rate else None}
    ours = oracle.flat(partial(mlp_gpu.mlp_half, **options), mlp.MLPWeights)
    plain = (
        partial(test_gpu.rounding_mlp_half, **options) if rate else oracle.flat(partial(mlp.mlp_half, **options), mlp.MLPWeights)
    )
    x = array(r, 3, t, d)
    oracle.check(ours, plain, [x, *(a.astype(jnp.float32) for a in weights)], names=("x", *mlp.MLPWeights._fields))


@pytest.mark.parametrize(("t", "d", "n", "tokens", "scale"), [(197, 768, 12, 197, 1.0), (50, 384, 6, 49, 0.5), (7, 256, 2, 7, 1.0)])
def test_the_attention_half(t, d, n, tokens, scale):
    r = np.random.default_rng(t)
    k = 64 * n
    assert refuses(jnp.dtype(jnp.bfloat16), d, k) is None
    weights = [
        array(r, d) + 1,
        array(r, d),
        array(r, 3, d, k, scale=d**-0.5),
        array(r, 3, k),
        array(r, k, d, scale=k**-0.5),
        array(r, d),
    ]

    def half(module):
        def run(x, **options):
            return module.attention_half(x, num_heads=n, tokens=tokens, residual_scale=scale, **options)[:, :tokens]

        return lambda x, *w: run(x, weights=attention.AttentionWeights(*w))

    args = [array(r, 2, t, d), *(a.astype(jnp.float32) for a in weights)]
    oracle.check(half(attention_gpu), half(attention), args, names=("x", *attention.AttentionWeights._fields))


@pytest.mark.parametrize(("n", "t", "h"), [(8, 197, 64), (8, 50, 80), (8, 258, 80), (4, 600, 64)])
def test_the_attention_half_that_drops(n, t, h):
    """Around our core, and around cuDNN's where rows are longer than ours are taken for."""
    options = {"num_heads": n, "residual_scale": 0.5, "dropout": drop.Dropout(0.1, jnp.int32(5), 7)}
    args = test_gpu.arrays(2, t, 512, n * h, 3, jnp.bfloat16, t)
    oracle.check(partial(test_gpu.attention_half, **options), partial(test_gpu.rounding_attention_half, **options), args)
