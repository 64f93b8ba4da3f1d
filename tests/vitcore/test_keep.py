"""What a training step keeps for the backward pass: chosen by what memory there is, said, and the same gradients."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import vitcore
from kernels.device import DEVICES
from kernels.launch import Launch
from train.step import StepOptions, make_init, make_train_step
from vitcore import keep
from vitcore.context import Context
from vitcore.model import forward
from vitcore.ops import fused
from vitcore.sharding import MeshShape

B16 = vitcore.variant("ViT-B/16", num_classes=1000)
V3 = fused(Launch(device=DEVICES["v3"]))
SMALL = vitcore.ViTConfig(
    image_size=24, patch_size=4, width=32, depth=2, mlp_dim=128, num_heads=2, num_classes=5, dropout=0.1, channels=1
)


def choose(config=B16, images=32, ops=V3, mesh=None, **options):
    return keep.choose(ops, config, images, "bfloat16", mesh, **{"remat": 0, **options})


def test_small_batches_keep_what_large_ones_make_again():
    ops, kept = choose()
    assert ops != V3
    assert keep.described(kept) == "keeps the hidden layer and q, k, v and what they attend to: 1.3 GiB"
    rows = 12 * 32 * 197
    assert rows * 3072 * 2 <= kept[0].bytes <= 1.1 * rows * 3072 * 2
    assert rows * 4 * 768 * 4 <= kept[1].bytes <= 1.1 * rows * 4 * 768 * 4
    some = fused(Launch(device=replace(DEVICES["v3"], hbm_bytes=11 * 2**28)))
    assert [one.what for one in choose(ops=some)[1]] == ["the hidden layer"]
    assert choose(ops=some, average=True) == (some, ())
    assert choose(images=1024) == (V3, ())
    assert choose(images=1024, ops=fused(Launch(device=replace(DEVICES["v3"], hbm_bytes=2**40))))[1]
    assert keep.described(()) == ""
    assert keep.described((keep.Kept("x", 3 * 2**19),)) == "keeps x: 1.5 MiB"


def test_what_is_kept_fits_beside_the_rest():
    """By the same count as a bound, for every device and batch: never more than the memory less four copies of the parameters."""
    parameters = sum(a.size for a in jax.tree.leaves(jax.eval_shape(partial(vitcore.init, config=B16), jax.random.key(0))))
    for name in ("v2", "v3", "v6e"):
        device = DEVICES[name]
        for images in (1, 100, 300, 500, 2000):
            kept = choose(images=images, ops=fused(Launch(device=device)))[1]
            room = device.hbm_bytes - 16 * parameters - 24 * images * 197 * 768 * 2
            assert sum(k.bytes for k in kept) <= max(0, room)


def test_a_mesh_splits_what_is_kept():
    whole, part = choose()[1], choose(mesh=MeshShape(1, 2))[1]
    assert part[0].bytes == whole[0].bytes // 2


@pytest.mark.parametrize(
    "change",
    [
        {"remat": 1},
        {"ops": vitcore.REFERENCE},
        {"ops": vitcore.GPU},
        {"config": vitcore.variant("R50x1", num_classes=10)},
    ],
    ids=["remat", "reference", "gpu", "a ResNet"],
)
def test_nothing_is_kept(change):
    assert choose(**change) == (change.get("ops", V3), ())


def test_an_op_that_cannot_keep_is_left_as_it_is():
    ops, kept = choose(replace(B16, mlp_dim=100))
    assert [one.what for one in kept] == ["q, k, v and what they attend to"]
    assert ops.mlp_half is V3.mlp_half
    relative = choose(replace(B16, position="relative"))
    assert [one.what for one in relative[1]] == ["the hidden layer"]


def test_an_axial_block_keeps_both_its_halves():
    axial = vitcore.variant("Axial-ViT-B/32", image_size=224, num_classes=10)
    assert choose(axial) == (V3, ())  # rows of 7 tokens are XLA's, which keeps nothing; interpreted, kernels take them
    kept, *_ = choose(axial, ops=fused(Launch(device=DEVICES["v3"], interpret=True)))[1]
    assert kept.bytes >= 12 * 2 * 32 * 49 * axial.mlp_dim * 2


def kept_hidden(ops, remat=0) -> int:
    """How many values the backward pass of a forward pass of SMALL is given of hidden layers."""
    params = jax.eval_shape(partial(vitcore.init, config=SMALL), jax.random.key(0))
    context = Context(ops=ops._replace(unrolled=("forward",)), remat=remat)
    images = jax.ShapeDtypeStruct((2, 24, 24, 1), jnp.float32)
    pullback = jax.eval_shape(lambda p, x: jax.vjp(lambda p: forward(p, x, SMALL, context), p)[1], params, images)
    return sum(a.size for a in jax.tree.leaves(pullback) if a.ndim == 3 and a.shape[-1] == SMALL.mlp_dim)


def test_the_ops_chosen_keep_the_hidden_layer_of_every_block():
    ops, _ = choose(SMALL, images=2)
    layers = SMALL.depth * SMALL.width * SMALL.mlp_dim  # the weights, stacked or one by one
    assert kept_hidden(V3) <= layers
    assert kept_hidden(ops) >= SMALL.depth * 2 * 37 * SMALL.mlp_dim


def test_a_training_step_takes_them_unless_it_rematerialises():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tx = optax.adam(1e-2)
    images, labels = jax.ShapeDtypeStruct((2, 24, 24, 1), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def program(**changes) -> str:
        options = StepOptions(**{"ops": V3, **changes})
        state = jax.eval_shape(make_init(SMALL, mesh, tx, options), jax.random.key(0))
        return str(jax.make_jaxpr(make_train_step(SMALL, mesh, tx, options))(state, images, labels))

    assert "mlp_half_hidden" in program()
    assert "mlp_half_hidden" not in program(remat=1)
    assert "mlp_half_hidden" not in program(ops=V3._replace(keeping=()))


@pytest.mark.ci
@pytest.mark.slow
def test_gradients_are_those_of_the_same_step_without():
    """With dropout, interpreted; float32, in which what is kept is not rounded."""
    kernels = fused(Launch(device=DEVICES["v3"], interpret=True))
    of_mlp = kernels.keeping[:1]
    plain = vitcore.REFERENCE._replace(mlp_half=kernels.mlp_half, keeping=of_mlp, device=kernels.device)
    params = vitcore.init(jax.random.key(0), SMALL)
    images = jax.random.normal(jax.random.key(1), (2, 24, 24, 1))

    def gradients(ops):
        context = Context(ops=ops, dropout_key=jax.random.key(2))
        return jax.jit(jax.grad(lambda p: jnp.square(forward(p, images, SMALL, context) - 1).sum()))(params)

    chosen, kept = choose(SMALL, images=2, ops=plain)
    assert kept
    for a, b in zip(*(jax.tree.leaves(gradients(ops)) for ops in (chosen, plain)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))
