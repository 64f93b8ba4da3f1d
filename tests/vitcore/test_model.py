"""The model against an independent computation in float64 NumPy, written from the paper's equations and nothing of ours."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

import vitcore
from vitcore import layers
from vitcore.ops import for_training


def norm(x, scale, bias):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * scale + bias


def gelu(x, form):
    if form == "erf":
        return 0.5 * x * (1 + erf(x / np.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def vit(params, images, *, patch, heads, pool="token", form="tanh"):
    """Eq. 1 to 4, one image and one head at a time; float64. Returns y and the logits."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    blocks, embed = p["blocks"], p["patch_embed"]
    ys, logits = [], []
    for image in np.asarray(images, np.float64):
        tokens = [] if pool == "gap" else [embed["cls"]]
        for row in range(image.shape[0] // patch):
            for column in range(image.shape[1] // patch):
                pixels = image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].reshape(-1)
                tokens.append(pixels @ embed["kernel"].reshape(-1, embed["kernel"].shape[-1]) + embed["bias"])
        x = np.stack(tokens) + embed["position"]
        width = x.shape[1]
        h = width // heads
        for layer in range(blocks["norm1"]["scale"].shape[0]):
            z = norm(x, blocks["norm1"]["scale"][layer], blocks["norm1"]["bias"][layer])
            q, k, v = (z @ blocks["qkv"]["kernel"][layer, i] + blocks["qkv"]["bias"][layer, i] for i in range(3))
            out = np.zeros_like(x)
            for n in range(heads):
                one = slice(n * h, (n + 1) * h)
                scores = q[:, one] @ k[:, one].T / np.sqrt(h)
                scores = np.exp(scores - scores.max(-1, keepdims=True))
                out += scores / scores.sum(-1, keepdims=True) @ v[:, one] @ blocks["out"]["kernel"][layer, one]
            x = x + out + blocks["out"]["bias"][layer]
            z = norm(x, blocks["norm2"]["scale"][layer], blocks["norm2"]["bias"][layer])
            hidden = gelu(z @ blocks["mlp_in"]["kernel"][layer] + blocks["mlp_in"]["bias"][layer], form)
            x = x + hidden @ blocks["mlp_out"]["kernel"][layer] + blocks["mlp_out"]["bias"][layer]
        x = norm(x, p["norm"]["scale"], p["norm"]["bias"])
        y = x[0] if pool == "token" else x.mean(0)
        ys.append(y)
        if "pre_logits" in p:
            y = np.tanh(y @ p["pre_logits"]["kernel"] + p["pre_logits"]["bias"])
        logits.append(y @ p["head"]["kernel"] + p["head"]["bias"])
    return np.stack(ys), np.stack(logits)


def noisy(config, seed=0):
    """Parameters with nothing left at zero or one, so that every entry matters."""
    params = vitcore.init(jax.random.key(seed), config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [leaf + 0.05 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def close(got, want, tolerance):
    assert np.abs(np.asarray(got, np.float64) - want).max() <= tolerance * np.abs(want).max()


PAIRS = [("token", None, "tanh"), ("gap", None, "erf"), ("gap", 24, "tanh"), ("token", 24, "erf")]  # any two, together once
OTHERS = [("gap", None, "tanh"), ("token", None, "erf"), ("token", 24, "tanh"), ("gap", 24, "erf")]


@pytest.mark.parametrize(
    ("pool", "representation_size", "form"), [*PAIRS, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_small_models_agree_with_numpy(pool, representation_size, form):
    config = vitcore.ViTConfig(
        image_size=(24, 16), patch_size=8, width=48, depth=3, mlp_dim=80, num_heads=3, num_classes=7, channels=2,
        pool=pool, representation_size=representation_size, gelu=form,
    )  # fmt: skip
    params = noisy(config)
    images = jax.random.uniform(jax.random.key(9), (3, 24, 16, 2), minval=-1)
    y, logits = vit(params, images, patch=8, heads=3, pool=pool, form=form)
    close(vitcore.features(params, images, config), y, 1e-5)
    close(vitcore.apply(params, images, config), logits, 1e-5)


@pytest.mark.slow
def test_vit_b16_agrees_with_numpy():
    config = vitcore.variant("ViT-B/16", representation_size=768)
    params = noisy(config)
    images = jax.random.uniform(jax.random.key(9), (2, 224, 224, 3), minval=-1)
    y, logits = vit(params, images, patch=16, heads=12)
    close(vitcore.features(params, images, config), y, 1e-5)
    close(jax.jit(partial(vitcore.apply, config=config))(params, images), logits, 1e-5)


@pytest.mark.slow  # test_parameters.py has small models' always
def test_vit_b16_initial_values():
    """Each leaf of init has the distribution the release draws it from: bounds, mean, deviation, and no two draws alike."""
    config = vitcore.variant("ViT-B/16", representation_size=768)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), vitcore.init(jax.random.key(3), config))
    d, f = 768, 3072

    def uniform(x, fan_in, fan_out):
        limit = np.sqrt(6 / (fan_in + fan_out))
        assert np.abs(x).max() <= limit
        assert np.abs(x).max() > 0.999 * limit
        assert abs(x.std() / (limit / np.sqrt(3)) - 1) < 2e-3
        assert abs(x.mean()) < 1e-3 * limit

    def normal(x, deviation, cut=None):
        tolerance = 4 / np.sqrt(x.size)
        assert abs(x.std() / deviation - 1) < tolerance
        assert abs(x.mean()) < tolerance * deviation
        if cut:
            assert np.abs(x).max() <= cut

    uniform(p["blocks"]["qkv"]["kernel"], d, d)
    uniform(p["blocks"]["out"]["kernel"], d, d)
    uniform(p["blocks"]["mlp_in"]["kernel"], d, f)
    uniform(p["blocks"]["mlp_out"]["kernel"], f, d)
    normal(p["blocks"]["mlp_in"]["bias"], 1e-6)
    normal(p["blocks"]["mlp_out"]["bias"], 1e-6)
    fan_in = 16 * 16 * 3
    normal(p["patch_embed"]["kernel"], fan_in**-0.5, cut=2 * fan_in**-0.5 / 0.8796256 + 1e-6)
    normal(p["pre_logits"]["kernel"], d**-0.5, cut=2 * d**-0.5 / 0.8796256 + 1e-6)
    normal(p["patch_embed"]["position"], 0.02)
    zeros = (p["head"]["kernel"], p["head"]["bias"], p["patch_embed"]["cls"], p["patch_embed"]["bias"], p["pre_logits"]["bias"])
    for x in (*zeros, p["blocks"]["qkv"]["bias"], p["blocks"]["out"]["bias"], p["blocks"]["norm1"]["bias"], p["norm"]["bias"]):
        assert not x.any()
    for x in (p["blocks"]["norm1"]["scale"], p["blocks"]["norm2"]["scale"], p["norm"]["scale"]):
        assert (x == 1).all()
    q, k, v = p["blocks"]["qkv"]["kernel"][0]
    assert (
        np.unique([q[0, 0], k[0, 0], v[0, 0], p["blocks"]["qkv"]["kernel"][1, 0, 0, 0], p["blocks"]["out"]["kernel"][0, 0, 0]]).size
        == 5
    )
    assert (np.asarray(vitcore.init(jax.random.key(0), vitcore.variant("ViT-Ti/16", head_bias=-10.0))["head"]["bias"]) == -10).all()


SMALL = vitcore.ViTConfig(image_size=16, patch_size=4, width=32, depth=4, mlp_dim=64, num_heads=4, num_classes=5, dropout=0.3)


def small_inputs():
    return noisy(SMALL), jax.random.uniform(jax.random.key(2), (6, 16, 16, 3), minval=-1)


LOOP, UNROLLED = (), ("forward", "remat")
MADE_AGAIN = [(0, None, UNROLLED), (2, 34, LOOP)]  # nothing, and parts of what is made again
ALSO = [
    *((True, None, LOOP), (2, None, UNROLLED), (4, 51, UNROLLED)),
    *((0, None, LOOP), (True, None, UNROLLED), (2, None, LOOP), (2, 34, UNROLLED), (4, 51, LOOP)),
]


@pytest.mark.parametrize(
    ("remat", "part", "unrolled"), [*MADE_AGAIN, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALSO)]
)
def test_remat_and_unrolling_change_no_number(remat, part, unrolled, monkeypatch):
    """Every block made again, or blocks in twos and fours, these with the batch whole or in parts of one, two or three images; the
    blocks in a loop, or one after the other."""
    if part:
        monkeypatch.setattr(layers, "PART", part)
        assert layers._parts(6, 17) == 6 * 17 // part
    params, images = small_inputs()

    def loss(remat, ops):
        def of(p):
            return jnp.square(vitcore.apply(p, images, SMALL, ops=ops, dropout_key=jax.random.key(4), remat=remat)).mean()

        assert ("scan" in str(jax.make_jaxpr(of)(params))) == (not ops.unrolled or remat > 1)  # groups of blocks are loops inside
        return jax.jit(jax.value_and_grad(of))(params)

    (a, ga), (b, gb) = loss(0, vitcore.REFERENCE), loss(remat, vitcore.REFERENCE._replace(unrolled=unrolled))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_remat_that_does_not_divide_the_depth_is_refused():
    params, images = small_inputs()
    with pytest.raises(ValueError, match=r"remat is 3 and the blocks are 4: a divisor of 4"):
        vitcore.apply(params, images, SMALL, remat=3)


def test_bf16_is_near_float32():
    params, images = small_inputs()
    wide = vitcore.apply(params, images, SMALL)
    narrow = vitcore.apply(params, images, SMALL, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.float32
    assert 0 < np.abs(wide - narrow).max() < 0.05 * np.abs(wide).max()


def test_dropout_stands_where_the_paper_puts_it(monkeypatch):
    """After the position embedding, the output projection, the GELU and the second MLP layer; nowhere else."""
    from kernels import dropout as drop

    sites, original = [], drop.apply

    def seen(x, dropout, site, *column, **options):
        sites.append((site, x.shape))
        return original(x, dropout, site, *column, **options)

    monkeypatch.setattr(drop, "apply", seen)
    params, images = small_inputs()
    images = images[:5]  # a batch not traced before
    vitcore.apply(params, images, SMALL, dropout_key=jax.random.key(0))
    assert sites == [
        (drop.EMBEDDING, (5, 17, 32)),
        (drop.ATTENTION_OUT, (5, 17, 32)),
        (drop.MLP_HIDDEN, (5, 17, 64)),
        (drop.MLP_OUT, (5, 17, 32)),
    ]


def test_dropout_depends_on_its_key_and_is_off_without():
    params, images = small_inputs()
    run = partial(vitcore.apply, params, images, SMALL)
    a, b, c = run(dropout_key=jax.random.key(0)), run(dropout_key=jax.random.key(0)), run(dropout_key=jax.random.key(1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    np.testing.assert_array_equal(run(), run())
    assert np.abs(a - run()).max() > 1e-3


def test_bad_images_and_parameters_are_refused():
    params, images = small_inputs()
    with pytest.raises(ValueError, match=r"images are float32\[6, 16, 16, 1\]: floats \[B, 16, 16, 3\]"):
        vitcore.apply(params, images[..., :1], SMALL)
    with pytest.raises(ValueError, match=r"images are uint8"):
        vitcore.apply(params, images.astype(jnp.uint8), SMALL)
    with pytest.raises(ValueError, match=r"params\['norm'\]\['bias'\] is missing, the config requires \(32,\)"):
        vitcore.apply({**params, "norm": {"scale": params["norm"]["scale"]}}, images, SMALL)
    other = vitcore.init(jax.random.key(0), vitcore.ViTConfig(**{**vars(SMALL), "mlp_dim": 128}))
    with pytest.raises(ValueError, match=r"mlp_in.*is \(4, 128\), the config requires \(4, 64\)"):
        vitcore.apply(other, images, SMALL)


def test_a_training_step_takes_its_own_setting():
    """The kernels train with the blocks one after the other, and run forward in a loop; with rematerialisation as they say."""
    assert vitcore.FUSED.unrolled == ("train", "remat")
    assert for_training(vitcore.FUSED).unrolled == ("forward", "remat", "train")
    assert for_training(vitcore.REFERENCE) == vitcore.REFERENCE
    assert for_training(vitcore.REFERENCE._replace(unrolled=("forward",))).unrolled == ()
