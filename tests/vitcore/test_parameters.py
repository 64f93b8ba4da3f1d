"""One list of leaves describes a model: everything that knows parameters reads it, and one more leaf is one more record."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import vitcore
from vitcore import blocks, families, parameters, positions, stems
from vitcore.collectives import MeshShape
from vitcore.config import NAMES
from vitcore.flops import multiply_adds
from vitcore.parameters import COLUMNS, Leaf, Name, Split
from vitcore.sharding import partition_specs
from vitcore.weight_names import Style, entries, written

STYLES = (Style(), Style(numbering=0, stacked=True), Style(naming="timm"), Style(naming="transformers", prefix="vit."))
CHANGES = ({}, {"pool": "gap", "representation_size": 24, "image_size": (224, 448)})


def nameless(name: str, style: Style) -> bool:
    """Whether nobody publishes such a model in this naming: axial ones at all, hybrids as transformers names things, DINO's as the
    paper's release does. Writing such a file is refused (tests/vitcore/test_weights_resnets.py, test_dino.py)."""
    if name.startswith("DINO"):
        return style.naming == "release"
    return name.startswith("Axial") or ("+" in name and style.naming == "transformers")


@pytest.mark.parametrize("changes", CHANGES, ids=["token", "gap"])
@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_of_every_named_model_appears_everywhere(name, changes):
    """In init, in the specs of a mesh (axes that divide), in the check, in the counts, and whole in a file of every naming."""
    config = vitcore.variant(name, **changes)
    leaves = families.leaves(config)
    assert len({leaf.path for leaf in leaves}) == len(leaves)
    tree = jax.eval_shape(lambda: vitcore.init(jax.random.key(0), config))
    assert {path: (a.shape, a.dtype) for path, a in parameters.flat(tree).items()} == {
        leaf.path: (leaf.shape, jnp.float32) for leaf in leaves
    }
    specs = parameters.flat(partition_specs(config, MeshShape(2, 1)))
    assert specs.keys() == {leaf.path for leaf in leaves}
    for leaf in leaves:
        for n, axes in zip(leaf.shape, specs[leaf.path], strict=False):
            assert n % (2 if axes and "data" in axes else 1) == 0
    parameters.check(tree, leaves)
    assert parameters.count(leaves) == sum(math.prod(a.shape) for a in jax.tree.leaves(tree))
    assert sum(multiply_adds(config).values()) == sum(n for leaf in leaves for n in leaf.multiply_adds.values()) > 0
    dino = (STYLES[0], *(written(config, naming) for naming in ("timm", "transformers")))
    for style in dino if name.startswith("DINO") else STYLES:
        held: dict = {}
        for entry in entries(config, style):
            held[entry.path] = held.get(entry.path, 0) + math.prod(entry.shape)
        whole = {leaf.path: leaf.size for leaf in leaves}
        if nameless(name, style):
            assert held.items() < whole.items(), style
        else:
            assert held == whole, style


# Means of the absolute values of the leaves of two small models, drawn from key 3 before there was a list of leaves.
BEFORE = {
    "token": {
        "blocks/mlp_in/bias": 7.4424207e-07,
        "blocks/mlp_in/kernel": 0.088677377,
        "blocks/mlp_out/bias": 7.9006713e-07,
        "blocks/mlp_out/kernel": 0.088971533,
        "blocks/norm1/bias": 0.0,
        "blocks/norm1/scale": 1.0,
        "blocks/norm2/bias": 0.0,
        "blocks/norm2/scale": 1.0,
        "blocks/out/bias": 0.0,
        "blocks/out/kernel": 0.10850707,
        "blocks/qkv/bias": 0.0,
        "blocks/qkv/kernel": 0.10808758,
        "head/bias": 0.0,
        "head/kernel": 0.0,
        "norm/bias": 0.0,
        "norm/scale": 1.0,
        "patch_embed/bias": 0.0,
        "patch_embed/cls": 0.0,
        "patch_embed/kernel": 0.4342531,
        "patch_embed/position": 0.015661621,
    },
    "gap": {
        "blocks/mlp_in/bias": 7.4424207e-07,
        "blocks/mlp_in/kernel": 0.088677377,
        "blocks/mlp_out/bias": 7.9006713e-07,
        "blocks/mlp_out/kernel": 0.088971533,
        "blocks/norm1/bias": 0.0,
        "blocks/norm1/scale": 1.0,
        "blocks/norm2/bias": 0.0,
        "blocks/norm2/scale": 1.0,
        "blocks/out/bias": 0.0,
        "blocks/out/kernel": 0.10850707,
        "blocks/qkv/bias": 0.0,
        "blocks/qkv/kernel": 0.10808758,
        "head/bias": 10.0,
        "head/kernel": 0.0,
        "norm/bias": 0.0,
        "norm/scale": 1.0,
        "patch_embed/bias": 0.0,
        "patch_embed/kernel": 0.12242214,
        "patch_embed/position": 0.01544864,
        "pre_logits/bias": 0.0,
        "pre_logits/kernel": 0.10759255,
    },
}


