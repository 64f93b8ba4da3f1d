"""Patch embedding from bytes on Hopper GPUs where no card is: its bookkeeping against the reference, its gradients, its lowering.

The kernel's numbers are compared on a card (tests/gpu/test_patch_embed.py, `make test-gpu`).
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import dropout as drop
from kernels.attention.hopper.plan import SHARED
from kernels.dropout import Dropout
from kernels.patch_embed import gpu, hopper, hopper_plan, reference
from kernels.patch_embed.hopper_plan import BOX, COLUMNS, MADE, ROWS, UNIT, Shape, plan, refuses
from tests import oracle

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
    # weights of a mean, so that it shows where the middle of the bytes lies
    kernel, *rest = (jnp.asarray(r.standard_normal(size), jnp.float32) for size in sizes)
    return images, [(kernel + 1) * k**-0.5, *rest] if s.first else [(kernel + 1) * k**-0.5, rest[0], None, rest[1]]


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
    where, row, slices = hopper.places(s, p), p.lines * s.line, s.patch // p.lines
    first = np.arange(len(where)) // ROWS * ROWS
    band = first // s.tokens * s.rows + np.maximum(first % s.tokens - s.first, 0) // s.columns  # as the loader has it
    line, step, half, lane, pair = np.ogrid[: p.lines, : s.padded // UNIT, :2, :4, :2]
    within = line * s.line + 4 * step + lane * (s.padded // 4) + 2 * half + pair
    at = np.maximum(where, 0).reshape(-1, 1, 1, 1, 1, 1) + within  # in a slice: [rows, lines, steps, halves, lanes, pairs]
    assert at.max() < p.bands * row + UNIT
    bands = band.reshape(-1, 1, 1, 1, 1, 1) + at // row
    k = np.arange(slices).reshape(1, -1, 1, 1, 1, 1, 1)
    place = (bands[:, None] * slices + k) * row + (at % row)[:, None]
    size = s.batch * s.rows * slices * row
    byte = jnp.where(place < size, images.reshape(-1)[np.minimum(place, size - 1)], 0)  # a copy past the end brings zeros
    made = jnp.where((where < 0).reshape(-1, 1), 0.0, byte.reshape(len(where), -1).astype(jnp.float32) - 128)
    return made[: s.batch * s.tokens]


def emulated(f, images, v, added, *mask):
    """`hopper._tokens` in float32, without a card."""
    s = f.shape
    y = gathered(s, images) @ v.astype(jnp.float32) + jnp.tile(added, (s.batch, 1))
    if mask:
        hashed, columns = mask
        kept = drop.keep(hashed[: len(y), None], columns, f.drops.rate)
        y = jnp.where(kept, y / (1 - f.drops.rate), 0.0)
    return y


@pytest.mark.parametrize(
    ("s", "dropout"),
    [
        (SMALL, Dropout(0.25, jnp.int32(3), 40)),
        (shape(56, 14, batch=17), None),
        (shape(64, 16, batch=9, cls=0), None),
        (shape(32, 8, cls=0), Dropout(0.25, jnp.int32(3), 40)),
    ],
    ids=str,
)
def test_tokens_and_gradients(monkeypatch, s, dropout):
    """All but what a card must show: bytes meet their weights, and XLA's backward pass, against the reference in float32."""
    monkeypatch.setattr(hopper, "_tokens", emulated)
    images, given = arrays(s)
    names = [n for n, a in enumerate(given) if a is not None]
    args = [given[n] for n in names]
    g = jnp.asarray(np.random.default_rng(1).standard_normal((s.batch, s.tokens, s.width)), jnp.float32)

    def both(op):
        def whole(*some):
            full: list = [None] * 4
            for n, a in zip(names, some, strict=True):
                full[n] = a
            return op(images, *full, dropout=dropout)

        value, pull = jax.vjp(whole, *args)
        return value, *pull(g)

    found: Any = both(partial(hopper.patch_embed, shape=s))
    true: Any = both(partial(reference.patch_embed, dtype=jnp.float32, rows=s.tokens))
    np.testing.assert_allclose(found[0][:, : s.end], true[0][:, : s.end], atol=2**-6)  # weights in bfloat16
    assert np.abs(found[0][:, : s.end] - true[0][:, : s.end]).mean() < 2**-9
    for a, b in zip(found[1:], true[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("s", [shape(64, 8, batch=5), shape(16, 16, batch=3, cls=0)], ids=str)
def test_what_dropout_leaves_of_a_gradient_is_summed_in_float32(monkeypatch, s):
    """By the one tolerance, in bfloat16: the masked gradient is rounded as an operand, not in the sums over images."""
    monkeypatch.setattr(hopper, "_tokens", lambda *some: emulated(*some).astype(jnp.bfloat16))
    images, given = arrays(s)
    names = ["kernel", "bias", "cls", "position"] if s.first else ["kernel", "bias", "position"]

    def of(op):
        def run(*some):
            dtype = jnp.float64 if some[0].dtype == jnp.float64 else jnp.bfloat16  # where the oracle gives that
            cls = some[2] if s.first else None
            return op(dtype)(images, *some[:2], cls, some[-1], dropout=Dropout(0.1, jnp.int32(5), 7))

        return run

    ours = of(lambda _: partial(hopper.patch_embed, shape=s))
    plain = of(lambda dtype: partial(reference.patch_embed, dtype=dtype, rows=s.tokens))
    oracle.check(ours, plain, [a for a in given if a is not None], names=names)


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
        def total(w):
            y: Any = run(images, *w)
            return y.astype(jnp.float32).sum()

        value, found = jax.value_and_grad(total)(given)
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
    assert "float32" in str(refuses(SMALL, jnp.float32))


def test_elsewhere_bytes_are_made_floats():
    images, given = arrays(SMALL)
    for dtype in (jnp.float32, jnp.bfloat16):
        found: Any = gpu.patch_embed(images, *given, dtype=dtype, rows=SMALL.tokens)
        assert not np.asarray(found[:, SMALL.end :]).any()
        found = found[:, : SMALL.end]
        true = gpu.patch_embed(reference.to_unit(images).astype(dtype), *given)
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(true, np.float32))
