"""The forward half in one kernel, an image a grid step, for cores whose VMEM holds the weights and one image's projections.

    z = LN(x);  q, k, v = z w_qkv + b_qkv;  o = softmax(q k^T / sqrt(H)) v;  out = share x + dropout(o w_out + share b_out)

All of it is one straight line of code, so that the compiler may fill the latencies of one product with another. What makes it fast
on v2 and v3: everything in VMEM is float32 (a store that packs bfloat16 halts the MXU between products: projecting 200 rows takes
13.8k cycles into bfloat16 and 11.1k into float32, of 10.8k), x and out change their dtype by bit operations (rows.py), the keys
are transposed once for the heads that share their columns, and rows and keys are padded in VMEM to whole registers.
"""

import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import rows
from kernels.attention.heads import heads_of, round_up
from kernels.attention.wide import PIECE, parts, product, undrop
from kernels.attention.wide_core import attend
from kernels.device import LANES, SUBLANES, Device
from kernels.launch import Launch, call
from kernels.layer_norm.tpu import normalise

F32 = jnp.float32
# Bytes that the compiler spills for twelve heads of 197 tokens, by FLOPs a cycle: one MXU (v2) or two (v3). v2 used 17.3 of 16 MiB.
TEMPORARIES = {2**15: 9 * 2**19, 2**16: 3 * 2**20}


def fits(shape: tuple[int, int, int, int], heads: int, device: Device, dtype) -> bool:
    """Whether one image of shape (B, T, D, K) and all weights lie in VMEM together, on a core that this kernel is for."""
    _, t, d, k = shape
    if device.bf16_matmul or (k // heads) % SUBLANES:
        return False
    one, padded = round_up(t, SUBLANES), round_up(t, LANES)
    wide = [round_up(n, LANES) for n in (d, k)]
    weights = 4 * 4 * wide[0] * wide[1]
    blocks = 2 * 2 * round_up(t, 16) * wide[0] * jnp.dtype(dtype).itemsize
    scratch = 4 * (one * wide[0] + (2 * one + padded) * wide[1])
    # measured at ViT-B/16; rows in flight are D wide (four heads of ViT-H/14 took 3.8 MB where heads alone gave 2.1)
    temporaries = TEMPORARIES[device.flops_per_cycle] * (heads * one * padded) // (12 * 200 * 256) * max(d, 768) // 768
    return weights + blocks + scratch + temporaries <= device.vmem_bytes


def forward(
    scalars, x, norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out, *, num_heads, width, rate, residual_scale, launch: Launch
):
    """The half block of x [B, T, D]; weights as operands, vectors as rows. scalars: dropout key and first row."""
    b, t, d = x.shape
    n_lanes = w_out.shape[0]
    h, dtype = n_lanes // num_heads, x.dtype
    padded, keys = round_up(t, SUBLANES), round_up(t, LANES)
    factor = width**-0.5 * math.log2(math.e)
    runs = heads_of(n_lanes, h)

    def kernel(scalars, x, scale, bias, w_qkv, b_qkv, w_out, b_out, out, z, q, k, v):
        for a, n in rows.pieces(t, PIECE):
            normal, _ = normalise(rows.widen(x[0, a : a + n]))
            z[a : a + n] = normal * scale[...] + bias[...]
        if padded > t:
            z[t:] = jnp.zeros((padded - t, d), F32)
        if keys > padded:
            v[padded:] = jnp.zeros((keys - padded, n_lanes), F32)

        for run in runs:
            columns = slice(run[0].lo, run[-1].hi)
            for part in parts(columns.stop - columns.start):
                lanes = slice(columns.start + part.start, columns.start + part.stop)
                for section, target in enumerate((q, k, v)):
                    target[:padded, lanes] = product(z[...], w_qkv[section, :, lanes], dtype) + b_qkv[section, :, lanes]
        for run in runs:
            attend(run, q, k, v, t=t, factor=factor, dtype=dtype)

        for part in parts(d):
            z[:, part] = product(q[...], w_out[:, part], dtype) + residual_scale * b_out[:, part]
        for a, n in rows.pieces(t, PIECE):
            row = pl.program_id(0) * t + rows.token(a, n, dtype)
            y = undrop(z[a : a + n], scalars, row, rate)
            out[0, a : a + n] = rows.narrow(residual_scale * rows.widen(x[0, a : a + n]) + y, dtype)

    def whole(*block):
        return pl.BlockSpec(block, lambda i, _: (0,) * len(block), pipeline_mode=pl.Buffered(1))

    image = pl.BlockSpec((1, t, d), lambda i, _: (i, 0, 0))
    size = jnp.dtype(dtype).itemsize
    cost = pl.CostEstimate(
        flops=2 * b * t * (4 * d + 2 * t) * n_lanes,
        transcendentals=b * num_heads * t * t,
        bytes_accessed=2 * b * t * d * size + 16 * d * n_lanes,
    )
    return call(
        kernel,
        launch=launch,
        name="attention_forward",
        grid=(b,),
        in_specs=[
            image,
            whole(1, d),
            whole(1, d),
            whole(3, d, n_lanes),
            whole(3, 1, n_lanes),
            whole(n_lanes, d),
            whole(1, d),
        ],
        out_specs=[image],
        out_shapes=[(x.shape, dtype)],
        semantics=("parallel",),
        cost=cost,
        scratch=[pltpu.VMEM((padded, d), F32), *[pltpu.VMEM((r, n_lanes), F32) for r in (padded, padded, keys)]],
        prefetch=1,
    )(scalars, x, norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out)[0]