def small(which: str):
    if which == "token":
        return vitcore.variant("ViT-Nano/2", image_size=8, channels=1, num_classes=10)
    return vitcore.variant(
        "ViT-Nano/4", image_size=(8, 16), num_classes=7, pool="gap", representation_size=24, head_bias=-10.0
    )  # fmt: skip


@pytest.mark.parametrize("which", ["token", "gap"])
def test_initial_values_are_those_that_a_key_has_always_given(which):
    found = parameters.flat(vitcore.init(jax.random.key(3), small(which)))
    assert {"/".join(path): float(np.abs(a).mean()) for path, a in found.items()} == pytest.approx(BEFORE[which], rel=1e-5)


# --- one more leaf -----------------------------------------------------------------------------------------------------------


def _scaled(x, w, config, layer):
    return x + w["scale"] * (blocks.BLOCKS["encoder"].apply(x, w, config, layer) - x)


SCALED = blocks.Block(
    leaves=lambda config: (
        *blocks.BLOCKS["encoder"].leaves(config),
        Leaf(
            path=("scale",),
            shape=(config.width,),
            initial=parameters.constant(0.1),
            split=(parameters.ROWS,),
            names={"release": (Name("{block}/scale"),)},
            multiply_adds={"scale": config.width},
        ),
    ),
    apply=_scaled,
)


@pytest.fixture
def scaled(monkeypatch):
    monkeypatch.setitem(blocks.BLOCKS, "scaled", SCALED)
    return dataclasses.replace(small("token"), block="scaled")


def test_a_leaf_is_added_in_one_place(scaled, tmp_path):
    """A leaf more in a copy of the block's list appears in init, specs, check, counts, FLOPs, and files written and read."""
    plain, path = small("token"), ("blocks", "scale")
    params = vitcore.init(jax.random.key(3), scaled)
    np.testing.assert_array_equal(params["blocks"]["scale"], np.full((4, 64), 0.1, np.float32))
    others = parameters.flat(params)
    others.pop(path)
    for name, leaf in parameters.flat(vitcore.init(jax.random.key(3), plain)).items():
        np.testing.assert_array_equal(leaf, others[name])  # and changes no other leaf's numbers
    assert partition_specs(scaled, MeshShape(2, 2))["blocks"]["scale"] == P(None, "data")
    images = jnp.zeros((1, 8, 8, 1))
    with pytest.raises(ValueError, match=r"params\['blocks'\]\['scale'\] is \(4, 64\), the config requires no such entry"):
        vitcore.apply(params, images, plain)
    assert vitcore.apply(params, images, scaled).shape == (1, 10)
    assert parameters.count(families.leaves(scaled)) == parameters.count(families.leaves(plain)) + 4 * 64
    assert multiply_adds(scaled) == {**multiply_adds(plain), "scale": 4 * 64}
    params["blocks"]["scale"] = params["blocks"]["scale"] + jnp.arange(4.0)[:, None]
    vitcore.save(tmp_path / "scaled.npz", params, scaled)
    assert "Transformer/encoderblock_3/scale" in np.load(tmp_path / "scaled.npz")
    loaded = vitcore.load(tmp_path / "scaled.npz", scaled)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(ValueError, match=r"extra Transformer/encoderblock_\{0-3\}/scale"):
        vitcore.load(tmp_path / "scaled.npz", plain)


