"""The attention half of a block as Pallas TPU kernels; `reference.py` in this folder is the specification.

    z = LN(x);  q, k, v = z w_qkv + b_qkv;  o = attention(q, k, v);  out = share x + dropout(o w_out + share b_out)

Backward saves x alone. With dy' the masked dy it recomputes z, q, k and v, then

    do = dy' w_out^T
    dqkv, o                       the backward pass of softmax attention
    dw_out = o^T dy', db_out
    dw_qkv = z^T dqkv, db_qkv
    dx = share dy + LN'(dqkv w_qkv^T), with the sums for norm_scale and norm_bias

Which kernels, by generation:
- v2 and v3 multiply float32 and stall where bfloat16 is packed: forward is one kernel where weights and an image fit VMEM
  (fused.py); backward a chain on float32 rows padded to whole registers (wide.py, wide_core.py), while whole rows of keys fit.
- Elsewhere, and for what does not fit: forward `project` and `output` (projections.py) around core.py, backward
  the same and gradients.py around core_backward.py. Blocks are whole rows of an image: nothing is padded or transposed in HBM.

The arrays between kernels pass through HBM while the MXU works; the batch is taken in parts, so that they take little room there.
The kernels find a part's images in the whole x and dy by the first one's number; dx takes the place of dy.
Operands are rounded where the reference rounds them, or not at all; sums, LN and softmax are float32, as are the gradients of the
parameters. Generations whose Mosaic takes no bfloat16 operands get float32 weights, which their MXU rounds.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import dropout as drop
from kernels import parts
from kernels.attention import core, fused, wide, wide_core
from kernels.attention.gradients import input_gradient, output_weights, projection_weights
from kernels.attention.projections import output, output_gradient, project
from kernels.attention.reference import AttentionWeights
from kernels.attention.tiling import Static
from kernels.device import Device
from kernels.launch import Launch, vary_alike

# Tokens at a time through the chains of kernels; between those of ViT-B/16 lie 6 kB a token forward, at most 16 kB backward.
FORWARD_ROWS = 65536
BACKWARD_ROWS = 24576


def _operand(w, dtype, device: Device):
    """A weight as the products take it: in the activations' dtype, or float32 where the MXU rounds float32 by itself."""
    return w.astype(dtype if device.bf16_matmul else jnp.float32)


def _forward(scalars, x, weights, static: Static, b: int | None = None, into=None):
    """b, into: b images of x, from image scalars[2] on, the results of the others being in `into`. By default all of them."""
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out = weights
    device = static.launch.device
    if _is_fused(x, w_out.shape[0], static):
        operands = _operand(w_qkv, x.dtype, device), b_qkv, _operand(w_out, x.dtype, device), b_out
        return fused.forward(
            scalars,
            x,
            norm_scale,
            norm_bias,
            *operands,
            num_heads=static.num_heads,
            width=static.width,
            rate=static.rate,
            residual_scale=static.residual_scale,
            launch=static.launch,
        )
    qkv = project(scalars, x, norm_scale, norm_bias, _operand(w_qkv, x.dtype, device), b_qkv, b or x.shape[0], static)
    o = core.forward(qkv, num_heads=static.num_heads, launch=static.launch, width=static.width)
    return output(scalars, o, x, _operand(w_out, x.dtype, device), b_out, static, into)


def _backward_wide(scalars, x, weights, dy, b: int, static: Static):
    """`_backward` on float32 rows."""
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, _ = weights
    device, launch, (_, t, d) = static.launch.device, static.launch, x.shape
    w_qkv, w_out = _operand(w_qkv, x.dtype, device), _operand(w_out, x.dtype, device)
    z, g = wide.prepare(scalars, x, dy, norm_scale, norm_bias, b, rate=static.rate, launch=launch)
    padded, k = z.shape[1], w_out.shape[0]

    def flat(value):
        return value.reshape(b * padded, value.shape[-1])

    multiply = partial(wide.multiply, dtype=x.dtype, launch=launch)
    gradients = partial(wide.gradients, dtype=x.dtype, launch=launch)
    qkv = [multiply([flat(z)], w_qkv[c, None], b_qkv[c], name="attention_project") for c in range(3)]
    do = multiply([flat(g)], w_out.T[None], name="attention_output_gradient")
    *dqkv, o = wide_core.backward(
        *(a.reshape(b, padded, k) for a in (*qkv, do)),
        t=t,
        num_heads=static.num_heads,
        width=static.width,
        dtype=x.dtype,
        launch=launch,
    )
    dqkv = [flat(a) for a in dqkv]
    dw_out, db_out = gradients(flat(o), flat(g), name="attention_output_weights")
    dw_qkv, db_qkv = zip(*(gradients(flat(z), a, name="attention_projection_weights") for a in dqkv), strict=True)
    dz = multiply(dqkv, w_qkv.swapaxes(1, 2), name="attention_input_gradient")
    dx, dscale, dbias = wide.finish(
        scalars, x, dy, dz.reshape(b, padded, d), norm_scale, residual_scale=static.residual_scale, launch=launch
    )
    return dx, (dscale[None], dbias[None], jnp.stack(dw_qkv), jnp.stack(db_qkv), dw_out, static.residual_scale * db_out)


def _is_fused(x, k: int, static: Static) -> bool:
    """Whether the forward half is one kernel."""
    return fused.fits((*x.shape, k), static.num_heads, static.launch.device, x.dtype)


