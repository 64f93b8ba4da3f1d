# pyright: reportMissingImports=false
"""Our logits beside those of transformers and timm with the same random weights, which travel through files of weights.

Marker `peers`: wants torch (any build; the CPU's will do), transformers and timm. timm imports torchvision, of which the models
compared here use nothing, and which fits one build of torch only: where it does not import, an empty stand-in takes its place.
"""

import functools
import importlib.abc
import importlib.util
import json
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcore
from vitcore import weights
from vitcore.weight_names import Style, entries, shapes

pytestmark = pytest.mark.peers

SMALL = dict(patch_size=16, width=96, depth=3, mlp_dim=160, num_heads=4)
MODELS = {"small": SMALL, "ViT-B/16": None, "ViT-L/32": None}
TOLERANCE = 1e-4  # of the largest logit
CLASSES = 11


def config_of(name, size, **more):
    """With exact GELU, as both compute."""
    changes: dict[str, Any] = dict(image_size=size, num_classes=CLASSES, gelu="erf") | more
    return vitcore.ViTConfig(**SMALL, **changes) if name == "small" else vitcore.variant(name, **changes)


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_grad_enabled(False)
    return torch


class _Class(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Anything(types.ModuleType):
    """A module in which every name is a class that does nothing."""

    __path__: Any = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Class(name, (), {"__init__": lambda self, *args, **options: None})


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def timm(torch):
    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]

    finder = _NoTorchvision()
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    except Exception:  # not there, or not for this torch: it then fails in many ways
        forget()
        sys.meta_path.insert(0, finder)
    try:
        return pytest.importorskip("timm.models.vision_transformer")
    finally:
        if finder in sys.meta_path:  # transformers would take it for the real one
            sys.meta_path.remove(finder)
            forget()


def random_params(config):
    """As `init`, with everything that starts at zero or one moved from there, so that nothing is compared in vain."""
    params = jax.jit(lambda: vitcore.init(jax.random.key(0), config))()
    rng = np.random.default_rng(1)

    def moved(leaf):
        return np.asarray(leaf) + 0.02 * rng.standard_normal(leaf.shape, np.float32)

    return jax.tree.map(moved, params)


def images_of(config, count=2):
    shape = (count, *config.image_shape, 3)
    contrast = np.linspace(1, 0.1, count).reshape(-1, 1, 1, 1)  # or noise is much like other noise
    return (contrast * np.random.default_rng(2).uniform(-1, 1, shape)).astype(np.float32)


def agree(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0.1
    assert theirs.std(0).max() > 0.01, "the images make a difference"
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def transformers_config(config, **more):
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim, image_size=config.image_shape[0], patch_size=config.patch_size,
        layer_norm_eps=1e-6, hidden_act="gelu", **({"num_labels": config.num_classes} | more),
    )  # fmt: skip


def timm_model(timm, config, **more):
    return timm.VisionTransformer(
        img_size=config.image_shape, patch_size=config.patch_size, embed_dim=config.width, depth=config.depth,
        num_heads=config.num_heads, mlp_ratio=config.mlp_dim / config.width, num_classes=config.num_classes, **more,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("small", 224),
        ("small", 384),
        ("ViT-B/16", 224),
        pytest.param("ViT-L/32", 384, marks=pytest.mark.slow),
        pytest.param("ViT-B/16", 384, marks=pytest.mark.slow),
        pytest.param("ViT-L/32", 224, marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_transformers_and_timm(tmp_path, torch, timm, name, size):
    """The same random weights under each library's names: through files at 224 pixels, in memory at 384."""
    from safetensors.torch import load_file
    from transformers import ViTForImageClassification

    def state(**style):
        leaves = {path: functools.reduce(dict.__getitem__, path, params) for path in shapes(config)}
        named = {e.name: e.to_file(leaves[e.path]) for e in entries(config, Style(**style))}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in named.items()}

    config = config_of(name, size)
    params = random_params(config)
    images = images_of(config)
    channels_first = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    ours = jax.jit(lambda p, x: vitcore.apply(p, x, config))(params, images)

    if size == 224:
        vitcore.save(tmp_path / "model.safetensors", params, config, naming="transformers")
        (tmp_path / "config.json").write_text(json.dumps(transformers_config(config).to_dict()))
        loaded: Any = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        model, report = loaded
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        (tmp_path / "model.safetensors").unlink()
    else:
        with torch.device("meta"):  # no initial values, which take longer than all the rest
            model = ViTForImageClassification(transformers_config(config))
        model.load_state_dict(state(naming="transformers", prefix="vit.", modules=True), strict=True, assign=True)
    agree(ours, model.eval()(channels_first).logits)
    del model

    with torch.device("meta"):
        model = timm_model(timm, config)
    if size == 224:
        vitcore.save(tmp_path / "timm.safetensors", params, config)
        model.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True, assign=True)
        (tmp_path / "timm.safetensors").unlink()
    else:
        model.load_state_dict(state(naming="timm"), strict=True, assign=True)
    agree(ours, model(channels_first))


