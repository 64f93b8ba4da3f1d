"""The packed core: as exact as the reference in value and every gradient, whatever images share a grid step; where it is chosen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import reference, tpu
from kernels.attention.packed.core import Static, core
from kernels.attention.packed.tiles import PackedCore, packed_core
from kernels.attention.plan import Packed, Plan, choose, plan
from kernels.attention.tiling import Shape
from kernels.by_xla import ByXLA
from kernels.device import DEVICES
from kernels.dropout import Dropout
from kernels.launch import Launch
from tests import oracle

NAMES = ("x", *reference.AttentionWeights._fields)
SIMULATED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
RUN = jax.jit(core, static_argnums=0)
half = oracle.flat(tpu.attention_half, reference.AttentionWeights)
plain = oracle.flat(reference.attention_half, reference.AttentionWeights)


def arguments(b: int, t: int, d: int, k: int, dtype: str):
    random = np.random.default_rng(0)
    shapes = (b, t, d), (d,), (d,), (3, d, k), (3, k), (k, d), (d,)
    return [jnp.asarray(random.standard_normal(s) * (0.2 if n else 1.0), jnp.float32 if n else dtype) for n, s in enumerate(shapes)]


def packed_plan(shape: Shape, device: str, images: int, *, backward: bool = True) -> Plan:
    packed, own = Packed(core=PackedCore(images=images), reason="a test"), plan(shape, DEVICES[device])
    return Plan(head_lanes=shape.h, forward=packed, backward=packed if backward else own.backward)


@pytest.mark.parametrize(
    ("device", "b", "t", "heads", "dtype", "images", "tokens"),
    [
        ("v3", 11, 5, (2, 64), "bfloat16", 8, None),
        ("v5e", 9, 17, (3, 64), "bfloat16", 8, 15),
        pytest.param("v3", 3, 14, (2, 80), "bfloat16", 8, None, marks=pytest.mark.slow),
        pytest.param("v5e", 19, 7, (1, 128), "float32", 16, None, marks=pytest.mark.slow),
        pytest.param("v3", 3, 50, (2, 64), "float32", 8, 47, marks=pytest.mark.slow),
    ],
    ids=["5 tokens", "17 tokens and padding", "heads across columns", "heads of a column", "50 tokens"],
)
def test_half_agrees(device, b, t, heads, dtype, images, tokens):
    """Batches that leave the last step's images wanting, whose memory holds NaN; dropout; padding that no token sees."""
    n, h = heads
    args = arguments(b, t, 48, n * h, dtype)
    launch = Launch(device=DEVICES[device], interpret=SIMULATED)
    options = {"num_heads": n, "tokens": tokens, "dropout": Dropout(0.2, jnp.int32(3), 1000)}
    chosen = packed_plan(Shape(b, t, 48, n, h, jnp.dtype(dtype)), device, images)
    ours = partial(half, launch=launch, plan=chosen, **options)

    def cut(f):
        return lambda *a: f(*a)[:, :tokens]

    oracle.check(cut(ours), cut(partial(plain, **options)), args, names=NAMES)
    assert oracle.kernels_in(ours, *args) == ["attention_packed_forward"]
    of_both = oracle.kernels_in(jax.grad(lambda *a: ours(*a).astype(jnp.float32).sum()), *args)
    assert of_both == ["attention_packed_forward", "attention_packed_forward", "attention_packed_backward"]


@pytest.mark.parametrize("section", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_image(section, bad):
    """One token's, which is that image's reference's NaN too; of images that share its grid step nothing changes."""
    qkv = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 8, 64)), jnp.float32)
    static = Static(
        tiles=PackedCore(images=8), num_heads=1, tokens=5, dtype=jnp.float32, launch=Launch(device=DEVICES["v3"], interpret=True)
    )
    others = np.array([0, 1, 2, 4, 5, 6, 7])
    expected, found = RUN(static, qkv), RUN(static, qkv.at[section, 2, 3].set(bad))
    np.testing.assert_array_equal(found[:, others], expected[:, others])
    assert not np.isfinite(found[2, 3]).any()


@pytest.mark.parametrize(("t", "images"), [(5, 24), (7, 16), (14, 8), (17, 8)])
@pytest.mark.parametrize("device", ["v3", "v5e"])
def test_what_is_packed(device, t, images):
    """Few tokens forward; not where the batch fills no step, where heads are no whole registers, or with a core that fills VMEM."""
    shape = Shape(128, t, 768, 12, 64, jnp.dtype(jnp.bfloat16))
    forward = choose(shape, DEVICES[device]).forward
    assert isinstance(forward, Packed)
    assert forward.core.images == images
    for other in (shape._replace(b=7), shape._replace(n=64, h=12)):
        found = choose(other, DEVICES[device]).forward
        assert isinstance(found, ByXLA)
        assert not isinstance(found, Packed)
    assert packed_core(shape._replace(t=50), DEVICES["v3"]) is None
    assert not isinstance(choose(shape._replace(t=50), DEVICES[device]).forward, ByXLA)


@pytest.mark.slow
def test_one_pass_packed_and_the_other_by_kernels_is_the_half():
    args = arguments(8, 9, 32, 64, "float32")
    shape = Shape(8, 9, 32, 1, 64, jnp.dtype("float32"))
    chosen = packed_plan(shape, "v3", 8, backward=False)
    ours = partial(half, num_heads=1, launch=Launch(device=DEVICES["v3"], interpret=True), plan=chosen)
    oracle.check(ours, partial(plain, num_heads=1), args, names=NAMES)
    assert oracle.kernels_in(ours, *args) == ["attention_packed_forward"]