def _is_wide(x, k: int, static: Static) -> bool:
    """Whether the backward half takes the kernels on float32 rows."""
    return wide_core.takes(x.shape[1], static.num_heads, k // static.num_heads, static.launch.device)


def _backward(scalars, x, weights, dy, b: int, static: Static):
    """dy with dx in its place for b images, from image scalars[2] on, and their share of the parameters' gradients, float32."""
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, _ = weights
    device = static.launch.device
    if _is_wide(x, w_out.shape[0], static):
        return _backward_wide(scalars, x, weights, dy, b, static)
    w_qkv, w_out = _operand(w_qkv, x.dtype, device), _operand(w_out, x.dtype, device)
    qkv = project(scalars, x, norm_scale, norm_bias, w_qkv, b_qkv, b, static)
    do = output_gradient(scalars, dy, w_out.T, b, static)
    dqkv, o = core.backward(qkv, do, num_heads=static.num_heads, launch=static.launch, width=static.width, with_o=True)
    dw_out, db_out = output_weights(scalars, o, dy, static)
    dw_qkv, db_qkv = projection_weights(scalars, x, norm_scale, norm_bias, dqkv, static)
    dx, dscale, dbias = input_gradient(scalars, x, norm_scale, dqkv, dy, w_qkv.swapaxes(1, 2), static)
    return dx, (dscale[None], dbias[None], dw_qkv, db_qkv, dw_out, db_out)


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _half(scalars, x, norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out, static: Static):
    n = 1 if _is_fused(x, w_out.shape[0], static) else parts.count(x, FORWARD_ROWS)
    weights = norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out
    if n == 1:
        return _forward(scalars, x, weights, static)
    step = lambda first, y: _forward(_part(scalars, first, x), x, weights, static, x.shape[0] // n, y)  # noqa: E731
    return parts.forward(step, n, x)


def _part(scalars, first, x):
    """The scalars of the part of x that begins with image `first`: its first row, among all of the job's, and that image."""
    return jnp.stack([scalars[0], scalars[1] + first * x.shape[1], first])


def _half_forward(scalars, x, *rest):
    *weights, static = rest
    y = checkpoint_name(_half(scalars, x, *weights, static), "attention_half")
    return y, (scalars, x, *weights)


def _half_backward(static: Static, residuals, dy):
    scalars, x, *weights = residuals
    wide_bytes = 2 if _is_wide(x, weights[4].shape[0], static) else 1
    n = parts.count(x, BACKWARD_ROWS // wide_bytes)
    step = lambda first, dy: _backward(_part(scalars, first, x), x, weights, dy, x.shape[0] // n, static)  # noqa: E731
    dx, gradients = parts.backward(step, n, x, dy)
    dtypes = (a.dtype for a in residuals[2:])
    return None, dx, *(g.astype(dtype) for g, dtype in zip(gradients, dtypes, strict=True))


_half.defvjp(_half_forward, _half_backward)


def attention_half(x, weights: AttentionWeights, *, num_heads, dropout=None, residual_scale=1.0, launch: Launch) -> Any:
    """The attention half of a block -> [B, T, D], as `reference.attention_half` (arguments and meaning there).

    launch: from `kernels.launch`. Differentiable in all arrays; saves x and the weights only. ValueError for shapes or dtypes that
    do not fit together; NotImplementedError for a shape that no tiles fit.
    """
    _check(x, weights, num_heads)
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out = weights
    rate = 0.0 if dropout is None else float(dropout.rate)
    key, row = (0, 0) if dropout is None or rate == 0.0 else (drop.site_key(dropout.key, drop.ATTENTION_OUT), dropout.row)
    scalars = jnp.stack([jnp.asarray(s, jnp.int32) for s in (key, row, 0)])
    width = w_out.shape[0] // num_heads
    lanes = core.head_lanes((*x.shape[:2], num_heads, width), launch.device, x.dtype)
    w_qkv, b_qkv, w_out = (_widen(w, axis, width, lanes) for w, axis in ((w_qkv, 2), (b_qkv, 1), (w_out, 0)))
    arrays = x, norm_scale[None], norm_bias[None], w_qkv, b_qkv[:, None], w_out, b_out[None]
    static = Static(num_heads=num_heads, width=width, rate=rate, residual_scale=float(residual_scale), launch=launch)
    return _half(*vary_alike(scalars, *arrays), static)


def _widen(w, axis: int, width: int, lanes: int):
    """A weight whose axis N*H becomes N*lanes, zeros after each head; differentiation cuts them off again."""
    if width == lanes:
        return w
    heads = w.reshape(*w.shape[:axis], -1, width, *w.shape[axis + 1 :])
    pads = [(0, lanes - width if a == axis + 1 else 0) for a in range(heads.ndim)]
    return jnp.pad(heads, pads).reshape(*w.shape[:axis], -1, *w.shape[axis + 1 :])


def _check(x, weights: AttentionWeights, num_heads: int) -> None:
    if x.ndim != 3 or min(x.shape) < 1 or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"attention_half: x is {x.dtype}{list(x.shape)}; required float32 or bfloat16 [B, T, D]")
    d, k = x.shape[2], weights.out_kernel.shape[0] if weights.out_kernel.ndim else 0
    if num_heads < 1 or k == 0 or k % num_heads:
        raise ValueError(f"attention_half: out_kernel has {k} rows; required N*H for num_heads = {num_heads}")
    required = (d,), (d,), (3, d, k), (3, k), (k, d), (d,)
    for name, array, shape in zip(weights._fields, weights, required, strict=True):
        if array.shape != shape:
            raise ValueError(f"attention_half: {name} has shape {array.shape}; required {shape} beside x {x.shape}")
