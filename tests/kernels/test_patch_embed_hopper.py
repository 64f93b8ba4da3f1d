"""Patch embedding from bytes on Hopper GPUs where no card is: its bookkeeping against the reference, its gradients, its lowering.

The kernel's numbers are compared on a card (tests/gpu/test_patch_embed.py, `make test-gpu`).
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.attention.hopper.plan import SHARED
from kernels.dropout import Dropout
from kernels.patch_embed import gpu, hopper, hopper_plan, reference
from kernels.patch_embed.hopper_plan import BOX, COLUMNS, MADE, ROWS, UNIT, Shape, plan, refuses

SIZES = [(224, 16), (224, 14), (224, 32), (384, 16), (64, 8), (256, 16)]  # pixels, patch
SMALL = Shape(batch=3, channels=3, rows=5, columns=4, patch=8, width=128, tokens=22, first=1)


def shape(side, patch, *, batch=2, width=128, cls=1, channels=3, extra=0):
    q = side // patch
    t = q * q + cls + extra
    return Shape(batch=batch, channels=channels, rows=q, columns=q, patch=patch, width=width, tokens=t, first=cls)


def arrays(s: Shape, seed=0):
    """(images, [kernel, bias, cls, position]) of the op."""
    r = np.random.default_rng(seed)
    images = jnp.asarray(r.integers(0, 256, (s.batch, s.rows * s.patch, s.columns * s.patch, s.channels)), jnp.uint8)
    k = s.patch * s.run
    sizes = ((s.patch, s.patch, s.channels, s.width), (s.width,), *([(s.width,)] * s.first), (s.end, s.width))
    kernel, *rest = (jnp.asarray(r.standard_normal(size), jnp.float32) for size in sizes)
    return images, [kernel * k**-0.5, *rest] if s.first else [kernel * k**-0.5, rest[0], None, rest[1]]


@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize(("side", "patch"), SIZES)
def test_a_plan_fits_shared_memory_its_copies_and_wgmma(side, patch, cls):
    s = shape(side, patch, cls=cls)
    p = plan(s)
    assert p is not None
    row = p.lines * s.line
    assert patch % p.lines == 0 == row % p.box
    assert p.box % UNIT == 0 == p.bands * row % 128
    assert max(p.box, p.bands, row // p.box, p.lines * s.padded) <= BOX
    assert p.lines * s.padded % (p.swizzle // 2) == 0
    assert 2 * p.stages * (p.bands * row + 2 * p.lines * s.padded * COLUMNS) + 2 * 2 * MADE * 64 * 64 <= SHARED


def gathered(s: Shape, images):
    """What the threads make of the bytes, in the kernel's order: [B * T, P * padded], by the addresses of `hopper.operand`."""
    p = plan(s)
    assert p is not None
    where, steps, row = hopper.places(s, p), s.padded // UNIT, p.lines * s.line
    flat = np.asarray(images).reshape(s.batch * s.rows, s.patch // p.lines, row)
    flat = np.concatenate([flat, np.zeros((p.bands, *flat.shape[1:]), np.uint8)])  # a copy past the end brings zeros
    made = np.zeros((len(where), s.patch // p.lines, p.lines, steps, 2, 4, 2), np.float32)
    for tile in range(len(where) // ROWS):
        token = tile * ROWS % s.tokens
        band = tile * ROWS // s.tokens * s.rows + max(token - s.first, 0) // s.columns  # as the loader has it
        for k in range(flat.shape[1]):
            one = np.concatenate([flat[min(band, len(flat) - p.bands) :][: p.bands, k].reshape(-1), np.zeros(64, np.uint8)])
            line, step, half, lane, pair = np.ogrid[: p.lines, :steps, :2, :4, :2]
            within = line * s.line + 4 * step + lane * (s.padded // 4) + 2 * half + pair
            mine = where[tile * ROWS : (tile + 1) * ROWS].reshape(-1, 1, 1, 1, 1, 1)
            taken = one[np.maximum(mine, 0) + within].astype(np.float32)
            made[tile * ROWS : (tile + 1) * ROWS, k] = np.where(mine < 0, 0, taken - 128)
    return made.reshape(len(where), -1)[: s.batch * s.tokens]


@pytest.mark.parametrize("s", [SMALL, shape(56, 14, batch=9), shape(64, 16, batch=5, cls=0)], ids=str)
def test_bytes_meet_their_weights(s):
    images, (kernel, bias, cls, _) = arrays(s)
    p = plan(s)
    v = np.asarray(hopper.weights(kernel, s, p), np.float32)
    found = (gathered(s, images) @ v).reshape(s.batch, s.tokens, s.width)
    found[:, s.first : s.end] += 0.5 * v.sum(0)
    none = jnp.zeros_like(bias)
    true = np.asarray(reference.patch_embed(images, kernel, none, cls, None, dtype=jnp.float32))
    np.testing.assert_allclose(found[:, s.first : s.end], true[:, s.first :], atol=2**-8 * 4)
    assert not found[:, : s.first].any()
    assert not found[:, s.end :].any()


@pytest.mark.parametrize("dropout", [None, Dropout(0.25, jnp.int32(3), 40)], ids=str)
@pytest.mark.parametrize("cls", [0, 1])
def test_gradients(cls, dropout):
    """The backward pass is XLA's on every device: of the same bytes, against the reference's in float32."""
    s = shape(32, 8, batch=3, width=128, cls=cls, extra=cls)
    images, given = arrays(s)
    g = jnp.asarray(np.random.default_rng(1).standard_normal((s.batch, s.tokens, s.width)), jnp.float32)
    names = [n for n, a in enumerate(given) if a is not None]

    def whole(op, *some):
        full: list = [None] * 4
        for n, a in zip(names, some, strict=True):
            full[n] = a
        return op(images, *full, dropout=dropout)

    args = [given[n] for n in names]
    true = jax.vjp(partial(whole, partial(reference.patch_embed, dtype=jnp.float32, rows=s.tokens)), *args)[1](g)
    replaced = pytest.MonkeyPatch()
    with replaced.context() as m:  # no card: zeros forward
        m.setattr(hopper, "_tokens", lambda f, images, v, added, *mask: jnp.zeros((s.batch * s.tokens, s.width), jnp.float32))
        found = jax.vjp(partial(whole, partial(hopper.patch_embed, shape=s)), *args)[1](g)
    for a, b in zip(found, true, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def lowered(f, *args) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("options", [{}, {"dropout": Dropout(0.1, jnp.int32(1), 5)}], ids=["", "dropout"])
def test_the_kernel_lowers_and_is_taken_where_a_hopper_card_is(monkeypatch, options):
    monkeypatch.setattr(hopper_plan, "not_hopper", lambda: None)
    images, given = arrays(SMALL)
    run = partial(gpu.patch_embed, dtype=jnp.bfloat16, rows=SMALL.tokens, **options)
    assert "mosaic_gpu" in lowered(run, images, *given)
    assert "patch_embed_hopper" not in str(jax.make_jaxpr(partial(run, dtype=jnp.float32))(images, *given))
    mesh = jax.make_mesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])

    def gradients(images, *given):
        value, found = jax.value_and_grad(lambda w: run(images, *w).astype(jnp.float32).sum())(given)
        return value[None], found

    split = jax.shard_map(gradients, mesh=mesh, in_specs=(P("data"), *[P()] * 4), out_specs=(P("data"), (P(),) * 4))
    text = lowered(split, images, *given)
    assert "mosaic_gpu" in text
    assert "all_reduce" in text


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({}, None),
        ({"width": 192}, "tokens of 192"),
        ({"patch": 7}, "21 bytes"),
        ({"columns": 37, "rows": 37, "patch": 14}, "units of 16 bytes"),
    ],
)
def test_which_images_are_refused_and_why(monkeypatch, changes, because):
    monkeypatch.setattr(hopper_plan, "not_hopper", lambda: None)
    why = refuses(replace(SMALL, **changes), jnp.bfloat16)
    assert why is None if because is None else because in why
    assert "float32" in refuses(SMALL, jnp.float32)


def test_elsewhere_bytes_are_made_floats():
    images, given = arrays(SMALL)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = gpu.patch_embed(images, *given, dtype=dtype, rows=SMALL.tokens)
        assert not np.asarray(found[:, SMALL.end :]).any()
        found = found[:, : SMALL.end]
        true = gpu.patch_embed(reference.to_unit(images).astype(dtype), *given)
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(true, np.float32))
