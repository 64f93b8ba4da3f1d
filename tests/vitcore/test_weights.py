"""Weights in every layout there is, both ways to the bit; and files that are wrong, broken or hostile, each refused in one line."""

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vitcore
from vitcore import weights
from vitcore.weight_names import Style, entries, shapes

ROOT = Path(__file__).parents[2]
CONFIG = vitcore.ViTConfig(
    image_size=16, patch_size=4, width=24, depth=3, mlp_dim=20, num_heads=2, num_classes=5, representation_size=6, channels=3
)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    tree: dict = {}
    for path, shape in shapes(config).items():
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = rng.standard_normal(shape).astype(np.float32)
    return tree


def bits(tree):
    return jax.tree.map(lambda a: np.asarray(a).tobytes(), tree)


def in_style(config, params, **style):
    """The arrays of a file in one of the release's layouts, {name: array}."""

    def leaf(path):
        found = params
        for key in path:
            found = found[key]
        return found

    out = {}
    for e in entries(config, Style(**style)):
        a = leaf(e.path)
        if e.path[-1] == "position" and style.get("top_position"):
            a = a[int(config.pool == "token") :]
        out[e.name] = e.to_file(a)
    return out


# --- round trips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"pool": "gap"}, {"representation_size": None, "channels": 1}], ids=str)
@pytest.mark.parametrize("naming", ["release", "timm", "transformers"])
def test_every_naming_goes_round_to_the_bit(tmp_path, naming, change):
    config = vitcore.variant("ViT-Nano/4", image_size=16, num_classes=5, **({"representation_size": 6} | change))
    params = random_params(config)
    path = tmp_path / ("w.npz" if naming == "release" else "w.safetensors")
    vitcore.save(path, params, config, naming=naming)
    found = vitcore.load(path, config)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == "float32" for leaf in jax.tree.leaves(found))
    assert bits(found) == bits(params)
    vitcore.save(tmp_path / f"again{path.suffix}", found, config, naming=naming)
    first, again = (weights.describe(p)[2] for p in (path, tmp_path / f"again{path.suffix}"))
    assert [(k, a.shape, a.dtype) for k, a in first.items()] == [(k, a.shape, a.dtype) for k, a in again.items()]
    assert os.stat(path).st_mode & 0o777 == 0o644
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, f"again{path.suffix}"])


RELEASES = [
    {"prefix": prefix, "numbering": numbering, "stacked": stacked, "top_position": top}
    for prefix in ("", "params/", "opt/target/")
    for numbering in (1, 0)
    for stacked in (False, True)
    for top in (False, True)
]


@pytest.mark.parametrize("style", RELEASES, ids=lambda s: "-".join(map(str, s.values())))
def test_every_layout_of_the_release_is_read(tmp_path, style):
    params = random_params(CONFIG)
    arrays = in_style(CONFIG, params, **style)
    if style["prefix"] == "opt/target/":
        arrays["opt/state/step"] = np.int32(7)  # beside the parameters, and none of them
    np.savez(tmp_path / "w.npz", **arrays)
    want = params
    if style["top_position"]:  # no class slot in the file: nothing is added to the class token
        want = jax.tree.map(np.copy, params)
        want["patch_embed"]["position"][0] = 0
    assert bits(vitcore.load(tmp_path / "w.npz", CONFIG)) == bits(want)


def test_the_names_are_the_paper_s():
    """ViT-B/16 as the specification lists it, name by name and shape by shape."""
    config = vitcore.variant("ViT-B/16", representation_size=768, num_classes=21843)
    want = {
        "embedding/kernel": (16, 16, 3, 768), "embedding/bias": (768,), "cls": (1, 1, 768),
        "Transformer/posembed_input/pos_embedding": (1, 197, 768),
        "Transformer/encoder_norm/scale": (768,), "Transformer/encoder_norm/bias": (768,),
        "pre_logits/kernel": (768, 768), "pre_logits/bias": (768,), "head/kernel": (768, 21843), "head/bias": (21843,),
    }  # fmt: skip
    for i in range(12):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            want |= {f"{block}/{norm}/scale": (768,), f"{block}/{norm}/bias": (768,)}
        for name in ("query", "key", "value"):
            mha = f"{block}/MultiHeadDotProductAttention_1/{name}"
            want |= {f"{mha}/kernel": (768, 12, 64), f"{mha}/bias": (12, 64)}
        mha = f"{block}/MultiHeadDotProductAttention_1/out"
        want |= {f"{mha}/kernel": (12, 64, 768), f"{mha}/bias": (768,)}
        mlp = f"{block}/MlpBlock_3"
        want |= {f"{mlp}/Dense_0/kernel": (768, 3072), f"{mlp}/Dense_0/bias": (3072,)}
        want |= {f"{mlp}/Dense_1/kernel": (3072, 768), f"{mlp}/Dense_1/bias": (768,)}
    assert {e.name: e.shape for e in entries(config, Style())} == want
    second = {e.name for e in entries(config, Style(numbering=0))}
    assert "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel" in second
    assert "Transformer/encoderblock_0/LayerNorm_1/scale" in second
    assert "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel" in second