@pytest.mark.parametrize("width", [64, 62], ids=["split", "whole"])
def test_a_leaf_outside_the_sums_is_the_same_on_a_mesh(monkeypatch, width):
    """Split over "data" or whole (62 columns do not divide over 4), in value and gradient. A block that does not say so is told."""
    monkeypatch.setitem(blocks.BLOCKS, "scaled", SCALED._replace(outside=(("scale",),)))
    monkeypatch.setitem(blocks.BLOCKS, "silent", SCALED)
    config = dataclasses.replace(small("token"), block="scaled", width=width, depth=2, num_heads=2)
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    params = vitcore.init(jax.random.key(3), config)
    params["head"]["kernel"] += 0.1 * jax.random.normal(jax.random.key(4), params["head"]["kernel"].shape)
    images = jax.random.uniform(jax.random.key(5), (8, 8, 8, 1), minval=-1)

    def both(run):
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(run(p, images)).sum()))(params)

    want, found = both(lambda p, x: vitcore.apply(p, x, config)), both(vitcore.apply_on(mesh, config))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-6)
    if width == 62:
        with pytest.raises(ValueError, match=r"block='silent' returns tokens that differ along the model axis: .* `Block.outside`"):
            vitcore.apply_on(mesh, dataclasses.replace(config, block="silent"))(params, images)


def _table(rows: int, *rest: int):
    return positions.Position(leaves=lambda config: (), table=lambda p, config: jnp.zeros((rows, *rest)))


def _stem(change):
    patches = stems.STEMS["patches"]
    return patches._replace(embed=None, project=lambda *given: change(patches.project(*given)))


def _block(change):
    return blocks.BLOCKS["encoder"]._replace(apply=lambda x, w, config, layer: change(x))


