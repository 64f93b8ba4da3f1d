"""Patch embedding from bytes on a Hopper card, against float64; and a model's, with the ops told to take bytes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dropout as drop
from kernels.patch_embed import gpu, hopper, reference
from kernels.patch_embed.hopper_plan import refuses
from tests import oracle
from tests.kernels.test_patch_embed_hopper import arrays, shape

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]


CASES = [
    shape(224, 16, batch=3, width=768),
    shape(224, 14, batch=2, width=1280, extra=1),
    shape(224, 32, batch=5, width=256, cls=0),
    shape(384, 16, batch=2, width=128),
    shape(64, 8, batch=37, width=384),
    shape(16, 16, batch=1, width=128, cls=0),
    shape(224, 16, batch=67, width=768),  # more tiles than warpgroups
]


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("s", CASES, ids=str)
def test_tokens_of_bytes_and_every_gradient(s, rate):
    """Twice the error of the specification in the same dtype, both against float64, is the most that is allowed."""
    assert refuses(s, jnp.dtype(jnp.bfloat16)) is None
    images, given = arrays(s)
    names = ["kernel", "bias", "cls", "position"]
    here = [n for n, a in enumerate(given) if a is not None]
    dropout = drop.Dropout(rate, jnp.int32(5), 7) if rate else None

    def tokens(op, dtype=jnp.bfloat16):
        def run(*some):
            full: list = [None] * 4
            for n, a in zip(here, some, strict=True):
                full[n] = a
            wide = jnp.float64 if some[0].dtype == jnp.float64 else dtype  # where the oracle gives that
            return op(images, *full, dropout=dropout, dtype=wide, rows=s.tokens)[:, : s.end]

        return run

    args = [given[n] for n in here]
    assert "patch_embed_hopper" in str(jax.make_jaxpr(tokens(gpu.patch_embed))(*args))
    oracle.check(tokens(gpu.patch_embed), tokens(reference.patch_embed), args, names=[names[n] for n in here])


def test_the_same_every_time():
    """A race between the copies and the threads would show as numbers that change."""
    s = shape(224, 16, batch=64, width=768)
    images, (kernel, *rest) = arrays(s)
    run = jax.jit(partial(hopper.patch_embed, shape=s))
    first = np.asarray(run(images, kernel, *rest), np.float32)
    assert all((np.asarray(run(images, kernel, *rest), np.float32) == first).all() for _ in range(20))
