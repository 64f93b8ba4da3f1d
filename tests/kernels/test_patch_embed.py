"""Patch embedding on a TPU, interpreted with simulated memories (races found, uninitialised memory NaN), against its reference."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from kernels.device import DEVICES
from kernels.dropout import Dropout
from kernels.launch import Launch
from kernels.patch_embed import plan as planning
from kernels.patch_embed import reference, tpu
from tests import oracle
from tests.draws import examples

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
LAUNCH = Launch(device=DEVICES["cpu"], interpret=STRICT)
EVALUATED = Launch(device=DEVICES["cpu"], interpret=True)  # without side effects, which jax.checkpoint refuses
NAMES = ("images", "kernel", "bias", "cls", "position")


def arrays(b, rows, columns, c, p, d, *, dtype=jnp.float32, cls=True, position=True, seed=0):
    """Arguments of the op; None for what the model does without."""
    draw = np.random.default_rng(seed).standard_normal
    t = rows * columns + cls

    def f(*shape):
        return jnp.asarray(draw(shape), jnp.float32)

    images = f(b, rows * p, columns * p, c).astype(dtype)
    return [images, f(p, p, c, d) / p, f(d), f(d) if cls else None, f(t, d) if position else None]


def bound(fn, args, **options):
    """`fn` as a function of the arguments that are there."""
    here = [i for i, a in enumerate(args) if a is not None]

    def call(*given):
        full = list(args)
        for i, a in zip(here, given, strict=True):
            full[i] = a
        return fn(*full, **options)

    return call, [args[i] for i in here], [NAMES[i] for i in here]


def check(args, *, launch=LAUNCH, dropout=None):
    ours, given_, names = bound(tpu.patch_embed, args, dropout=dropout, launch=launch)
    plain, _, _ = bound(reference.patch_embed, args, dropout=dropout)
    oracle.assert_kernel_ran(ours, *given_, name="patch_embed")
    oracle.check(ours, plain, given_, names=names)


CASES = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3),
        "rows": st.integers(1, 3),
        "columns": st.integers(1, 9),
        "c": st.sampled_from([1, 3, 4]),
        "p": st.sampled_from([1, 2, 4, 7, 8, 14]),
        "d": st.sampled_from([8, 80, 128]),
        "dtype": st.sampled_from([jnp.float32, jnp.bfloat16]),
        "cls": st.booleans(),
        "position": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
RATES = st.sampled_from([0.0, 0.3])


@examples(4)
@given(CASES, RATES)
def test_agrees_with_the_reference(case, rate):
    check(arrays(**case), dropout=Dropout(rate, jnp.int32(case["seed"]), jnp.int32(1000)) if rate else None)


@pytest.mark.slow
@examples(20)
@given(CASES, RATES)
def test_agrees_with_the_reference_often(case, rate):
    check(arrays(**case), dropout=Dropout(rate, jnp.int32(case["seed"]), jnp.int32(1000)) if rate else None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("p", [pytest.param(16, marks=pytest.mark.ci), 32])
def test_agrees_with_the_reference_at_the_patches_of_the_paper(p, dtype):
    check(arrays(2, 2, 3, 3, p, 128, dtype=dtype), dropout=Dropout(0.1, jnp.int32(5)))


def small(vmem_bytes) -> Launch:
    """A core with so little memory that the tiles must split."""
    return replace(LAUNCH, device=replace(LAUNCH.device, vmem_bytes=vmem_bytes))


def test_tiles_of_the_width_and_blocks_of_the_image():
    args = arrays(2, 6, 2, 3, 8, 256, dtype=jnp.bfloat16)
    launch = small(680 * 1024)
    shape = tpu._shape(*args)
    found = planning.plan(shape, launch.device)
    assert found.width < shape.width
    assert found.rows < shape.rows  # the image goes by in blocks
    check(args, launch=launch, dropout=Dropout(0.5, jnp.int32(3), jnp.int32(24)))


def test_several_images_share_a_step():
    args = arrays(6, 3, 2, 1, 2, 64)
    assert planning.plan(tpu._shape(*args), LAUNCH.device).images == 6
    check(args, dropout=Dropout(0.2, jnp.int32(3)))


def test_tiles_hold_the_named_shapes_on_every_generation():
    for device in DEVICES.values():
        for rows, p, d in ((14, 16, 768), (16, 14, 1280), (32, 16, 1024), (37, 14, 1280), (28, 8, 768), (7, 32, 768)):
            for itemsize in (2, 4):
                shape = planning.Shape(
                    batch=8, channels=3, rows=rows, columns=rows, patch=p, width=d, tokens=rows * rows + 1, itemsize=itemsize
                )
                found = planning.plan(shape, device)
                assert shape.width % found.width == 0
                assert shape.rows % found.rows == 0
                assert planning.vmem_bytes(shape, found) < device.vmem_bytes


def test_permuting_patches_permutes_tokens():
    images, kernel, bias, _, _ = arrays(1, 2, 3, 3, 4, 128, cls=False)
    order = np.array([4, 2, 0, 5, 1, 3])
    patches = images.reshape(1, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(1, 6, 4, 4, 3)
    shuffled = patches[:, order].reshape(1, 2, 3, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
    found, plain = (np.asarray(tpu.patch_embed(x, kernel, bias, None, None, launch=LAUNCH)) for x in (shuffled, images))
    np.testing.assert_array_equal(found, plain[:, order])


def test_a_token_depends_on_its_own_pixels_only():
    images, *rest = arrays(1, 2, 3, 3, 4, 128)
    gradient = np.asarray(jax.grad(lambda x: jnp.asarray(tpu.patch_embed(x, *rest, launch=LAUNCH))[0, 1 + 4].sum())(images))
    touched = np.zeros(images.shape, bool)
    touched[:, 4:8, 4:8] = True  # patch 4 is row 1, column 1
    assert (gradient[~touched] == 0).all()
    assert (gradient[touched] != 0).all()


def test_the_class_token_sees_no_pixels():
    images, *rest = arrays(2, 2, 2, 1, 4, 128)
    assert not np.asarray(jax.grad(lambda x: jnp.asarray(tpu.patch_embed(x, *rest, launch=LAUNCH))[:, 0].sum())(images)).any()


def test_under_jit_remat_and_scan():
    args = arrays(2, 2, 2, 1, 4, 128)

    def loss(fn, images, *rest):
        def layer(total, scale):
            return total + jnp.square(jax.checkpoint(fn)(images * scale, *rest)).mean(), None

        return jax.lax.scan(layer, 0.0, jnp.array([0.5, 2.0]))[0]

    found, expected = (
        jax.jit(jax.grad(partial(loss, fn), argnums=(0, 1, 2, 3, 4)))(*args)
        for fn in (partial(tpu.patch_embed, launch=EVALUATED), reference.patch_embed)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_on_a_mesh_as_on_one_device():
    """Images split over two devices, parameters replicated, dropout on: gradients arrive summed, masks keyed by the global row."""
    images, *rest = arrays(2, 2, 2, 1, 4, 128)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def local(images, *rest):
        row = jax.lax.axis_index("data") * images.shape[0] * 5
        return tpu.patch_embed(images, *rest, dropout=Dropout(0.4, jnp.int32(9), row), launch=LAUNCH)

    split = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P(), P(), P()), out_specs=P("data"), check_vma=True)
    plain = partial(reference.patch_embed, dropout=Dropout(0.4, jnp.int32(9)))
    found, expected = (
        jax.jit(jax.value_and_grad(lambda *a, fn=fn: jnp.square(fn(*a)).sum(), argnums=(0, 1, 2, 3, 4)))(images, *rest)
        for fn in (split, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bad_input_is_refused_in_words():
    images, kernel, bias, cls, position = arrays(1, 2, 2, 3, 4, 64)
    run = partial(tpu.patch_embed, launch=LAUNCH)
    with pytest.raises(ValueError, match="patches of 4 do not tile images"):
        run(images[:, :-1], kernel, bias, cls, position)
    with pytest.raises(ValueError, match=r"kernel \[P, P, C, D\]"):
        run(images[..., :2], kernel, bias, cls, position)
    with pytest.raises(ValueError, match=r"position must be \(4, 64\)"):
        run(images, kernel, bias, None, position)
    with pytest.raises(ValueError, match="bias must be"):
        run(images, kernel, bias[:-1], cls, position)
    with pytest.raises(NotImplementedError, match="float32 and bfloat16 images, not float16"):
        run(images.astype(jnp.float16), kernel, bias, cls, position)
    with pytest.raises(NotImplementedError, match="MiB of VMEM"):
        run(images, kernel, bias, cls, position, launch=small(64 * 1024))
