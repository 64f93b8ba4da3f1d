"""The attention half of a block on a GPU: XLA's own products around cuDNN's flash attention; no kernel of ours.

The same as `reference.py` but for what goes through memory:
- An activation is rounded to x's dtype where it is made (the accumulator inside is float32). The reference keeps products float32,
  and then those of the backward pass read float32 operands, which costs the tensor cores two to four times as much.
- Probabilities never exist in memory: cuDNN makes them from q, k, v, forward and backward. What it does not take goes through XLA.
- What the backward pass needs is x, q, k, v and the heads' output, in x's dtype; all that is elementwise is computed again.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from kernels import dropout as drop
from kernels.launch import vary_alike
from kernels.layer_norm.reference import layer_norm

TOKENS = 2  # cuDNN's backward pass takes even numbers of tokens only: an odd one gets a row more, masked

# Keeps the inputs of a function for its backward pass and nothing from within. In a scan nothing undoes it: no barrier.
again = partial(jax.checkpoint, prevent_cse=False)


@jax.custom_vjp
def _product(x, w):
    return x @ w.astype(x.dtype)


def _product_backward(kept, g):
    x, w = kept
    dw = jnp.einsum(
        "btd,btf->df", x, g, preferred_element_type=w.dtype
    )  # over all tokens: float32 like w, not rounded to x's dtype
    return g @ w.astype(x.dtype).T, dw


_product.defvjp(lambda x, w: (_product(x, w), (x, w)), _product_backward)


def product(x, w):
    """x [B, T, D] @ w [D, F] in x's dtype, w rounded to it; the gradient of w comes in w's own dtype."""
    return _product(*vary_alike(x, w))


def attention_half(x, norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out, *, num_heads, dropout=None, share=1.0):
    """As `reference.attention_half`: the same arguments, the same result to rounding."""
    b, t, _ = x.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)

    @again
    def project(x, norm_scale, norm_bias, w_qkv, b_qkv):
        z = jnp.pad(layer_norm(x, norm_scale, norm_bias), ((0, 0), (0, -t % TOKENS), (0, 0)))
        parts = (product(z, w).astype(wide) + c for w, c in zip(w_qkv, b_qkv, strict=True))
        return [part.astype(x.dtype).reshape(b, z.shape[1], num_heads, -1) for part in parts]

    @again
    def close(x, o, w_out, b_out):
        y = product(o[:, :t].reshape(b, t, -1), w_out).astype(wide) + share * b_out
        return (share * x.astype(wide) + drop.apply(y, dropout, drop.ATTENTION_OUT)).astype(x.dtype)

    q, k, v = project(x, norm_scale, norm_bias, w_qkv, b_qkv)
    lengths = jnp.full(b, t, jnp.int32) if t % TOKENS else None
    o = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation(q.dtype, q.shape[-1])
    )
    return close(x, o, w_out, b_out)


def implementation(dtype, head_width: int) -> Literal["cudnn", "xla"]:
    """Which of `jax.nn.dot_product_attention`'s implementations takes heads of this dtype and width: "cudnn" or "xla"."""
    on_gpu = jax.default_backend() == "gpu"
    return "cudnn" if on_gpu and dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128 else "xla"
