"""The Hopper products, norms and half blocks where no card is: lowered by Mosaic GPU; their tables; the arithmetic of epilogues.

Their numbers are compared on a card (tests/gpu/test_products.py, `make test-gpu`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bench import tune
from kernels.attention import gpu as attention_gpu
from kernels.attention.hopper import half as attention_hopper
from kernels.attention.reference import AttentionWeights
from kernels.dropout import Dropout
from kernels.hopper import epilogue, plan, table
from kernels.hopper.epilogue import Epilogue
from kernels.hopper.plan import Tiles, memory, refuses, tiles
from kernels.hopper.product import product
from kernels.mlp import gpu as mlp_gpu
from kernels.mlp import hopper as mlp_hopper
from kernels.mlp.reference import GELUS, MLPWeights

D, F, T = 128, 256, 17


def lowered(f, *args) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


def weights(record, *shapes):
    return record(*(shape(*s, dtype=jnp.float32) for s in shapes))


MLP = weights(MLPWeights, (D,), (D,), (D, F), (F,), (F, D), (D,))
ATTENTION = weights(AttentionWeights, (D,), (D,), (3, D, D), (3, D), (D, D), (D,))
HALF_OF_MLP = partial(mlp_hopper.mlp_half, gelu="tanh", residual_scale=1.0, eps=1e-6)
HALF_OF_ATTENTION = partial(attention_hopper.attention_half, num_heads=2, tokens=T - 1, residual_scale=0.5, eps=1e-6)
HALVES = {
    "mlp": (HALF_OF_MLP, MLP),
    "attention": (partial(HALF_OF_ATTENTION, by="hopper"), ATTENTION),
    "attention around another's core": (partial(HALF_OF_ATTENTION, by="xla"), ATTENTION),
    "mlp that drops": (partial(HALF_OF_MLP, dropout=Dropout(0.1, jnp.int32(1), 5, 7), tokens=T - 1), MLP),
}


def gradients(half):
    return lambda x, w, g: jax.vjp(half, x, w)[1](g)


@pytest.mark.parametrize("name", HALVES)
def test_half_blocks_lower_for_a_card_on_a_mesh_and_alone(name):
    """Under shard_map results vary as their inputs do, gradients of weights are sums over the devices."""
    half, w = HALVES[name]
    assert lowered(half, shape(2, T, D), w).count("mosaic_gpu") >= 3  # the norm and two products, those alike are one function
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    x = shape(2, T, D)
    split = jax.shard_map(gradients(half), mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=(P("data"), P()))
    text = lowered(split, x, w, x)
    assert "mosaic_gpu" in text
    assert "all_reduce" in text


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_what_a_half_block_keeps_for_its_backward_pass(name):
    """Also under a checkpoint around the block with the GPU ops' policy: x, two numbers a row, and the products named."""
    half, w = HALVES[name]
    policy = jax.checkpoint(half, policy=attention_gpu.keeps)
    own = [(2 * T, D), (2 * T, 1), (2 * T, 1), *(a.shape for a in w)]
    expected = sorted([*own, *{"mlp": [(2 * T, F)], "attention": [(2 * T, 3 * D), (2 * T, D)]}[name]])
    for f in (half, policy):
        kept = jax.tree.leaves(jax.eval_shape(lambda x, w, f=f: jax.vjp(f, x, w)[1], shape(2, T, D), w))
        found = [(2 * T, D) if a.shape == (2, T, D) else a.shape for a in kept]
        assert sorted(found) == expected


@pytest.mark.slow
@pytest.mark.parametrize("entry", table.TABLE, ids=str)
def test_every_product_of_the_table_lowers(entry):
    kind, k, n = entry
    e = tune.EPILOGUES[kind]
    args = [shape(1000, k), shape(k, n), *([shape(n, dtype=jnp.float32)] * e.bias), *([shape(1000, n)] * e.beside)]

    def run(x, w, *rest):
        return product(x, w, rest[0] if e.bias else None, rest[-1] if e.beside else None, e=e, t=tiles(k, n, kind))

    assert "mosaic_gpu" in lowered(run, *args)


