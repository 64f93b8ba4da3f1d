"""The attention half with relative positions as Pallas TPU kernels; `reference.py` is the specification.

The products around the core are those of the half without positions (`general/`), the core is
`core.py`. Backward saves x and the weights alone. Where `plan.plan` finds no tiles, XLA compiles the specification:
`by_xla` gives the reason, for the line in which a run says what it runs on.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention import positional, tpu
from kernels.attention.general.forward import Static
from kernels.attention.plan import Plan, Refused
from kernels.attention.relative import core as relative_core
from kernels.attention.relative import plan as relative_plan
from kernels.attention.relative import reference as relative
from kernels.attention.relative.reference import RelativeWeights
from kernels.attention.tiling import RelativeTiles, Shape
from kernels.body import operand_dtype
from kernels.launch import Launch, vary_alike
from kernels.layer_norm.reference import EPS
from kernels.settings import own


def by_xla(shape: Shape, *, launch: Launch) -> str:
    """Why the half of this shape is XLA's and not a kernel's; "" where it is a kernel's."""
    chosen = relative_plan.plan(shape, launch.device)
    return chosen.reason if isinstance(chosen, Refused) else ""


# ---- the table of offsets, as the core takes it


def _laid_out(positions, tokens: int, queries: int, *, class_token: bool):
    """(positions [entries, K] transposed, an offset d at column anchor + d and zeros around; the class token's [1, K] or None)."""
    offsets = positions[:-1] if class_token else positions
    before = relative_plan.anchor(tokens, queries) - len(offsets) // 2
    after = relative_plan.length(tokens, queries) - before - len(offsets)
    return jnp.pad(offsets, ((before, after), (0, 0))).T, positions[-1:] if class_token else None


def _picked(table, own, like, tokens: int, queries: int):
    """The inverse of `_laid_out`, of gradients: [entries, K]."""
    offsets = len(like) - (own is not None)
    first = relative_plan.anchor(tokens, queries) - offsets // 2
    return jnp.concatenate([table[:, first : first + offsets].T, *([] if own is None else [own])])


def _core_forward(tiles: RelativeTiles, qkv, positions, *, class_token: bool, num_heads: int, launch: Launch):
    positions = positions.astype(qkv.dtype).astype(operand_dtype(qkv.dtype, launch.device))
    table, own = _laid_out(positions, qkv.shape[2], tiles.queries, class_token=class_token)
    return relative_core.forward(tiles, qkv, table, own, num_heads=num_heads, launch=launch)


def _core_backward(tiles: RelativeTiles, qkv, positions, do, *, class_token: bool, with_o: bool, num_heads: int, launch: Launch):
    rounded = positions.astype(qkv.dtype).astype(operand_dtype(qkv.dtype, launch.device))
    table, own = _laid_out(rounded, qkv.shape[2], tiles.queries, class_token=class_token)
    options = {"num_heads": num_heads, "launch": launch, "with_o": with_o}
    dqkv, o, dtable, down = relative_core.backward(tiles, qkv, table, own, do, **options)
    return dqkv, o, _picked(dtable, down, positions, qkv.shape[2], tiles.queries)


# ---- the half


class _Offsets(NamedTuple):
    """The `positional.Core` of relative positions, whose table is learned."""

    class_token: bool

    def tables(self, tokens: int, width: int):
        return None

    def forward(self, tiles, qkv, table, static: Static):
        return _core_forward(tiles, qkv, table, **self._options(static))

    def backward(self, tiles, qkv, do, table, static: Static):
        return _core_backward(tiles, qkv, table, do, with_o=True, **self._options(static))

    def _options(self, static: Static) -> Any:
        return {"num_heads": static.num_heads, "launch": static.launch, "class_token": self.class_token}


def attention_half(
    x,
    weights: RelativeWeights,
    *,
    num_heads,
    class_token,
    dropout=None,
    residual_scale=1.0,
    tokens=None,
    eps=EPS,
    launch: Launch,
    plan: Plan | None = None,
) -> Any:
    """The attention half with relative positions -> [B, T, D], as `relative.attention_half` (arguments and meaning there).

    launch: from `kernels.launch`. plan: which kernels run and how, by default what `plan.plan` chooses, which may be XLA.
    Differentiable in x and all weights; the kernels save x and the weights only. ValueError for shapes or dtypes that do not fit
    together.
    """
    if tokens not in (None, x.shape[1]):  # the kernels know no padding
        options = {"dropout": dropout, "residual_scale": residual_scale, "eps": eps, "launch": launch, "plan": plan}
        y = attention_half(x[:, :tokens], weights, num_heads=num_heads, class_token=class_token, **options)
        return jnp.pad(y, ((0, 0), (0, x.shape[1] - tokens), (0, 0)))
    tpu.check_half(x, weights.half, num_heads)
    relative.check(weights.positions, x.shape[1], class_token=class_token)
    shape = tpu.shape_of(x, weights.half, num_heads)
    chosen: Any = plan or relative_plan.plan(shape, launch.device)
    options: Any = {"num_heads": num_heads, "dropout": dropout, "residual_scale": residual_scale, "eps": eps}
    if isinstance(chosen, Refused):
        return relative.attention_half(x, weights, class_token=class_token, **options)
    return positional.half(x, weights.half, weights.positions, _Offsets(bool(class_token)), chosen, launch=launch, **options)


# ---- attention by itself


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _attention(qkv, positions, num_heads, class_token, launch, forward: RelativeTiles, backward: RelativeTiles):
    options: Any = {"num_heads": num_heads, "class_token": class_token, "launch": launch}
    return _core_forward(forward, qkv, positions, **options)


def _attention_backward(num_heads, class_token, launch, forward, backward, residuals, do):
    qkv, positions = residuals
    options: Any = {"num_heads": num_heads, "class_token": class_token, "launch": launch}
    dqkv, _, found = _core_backward(backward, qkv, positions, do, with_o=False, **options)
    return dqkv, found.astype(positions.dtype)


_attention.defvjp(
    own(lambda qkv, positions, *static: (_attention(qkv, positions, *static), (qkv, positions))), own(_attention_backward)
)


def attention(
    qkv, positions, num_heads: int, *, class_token: bool, launch: Launch, tiles: tuple[RelativeTiles, RelativeTiles] | None = None
) -> Any:
    """Softmax attention with relative positions: qkv [3, B, T, N*H] and positions [entries, N*H] -> [B, T, N*H].

    float32 or bfloat16, differentiable in both. tiles: forward and backward, by default the plan's. ValueError for another shape or
    dtype; NotImplementedError where no tiles fit.
    """
    if qkv.ndim != 4 or qkv.shape[0] != 3 or min(qkv.shape) < 1 or num_heads < 1 or qkv.shape[-1] % num_heads:
        raise ValueError(f"attention: qkv has shape {qkv.shape}; required [3, B, T, N*H] with N = num_heads = {num_heads}")
    if qkv.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"attention: qkv is {qkv.dtype}; required float32 or bfloat16")
    _, b, t, k = qkv.shape
    relative.check(positions, t, class_token=class_token)
    shape = Shape(b, t, k, num_heads, k // num_heads, jnp.dtype(qkv.dtype))
    choose = partial(relative_plan.core_tiles, shape, launch.device)
    forward, backward = tiles or (choose(backward=False), choose(backward=True))
    qkv, positions = vary_alike(qkv, positions)
    return _attention(qkv, positions, num_heads, bool(class_token), launch, forward, backward)