def by_hand(naming, p):
    """The arrays of a file, written out without `entries`."""
    heads, block, d = CONFIG.num_heads, p["blocks"], CONFIG.width
    kernels = {"query": 0, "key": 1, "value": 2}
    if naming == "release":
        out = {
            "embedding/kernel": p["patch_embed"]["kernel"],
            "embedding/bias": p["patch_embed"]["bias"],
            "cls": p["patch_embed"]["cls"][None, None],
            "Transformer/posembed_input/pos_embedding": p["patch_embed"]["position"][None],
            **{f"Transformer/encoder_norm/{k}": v for k, v in p["norm"].items()},
            **{f"{part}/{k}": v for part in ("pre_logits", "head") for k, v in p[part].items()},
        }
        for i in range(CONFIG.depth):
            at = f"Transformer/encoderblock_{i}"
            for theirs, ours in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
                out |= {f"{at}/{theirs}/{k}": v[i] for k, v in block[ours].items()}
            for name, j in kernels.items():
                out[f"{at}/MultiHeadDotProductAttention_1/{name}/kernel"] = block["qkv"]["kernel"][i, j].reshape(d, heads, -1)
                out[f"{at}/MultiHeadDotProductAttention_1/{name}/bias"] = block["qkv"]["bias"][i, j].reshape(heads, -1)
            out[f"{at}/MultiHeadDotProductAttention_1/out/kernel"] = block["out"]["kernel"][i].reshape(heads, -1, d)
            out[f"{at}/MultiHeadDotProductAttention_1/out/bias"] = block["out"]["bias"][i]
            for theirs, ours in (("Dense_0", "mlp_in"), ("Dense_1", "mlp_out")):
                out |= {f"{at}/MlpBlock_3/{theirs}/{k}": v[i] for k, v in block[ours].items()}
        return out

    def dense(name, kernel, bias):
        return {f"{name}.weight": kernel.T, f"{name}.bias": bias}

    def norm(name, p):
        return {f"{name}.weight": p["scale"], f"{name}.bias": p["bias"]}

    timm = naming == "timm"
    stem = "patch_embed.proj" if timm else "vit.embeddings.patch_embeddings.projection"
    out = {
        "cls_token" if timm else "vit.embeddings.cls_token": p["patch_embed"]["cls"][None, None],
        "pos_embed" if timm else "vit.embeddings.position_embeddings": p["patch_embed"]["position"][None],
        f"{stem}.weight": p["patch_embed"]["kernel"].transpose(3, 2, 0, 1),
        f"{stem}.bias": p["patch_embed"]["bias"],
        **norm("norm" if timm else "vit.layernorm", p["norm"]),
        **dense("pre_logits.fc" if timm else "vit.pooler.dense", **p["pre_logits"]),
        **dense("head" if timm else "classifier", **p["head"]),
    }
    for i in range(CONFIG.depth):
        layer = jax.tree.map(lambda a, i=i: a[i], block)
        at = f"blocks.{i}" if timm else f"vit.encoder.layer.{i}"
        out |= norm(f"{at}.norm1" if timm else f"{at}.layernorm_before", layer["norm1"])
        out |= norm(f"{at}.norm2" if timm else f"{at}.layernorm_after", layer["norm2"])
        if timm:
            out[f"{at}.attn.qkv.weight"] = np.concatenate([k.T for k in layer["qkv"]["kernel"]])
            out[f"{at}.attn.qkv.bias"] = np.concatenate(list(layer["qkv"]["bias"]))
        else:
            for name, j in kernels.items():
                out |= dense(f"{at}.attention.attention.{name}", layer["qkv"]["kernel"][j], layer["qkv"]["bias"][j])
        for theirs, other, ours in (
            ("attn.proj", "attention.output.dense", "out"),
            ("mlp.fc1", "intermediate.dense", "mlp_in"),
            ("mlp.fc2", "output.dense", "mlp_out"),
        ):
            out |= dense(f"{at}.{theirs if timm else other}", layer[ours]["kernel"], layer[ours]["bias"])
    return out