def test_the_table():
    """Its tiles divide the columns and fit shared memory; so do those of its nearest entry for every other product."""
    for (kind, k, n), fields in table.TABLE.items():
        assert tiles(k, n, kind) == Tiles(*fields)
        assert memory(Tiles(*fields), kind) <= tune.SHARED
    for kind in tune.EPILOGUES:
        for n in range(128, 4096, 128):
            assert n % tiles(512, n, kind).columns == 0
        for n in (768, 1024):
            assert tiles(1024, n, kind) in (found := tune.candidates(kind, n)) or len(found) > 1
            assert all(memory(t, kind) <= tune.SHARED and n % t.columns == 0 for t in found)
    assert tiles(3000, 768, "residual") == tiles(3072, 768, "residual")


def test_the_table_is_written_as_it_is_read(tmp_path):
    out = tmp_path / "table.py"
    out.write_text(tune.text(table.CARD, {**table.TABLE, ("plain", 64, 128): (128, 128, 5, 2, True, 2, 2)}))
    names: dict = {}
    exec(out.read_text(), names)
    assert names["TABLE"].pop(("plain", 64, 128)) == (128, 128, 5, 2, True, 2, 2)
    assert names["TABLE"] == table.TABLE


@pytest.mark.parametrize("form", ["tanh", "quick", "silu", "erf"])
def test_gelu_and_its_slope_in_few_operations(form):
    """Within a few roundings of float32 everywhere, also where the exponential overflows."""
    a = np.concatenate([np.linspace(-12, 12, 2001), [-1e4, -100.0, 100.0, 1e4, 0.0]])
    with jax.enable_x64(True):
        true, pull = jax.vjp(GELUS[form], jnp.asarray(a, jnp.float64))
        slope = np.asarray(pull(jnp.ones_like(true))[0])
    h, found = epilogue.gelu_and_slope(jnp.asarray(a, jnp.float32), form)
    np.testing.assert_allclose(h, true, rtol=2e-6, atol=3e-6)
    np.testing.assert_allclose(epilogue.gelu(jnp.asarray(a, jnp.float32), form), h, atol=1e-7)
    np.testing.assert_allclose(found, slope, rtol=2e-6, atol=6e-6)


def test_what_an_epilogue_makes():
    y, beside, bias = (jnp.asarray(np.random.default_rng(i).standard_normal((3, 4)), jnp.float32) for i in range(3))
    for e in (*tune.EPILOGUES.values(), Epilogue(residual=0.5), Epilogue(bias=True)):
        assert len(e(y, bias if e.bias else None, beside if e.beside else None)) == e.outputs
    np.testing.assert_allclose(Epilogue(bias=True, residual=0.5)(y, bias, beside)[0], y + bias + 0.5 * beside, rtol=1e-6)
    h, a = Epilogue(bias=True, gelu="quick", keep=True)(y, bias)
    np.testing.assert_allclose(a, y + bias)
    np.testing.assert_allclose(h, GELUS["quick"](y + bias), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(Epilogue(slope="tanh")(y, None, beside)[1], GELUS["tanh"](beside), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "d", "inner", "because"),
    [
        (jnp.bfloat16, 768, 3072, None),
        (jnp.float32, 768, 3072, "float32"),
        (jnp.bfloat16, 192, 768, "rows of 192"),
        (jnp.bfloat16, 4096, 4096, "rows of 4096"),
        (jnp.bfloat16, 128, 200, "200 columns"),
    ],
)
def test_which_half_blocks_are_refused_and_why(monkeypatch, dtype, d, inner, because):
    monkeypatch.setattr(plan, "not_hopper", lambda: None)
    why = refuses(jnp.dtype(dtype), d, inner)
    assert why is None if because is None else because in why


def test_halves_are_of_our_kernels_where_a_hopper_card_is(monkeypatch):
    for module in (plan, attention_gpu.products):
        monkeypatch.setattr(module, "not_hopper", lambda: None)
    monkeypatch.setattr(attention_gpu, "refuses", lambda *_: None)
    x = shape(2, T, D)
    for options in ({}, {"dropout": Dropout(0.1, jnp.int32(1))}):
        assert "product_hopper" in str(jax.make_jaxpr(partial(mlp_gpu.mlp_half, **options))(x, MLP))
    assert "product_hopper" in str(jax.make_jaxpr(partial(attention_gpu.attention_half, num_heads=2))(x, ATTENTION))
    assert "product_hopper" not in str(jax.make_jaxpr(mlp_gpu.mlp_half)(shape(2, T, D, dtype=jnp.float32), MLP))


def test_tuning_wants_a_card(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.tune"])
    assert tune.main() == 2
    assert "the kernels are for GPUs" in capsys.readouterr().err
