"""How the matrix products of the attention half are cut into grid steps, and what they cost: plain arithmetic, no arrays."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.device import LANES, Device
from kernels.launch import Launch

ROWS = 400  # rows a grid step: the start of a step and the LN of its first image are paid once
LONG = 640  # an image of more tokens is cut into tiles of this many rows


@dataclass(frozen=True, kw_only=True)
class HalfTiles:
    """images, rows (T: all) and columns of the weights a grid step; sections of w_qkv (3 or 1) a step."""

    images: int
    rows: int
    columns: int
    sections: int = 1
    needs: int = 0  # bytes of VMEM


@dataclass(frozen=True, kw_only=True)
class Static:
    num_heads: int
    width: int  # of a head, H; the arrays may hold more lanes a head, the rest zero
    rate: float
    residual_scale: float
    launch: Launch


# The six matrix-product kernels: how many sections of weights they have, and whether the columns of their weights are D (or K).
STEPS = {
    "project": (3, False),
    "output": (1, True),
    "output_gradient": (1, False),
    "input_gradient": (3, False),
    "output_weights": (1, True),
    "projection_weights": (3, False),
}
WEIGHTS = ("output_weights", "projection_weights")  # these sum over the batch


def tiles(step: str, shape: tuple[int, int, int, int], device: Device, dtype) -> HalfTiles:
    """Tiles of one of the `STEPS` for shape (B, T, D, K).

    Weights, or the sums for their gradients, resident in VMEM if they fit, several images a step; else column tiles of them, and as
    many images as hide their transfer. NotImplementedError where not even 128 rows and 128 columns fit.
    """
    b, t, d, k = shape
    size = jnp.dtype(dtype).itemsize
    wide = 2 if device.bf16_matmul and size == 2 else 4  # bytes of a weight and of a cast activation
    parts, of_d = STEPS[step]
    full = d if of_d else k

    def bytes_of(images, rows, n, sections):
        """Weights, pipelined blocks of tokens (twice), scratch, and the temporaries."""
        one = -(-rows // 16) * 16
        r, m = images * one, sections * n
        several = r if one <= LANES else one  # where the compiler works on several short images at once
        w = m * (1 if (n, sections) == (full, parts) else 2)
        return {
            "project": w * d * wide + 2 * r * size * (d + m) + r * d * wide + 4 * one * (2 * d + 2 * n),
            "output": w * k * wide + 2 * r * size * (k + 2 * n) + 4 * several * (k + 3 * n),
            "output_gradient": w * d * wide + 2 * r * size * (d + n) + r * d * wide + 4 * one * (2 * d + n),
            "input_gradient": w * d * wide + 2 * r * size * (3 * d + m) + r * d * 4 + 4 * one * (6 * d + n),
            "output_weights": w * k * 4 + 2 * r * size * (k + n) + 4 * one * (k + 3 * n) + 4 * k * 256,
            "projection_weights": w * d * 4 + 2 * r * size * (d + m) + 4 * one * (4 * d + 256) + 4 * d * 256,
        }[step]

    widths = [c for c in range(full - 1, 0, -1) if full % c == 0 and c % LANES == 0]
    lengths = [t] * (t <= LONG) + [rows for rows in (512, 256, 128) if rows < t]
    together = [n for n in range(min(b, max(1, ROWS // t)), 0, -1) if b % n == 0]
    for weights in ([(full, parts)], [(c, 1) for c in (full, *widths)]):
        for rows in lengths:
            for images in together if rows == t else [1]:
                for columns, sections in weights:
                    needs = bytes_of(images, rows, columns, sections)
                    if needs <= 0.92 * device.vmem_bytes:
                        return HalfTiles(images=images, rows=rows, columns=columns, sections=sections, needs=needs)
    raise NotImplementedError(
        f"attention half, {step}: 128 tokens of width {d} with {min((full, *widths))} columns of the weights do not fit the "
        f"{device.vmem_bytes >> 20} MiB of VMEM of a {device.name}. Split the heads over a model axis, or use the reference ops."
    )


def cost(shape: tuple[int, int, int, int], dtype, *, products: int, arrays: int) -> pl.CostEstimate:
    """`products` matrix products of B*T rows, D and K, `arrays` arrays of B*T*max(D, K) through HBM. shape (B, T, D, K)."""
    b, t, d, k = shape
    size = jnp.dtype(dtype).itemsize
    return pl.CostEstimate(
        flops=products * 2 * b * t * d * k,
        transcendentals=b * t,
        bytes_accessed=arrays * b * t * max(d, k) * size + products * d * k * 4,
    )
