"""What a forward pass gives besides its result: features and attention maps of blocks; and edits of the patch embeddings."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import vitcore
from kernels.dropout import Dropout
from tests.oracle import check, kernels_in
from tests.vitcore.test_model import SMALL, norm, small_inputs
from vitcore.context import Context
from vitcore.model import encode
from vitcore.vit import embed

LOOP = vitcore.REFERENCE
OPS = {"loop": LOOP, "unrolled": LOOP._replace(unrolled=("forward",)), "padded": LOOP._replace(multiple=8)}


def behind(params, images, count):
    """The tokens behind so many blocks: of a model that has no more."""
    some = {**params, "blocks": jax.tree.map(lambda a: a[:count], params["blocks"])}
    return encode(some, images, dataclasses.replace(SMALL, depth=count), Context(ops=LOOP))


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_features_of_blocks_are_the_tokens_of_a_model_cut_there(ops):
    params, images = small_inputs()
    found = vitcore.features(params, images, SMALL, ops=ops, blocks=(3, 1, 3))
    assert [(a.shape, a.dtype) for a in found] == [((6, 17, 32), jnp.float32)] * 3
    for block, tokens in zip((3, 1, 3), found, strict=True):
        np.testing.assert_allclose(tokens, behind(params, images, block), rtol=1e-5, atol=1e-5)


def maps_by_hand(params, images, block):
    """Head by head from the block's input, in float64."""
    x = images_to_input(params, images, block)
    w = jax.tree.map(lambda a: np.asarray(a[block - 1], np.float64), params["blocks"])
    z = norm(x, w["norm1"]["scale"], w["norm1"]["bias"])
    q, k = (z @ w["qkv"]["kernel"][i] + w["qkv"]["bias"][i] for i in range(2))
    h = SMALL.width // SMALL.num_heads
    maps = []
    for n in range(SMALL.num_heads):
        one = slice(n * h, (n + 1) * h)
        scores = q[..., one] @ k[..., one].swapaxes(1, 2) / np.sqrt(h)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        maps.append(scores / scores.sum(-1, keepdims=True))
    return np.stack(maps, 1)


def images_to_input(params, images, block):
    if block == 1:
        p = params["patch_embed"]
        patches = np.asarray(images).reshape(6, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(6, 16, 48)
        tokens = patches @ np.asarray(p["kernel"]).reshape(48, 32) + p["bias"]
        cls = np.broadcast_to(p["cls"], (6, 1, 32))
        return np.concatenate([cls, tokens], 1).astype(np.float64) + np.asarray(p["position"])
    return np.asarray(behind(params, images, block - 1), np.float64)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_attention_maps_are_the_probabilities_of_each_head(ops):
    params, images = small_inputs()
    found = vitcore.attention_maps(params, images, SMALL, ops=ops, blocks=(1, 4))
    assert (found.shape, found.dtype) == ((2, 6, 4, 17, 17), jnp.float32)
    for i, block in enumerate((1, 4)):
        np.testing.assert_allclose(found[i], maps_by_hand(params, images, block), atol=1e-5)
    mean = vitcore.attention_maps(params, images, SMALL, ops=ops, blocks=(1, 4), mean=True)
    np.testing.assert_allclose(mean, found.mean(2), atol=1e-6)
    assert np.ptp(np.asarray(found)) > 0.05  # and they differ


def test_a_mesh_gives_the_same_features_and_maps():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    params, images = small_inputs()
    want = vitcore.features(params, images, SMALL, blocks=(2, 4))
    for ops in (LOOP, OPS["unrolled"]):
        found = jax.jit(vitcore.features_on(mesh, SMALL, ops=ops, blocks=(2, 4)))(params, images)
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(vitcore.features_on(mesh, SMALL))(params, images), vitcore.features(params, images, SMALL), rtol=1e-5, atol=1e-5
    )
    for mean in (False, True):
        found = jax.jit(vitcore.attention_maps_on(mesh, SMALL, blocks=(2,), mean=mean))(params, images)
        np.testing.assert_allclose(found, vitcore.attention_maps(params, images, SMALL, blocks=(2,), mean=mean), atol=1e-5)


