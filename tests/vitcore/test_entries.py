"""Position embeddings, pools, gated and axial blocks and hybrids against a ViT written a second time in float64
NumPy (tests/tape.py): values and every gradient of the whole model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import vitcore
from tests import tape
from tests.tape import Number
from tests.vitcore.test_resnet import is_number, network
from vitcore import families
from vitcore.positions import sincos2d
from vitcore.resnet import ResNetStem

SMALL: Any = dict(image_size=(16, 24), patch_size=8, width=16, depth=2, mlp_dim=24, num_heads=2, num_classes=3, channels=2)

# --- the second computation ----------------------------------------------------------------------------------------------------


def norm(x, w):
    z = x - x.mean(-1, True)
    return z / ((z * z).mean(-1, True) + 1e-6).sqrt() * w["scale"] + w["bias"]


def table(c, kind, p):
    """[T, D] of a learned or a fixed table, one patch at a time."""
    rows, columns = c.grid
    first = [Number(np.zeros((1, c.width)))] if c.pool == "token" else []
    if kind == "1d":
        return p["position"]
    if kind == "2d":
        parts = [
            tape.concatenate([p["position_columns"][x : x + 1], p["position_rows"][y : y + 1]], 1)
            for y in range(rows)
            for x in range(columns)
        ]
        return tape.concatenate(first + parts, 0)
    q = c.width // 4
    each = [
        [f(place / 10_000 ** (i / (q - 1))) for place in (x, y) for f in (np.sin, np.cos) for i in range(q)]
        for y in range(rows)
        for x in range(columns)
    ]
    return tape.concatenate([*first, Number(each)], 0)


def rotary(x, c):
    """[T, H] with pairs of columns of the patches turned, one patch at a time; registers stand in front of them here."""
    h, before = x.shape[1], x.shape[0] - c.grid[0] * c.grid[1]
    rows = [x[:before]]
    for patch in range(c.grid[0] * c.grid[1]):
        y, column = divmod(patch, c.grid[1])
        centres = [(2 * y + 1) / c.grid[0] - 1, (2 * column + 1) / c.grid[1] - 1]
        angles = np.array([2 * np.pi * centre / 100 ** (4 * i / h) for centre in centres for i in range(h // 4)])
        row = x[before + patch : before + patch + 1]
        a, b = row[:, : h // 2], row[:, h // 2 :]
        rows.append(tape.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], 1))
    return tape.concatenate(rows, 0)


def attention(x, w, c, relative=None):
    """MSA(LN(x)) of [T, D], one head and one pair at a time where offsets matter."""
    z, h, t = norm(x, w["norm1"]), c.width // c.num_heads, x.shape[0]
    place: Any = {"qkv": {0: 0, 1: 1, 2: 2}, "qv": {0: 0, 2: 1}, "none": {}}[c.qkv_bias]
    q, k, v = (
        tape.einsum("td,dk->tk", z, w["qkv"]["kernel"][i]) + (w["qkv"]["bias"][place[i]] if i in place else 0.0) for i in range(3)
    )
    heads = []
    for n in range(c.num_heads):
        one = (slice(None), slice(n * h, (n + 1) * h))
        turn = (lambda a: rotary(a, c)) if c.position == "rope" else (lambda a: a)
        logits = tape.einsum("th,sh->ts", turn(q[one]), turn(k[one]))
        if relative is not None:
            token = c.pool == "token"
            last = relative.shape[0] - 1
            far = [[last if token and 0 in (i, j) else j - i + c.grid[0] * c.grid[1] - 1 for j in range(t)] for i in range(t)]
            logits = logits + tape.einsum("th,tsh->ts", q[one], relative[one][np.array(far)])
        heads.append(tape.einsum("ts,sh->th", (logits / np.sqrt(h)).softmax(), v[one]))
    return tape.einsum("tk,kd->td", tape.concatenate(heads, 1), w["out"]["kernel"]) + w["out"]["bias"]


def mlp(x, w, norm_name="norm2"):
    z = tape.einsum("td,df->tf", norm(x, w[norm_name]), w["mlp_in"]["kernel"]) + w["mlp_in"]["bias"]
    return tape.einsum("tf,fd->td", z.gelu(), w["mlp_out"]["kernel"]) + w["mlp_out"]["bias"]


def gated(x, w, c):
    z = norm(x, w["norm2"])
    a, b = (tape.einsum("td,df->tf", z, w["mlp_gated"]["kernel"][i]) + w["mlp_gated"]["bias"][i] for i in range(2))
    h = a * b / ((a * -1.0).exp() + 1.0) if c.gelu == "silu" else a.gelu() * b
    return tape.einsum("tf,fd->td", h, w["mlp_out"]["kernel"]) + w["mlp_out"]["bias"]


def block(x, w, c):
    if c.block != "axial":
        scales = (w["scale1"], w["scale2"]) if "layerscale" in c.block else (1.0, 1.0)
        x = x + attention(x, w, c, w.get("relative")) * scales[0]
        return x + (gated(x, w, c) if "gated" in c.block else mlp(x, w)) * scales[1]
    rows, columns = c.grid
    places = np.arange(rows * columns).reshape(rows, columns)
    for axis, lines in (("row", places), ("column", places.T)):
        done = [x[line] + attention(x[line], w[axis], c) for line in lines]
        back = np.argsort(np.concatenate(list(lines)))
        x = tape.concatenate(done, 0)[back]
        x = x + mlp(x, w[axis])
    return x


def pooled(x, p, c):
    if c.registers:
        first = int(c.pool == "token")
        x = tape.concatenate([x[:first], x[first + c.registers :]], 0)
    z = norm(x, p["norm"])
    if c.pool == "gap":
        return z.mean(0).reshape(1, c.width)
    if c.pool in ("token", "first"):
        return z[:1]
    if c.pool == "none":
        return z
    w, h = p["map"], c.width // c.num_heads
    probe = w["probe"].reshape(1, c.width)
    q, k, v = (tape.einsum("td,dk->tk", a, w["qkv"]["kernel"][i]) + w["qkv"]["bias"][i] for i, a in enumerate((probe, z, z)))
    heads = []
    for n in range(c.num_heads):
        one = (slice(None), slice(n * h, (n + 1) * h))
        heads.append(tape.einsum("ts,sh->th", (tape.einsum("th,sh->ts", q[one], k[one]) / np.sqrt(h)).softmax(), v[one]))
    a = tape.einsum("tk,kd->td", tape.concatenate(heads, 1), w["out"]["kernel"]) + w["out"]["bias"]
    return a + mlp(a, w, "norm")


def vit(p, images, c):
    """Logits of every image of the tree of Numbers p."""
    embed, (kind, _, where), logits = p["patch_embed"], c.position.partition("-"), []
    for image in images:
        if c.stem is not None and c.stem != "clip":
            maps = network(p["stem"], image[None], "post", c.stem.depths)
            patches = maps.reshape(-1, c.stem.channels)
        else:
            s = c.patch_size
            cut = [
                image[y : y + s, x : x + s].reshape(-1) for y in range(0, image.shape[0], s) for x in range(0, image.shape[1], s)
            ]
            patches = Number(np.stack(cut))
        x = tape.einsum("nd,dk->nk", patches, embed["kernel"].reshape(-1, c.width))
        x = x if c.stem == "clip" else x + embed["bias"]
        if c.pool == "token":
            x = tape.concatenate([embed["cls"].reshape(1, c.width), x], 0)
        if kind not in ("none", "relative", "rope") and not where:
            x = x + table(c, kind, embed)
        if c.registers:  # behind the class token, where others have them
            first = int(c.pool == "token")
            x = tape.concatenate([x[:first], embed["registers"], x[first:]], 0)
        x = norm(x, p["norm_pre"]) if c.stem == "clip" else x
        for layer in range(c.depth):
            w = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"], is_leaf=is_number)
            if where:
                added, first = table(c, kind, w if where == "layers" else embed), int(c.pool == "token")
                none = Number(np.zeros((c.registers, c.width)))
                x = x + (tape.concatenate([added[:first], none, added[first:]], 0) if c.registers else added)
            x = block(x, w, c)
        y = tape.einsum("td,dv->tv", pooled(x, p, c), p["head"]["kernel"]) + p["head"]["bias"]
        logits.append(y.reshape(1, *y.shape) if c.pool == "none" else y)
    return tape.concatenate(logits, 0)


# --- ours against it -----------------------------------------------------------------------------------------------------------


def noisy(config, seed=0):
    """Parameters with nothing left at zero or one."""
    leaves, tree = jax.tree.flatten(vitcore.init(jax.random.key(seed), config))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [a + 0.1 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)])


CASES = [  # every stem, block and pool, and every kind of position and place of it, in as few as hold them
    {"position": "1d-shared", "pool": "none"},
    {"position": "2d-layers", "pool": "gap"},
    {"position": "relative"},
    {"position": "sincos2d"},
    {"registers": 2, "pool": "map", "position": "1d-layers"},
    {"stem": "clip", "registers": 3},
    {"block": "axial", "pool": "map", "position": "2d-layers"},
    {"position": "rope", "block": "layerscale-gated", "gelu": "silu", "qkv_bias": "qv", "registers": 2},
    {"stem": ResNetStem(depths=(1,), width_factor=0.5), "patch_size": 1, "image_size": 12, "channels": 3},
]
MORE_CASES = [
    {"position": "none", "pool": "gap"},
    {"position": "1d-layers"},
    {"position": "2d"},
    {"position": "2d-shared", "pool": "first"},
    {"position": "relative", "pool": "gap"},
    {"pool": "map"},
    {"block": "axial", "pool": "gap"},
    {"position": "rope", "pool": "gap", "block": "layerscale"},
    {"block": "gated", "qkv_bias": "none"},
]


def called(changes):
    return "-".join(map(str, changes.values()))[:40]


@pytest.mark.parametrize("changes", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=called)
def test_values_and_every_gradient_agree_with_numpy(changes):
    config = vitcore.ViTConfig(**{**SMALL, **changes})
    params = noisy(config)
    images = np.random.default_rng(1).uniform(-1, 1, (2, *config.image_shape, config.channels))
    numbers = jax.tree.map(Number, params)
    want = vit(numbers, images, config)
    weights = np.random.default_rng(2).standard_normal(want.shape)
    wanted = tape.gradients((want * weights).sum(), jax.tree.leaves(numbers, is_leaf=is_number))

    def ours(p, x):
        logits = vitcore.apply(p, x, config, ops=vitcore.REFERENCE)
        return (logits * weights).sum(), logits

    got = vitcore.apply(params, jnp.asarray(images, jnp.float32), config, ops=vitcore.REFERENCE)
    assert np.abs(np.asarray(got, np.float64) - want.value).max() <= 1e-5 * np.abs(want.value).max()
    (_, got), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(params, jnp.asarray(images, jnp.float32))
    for (path, g), w in zip(jax.tree.leaves_with_path(gradients), wanted, strict=True):
        if jax.tree_util.keystr(path[-2:]) != "['qkv']['bias']":  # a key's bias changes no softmax: its gradient is rounding alone
            assert np.abs(w).max() > 0, path
        assert np.abs(np.asarray(g, np.float64) - w).max() <= 1e-5 * max(np.abs(w).max(), 1e-2 * np.abs(weights).max()), path


def test_attention_maps_hold_the_relative_logits():
    """The maps of a model with relative positions, pushed through by hand, give its own next tokens: here, rows that sum to one and
    change with the table."""
    config = vitcore.ViTConfig(**SMALL, position="relative")
    params, images = noisy(config), jax.random.uniform(jax.random.key(1), (2, 16, 24, 2))
    maps = vitcore.attention_maps(params, images, config)
    numbers = jax.tree.map(lambda a: Number(np.asarray(a)[0]), params["blocks"])
    x = tape.einsum("nd,dk->nk", _patches(images[0]), Number(params["patch_embed"]["kernel"]).reshape(-1, 16))
    x = tape.concatenate([Number(params["patch_embed"]["cls"]).reshape(1, 16), x + Number(params["patch_embed"]["bias"])], 0)
    z = norm(x, numbers["norm1"])
    q, k = (tape.einsum("td,dk->tk", z, numbers["qkv"]["kernel"][i]) + numbers["qkv"]["bias"][i] for i in range(2))
    relative, n = numbers["relative"], 6
    for head in range(2):
        one = (slice(None), slice(head * 8, head * 8 + 8))
        far = np.array([[11 if 0 in (i, j) else j - i + n - 1 for j in range(7)] for i in range(7)])
        logits = tape.einsum("th,sh->ts", q[one], k[one]) + tape.einsum("th,tsh->ts", q[one], relative[one][far])
        np.testing.assert_allclose(maps[0, 0, head], (logits / np.sqrt(8)).softmax().value, atol=1e-5)


def _patches(image):
    image = np.asarray(image, np.float64)
    return Number(np.stack([image[y : y + 8, x : x + 8].reshape(-1) for y in (0, 8) for x in (0, 8, 16)]))


def test_sincos2d_is_the_authors_table():
    """Of 2 x 3 places, D = 8, temperature 10,000, as their code prints it: [sin x, sin x/1e4, cos x, cos x/1e4, sin y, ...]."""
    got = sincos2d(2, 3, 8)
    assert got.shape == (6, 8)
    np.testing.assert_allclose(got[0], [0, 0, 1, 1, 0, 0, 1, 1])
    np.testing.assert_allclose(
        got[5], [np.sin(2), np.sin(2e-4), np.cos(2), np.cos(2e-4), np.sin(1), np.sin(1e-4), np.cos(1), np.cos(1e-4)], rtol=1e-6
    )


MESHES = [
    ({"position": "relative"}, (2, 2)),
    pytest.param({"position": "2d-layers", "pool": "map"}, (2, 2), marks=pytest.mark.slow),
    pytest.param({"block": "axial", "pool": "gap", "dropout": 0.3}, (2, 2), marks=pytest.mark.slow),
    ({"registers": 3, "stem": "clip", "dropout": 0.3, "head_bias": None}, (2, 2)),
    pytest.param(
        {"registers": 3, "position": "rope", "block": "layerscale-gated", "qkv_bias": "qv", "gelu": "silu", "dropout": 0.3},
        (2, 2),
        marks=(pytest.mark.slow, pytest.mark.ci),
    ),
    pytest.param(
        {"stem": ResNetStem(depths=(2,), width_factor=0.5), "patch_size": 1, "image_size": 12, "channels": 3},
        (2, 2),
        marks=pytest.mark.slow,  # test_resnet.py has the post-activation form on a mesh
    ),
]
NAMES_OF_MESHES = ["relative", "2d-map", "axial", "registers-clip", "rotary-gated", "hybrid"]


@pytest.mark.parametrize(("changes", "shape"), MESHES, ids=NAMES_OF_MESHES)
def test_a_mesh_changes_no_number(changes, shape):
    """Logits and gradients on a mesh are those of one device, dropout included."""
    config = vitcore.ViTConfig(**{**SMALL, **changes})
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = noisy(config)
    images = jax.random.uniform(jax.random.key(2), (4, *config.image_shape, config.channels), minval=-1)
    key = jax.random.key(5) if config.dropout else None

    def loss(p, run):
        return jnp.square(run(p)).mean()

    specs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), vitcore.partition_specs(config, mesh))
    on = vitcore.apply_on(mesh, config, ops=vitcore.REFERENCE)
    got = jax.jit(jax.value_and_grad(lambda p: loss(p, lambda p: on(p, images, *(() if key is None else (key,))))))(
        jax.device_put(params, specs)
    )
    want = jax.jit(
        jax.value_and_grad(lambda p: loss(p, lambda p: vitcore.apply(p, images, config, ops=vitcore.REFERENCE, dropout_key=key)))
    )(params)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * max(float(np.abs(b).max()), 1e-4), path


COUNTS = {
    "R50+ViT-B/16": 98_659_112, "R50+L/32": 328_994_856, "R26+S/32": 36_431_912, "R26+ViT-B/32": 101_383_976, "R+Ti/16": 6_337_704,
    "Axial-ViT-B/32": 173_277_160, "Axial-ViT-B/16": 171_620_584, "AxialResNet-50": 19_373_640,
    "ViT-mu/16": 76_712, "R50x1": 25_549_352,
    # DINO's, without the mask token of their training: 4,096 for the 7B
    "DINOv2-S/14": 22_056_192, "DINOv2-B/14": 86_579_712, "DINOv2-L/14": 304_367_616, "DINOv2-g/14": 1_136_479_232,
    "DINOv3-S/16": 21_596_160, "DINOv3-S+/16": 28_692_480, "DINOv3-B/16": 85_659_648, "DINOv3-L/16": 303_128_576,
    "DINOv3-H+/16": 840_591_360, "DINOv3-7B/16": 6_716_030_976,
}  # fmt: skip
WITH_HIDDEN = {"R50+ViT-B/32": 124_833_203, "R50+ViT-B/16": 112_546_483, "R50+ViT-L/32": 347_767_731, "R50+ViT-L/16": 335_256_499}


@pytest.mark.parametrize("name", COUNTS)
def test_named_models_have_as_many_parameters_as_published(name):
    assert sum(leaf.size for leaf in families.leaves(vitcore.variant(name))) == COUNTS[name]


@pytest.mark.parametrize("name", WITH_HIDDEN)
def test_hybrids_of_table_6_have_as_many_parameters_as_published(name):
    config = vitcore.variant(name, num_classes=18_291, representation_size=vitcore.variant(name).width)
    assert sum(leaf.size for leaf in families.leaves(config)) == WITH_HIDDEN[name]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("R50x1", {"image_size": 16}, "divides it by 32, at least that many pixels"),
        ("R50+ViT-B/16", {"image_size": 8}, "divides it by 16, at least that many pixels"),
        ("R+Ti/16", {"image_size": 100}, "a map of 25 x 25, which is not divisible by patch_size=8: use a multiple of 32"),
        ("R50x1.3", {}, "83.2 channels: a multiple of the 32 groups"),
        ("R51x1", {}, "unknown model 'R51x1': did you mean R50x1"),
        ("R50+ViT-B/8", {}, "unknown model"),
        ("Axial-ViT-B/16", {"pool": "token"}, "a class token stands in no row: use pool='gap'"),
        ("Axial-ViT-B/16", {"registers": 4}, "a register stands in no row: use registers=0"),
        ("ViT-B/16", {"position": "relative", "registers": 4}, "a register is at no distance; use '1d' or '2d'"),
        ("ViT-B/16", {"registers": -1}, "a positive integer, or 0 for a model without registers, is required"),
        ("Axial-ViT-B/16", {"position": "relative"}, "use '1d' or '2d'"),
        ("ViT-B/16", {"position": "3d"}, "'1d', '1d-patches', '1d-layers'"),
        ("Axial-ViT-B/16", {"position": "rope"}, "use '1d' or '2d'"),
        ("ViT-B/16", {"position": "rope", "num_heads": 128}, "heads of 768 / 128 = 6 columns: a multiple of 4"),
        ("ViT-B/16", {"qkv_bias": "kv"}, "qkv_bias='kv': 'qkv', 'qv' or 'none' is required"),
        ("DINOv3-XL/16", {}, "unknown model 'DINOv3-XL/16': did you mean DINOv3-"),
        ("ViT-B/16", {"position": "sincos2d", "width": 18, "num_heads": 2}, "a multiple of 4 is required"),
    ],
)
def test_what_makes_no_model_is_refused_in_one_line(name, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        vitcore.variant(name, **changes)
    assert "\n" not in str(caught.value)


def test_configurations_survive_json():
    import dataclasses
    import json

    for name in ("DINOv3-7B/16", "R50+ViT-B/16", "R50x2", "AxialResNet-50", "Axial-ViT-B/16"):
        config = vitcore.variant(name)
        assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