@pytest.mark.parametrize("naming", ["release", "timm", "transformers"])
def test_every_array_goes_to_its_place(tmp_path, naming):
    """Against a file made by hand: what reads and writes by one table could be wrong both ways."""
    params = random_params(CONFIG)
    want = by_hand(naming, params)
    path = tmp_path / ("w.npz" if naming == "release" else "w.safetensors")
    if naming == "release":
        np.savez(path, **want)
    else:
        save_file({k: np.ascontiguousarray(v) for k, v in want.items()}, path)
    assert bits(vitcore.load(path, CONFIG)) == bits(params)
    vitcore.save(path, params, CONFIG, naming=naming)
    found = dict(np.load(path)) if naming == "release" else load_file(path)
    assert found.keys() == want.keys()
    assert all(found[k].shape == want[k].shape and found[k].tobytes() == want[k].tobytes() for k in want)


def test_layouts_that_were_packed_squeezed_or_halved(tmp_path):
    params = random_params(CONFIG)
    arrays = in_style(CONFIG, params)
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    assert bits(vitcore.load(tmp_path / "packed.npz", CONFIG)) == bits(params)
    np.savez(tmp_path / "fortran.npz", **{k: np.asfortranarray(a) for k, a in arrays.items()})  # pyright: ignore[reportArgumentType]
    assert bits(vitcore.load(tmp_path / "fortran.npz", CONFIG)) == bits(params)
    np.savez(tmp_path / "old.npz", **{k: a.reshape(1, 1, 1, -1) if a.ndim == 1 else a for k, a in arrays.items()})
    assert bits(vitcore.load(tmp_path / "old.npz", CONFIG)) == bits(params)
    for name, kept in (("bf16", ml_dtypes.bfloat16), ("f16", np.float16), ("f64", np.float64)):
        rounded = jax.tree.map(lambda a, kept=kept: a.astype(kept).astype(np.float32), params)
        cast = {k: a.astype(kept) for k, a in arrays.items()}
        np.savez(tmp_path / f"{name}.npz", **{k: a.view("V2") if name == "bf16" else a for k, a in cast.items()})
        assert bits(vitcore.load(tmp_path / f"{name}.npz", CONFIG)) == bits(rounded)
    with np.load(tmp_path / "bf16.npz") as file:
        assert file["head/bias"].dtype == "V2"


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
def test_bfloat16_is_written_as_the_releases_do_and_goes_round(tmp_path, name):
    params = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), random_params(CONFIG))
    vitcore.save(tmp_path / name, params, CONFIG, dtype="bfloat16")
    assert bits(vitcore.load(tmp_path / name, CONFIG)) == bits(params)
    if name.endswith("npz"):
        with np.load(tmp_path / name) as file:
            assert {file[k].dtype for k in file.files} == {np.dtype("V2")}
    else:
        assert {a.dtype for a in load_file(tmp_path / name).values()} == {np.dtype(ml_dtypes.bfloat16)}


# --- another grid, another head ---------------------------------------------------------------------------------------------


def test_the_position_embedding_is_fitted_to_the_config(tmp_path):
    from vitcore.posemb import fit

    params = random_params(CONFIG)
    vitcore.save(tmp_path / "w.npz", params, CONFIG)
    vitcore.save(tmp_path / "w.safetensors", params, CONFIG)
    for size, grid in ((32, (8, 8)), ((8, 24), (2, 6))):
        config = vitcore.ViTConfig(**{**vars(CONFIG), "image_size": size})
        for name in ("w.npz", "w.safetensors"):
            for method in ("corners", "half-pixel"):
                found = vitcore.load(tmp_path / name, config, interpolation=method)["patch_embed"]["position"]
                want = fit(params["patch_embed"]["position"], grid=(4, 4), to=grid, class_slots=1, method=method)
                assert np.asarray(found).tobytes() == want.tobytes()


