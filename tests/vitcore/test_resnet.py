"""BiT ResNets and the hybrids' root against a second computation in float64 NumPy (tests/tape.py), values and every gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests import tape
from tests.tape import Number
from vitcore import parameters, resnet, resnet_leaves
from vitcore.collectives import MeshShape
from vitcore.resnet import ResNetStem

# --- the second computation ----------------------------------------------------------------------------------------------------


def windows(x: Number, side: int, stride: int, before: int, after: int, border=0.0) -> Number:
    """[B, Y, X, C] to every window [B, Y', X', side, side, C]."""
    x = x.pad(((0, 0), (before, after), (before, after), (0, 0)), border)
    rows = np.arange(0, x.shape[1] - side + 1, stride)[:, None] + np.arange(side)
    columns = np.arange(0, x.shape[2] - side + 1, stride)[:, None] + np.arange(side)
    return x[:, rows[:, None, :, None], columns[None, :, None, :]]


def borders(form, n, side, stride):
    """Positions before and after n that the authors pad."""
    if form == "pre":
        return side // 2, side // 2
    extra = max((-(-n // stride) - 1) * stride + side - n, 0)
    return extra // 2, extra - extra // 2


def convolution(x, kernel, stride, form):
    mean = kernel.mean((0, 1, 2), True)
    centred = kernel - mean
    variance = (centred * centred).mean((0, 1, 2), True)
    kernel = centred / (variance.sqrt() + 1e-5 if form == "post" else (variance + 1e-10).sqrt())
    side = kernel.shape[0]
    assert x.shape[1] == x.shape[2]
    return tape.einsum("byxijc,ijcd->byxd", windows(x, side, stride, *borders(form, x.shape[1], side, stride)), kernel)


EPS = {"post": 1e-6, "pre": 1e-5, "axial": 1e-4}


def group_norm(x, w, form):
    b, y, columns, c = x.shape
    z = x.reshape(b, y, columns, 32, c // 32)
    z = z - z.mean((1, 2, 4), True)
    z = z / ((z * z).mean((1, 2, 4), True) + EPS[form]).sqrt()
    return z.reshape(b, y, columns, c) * w["scale"] + w["bias"]


def bottleneck(x, w, stride, form):
    if form == "pre":
        z = group_norm(x, w["gn1"], form).relu()
        residual = convolution(z, w["conv_proj"]["kernel"], stride, form) if "conv_proj" in w else x
        y = group_norm(convolution(z, w["conv1"]["kernel"], 1, form), w["gn2"], form).relu()
        y = group_norm(convolution(y, w["conv2"]["kernel"], stride, form), w["gn3"], form).relu()
        return residual + convolution(y, w["conv3"]["kernel"], 1, form)
    residual = group_norm(convolution(x, w["conv_proj"]["kernel"], stride, form), w["gn_proj"], form) if "conv_proj" in w else x
    y = group_norm(convolution(x, w["conv1"]["kernel"], 1, form), w["gn1"], form).relu()
    if form == "axial":
        y = lines(lines(y.transpose(0, 2, 1, 3), w["height"]).transpose(0, 2, 1, 3), w["width"])
        if stride == 2:
            y = windows(y, 2, 2, 0, y.shape[1] % 2).mean((3, 4))
        y = y.relu()
    else:
        y = group_norm(convolution(y, w["conv2"]["kernel"], stride, form), w["gn2"], form).relu()
    return (residual + group_norm(convolution(y, w["conv3"]["kernel"], 1, form), w["gn3"], form)).relu()


def lines(x, w):
    """Wang et al. 2020, Eq. 4, along the third axis, one line, head and place at a time."""
    b, count, length, c = x.shape
    d = c // 8
    x = x.reshape(b * count, length, c)
    done = []
    for m in range(b * count):
        qkv = tape.einsum("lc,ck->lk", x[m], w["qkv"]).reshape(1, length, 1, 2 * c)
        qkv = group_norm(qkv, w["gn_qkv"], "axial").reshape(length, 8, 2 * d)
        heads = []
        for n in range(8):
            q, k, v = qkv[:, n, : d // 2], qkv[:, n, d // 2 : d], qkv[:, n, d:]
            out = []
            for o in range(length):
                table = w["relative"][:, np.arange(length) - o + length - 1]  # of every p, seen from o
                logits = tape.einsum("d,pd->p", q[o], k) + tape.einsum("d,dp->p", q[o], table[: d // 2])
                logits = logits + tape.einsum("pd,dp->p", k, table[d // 2 : d])
                out.append(tape.einsum("p,pd->d", logits.softmax(), v + table[d:].transpose(1, 0)).reshape(1, d))
            heads.append(tape.concatenate(out, 0))
        y = tape.concatenate(heads, 1).reshape(1, length, 1, c)
        done.append(group_norm(y, w["gn_out"], "axial").reshape(1, length, c))
    return tape.concatenate(done, 0).reshape(b, count, length, c)


def network(p, images, form, depths):
    """Feature map of the tree of Numbers p."""
    x = convolution(Number(images), p["root"]["conv"]["kernel"], 2, form)
    if form != "pre":
        x = group_norm(x, p["root"]["norm"], form).relu()
    before, after = borders(form, x.shape[1], 3, 2)
    x = windows(x, 3, 2, before, after, 0.0 if form == "pre" else -np.inf)
    b, rows, columns, _, _, c = x.shape
    x = x.reshape(b, rows, columns, 9, c).largest(3)
    for s, count in enumerate(depths):
        stage = p[f"stage{s + 1}"]
        x = bottleneck(x, stage["first"], 2 if s else 1, form)
        for i in range(count - 1):
            x = bottleneck(x, jax.tree.map(lambda a, i=i: a[i], stage["rest"], is_leaf=is_number), 1, form)
    return group_norm(x, p["norm"], form).relu() if form == "pre" else x


def is_number(x):
    return isinstance(x, Number)


# --- ours against it -------------------------------------------------------------------------------------------------------------


def noisy(stem, side=32, seed=0):
    """Parameters with nothing left at zero or one."""
    params = parameters.init(jax.random.key(seed), resnet_leaves.leaves(stem, (side, side), 3, under=()))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [a + 0.1 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)])


def close(got, want, tolerance=1e-5):
    assert np.abs(np.asarray(got, np.float64) - want).max() <= tolerance * np.abs(want).max()


CASES = [
    pytest.param("post", (1, 2), 24, marks=pytest.mark.slow),
    ("pre", (1, 2), 24),
    pytest.param("post", (1, 1), 27, marks=pytest.mark.slow),  # the hybrid's stem, in test_entries.py, is this form
    pytest.param("pre", (), 18, marks=pytest.mark.slow),
    ("axial", (1, 2), 16),
]


@pytest.mark.parametrize(("form", "depths", "side"), CASES)
def test_values_and_every_gradient_agree_with_numpy(form, depths, side):
    """Even and odd sides, whose SAME borders differ; first units with and without a stride; the root alone."""
    stem = ResNetStem(depths=depths, width_factor=0.5, form=form)
    params = noisy(stem, side)
    images = np.random.default_rng(1).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    out = jax.eval_shape(lambda p: resnet.feature_map(p, jnp.asarray(images), stem), params)
    assert out.shape == (2, *stem.grid((side, side)), stem.channels)
    weights = np.random.default_rng(2).standard_normal(out.shape)

    def ours(p, images):
        return (resnet.feature_map(p, images, stem) * weights).sum()

    with jax.enable_x64(True):  # ours in float64: what is judged is the formula, to far less than 1e-5
        p64 = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), params)
        got64 = jax.jit(lambda p, x: resnet.feature_map(p, x, stem))(p64, jnp.asarray(images, jnp.float64))
        gradients64 = jax.jit(jax.grad(ours))(p64, jnp.asarray(images, jnp.float64))
    got = jax.jit(lambda p, x: resnet.feature_map(p, x, stem))(params, images)

    numbers = jax.tree.map(Number, params)
    want = network(numbers, images, form, depths)
    wanted = tape.gradients((want * weights).sum(), jax.tree.leaves(numbers, is_leaf=is_number))
    close(got64, want.value, 1e-10)
    close(got, want.value)
    for (path, g), w in zip(jax.tree.leaves_with_path(gradients64), wanted, strict=True):
        assert np.abs(w).max() > 0, path
        assert np.abs(np.asarray(g) - w).max() <= 1e-8 * np.abs(w).max(), path


HEADLESS = {
    "R50x1": 23_508_032,
    "R50x2": 93_907_072,
    "R101x1": 42_500_160,
    "R152x1": 58_143_808,
    "R152x2": 232_253_568,
    "R200x3": 562_511_040,
}


@pytest.mark.parametrize("name", HEADLESS)
def test_parameters_are_as_many_as_the_authors(name):
    depth, width = map(int, name[1:].split("x"))
    post, pre = (
        parameters.count(
            resnet_leaves.leaves(ResNetStem(depths=resnet.DEPTHS[depth], width_factor=width, form=form), (224, 224), 3)
        )
        for form in ("post", "pre")
    )
    assert post == HEADLESS[name]
    assert pre == post - 7680 * width  # norms before the convolutions are of other widths


def mapped(stem, params, images, mesh_shape, remat=False, unrolled=False):
    """The loss (sum of squares of the map) and its gradients, on a mesh."""
    mesh = jax.make_mesh(mesh_shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shape = MeshShape.of(mesh)
    specs = parameters.specs(resnet_leaves.leaves(stem, images.shape[1:3], 3, under=()), shape)

    def local(p, x):
        def loss(p):
            out = resnet.feature_map(p, x, stem, specs=specs, mesh=shape, remat=remat, unrolled=unrolled)
            return jax.lax.psum(jnp.square(out).sum() / images.shape[0], "data")

        return jax.value_and_grad(loss)(p)

    run = jax.shard_map(local, mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs))
    return specs, jax.jit(run)(params, images)


@pytest.mark.parametrize(
    ("form", "mesh", "more"),
    [
        ("post", (2, 2), {"remat": True}),
        pytest.param("pre", (2, 2), {}, marks=pytest.mark.slow),
        pytest.param("pre", (1, 4), {"unrolled": True}, marks=pytest.mark.slow),
        pytest.param("axial", (2, 2), {}, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_no_number(form, mesh, more):
    """Channels over 2 and 4, kernels over 2: the same loss and gradients; units in a loop, made again, and without a loop. Axial
    units, whose softmax has large logits, in float64."""
    with jax.enable_x64(form == "axial"):
        _a_mesh_changes_no_number(form, mesh, more)


def _a_mesh_changes_no_number(form, mesh, more):
    stem = ResNetStem(depths=(1, 2), width_factor=0.5, form=form)
    params, images = noisy(stem), jax.random.uniform(jax.random.key(3), (4, 16, 16, 3), minval=-1)
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    want, wanted = jax.jit(jax.value_and_grad(lambda p: jnp.square(resnet.feature_map(p, images, stem)).sum() / 4))(params)
    specs, (loss, gradients) = mapped(stem, params, images, mesh, **more)
    axes = {a for spec in jax.tree.leaves(specs) for entry in spec for a in (entry if isinstance(entry, tuple) else (entry,))}
    assert axes >= {"model", *(("data",) if mesh[0] > 1 else ())}
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for (path, g), w in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True):
        assert np.abs(g - w).max() <= 2e-4 * np.abs(w).max(), path


def test_what_makes_no_resnet_is_refused():
    for changes, words in (
        ({"depths": (3, 0)}, "units of each stage"),
        ({"form": "middle"}, "'post' or 'pre'"),
        ({"width_factor": 0.7}, "multiple of the 32 groups"),
        ({"width_factor": 0.25}, "multiple of the 32 groups"),
        ({"width_factor": float("nan")}, "multiple of the 32 groups"),
    ):
        with pytest.raises(ValueError, match=words):
            ResNetStem(**changes)  # pyright: ignore
    with pytest.raises(ValueError, match="groups of GroupNorm=32 is not divisible by the model axis of the 1x3 mesh"):
        parameters.specs(resnet_leaves.leaves(ResNetStem(), (32, 32), 3), MeshShape(1, 3))
    listed: Any = [3, 4]
    assert hash(ResNetStem(depths=listed)) == hash(ResNetStem(depths=(3, 4)))


@pytest.mark.parametrize(("n", "side", "stride"), [(224, 7, 2), (7, 3, 1), (27, 3, 2), (1, 3, 2), (14, 1, 2)])
@pytest.mark.parametrize("same", [False, True])
def test_taps_on_the_image_are_those_of_a_line_of_ones(n, side, stride, same):
    """Counted by multiplying: a convolution of ones with ones counts, at each place, the taps that meet the image."""
    padding = "SAME" if same else [(side // 2, side // 2)]
    out = jax.lax.conv_general_dilated(jnp.ones((1, 1, n)), jnp.ones((1, 1, side)), (stride,), padding)
    assert resnet_leaves.taps_on_image(n, side, stride, same) == int(out.sum())