def test_weights_that_transformers_and_timm_make_and_write(tmp_path, torch, timm):
    from safetensors.torch import save_file
    from transformers import ViTForImageClassification

    config = config_of("small", 224)
    images = images_of(config)
    channels_first = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    torch.manual_seed(0)
    model = ViTForImageClassification(transformers_config(config, initializer_range=0.1)).eval()
    model.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "modules.safetensors")  # the names in memory
    for file in ("model", "modules"):
        params = vitcore.load(tmp_path / f"{file}.safetensors", config)
        agree(vitcore.apply(params, jnp.asarray(images), config), model(channels_first).logits)
    assert weights.describe(tmp_path / "model.safetensors", heads=4)[1] == config

    model = timm_model(timm, config)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    params = vitcore.load(tmp_path / "timm.safetensors", config)
    agree(vitcore.apply(params, jnp.asarray(images), config), model(channels_first))


def test_the_hidden_layer_is_the_pooler_of_transformers(tmp_path, torch):
    from safetensors.torch import load_file
    from transformers import ViTModel

    config = config_of("small", 224, representation_size=96)
    params = random_params(config)
    images = images_of(config)
    vitcore.save(tmp_path / "w.safetensors", params, config, naming="transformers")
    state = {k.removeprefix("vit."): v for k, v in load_file(tmp_path / "w.safetensors").items() if "classifier" not in k}
    (tmp_path / "m").mkdir()
    from safetensors.torch import save_file

    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "m" / "config.json").write_text(json.dumps(transformers_config(config).to_dict()))
    model = ViTModel.from_pretrained(tmp_path / "m").eval()
    pooled = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).pooler_output.numpy()
    logits = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    agree(vitcore.apply(params, jnp.asarray(images), config), logits)


def test_global_average_pooling_is_timm_s(tmp_path, torch, timm):
    from safetensors.torch import load_file

    config = config_of("small", 224, pool="gap")
    params = random_params(config)
    images = images_of(config)
    vitcore.save(tmp_path / "w.safetensors", params, config)
    model = timm_model(timm, config, class_token=False, global_pool="avg", fc_norm=False)
    model.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    agree(vitcore.apply(params, jnp.asarray(images), config), model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))


def test_half_pixel_positions_are_torch_s_interpolation(torch):
    from vitcore.posemb import fit

    position = np.random.default_rng(0).standard_normal((1 + 6 * 4, 8)).astype(np.float32)
    patches = torch.from_numpy(position[1:].reshape(1, 6, 4, 8).transpose(0, 3, 1, 2).copy())
    for method, corners in (("half-pixel", False), ("corners", True)):
        theirs = torch.nn.functional.interpolate(patches, size=(9, 3), mode="bilinear", align_corners=corners)
        ours = fit(position, grid=(6, 4), to=(9, 3), class_slots=1, method=method)  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(ours[1:], theirs.numpy().transpose(0, 2, 3, 1).reshape(27, 8), atol=1e-5)