def test_a_grid_that_is_not_square_is_asked_for_where_it_could_be_two_things(tmp_path):
    wide = vitcore.ViTConfig(**{**vars(CONFIG), "image_size": (8, 32)})  # 2 x 8 patches: as many as 4 x 4
    params = random_params(wide)
    vitcore.save(tmp_path / "ours.npz", params, wide)  # which says so itself
    assert bits(vitcore.load(tmp_path / "ours.npz", wide)) == bits(params)
    with np.load(tmp_path / "ours.npz") as file:
        np.savez(tmp_path / "w.npz", **file)
    with pytest.raises(ValueError, match="16 patches, both a square and the config's 2 x 8: say its"):
        vitcore.load(tmp_path / "w.npz", wide)
    assert bits(vitcore.load(tmp_path / "w.npz", wide, grid=(2, 8))) == bits(params)
    assert bits(vitcore.load(tmp_path / "w.npz", wide, grid=(4, 4))) != bits(params)
    vitcore.save(tmp_path / "w.safetensors", params, wide)  # which says so itself
    assert bits(vitcore.load(tmp_path / "w.safetensors", wide)) == bits(params)
    tall = vitcore.ViTConfig(**{**vars(CONFIG), "image_size": (20, 12)})
    vitcore.save(tmp_path / "ours.npz", random_params(tall), tall)
    with np.load(tmp_path / "ours.npz") as file:
        np.savez(tmp_path / "tall.npz", **file)
    assert bits(vitcore.load(tmp_path / "tall.npz", tall)) == bits(random_params(tall))
    with pytest.raises(ValueError, match="15 patches, no square"):
        vitcore.load(tmp_path / "tall.npz", CONFIG)
    with pytest.raises(ValueError, match="not 4 x 4"):
        vitcore.load(tmp_path / "tall.npz", CONFIG, grid=(4, 4))


@pytest.mark.parametrize("name", ["w.npz", "timm.safetensors", "transformers.safetensors"])
def test_a_new_head_is_zeros_and_drops_the_hidden_layer(tmp_path, name):
    params = random_params(CONFIG)
    vitcore.save(tmp_path / name, params, CONFIG, naming=None if name == "w.npz" else name.partition(".")[0])
    config = vitcore.ViTConfig(**{**vars(CONFIG), "representation_size": None, "num_classes": 7, "head_bias": -3.0})
    with pytest.raises(ValueError, match=r"extra pre_logits|extra vit\.pooler"):
        vitcore.load(tmp_path / name, config)
    found = vitcore.load(tmp_path / name, config, new_head=True)
    assert not np.asarray(found["head"]["kernel"]).any()
    assert found["head"]["kernel"].shape == (24, 7)
    assert (np.asarray(found["head"]["bias"]) == -3).all()
    assert bits({k: v for k, v in found.items() if k != "head"}) == bits(
        {k: v for k, v in params.items() if k not in ("head", "pre_logits")}
    )
    with pytest.raises(ValueError, match="representation_size=6: make it None"):
        vitcore.load(tmp_path / name, CONFIG, new_head=True)


def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path):
    params = random_params(CONFIG)
    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)
    want = vitcore.apply(params, images, CONFIG)
    for name in ("w.npz", "w.safetensors"):
        vitcore.save(tmp_path / name, params, CONFIG)
        np.testing.assert_array_equal(vitcore.apply(vitcore.load(tmp_path / name, CONFIG), images, CONFIG), want)


# --- the command line -------------------------------------------------------------------------------------------------------


def test_convert_there_and_back_and_show(tmp_path, capsys):
    config = vitcore.variant("ViT-Nano/4", image_size=16, num_classes=5)
    params = random_params(config)
    a, b, c, d = (str(tmp_path / n) for n in ("a.npz", "b.safetensors", "c.safetensors", "d.npz"))
    vitcore.save(a, params, config)
    assert weights.main(["convert", a, b]) == 0
    assert "num_heads=4" in capsys.readouterr().out
    assert weights.main(["convert", b, c, "--naming", "transformers"]) == 0
    assert weights.main(["convert", c, d]) == 0
    assert "GELU" not in capsys.readouterr().out
    assert weights.describe(d)[1] == config  # by way of two namings whose models compute GELU exactly
    strange = str(tmp_path / "strange.safetensors")
    save_file(load_file(b), strange)  # as others write it
    assert weights.main(["convert", strange, str(tmp_path / "e.npz")]) == 0
    assert "GELU" in capsys.readouterr().out
    with np.load(a) as first, np.load(d) as last:
        assert first.files == last.files
        assert all(first[k].tobytes() == last[k].tobytes() for k in first.files)
    assert "vit.encoder.layer.2.attention.attention.value.weight" in load_file(c)
    assert weights.main(["show", a]) == 0
    shown = capsys.readouterr().out
    assert "naming release" in shown
    assert "Transformer/encoderblock_3/MlpBlock_3/Dense_1/kernel" in shown
    assert "ViTConfig(image_size=16, patch_size=4, width=64, depth=4, mlp_dim=128, num_heads=4, num_classes=5" in shown
    assert weights.main(["convert", a, b, "--dtype", "bfloat16"]) == 0
    assert os.path.getsize(b) < 0.6 * os.path.getsize(a)


