"""An op's pass by XLA where a plan says so: where that takes fewer cycles than the kernels do, by the one count of both.

The forward and the backward pass are chosen each for itself. Kept between them is what the kernels keep, x and the weights: XLA's
backward pass recomputes what it needs. What it has in memory meanwhile is bounded by taking a large batch in parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels import parts
from kernels.device import Device
from kernels.dropout import Dropout
from kernels.launch import vary_alike
from kernels.settings import own

ROWS = 24576  # tokens at a time
UNHOISTED_ROWS = 4096  # at most, for which a product casts its weights itself: it does so again for every tile of rows
FEW_TOKENS = 24  # of an image, at most, with which XLA's products are ahead forward
VERY_FEW_TOKENS = 8  # at most, with which they are ahead backward too; the attention kernels take minutes to compile there


@dataclass(frozen=True, kw_only=True)
class ByXLA:
    """In a plan, a pass that is left to XLA, the reference's, and why."""

    reason: str


def few_tokens(t: int) -> tuple[ByXLA | None, ByXLA | None]:
    """The forward and the backward pass of a half block where images have few tokens."""
    few = ByXLA(reason=f"images of {t} tokens: grid steps of so few rows, each padded, wait for themselves")
    return few if t <= FEW_TOKENS else None, few if t <= VERY_FEW_TOKENS else None


def left(chosen) -> tuple[bool, bool]:
    """Whether the forward and whether the backward pass of a plan is XLA's."""
    return isinstance(chosen.forward, ByXLA), isinstance(chosen.backward, ByXLA)


def choose(
    plan: Callable,
    shape,
    device: Device,
    *,
    keep: bool,
    few: Callable = lambda shape, device: few_tokens(shape.t),
    beyond: Callable = lambda chosen: chosen,
) -> Any:
    """`plan(shape, device)`, the kernels', with the passes left to XLA where images have few tokens, as `few(shape, device)` says,
    else as `beyond` leaves them, given that plan. keep: `plan(..., keep=True)`; NotImplementedError where a pass would be XLA's,
    but that a kernel's backward pass has its own forward pass then where the MXU takes bfloat16."""
    chosen = plan(shape, device)
    forward, backward = few(shape, device)
    if keep and device.bf16_matmul and not backward:  # the kernels, which keep: not yet counted against this forward pass
        forward = None
    if forward or backward:
        chosen = replace(chosen, forward=forward or chosen.forward, backward=backward or chosen.backward)
    else:
        chosen = beyond(chosen)
    if keep and any(left(chosen)):
        raise NotImplementedError("nothing is kept between kernels where a pass is left to XLA")
    return plan(shape, device, keep=True) if keep else chosen


@dataclass(frozen=True)
class Passes:
    """Two functions (x, weights, dropout) -> y that compute the same, `reference` by XLA and `kernels`.

    forward, backward: whether the pass is XLA's. name: of the result, for a rematerialisation policy. tokens: of an image, if the
    rows of x are more. whole: `reference` takes a large batch in parts by itself, by a plan for all its images. read: of the
    weights, what the forward pass by XLA is given of them.
    """

    reference: Callable
    kernels: Callable
    forward: bool
    backward: bool
    name: str
    tokens: int | None = None
    whole: bool = False
    read: Callable = lambda weights: weights


def partly(half: Callable, reference: Callable, own, x, weights, dropout, *, plan, launch, name: str, options: dict[str, Any]):
    """A half block with the passes by XLA that `plan` leaves to it, the others by kernels.

    half, reference: the op by kernels and as einsum. own: the kernels' plan, which stands in for the passes that are XLA's. name:
    as in `Passes`. options: of both, "tokens" among them.
    """
    forward, backward = left(plan)
    plan = replace(plan, forward=own.forward if forward else plan.forward, backward=own.backward if backward else plan.backward)

    def plain(x, w, dropout):
        return reference(x, w, dropout=dropout, **options)

    def kernels(x, w, dropout):
        return half(x, w, dropout=dropout, launch=launch, plan=plan, **options)

    read = partial(unhoisted, dtype=x.dtype) if x.shape[0] * x.shape[1] <= UNHOISTED_ROWS else lambda weights: weights
    return run(Passes(plain, kernels, forward, backward, name, options["tokens"], read=read), x, weights, dropout)


def unhoisted(weights, dtype):
    """A half block's weights, in whose loop XLA shall not cast those of all layers before the first.

    XLA moves a cast over the slice that a loop over stacked layers takes of them, and out of the loop: the weights are then read as
    float32, written and read as bfloat16. With few rows that is a fifth of all. Rounded first, as the cast rounds them, they stay
    where they are, and the product casts what it reads.
    """
    if dtype != jnp.bfloat16:
        return weights
    kernels = {name: w for name, w in weights._asdict().items() if name.endswith("kernel") and w.dtype == jnp.float32}
    return weights._replace(**{name: lax.reduce_precision(w, 8, 7) for name, w in kernels.items()})


def run(passes: Passes, x, weights, dropout):
    """The op on (x, weights, dropout) by the passes, differentiable in x and weights."""
    x, weights = vary_alike(x, weights)
    rate, places = (0.0, (0, 0, 0)) if dropout is None else (float(dropout.rate), dropout[1:])
    return _run(passes, rate, x, weights, places)


def _part(passes: Passes, rate: float, places, first, n: int, *arrays):
    """(The dropout of the part of 1/n of the batch that begins with image `first`, that part of each array)."""
    arrays = [a if n == 1 else lax.dynamic_slice_in_dim(a, first, a.shape[0] // n) for a in arrays]
    key, row, column = places
    row = row + first * (passes.tokens or arrays[0].shape[1])
    return (Dropout(rate, key, row, column) if rate else None), *arrays


def _parts(passes: Passes, x) -> int:
    return 1 if passes.whole else parts.count(x.shape[0], x.shape[1], ROWS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(passes: Passes, rate: float, x, weights, places) -> Any:
    n, op = (_parts(passes, x), passes.reference) if passes.forward else (1, passes.kernels)
    weights = passes.read(weights) if passes.forward else weights

    def step(first, y):
        dropout, own = _part(passes, rate, places, first, n, x)
        return lax.dynamic_update_slice_in_dim(y, op(own, weights, dropout), first, 0)

    if n == 1:
        return op(x, weights, _part(passes, rate, places, 0, 1, x)[0])
    return parts.forward(step, n, x)


def _forward(passes, rate, x, weights, places):
    return checkpoint_name(_run(passes, rate, x, weights, places), passes.name), (x, weights, places)


def _backward(passes, rate, saved, dy):
    x, weights, places = saved
    # Without it XLA keeps what the forward pass computed, and casts all layers' weights before the first: there is no room for it.
    x, weights, dy = lax.optimization_barrier((x, weights, dy))
    n, op = (_parts(passes, x), passes.reference) if passes.backward else (1, passes.kernels)

    def step(first, dy):
        dropout, own, g = _part(passes, rate, places, first, n, x, dy)
        _, pullback = jax.vjp(lambda x, w: op(x, w, dropout), own, weights)
        dx, sums = pullback(g)
        return (dx if n == 1 else lax.dynamic_update_slice_in_dim(dy, dx, first, 0)), sums

    return *parts.backward(step, n, x, dy), None


_run.defvjp(own(_forward), own(_backward))