# ---- BiT ResNets and hybrids: timm's models by their names, at small images

# timm's name, ours, the side of the image, timm's options
RESNETS = [
    ("resnetv2_50x1_bit", "R50x1", 64, {}),
    ("vit_tiny_r_s16_p8_224", "R+Ti/16", 64, {"img_size": 64}),
    ("vit_small_r26_s32_224", "R26+S/32", 64, {"img_size": 64}),
    pytest.param("vit_base_r50_s16_224", "R50+ViT-B/16", 64, {"img_size": 64}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("theirs", "name", "size", "options"), RESNETS, ids=["bit-50x1", "r+ti", "r26+s", "r50+b"])
def test_resnets_and_hybrids_are_timm_s(tmp_path, torch, timm, theirs, name, size, options):
    """Our file into timm's model, and timm's names out of it again: every array is there, and the logits are the same."""
    from safetensors.torch import load_file, save_file

    config = vitcore.variant(name, image_size=size, num_classes=CLASSES, **({"gelu": "erf"} if "+" in name else {}))
    rng = np.random.default_rng(1)

    def drawn(path, leaf):
        """Near what a model starts from, but that no branch is silent, and kernels that are standardised have a deviation of 1: the
        release divides by std + 1e-5, timm by sqrt(var + 1e-8)."""
        kind, layer = path[-1].key, path[-2].key
        middle = float(kind == "scale" and layer != "gn3")
        deviation = 0.3 if kind == "scale" else 1.0 if kind == "kernel" and path[0].key == "stem" else 0.02
        return (middle + deviation * rng.standard_normal(leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda: vitcore.init(jax.random.key(0), config))
    params = jax.tree_util.tree_map_with_path(drawn, shapes)
    images = images_of(config)
    vitcore.save(tmp_path / "ours.safetensors", params, config)
    model = sys.modules["timm"].create_model(theirs, num_classes=CLASSES, **options).eval()
    model.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    read = vitcore.load(tmp_path / "theirs.safetensors", config)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    agree(jax.jit(lambda p, x: vitcore.apply(p, x, config))(read, images), logits)


FAMILIES = {"small": SMALL, "ViT-S/14": None}


def of_family(name, **more):
    shape = SMALL if name == "small" else {f: getattr(vitcore.variant("ViT-S/14", image_size=56), f) for f in SMALL}
    return vitcore.ViTConfig(
        image_size=4 * shape["patch_size"],
        num_classes=0,
        gelu="erf",
        block="layerscale",
        **shape | {"mlp_dim": 4 * shape["width"]},
        **more,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_dinov2_of_transformers(torch, tmp_path, name):
    from transformers import Dinov2Config, Dinov2Model

    config = of_family(name)
    params = random_params(config)
    model = Dinov2Model(Dinov2Config(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.num_heads,
        mlp_ratio=config.mlp_dim // config.width, image_size=config.image_size, patch_size=config.patch_size,
    ))  # fmt: skip
    model.config.save_pretrained(tmp_path)
    weights.save(tmp_path / "model.safetensors", params, config, naming="transformers")
    loaded: Any = Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)  # it knows the names that files have
    model, lost = loaded
    assert (set(lost["missing_keys"]), set(lost["unexpected_keys"])) == ({"embeddings.mask_token"}, set())
    model.eval()
    images = images_of(config)
    theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).pooler_output
    agree(vitcore.features(params, images, config), theirs)


@pytest.mark.parametrize("position", ["1d", "1d-patches"])
@pytest.mark.parametrize("name", FAMILIES)
def test_dinov2_and_deit3_of_timm(torch, timm, tmp_path, name, position):
    config = of_family(name, position=position)
    params = random_params(config)
    model = timm_model(timm, config, init_values=1e-5, no_embed_class=position == "1d-patches")
    path = tmp_path / "model.safetensors"
    weights.save(path, params, config)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path))
    images = images_of(config)
    agree(vitcore.features(params, images, config), model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))