def test_a_files_own_model_is_made_out_in_every_layout(tmp_path):
    for i, style in enumerate(RELEASES):
        path = tmp_path / f"{i}.npz"
        np.savez(path, **in_style(CONFIG, random_params(CONFIG), **style))
        assert weights.describe(path)[1] == CONFIG
    for naming in ("timm", "transformers"):
        path = tmp_path / f"{naming}.safetensors"
        save_file(in_style(CONFIG, random_params(CONFIG), naming=naming), path)
        theirs = {"gelu": "erf", "eps": 1e-6 if naming == "timm" else 1e-12}
        assert weights.describe(path, heads=2)[1] == vitcore.ViTConfig(**{**vars(CONFIG), **theirs})


def test_the_command_runs_without_a_warning(tmp_path):
    vitcore.save(tmp_path / "a.npz", random_params(CONFIG), CONFIG)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "vitcore.weights", "show", tmp_path / "a.npz"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "naming release" in done.stdout


# --- what does not fit: every name ------------------------------------------------------------------------------------------


def test_a_mismatch_names_every_entry(tmp_path):
    arrays = in_style(CONFIG, random_params(CONFIG))
    del arrays["cls"], arrays["Transformer/encoderblock_1/LayerNorm_0/scale"]
    arrays["Transformer/encoderblock_0/gamma"] = arrays["stray"] = np.zeros(3, np.float32)
    arrays["Transformer/encoderblock_2/MlpBlock_3/Dense_0/bias"] = np.zeros(21, np.float32)
    arrays["Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"] = np.zeros(21, np.float32)
    arrays["head/bias"] = np.zeros(5, np.int32)
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(ValueError, match=r"w\.npz is not this config's model") as error:
        vitcore.load(tmp_path / "w.npz", CONFIG)
    said = str(error.value)
    assert "missing cls, Transformer/encoderblock_1/LayerNorm_0/scale;" in said
    assert "extra Transformer/encoderblock_0/gamma, stray;" in said
    assert "misshapen Transformer/encoderblock_{1-2}/MlpBlock_3/Dense_0/bias (21) for (20);" in said
    assert "no floats in head/bias int32" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 5}, "missing Transformer/encoderblock_{3-4}/LayerNorm_0/scale"),
        ({"depth": 2}, "extra Transformer/encoderblock_2/LayerNorm_0/scale"),
        ({"width": 32}, "misshapen embedding/kernel (4,4,3,24) for (4,4,3,32)"),
        ({"num_heads": 3}, "query/kernel (24,2,12) for (24,3,8)"),
        ({"patch_size": 8}, "the file's model has patch_size=4, width=24, depth=3, mlp_dim=20, num_heads=2, num_classes=5"),
        ({"num_classes": 6}, "head/bias (5) for (6): new_head=True replaces the head by zeros"),
        ({"pool": "gap"}, "extra cls"),
        ({"representation_size": None}, "extra pre_logits/kernel, pre_logits/bias"),
    ],
    ids=str,
)
def test_another_model_is_said(tmp_path, change, words):
    np.savez(tmp_path / "w.npz", **in_style(CONFIG, random_params(CONFIG)))
    with pytest.raises(ValueError, match="is not this config's model") as error:
        vitcore.load(tmp_path / "w.npz", vitcore.ViTConfig(**{**vars(CONFIG), **change}))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_saving_checks_too(tmp_path):
    params = random_params(CONFIG)
    with pytest.raises(ValueError, match="head/bias, head/kernel differ"):
        vitcore.save(tmp_path / "w.npz", params, vitcore.ViTConfig(**{**vars(CONFIG), "num_classes": 6}))
    with pytest.raises(ValueError, match=r"naming='timm' for .*w\.npz"):
        vitcore.save(tmp_path / "w.npz", params, CONFIG, naming="timm")
    with pytest.raises(ValueError, match=r"\.npz or \.safetensors is required"):
        vitcore.save(tmp_path / "w.pt", params, CONFIG)
    with pytest.raises(ValueError, match="dtype='int8'"):
        vitcore.save(tmp_path / "w.npz", params, CONFIG, dtype="int8")
    assert not list(tmp_path.iterdir())


