"""The MLP half of a block (paper Eq. 3) as two TPU kernels; `reference.py` beside this file is the specification.

    forward     z = LN(x),  a = z W1 + b1,  h = drop(GELU(a)),  y = share x + drop(h W2 + share b2)
    backward    g = drop(dy),  dh = drop(g W2'),  da = dh GELU'(a)
                dW2 = h' g,  db2 = share sum g,  dW1 = z' da,  db1 = sum da,  dx = share dy + LN_back(da W1')

The hidden values [B*T, F] live only in VMEM, one tile of rows times one tile of F at a time; backward starts from x again, so x and
the weights are all that is saved. With keep=True a, rounded to x's dtype, is saved as well, in the order in which the kernels take
the rows: B*T*F values of HBM, written once and read once, for one of the five products of the backward pass. Matrix operands are in
x's dtype (float32 on v2 and v3, whose MXU rounds them itself), sums and everything between in float32.

The grid of both kernels is (row tiles, hidden tiles), rows outermost. Where VMEM holds both weights (v5 and later) they stay in it
and HBM sees each array once; elsewhere hidden tiles of them are streamed, and in the backward pass so are the sums dW1 and dW2, by
hand; where that leaves room for few rows, `outermost.py` has hidden tiles outermost. How x is cut: `plan.py`; the backward kernel:
`backward.py`. GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from kernels import by_xla, parts
from kernels import dropout as drop
from kernels.body import operand_dtype
from kernels.device import SUBLANES
from kernels.launch import Launch, call, vary_alike
from kernels.layer_norm.reference import EPS
from kernels.mlp import arriving, backward, forward, outermost
from kernels.mlp import kept as backward_kept
from kernels.mlp.body import block_specs
from kernels.mlp.plan import Outermost, Plan, Shape, Tiling, choose, cost
from kernels.mlp.plan import plan as kernels_of
from kernels.mlp.reference import GELUS, MLPWeights
from kernels.mlp.reference import mlp_half as reference
from kernels.settings import own
from kernels.stacked import WRITTEN_TOKENS, apart, cast, cotangent, in_place, places, taken, writable


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """Everything static: the static argument of the custom_vjp."""

    launch: Launch
    gelu: str
    rate: float
    residual_scale: float
    eps: float
    tokens: int | None = None


def _shape(x, w_in) -> Shape:
    b, t, d = x.shape
    return Shape(b, t, d, w_in.shape[1], x.dtype.itemsize)


def _weights(spec: _Spec, rounds: bool, x, w_in, w_out):
    """The kernels' weights: in their operands' dtype, or as they are where the kernels round them."""
    dtype = operand_dtype(x.dtype, spec.launch.device)
    return (w_in, w_out) if rounds else (cast(w_in, dtype), cast(w_out, dtype))


def _rows(v):
    """[..., K] or [..., 1, K] as eight equal rows, float32: what `by_tile` takes."""
    v = v if v.ndim > 1 else v[None]
    return jnp.broadcast_to(v.astype(jnp.float32), (*v.shape[:-2], SUBLANES, v.shape[-1]))


def _forward(spec: _Spec, plan: Plan, scalars, x, scale, bias, w_in, b_in, w_out, b_out):
    shape = _shape(x, w_in)
    t = plan.forward
    assert isinstance(t, Tiling)  # XLA's passes do not come here
    view, hidden_tiles = t.view(shape), t.grid(shape)[1]
    places = *view, shape.t, spec.tokens or shape.t
    in_specs, out_specs = forward.specs(t, shape)
    operands, operand = _weights(spec, plan.rounds, x, w_in, w_out), operand_dtype(x.dtype, spec.launch.device)
    x_rows = checkpoint_name(x.reshape(*view, shape.d), "mlp_half_in")
    y, *kept = call(
        partial(forward.kernel, spec=spec, t=t, view=places, hidden_tiles=hidden_tiles),
        launch=spec.launch.within(t.needs),
        name="mlp_half_forward",
        grid=t.grid(shape),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shapes=[((*view, shape.d), x.dtype), *([(t.kept(shape), x.dtype)] if t.keep else [])],
        semantics=("parallel", "arbitrary"),
        cost=cost(shape, t, backward=False),
        scratch=[*forward.scratch(t, shape.d, operand), *arriving.scratch(t, shape.d, shape.f, operands[0].dtype, operand)],
        prefetch=1,
    )(
        scalars,
        x_rows,
        _rows(scale),
        _rows(bias),
        operands[0],
        _rows(b_in.reshape(hidden_tiles, 1, t.hidden)),
        operands[1],
        _rows(b_out),
    )
    # Named inside the rule, so that a rematerialisation policy can choose to keep them.
    y = checkpoint_name(y.reshape(x.shape), "mlp_half_out")
    weights = (scale, bias, w_in, b_in, w_out, b_out)
    if kept:  # the backward kernel takes x in the same view: what XLA copies for it is not copied again
        saved = scalars, x_rows, checkpoint_name(kept[0], "mlp_half_hidden"), weights
    else:
        saved = scalars, checkpoint_name(x, "mlp_half_in"), None, weights
    return (y, taken(weights)), saved


def _backward(spec: _Spec, plan: Plan, saved, cotangents):
    (scalars, x, kept, weights), (dy, arrays) = saved, cotangents
    x = x.reshape(dy.shape)
    n = x.shape[0] // (plan.backward_images or x.shape[0])
    chosen = plan.backward
    assert isinstance(chosen, Tiling | Outermost)
    where = places(weights, arrays)
    written = [n == 1 and writable(place) for place in where]

    def step(first, dy):
        if n == 1:
            into = [place if ready else None for place, ready in zip(where, written, strict=True)]
            return _backward_part(spec, chosen, plan.rounds, scalars, x, dy, *weights, into=into, kept=kept)
        part, g = (lax.dynamic_slice_in_dim(a, first, x.shape[0] // n) for a in (x, dy))
        dx, sums = _backward_part(
            spec, chosen, plan.rounds, scalars.at[2].add(first * (spec.tokens or x.shape[1])), part, g, *weights
        )
        return lax.dynamic_update_slice_in_dim(dy, dx, first, 0), sums

    dx, sums = parts.backward(step, n, x, dy)
    # Without it XLA may write a sum straight into the layers' stacked gradients, and drops the kernel's limit of VMEM (v5e).
    apart = iter(lax.optimization_barrier([a for a, ready in zip(sums, written, strict=True) if not ready]))
    sums = [a if ready else next(apart) for a, ready in zip(sums, written, strict=True)]
    found = zip(weights, where, sums, written, strict=True)
    return None, dx, *(cotangent(w, place, a, written=ready) for w, place, a, ready in found)


def _backward_part(
    spec: _Spec, t, rounds: bool, scalars, x, dy, scale, bias, w_in, b_in, w_out, b_out, into=(None,) * 6, kept=None
):
    """(dx, the gradients of the parameters in float32). t: Tiling or Outermost. rounds: `Plan.rounds`. into: where each belongs;
    the whole array is returned then. kept: of the forward kernel."""
    if isinstance(t, Outermost):
        operands = _weights(spec, rounds, x, w_in, w_out)
        return outermost.backward(spec, t, scalars, x, dy, scale, bias, operands[0], b_in, operands[1], into=(into[2], into[4]))
    shape = _shape(x, w_in)
    d, f, view, (row_tiles, hidden_tiles) = shape.d, shape.f, t.view(shape), t.grid(shape)
    rows, vector, w_in_spec, w_out_spec = block_specs(t, shape, t.rows)
    if not t.resident:  # half the VMEM for a stall of some percent, once a row tile: the rows it makes room for are worth more
        rows = pl.BlockSpec(rows.block_shape, rows.index_map, pipeline_mode=pl.Buffered(1))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    operands, operand = _weights(spec, rounds, x, w_in, w_out), operand_dtype(x.dtype, spec.launch.device)
    body: Any = backward_kept if t.keep else backward
    hidden, bias_rows = pl.BlockSpec((1, t.hidden, 1), lambda i, j, _: (j, 0, 0)), SUBLANES if t.keep else 1
    if t.keep:
        hidden = pl.BlockSpec((1, t.height, t.hidden), lambda i, j, _: (i, 0, j))
    dx, dw_in, dw_out, db_in, db_out, dscale, dbias = call(
        partial(body.kernel, spec=spec, t=t, view=(*view, shape.t, spec.tokens or shape.t)),
        launch=spec.launch.within(t.needs),
        name="mlp_half_backward",
        grid=(row_tiles, hidden_tiles),
        in_specs=[rows, rows, vector, vector, w_in_spec, hidden, w_out_spec],
        out_specs=[
            in_hbm if t.shared else rows,
            in_hbm,
            in_hbm,
            pl.BlockSpec((hidden_tiles, bias_rows, t.hidden), lambda i, j, _: (0, 0, 0)),
            vector,
            vector,
            vector,
        ],
        out_shapes=[
            ((*view, d), x.dtype),
            into[2] or ((d, f), jnp.float32),
            into[4] or ((f, d), jnp.float32),
            ((hidden_tiles, bias_rows, t.hidden), jnp.float32),
            *[((SUBLANES, d), jnp.float32)] * 3,
        ],
        semantics=("arbitrary", "arbitrary"),
        cost=cost(shape, t, backward=True),
        scratch=[*body.scratch(t, d, hidden_tiles, operand), *arriving.scratch(t, d, f, operands[0].dtype, operand)],
        prefetch=1,
        aliases={2: 0},  # a row tile of dy is read before that of dx is written
    )(
        scalars,
        x.reshape(*view, d),
        dy.reshape(*view, d),
        _rows(scale),
        _rows(bias),
        operands[0],
        kept if t.keep else b_in.astype(jnp.float32).reshape(hidden_tiles, t.hidden, 1),
        operands[1],
    )
    return dx.reshape(x.shape), (dscale.sum(0), dbias.sum(0), dw_in, db_in.sum(1).reshape(f), dw_out, db_out.sum(0))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp_half(spec, plan, scalars, x, scale, bias, w_in, b_in, w_out, b_out):
    if plan.forward.keep:  # nobody differentiates
        plan = replace(plan, forward=replace(plan.forward, keep=False))
    return _forward(spec, plan, scalars, x, scale, bias, w_in, b_in, w_out, b_out)[0]


_mlp_half.defvjp(own(_forward), own(_backward))


def _check(x, weights: MLPWeights, gelu, dropout) -> None:
    if x.ndim != 3 or x.size == 0:
        raise ValueError(f"x has shape {x.shape}; mlp_half needs [B, T, D] with at least one row")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x is {x.dtype}; the kernel takes float32 or bfloat16: cast it, or use the reference")
    d, f = x.shape[-1], weights.in_kernel.shape[-1]
    required = (d,), (d,), (d, f), (f,), (f, d), (d,)
    for name, array, shape in zip(weights._fields, weights, required, strict=True):
        if array.shape != shape:
            given = f"x of shape {x.shape} and in_kernel of shape {weights.in_kernel.shape}"
            raise ValueError(f"mlp_half: {name} has shape {array.shape}; {given} need {shape}")
    if gelu not in GELUS:
        raise ValueError(f"gelu={gelu!r}; known: {', '.join(map(repr, GELUS))}")
    if dropout is not None and not 0.0 <= dropout.rate < 1.0:
        raise ValueError(f"dropout.rate is {dropout.rate}; it must be in [0, 1)")


def kept_bytes(b: int, t: int, d: int, f: int, dtype, *, launch: Launch) -> int | None:
    """The HBM that a call with keep=True keeps beside x [b, t, d] in `dtype`, with F = f; None where it refuses."""
    shape = Shape(b, t, d, f, jnp.dtype(dtype).itemsize)
    with contextlib.suppress(NotImplementedError):
        chosen = (kernels_of if launch.interpret else choose)(shape, launch.device, keep=True).forward
        assert isinstance(chosen, Tiling)
        return math.prod(chosen.kept(shape)) * shape.itemsize
    return None


def mlp_half(
    x,
    weights: MLPWeights,
    *,
    gelu="tanh",
    dropout=None,
    residual_scale=1.0,
    tokens=None,
    eps=EPS,
    keep: bool = False,
    launch: Launch,
    plan: Plan | None = None,
):
    """The MLP half of a block, as `reference.mlp_half` (shapes and meaning there), in one kernel forward and one backward.

    keep: keep the hidden values before their GELU for the backward pass, in x's dtype, instead of making them again.
    launch: where the kernels run. plan: how they are cut into steps, by default what `plan.plan` chooses; one that is given says
    itself what is kept. in_kernel and out_kernel may be `stacked.Stacked`: returned is (y, their arrays), or y alone where the
    batch is large, or they are lent. Differentiable in x and all weights. ValueError for input the op does not take;
    NotImplementedError for widths that no tiling fits on the device, and with keep where `kept_bytes` is None.
    """
    _check(x, weights, gelu, dropout)
    rate = 0.0 if dropout is None else float(dropout.rate)
    scalars = jnp.zeros(4, jnp.int32)
    if dropout is not None and rate:
        sites = (drop.site_key(dropout.key, drop.MLP_HIDDEN), drop.site_key(dropout.key, drop.MLP_OUT))
        scalars = jnp.stack([jnp.asarray(s, jnp.int32) for s in (*sites, dropout.row, dropout.column)])
    # interpreted, it is the kernels that are tried
    plan = plan or (kernels_of if launch.interpret else choose)(_shape(x, weights.in_kernel), launch.device, keep=keep)
    if any(by_xla.left(plan)):
        own = kernels_of(_shape(x, weights.in_kernel), launch.device)
        options = {"gelu": gelu, "residual_scale": residual_scale, "tokens": tokens, "eps": eps}
        return by_xla.partly(
            mlp_half, reference, own, x, apart(weights), dropout, plan=plan, launch=launch, name="mlp_half_out", options=options
        )
    dtype = operand_dtype(x.dtype, launch.device)
    whole = plan.backward_images in (None, x.shape[0]) and x.shape[0] * x.shape[1] <= WRITTEN_TOKENS
    weights = in_place(weights, write=whole, dtype=jnp.dtype(jnp.float32) if plan.rounds else dtype)
    spec = _Spec(launch=launch, gelu=gelu, rate=rate, residual_scale=float(residual_scale), eps=float(eps), tokens=tokens)
    arrays = vary_alike(scalars, x, *weights)
    y, stacks = _mlp_half(spec, plan, *arrays)  # type: ignore[misc]  # pyright cannot see through custom_vjp
    return (y, stacks) if stacks else y
