"""The attention half of a block with rotary positions in two dimensions, as DINOv3 has them (RoPE, arXiv:2104.09864; axial and of
patch centres, arXiv:2508.10104): plain einsum, the specification, and the path without kernels.

    logits[t, s] = (R_t q_t) . (R_s k_s) / sqrt(H)

R_t turns pairs of a head's columns, i and i + H/2, by the angle 2 pi c period_i^-1. The first half of the angles takes for c the
row's coordinate, the second the column's; a patch's coordinate is that of its centre, from -1 to 1 across the image's side, so that
any grid is one and the same image. Tokens that are no patches are not turned.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.attention.reference import AttentionWeights
from kernels.attention.reference import attention_half as plain
from kernels.layer_norm.reference import EPS

BASE = 100.0  # of the periods


class Turn(NamedTuple):
    """Which tokens are turned, and how: `before` tokens that are none of the patches, then rows * columns patches in row-major
    order, then others. Static."""

    rows: int
    columns: int
    before: int

    def angles(self, width: int) -> np.ndarray:
        """[rows * columns, width / 2] float64 for heads of this width, a multiple of 4."""
        periods = BASE ** (np.arange(width // 4) / (width // 4))
        places = [(np.arange(n) + 0.5) / n * 2 - 1 for n in (self.rows, self.columns)]
        grid = np.stack(np.meshgrid(*places, indexing="ij"), -1)
        return (2 * np.pi * grid[..., None] / periods).reshape(self.rows * self.columns, width // 2)

    def table(self, tokens: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(cosines, sines) [tokens, width / 2] float64: of tokens that are not turned 1 and 0. ValueError for fewer tokens."""
        angles = self.angles(width)
        after = tokens - self.before - len(angles)
        if after < 0:
            raise ValueError(
                f"{tokens} tokens for rotary positions of {self.rows} x {self.columns} patches behind {self.before} others: "
                f"at least {tokens - after} are required"
            )
        angles = np.pad(angles, ((self.before, after), (0, 0)))
        return np.cos(angles), np.sin(angles)


def turned(qk, turn: Turn, num_heads: int):
    """[C, B, T, N*H] of queries and keys as they attend, of the same dtype; more than two, such as values, are left as they are."""
    b, t, k = qk.shape[1:]
    heads = qk[:2].reshape(2, b, t, num_heads, 2, k // num_heads // 2)
    cos, sin = (jnp.asarray(a[None, None, :, None], qk.dtype) for a in turn.table(t, k // num_heads))
    first, second = heads[..., 0, :], heads[..., 1, :]
    both = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2).reshape(2, b, t, k)
    return both if len(qk) == 2 else jnp.concatenate([both, qk[2:]])


def attention_half(
    x, weights: AttentionWeights, *, turn: Turn, num_heads, dropout=None, residual_scale=1.0, tokens=None, eps=EPS
):  # fmt: skip
    """`kernels.attention.reference.attention_half` with queries and keys turned: arguments and meaning there.

    turn: of the `tokens` of T that are real. q and k are turned in float32 and then rounded. Returns [B, T, D] in x's dtype.
    """
    return plain(
        x, weights, num_heads=num_heads, dropout=dropout, residual_scale=residual_scale, tokens=tokens, eps=eps,
        turn=lambda qkv: turned(qkv, turn, num_heads),
    )  # fmt: skip