# --- broken and hostile files -----------------------------------------------------------------------------------------------


def npy(shape, descr="<f4", data=b"", version=1, length=None):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = len(header) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", size) + header + data


def archive(path, members, **options):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", **options) as file:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, data in members:
            file.writestr(name, data)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("pickle-was-run",))


def pickled():
    out = io.BytesIO()
    np.lib.format.write_array(out, np.array([Bomb()], object), allow_pickle=True)
    return out.getvalue()


def good():
    out = []
    for name, array in in_style(CONFIG, random_params(CONFIG)).items():
        file = io.BytesIO()
        np.lib.format.write_array(file, array)
        out.append((f"{name}.npy", file.getvalue()))
    return out


def put(path, name, data, **options):
    archive(path, [(n, data if n == name else d) for n, d in good()], **options)


def cut(path, keep=0.5, name="w.npz"):
    vitcore.save(path.with_name(name), random_params(CONFIG), CONFIG)
    whole = path.with_name(name).read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])


def flipped(path):
    vitcore.save(path, random_params(CONFIG), CONFIG)
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)


def huge_directory(path):
    put(path, "", b"")
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\5\6")
    struct.pack_into("<I", data, end + 12, 2**31)
    path.write_bytes(data)


def tensors(path, header, body=b""):
    text = header if isinstance(header, bytes) else str(header).replace("'", '"').encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def tensor(shape, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


TERABYTES = (10**6, 10**6)
HEAD = "head/bias.npy"
BAD = {
    "pickle": ("a.npz", lambda p: p.write_bytes(pickle.dumps({"a": Bomb()})), "no directory at its end"),
    "object array": ("a.npz", lambda p: put(p, HEAD, pickled()), "head/bias holds Python objects"),
    "cut in half": ("a.npz", cut, "is cut short or damaged"),
    "last byte gone": ("a.npz", lambda p: cut(p, 0.9999), "is cut short or damaged"),
    "empty": ("a.npz", lambda p: p.write_bytes(b""), "is cut short or damaged"),
    "a flipped bit": ("a.npz", flipped, "Bad CRC-32"),
    "text": ("a.npz", lambda p: p.write_text("<html>404</html>"), "no directory at its end"),
    "terabytes, stored": ("a.npz", lambda p: put(p, HEAD, npy(TERABYTES)), "claims 4,000,000,000,000 bytes as float32"),
    "terabytes, packed": (
        "a.npz", lambda p: put(p, "cls.npy", npy(TERABYTES, data=bytes(10**7)), compression=zipfile.ZIP_DEFLATED),
        "the file has 10,000,000",
    ),
    "a bomb of the right claim": (
        "a.npz", lambda p: put(p, "cls.npy", npy((10**4, 10**4), data=bytes(4 * 10**8)), compression=zipfile.ZIP_DEFLATED),
        "misshapen cls (10000,10000) for (1,1,24)",
    ),
    "too many positions": (
        "a.npz",
        lambda p: put(p, "Transformer/posembed_input/pos_embedding.npy", npy((1, 2**20, 24), data=bytes(96 * 2**20)),
                      compression=zipfile.ZIP_DEFLATED),
        "misshapen Transformer/posembed_input/pos_embedding (1,1048576,24) for (1,17,24)",
    ),
    "a header of gigabytes": ("a.npz", lambda p: put(p, HEAD, npy((5,), version=2, length=2**31)), "header of 2,147,483,648 bytes"),
    "a header that is code": ("a.npz", lambda p: put(p, HEAD, npy("__import__('os').abort()")), "a header that is none"),
    "a negative shape": ("a.npz", lambda p: put(p, HEAD, npy((-5,), data=bytes(20))), "a shape that is none"),
    "no array": ("a.npz", lambda p: put(p, HEAD, b"hello"), "head/bias is no .npy array"),
    "a name that climbs": ("a.npz", lambda p: archive(p, [*good(), ("../../x.npy", npy((0,)))]), "'../../x.npy', which leaves"),
    "a name from the root": ("a.npz", lambda p: archive(p, [*good(), ("/etc/x.npy", npy((0,)))]), "'/etc/x.npy', which leaves"),
    "a name with a control": ("a.npz", lambda p: archive(p, [*good(), ("a\x1b[2J.npy", npy((0,)))]), "which leaves"),
    "a name twice": ("a.npz", lambda p: archive(p, [*good(), (HEAD, npy((5,), data=bytes(20)))]), "twice"),
    "another kind of file": ("a.npz", lambda p: archive(p, [*good(), ("run.sh", b"")]), "'run.sh', which is no .npy"),
    "another packing": ("a.npz", lambda p: archive(p, good(), compression=zipfile.ZIP_LZMA), "packed in a way"),
    "a directory of gigabytes": ("a.npz", huge_directory, "directory of 2,147,483,648 bytes"),
    "nothing of a ViT": ("a.npz", lambda p: np.savez(p, conv1=np.zeros(3)), "holds no Vision Transformer"),
    "no arrays": ("a.npz", lambda p: np.savez(p), "holds no Vision Transformer"),
    "another suffix": ("a.pth", lambda p: p.write_bytes(b"x"), ".npz or .safetensors is required"),
    "tensors cut in half": ("a.safetensors", lambda p: cut(p, 0.5, "w.safetensors"), "is cut short or damaged"),
    "tensors cut in the header": ("a.safetensors", lambda p: p.write_bytes(struct.pack("<Q", 500) + b"{"), "is cut short or no"),
    "tensors empty": ("a.safetensors", lambda p: p.write_bytes(b""), "is cut short or no"),
    "tensors with a header of exabytes": ("a.safetensors", lambda p: p.write_bytes(b"\xff" * 64), "is cut short or no"),
    "tensors with a long header": ("a.safetensors", lambda p: tensors(p, b" " * 2**23), "a header of 8,388,608 bytes"),
    "tensors of terabytes": (
        "a.safetensors", lambda p: tensors(p, {"cls_token": tensor([10**6, 10**6], 4 * 10**12)}),
        "is cut short or damaged",
    ),
    "tensors that overlap": (
        "a.safetensors", lambda p: tensors(p, {n: tensor([1], 4) for n in ("cls_token", "pos_embed")}, bytes(4)),
        "is cut short or damaged",
    ),
    "tensors of integers": (
        "a.safetensors", lambda p: tensors(p, {"cls_token": tensor([1, 1, 24], 192, "I64")}, bytes(192)),
        "no floats in cls_token",
    ),
    "tensors of a convolution": ("a.safetensors", lambda p: save_file({"conv1": np.zeros(3)}, p), "holds no Vision Transformer"),
    "a directory": ("a.npz", lambda p: p.mkdir(), "Is a directory"),
    "nothing there": ("a.npz", lambda p: None, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_and_no_memory(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    file, make, words = BAD[name]
    make(tmp_path / file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, OSError)) as error:
        vitcore.load(tmp_path / file, CONFIG)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert taken < 32 * 2**20  # the largest claims are 400 MB in a file of half a megabyte, and 4 TB
    assert not (tmp_path / "pickle-was-run").exists()
    # and on the command line
    assert weights.main(["convert", file, "out.npz"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("vitcore.weights: error: ")
    assert printed.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("words", [["--grid", "4"], ["--heads", "0"]])
def test_a_bad_option_is_one_line(tmp_path, capsys, words):
    assert weights.main(["show", str(tmp_path / "x.npz"), *words]) == 2
    assert capsys.readouterr().err.startswith(f"vitcore.weights: error: {words[0]} {words[1]}: ")


@pytest.mark.parametrize("file", ["w.npz", "w.safetensors"])
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, file, mask):
    before = os.umask(mask)
    try:
        vitcore.save(tmp_path / file, random_params(CONFIG), CONFIG)
    finally:
        os.umask(before)
    assert (tmp_path / file).stat().st_mode & 0o777 == 0o666 & ~mask
    assert [path.name for path in tmp_path.iterdir()] == [file]