TWICE = Leaf(path=("qkv", "kernel"), shape=(2,), initial=parameters.zeros)
WRONG = {
    "a row for each patch alone": (
        "position",
        _table(16, 64),
        r"adds \[16, 64\]: \[class token and patches, width\] = \[17, 64\] is",
    ),
    "a vector": ("position", _table(64), r"adds \[64\]: \[class token and patches, width\] = \[17, 64\] is required"),
    "a vector at each block": (
        "position",
        positions.Position(leaves=lambda c: (), table=lambda p, c: None, at_block=lambda p, w, c: jnp.zeros(64)),
        r"adds \[64\]: \[class token and patches, width\] = \[17, 64\] is required",
    ),
    "patches as they lie": (
        "stem",
        _stem(lambda x: x.reshape(1, 4, 4, 64)),
        r"returns \[1, 4, 4, 64\]: \[images, patches, width\] = \[1, 16, 64\] is",
    ),
    "fewer tokens": ("block", _block(lambda x: x[:, 1:]), r"returns float32\[1, 16, 64\] for float32\[1, 17, 64\]: it must keep"),
    "another dtype": ("block", _block(lambda x: x.astype(jnp.bfloat16)), r"returns bfloat16\[1, 17, 64\] for float32\[1, 17, 64\]"),
    "a name twice": (
        "block",
        blocks.BLOCKS["encoder"]._replace(leaves=lambda config: (*blocks.BLOCKS["encoder"].leaves(config), TWICE)),
        r"two leaves of this model have the path blocks/qkv/kernel",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_new_entry_that_does_not_fit_is_told_by_its_name(what, monkeypatch):
    table, entry, words = WRONG[what]
    name = what.replace(" ", "-")  # the lists of leaves are remembered by configuration
    monkeypatch.setitem({"position": positions.POSITIONS, "stem": stems.STEMS, "block": blocks.BLOCKS}[table], name, entry)
    config = dataclasses.replace(small("token"), **{table: name})
    with pytest.raises(ValueError, match=words) as caught:
        vitcore.apply(vitcore.init(jax.random.key(0), config), jnp.zeros((1, 8, 8, 1)), config)
    assert "\n" not in str(caught.value)
    assert "twice" in what or f"{table}='{name}'" in str(caught.value)


def test_a_leaf_that_one_layout_has_no_name_for_is_saved_in_the_other(monkeypatch, tmp_path):
    own = Leaf(path=("own",), shape=(64,), initial=parameters.ones, names={"timm": (Name("{block}.own"),)})
    entry = blocks.BLOCKS["encoder"]
    monkeypatch.setitem(blocks.BLOCKS, "own", entry._replace(leaves=lambda config: (*entry.leaves(config), own)))
    config = dataclasses.replace(small("token"), block="own")
    params = vitcore.init(jax.random.key(0), config)
    with pytest.raises(ValueError, match=r"release naming have no name for .* blocks/own: timm's \.safetensors has them"):
        vitcore.save(tmp_path / "x.npz", params, config)
    vitcore.save(tmp_path / "x.safetensors", params, config)
    again, same = vitcore.load(tmp_path / "x.safetensors")
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_block_without_maps_says_so(scaled):
    params = vitcore.init(jax.random.key(3), scaled)
    with pytest.raises(ValueError, match=r"block='scaled' has no attention maps: ask for the features"):
        vitcore.attention_maps(params, jnp.zeros((1, 8, 8, 1)), scaled)


def test_what_a_model_axis_must_divide_is_said_by_its_name():
    leaf = Leaf(path=("w",), shape=(12, 4), initial=parameters.zeros, split=(Split(model=("channels", 12), data=True), None))
    assert parameters.specs((leaf,), MeshShape(2, 3)) == {"w": P(("model", "data"), None)}
    assert parameters.specs((leaf,), MeshShape(5, 3)) == {"w": P("model", None)}
    with pytest.raises(ValueError, match=r"channels=12 is not divisible by the model axis of the 2x5 mesh: use .* divides 12"):
        parameters.specs((leaf,), MeshShape(2, 5))


def test_a_data_axis_of_two_names_splits_rows_over_what_divides_them_and_columns_over_the_rest():
    leaf = Leaf(path=("w",), shape=(12, 6), initial=parameters.zeros, split=(Split(model=("channels", 12), data=True), COLUMNS))

    def spec(model, *parts):
        shape = MeshShape(math.prod(parts), model, over_data=("data", "rest"), parts=parts)
        return parameters.specs((leaf,), shape)["w"], parameters.whole_over_data((leaf,), shape)

    assert spec(3, 2, 4) == (P(("model", "rest"), "data"), (0, ()))  # 4 rows are left of a third
    assert spec(3, 2, 2) == (P(("model", "rest", "data"), None), (0, ()))
    assert spec(1, 4, 5) == (P(("model", "data"), None), (18 * 4 // 5, (12,)))  # of a quarter four fifths are not its own
    assert spec(1, 5, 1) == (P("model", None), (72 * 4 // 5, (12,)))


def test_unknown_entries_are_refused_with_those_that_there_are():
    for field in ("stem", "position", "block", "pool"):
        with pytest.raises(ValueError, match=rf"{field}='none of these': .*is required"):
            vitcore.variant("ViT-Nano/2", image_size=8, **{field: "none of these"})


def test_a_config_json_without_the_newer_fields_is_a_plain_vit():
    """As runs wrote it before a stem, a position embedding and a block could be chosen."""
    fields: dict = dataclasses.asdict(small("gap")) | {"image_size": [8, 16]}
    assert {fields.pop(name) for name in ("stem", "position", "block")} == {None, "1d", "encoder"}
    assert vitcore.ViTConfig(**fields) == small("gap")


def test_a_model_without_a_head_gives_what_a_head_would_read():
    config = dataclasses.replace(small("gap"), num_classes=0)
    params = vitcore.init(jax.random.key(0), config)
    assert "head" not in params
    found = vitcore.apply(params, jnp.zeros((2, 8, 16, 3)), config)
    assert (found.shape, found.dtype) == ((2, 24), jnp.float32)