@pytest.mark.slow
def test_captured_features_are_differentiable():
    params, images = small_inputs()

    def loss(ops):
        return jax.grad(lambda p: sum(jnp.square(a).mean() for a in vitcore.features(p, images, SMALL, ops=ops, blocks=(2, 3))))(
            params
        )

    want = jax.grad(lambda p: sum(jnp.square(behind(p, images, block)).mean() for block in (2, 3)))(params)
    for ops in (LOOP, OPS["unrolled"]):
        for a, b in zip(jax.tree.leaves(loss(ops)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_nothing_is_computed_unasked():
    """Without capture the loop carries the tokens alone, has no results and no branches."""
    params, images = small_inputs()
    jaxpr = jax.make_jaxpr(lambda p, x: vitcore.apply(p, x, SMALL))(params, images)
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    (tokens,) = scan.outvars
    assert tokens.aval.shape == (images.shape[0], SMALL.tokens, SMALL.width)
    assert "cond" not in str(jaxpr)
    asked = str(jax.make_jaxpr(lambda p, x: vitcore.attention_maps(p, x, SMALL, blocks=(2,)))(params, images))
    assert "cond" in asked


def test_what_cannot_be_captured_is_refused():
    params, images = small_inputs()
    for blocks in ((0,), (2, 5)):
        with pytest.raises(ValueError, match=rf"block {blocks[-1]}: the model has blocks 1 to 4"):
            vitcore.features(params, images, SMALL, blocks=blocks)
    with pytest.raises(ValueError, match="remat is 2 and results of blocks are asked for: they are kept with remat=0 only"):
        vitcore.features(params, images, SMALL, blocks=(1,), remat=2)


# --- edits -------------------------------------------------------------------------------------------------------------------


def test_an_edit_that_changes_nothing_changes_nothing():
    """With dropout, whose masks must be those of the op that does all of Eq. 1 at once."""
    params, images = small_inputs()
    for key in (None, jax.random.key(4)):
        plain = vitcore.apply(params, images, SMALL, dropout_key=key)
        edited = vitcore.apply(params, images, SMALL, dropout_key=key, edit=lambda x, first: x)
        np.testing.assert_allclose(edited, plain, rtol=1e-6, atol=1e-6)


def test_an_edit_through_the_kernel_keeps_its_tokens():
    """The kernel projects alone; class token, position and dropout are added outside, the same elements dropped."""
    params, images = small_inputs()
    p = params["patch_embed"]

    def tokens(ops, edit, images, kernel, bias, position, cls):
        p = {"kernel": kernel, "bias": bias, "position": position, "cls": cls}
        return embed(params, p, images, SMALL, Context(ops=ops, edit=edit), Dropout(0.3, jnp.int32(5), 34))

    arrays = images[:2], p["kernel"], p["bias"], p["position"], p["cls"]
    edited = partial(tokens, vitcore.INTERPRET, lambda x, first: x)
    assert kernels_in(edited, *arrays) == ["patch_embed"]
    check(edited, partial(tokens, vitcore.REFERENCE, None), arrays, names=("images", "kernel", "bias", "position", "cls"))
    dropped = edited(*arrays) == 0
    np.testing.assert_array_equal(dropped, tokens(vitcore.INTERPRET, None, *arrays) == 0)
    assert 0.2 < float(dropped.mean()) < 0.4


def test_an_edit_sees_patch_embeddings_and_the_index_of_the_first():
    """The same on a mesh, whose devices each see their own images, as on one device."""
    params, images = small_inputs()
    seen = []

    def edit(x, first):
        seen.append(x.shape)
        rows = first + jnp.arange(x.shape[0])
        return jnp.where((rows % 3 == 0)[:, None, None], 0.5, x)

    alone = vitcore.apply(params, images, SMALL, edit=edit)
    assert seen == [(6, 16, 32)]
    plain = vitcore.apply(params, images, SMALL)
    changed = np.abs(np.asarray(alone - plain)).max(1) > 1e-4
    assert changed.tolist() == [True, False, False] * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    np.testing.assert_allclose(jax.jit(vitcore.apply_on(mesh, SMALL, edit=edit))(params, images), alone, rtol=1e-5, atol=1e-5)
    assert seen[-1] == (3, 16, 32)


def test_an_edit_that_returns_another_shape_is_refused():
    params, images = small_inputs()
    with pytest.raises(ValueError, match=r"edit returned float32\[6, 15, 32\]: float32\[6, 16, 32\], as it was given, is required"):
        vitcore.apply(params, images, SMALL, edit=lambda x, first: x[:, 1:])
