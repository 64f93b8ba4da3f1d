"""The attention half of a block on a GPU: XLA's own products around our kernel for short rows on Hopper, or cuDNN's attention.

On Hopper the half is of our kernels (`hopper/half.py`) where `kernels.hopper.plan.refuses` does not say why not, its core too where
`hopper.plan.refuses` does not. What follows is the way of the rest. It is the same as `reference.py` but for what
goes through memory:
- An activation is rounded to x's dtype where it is made (the accumulator inside is float32). The reference keeps products float32,
  and then those of the backward pass read float32 operands, which costs the tensor cores two to four times as much.
- Probabilities never exist in memory: the kernel in `hopper/` makes them from q, k, v, forward and backward, or else cuDNN does.
  What neither takes goes through XLA. `implementation` says which it is, `hopper.plan.refuses` why it is not ours.
- What the backward pass needs is x, its rows' statistics, q, k, v and the heads' output, in x's dtype; all that is elementwise is
  computed again.
- Keys and values take no bias, and so no pass over them: a key's shifts all logits of a query alike, which softmax undoes, and a
  value's goes through the output projection as it is, since probabilities sum to one. It is added there, b_v @ w_out.
- What is kept has a name (KEPT): a checkpoint around a whole block overrules those in here, and keeps the same by it (`keeps`).
- Tokens are the rows of matrices [B * T, D]. Left three-dimensional, XLA puts T before B where it likes, and transposes in between.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels import dropout as drop
from kernels.attention.hopper.plan import refuses
from kernels.attention.library import attend
from kernels.attention.reference import AttentionWeights
from kernels.hopper import plan as products
from kernels.hopper.plan import KEPT as KEPT
from kernels.launch import vary_alike
from kernels.layer_norm.gpu import STATISTICS, layer_norm
from kernels.layer_norm.reference import EPS
from kernels.settings import own

TOKENS = 2  # cuDNN's backward pass takes even numbers of tokens only: an odd one gets a row more, masked

# Keeps the inputs of a function for its backward pass and, from within, a few numbers a row.
again = partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(STATISTICS))


def keeps(prim, *_, **params) -> bool:
    """Checkpoint policy of a block of these ops: what they keep for the backward pass when no checkpoint stands around them.

    A policy applies to all that is inside, also to the inputs of checkpoints inside, so it has to name those. cuDNN's forward pass
    is known by its primitive: its statistics of a row have no name, and without them it would run a second time.
    """
    if prim.name == "name":
        return params["name"] in (STATISTICS, KEPT)
    return prim.name.startswith("dot_product_attention_fwd")


@jax.custom_vjp
def _product(x, w):
    return x @ w.astype(x.dtype)


def _product_backward(kept, g):
    x, w = kept
    dw = jnp.einsum("md,mf->df", x, g, preferred_element_type=w.dtype)  # over all tokens: float32 like w, not rounded to x's dtype
    return g @ w.astype(x.dtype).T, dw


_product.defvjp(own(lambda x, w: (_product(x, w), (x, w))), own(_product_backward))


def product(x, w):
    """x [M, D] @ w [D, F] in x's dtype, w rounded to it; the gradient of w comes in w's own dtype."""
    return _product(*vary_alike(x, w))


def attention_half(x, weights: AttentionWeights, *, num_heads, dropout=None, residual_scale=1.0, tokens=None, eps=EPS):
    """As `reference.attention_half`: the same arguments, the same result to rounding.

    tokens: how many of x's T are tokens, by default all. The rows behind them are padding: no token sees them, and what is returned
    there is finite and means nothing. An odd T is padded here for cuDNN, which costs copies of q, k, v and the result.
    """
    norm_scale, norm_bias, w_qkv, b_qkv, w_out, b_out = weights
    b, t, d = x.shape
    tokens = tokens or t
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    by = implementation(x.dtype, w_qkv.shape[-1] // num_heads, t)
    options = {"num_heads": num_heads, "dropout": dropout, "residual_scale": residual_scale, "tokens": tokens, "eps": eps}
    if t % TOKENS and by != "hopper":
        padded = jnp.pad(x, ((0, 0), (0, -t % TOKENS), (0, 0)))
        return attention_half(padded, weights, **options)[:, :t]
    if by != "xla" and products.refuses(x.dtype, d, w_out.shape[0]) is None:
        from kernels.attention.hopper.half import attention_half as whole  # Mosaic GPU takes a third of a second to import

        return whole(x, weights, by=by, **options)

    @again
    def project(x, norm_scale, norm_bias, w_qkv, b_q):
        z = layer_norm(x, norm_scale, norm_bias, eps=eps)
        # apart, or XLA makes one product of two, copies them out of its result, and their gradients into one for the backward pass
        q, k, v = (product(z, w) for z, w in zip(lax.optimization_barrier((z, z, z)), w_qkv, strict=True))
        return checkpoint_name(((q.astype(acc_dtype) + b_q).astype(x.dtype), k, v), KEPT)

    @again
    def close(x, o, w_out, b_v, b_out):
        bias = residual_scale * b_out + jnp.matmul(b_v, w_out, precision=lax.Precision.HIGHEST)
        y = product(o, w_out).astype(acc_dtype) + bias
        return rounded(residual_scale * x.astype(acc_dtype) + dropped(y, t, dropout, drop.ATTENTION_OUT, tokens), x.dtype)

    x = x.reshape(b * t, d)
    q, k, v = (a.reshape(b, t, num_heads, -1) for a in project(x, norm_scale, norm_bias, w_qkv, b_qkv[0]))
    o = _core(q, k, v, tokens, by)
    if by != "cudnn":  # whose output is kept with its statistics: named besides, it would be kept twice
        o = checkpoint_name(o, KEPT)
    return close(x, o.reshape(b * t, -1), w_out, b_qkv[2], b_out).reshape(b, t, d)


def _core(q, k, v, tokens: int, by: Literal["hopper", "cudnn", "xla"]) -> jax.Array:
    """Attention of q, k, v [B, T, N, H], of whose rows the first `tokens` are keys."""
    if by == "hopper":
        from kernels.attention.hopper.forward import attention  # Mosaic GPU takes a third of a second to import

        return attention(q, k, v, tokens=tokens)
    return attend(q, k, v, tokens, by)


def rounded(x, dtype):
    """x in dtype, in memory too: XLA, free to keep more digits, would write it for the next norm in float32 beside."""
    return lax.optimization_barrier(x.astype(dtype))


def dropped(y, t: int, dropout, site: int, tokens: int, column=0):
    """Dropout of rows y [B * T, K], of which `tokens` of every T are tokens."""
    if dropout is None:
        return y
    return drop.apply(y.reshape(-1, t, y.shape[-1]), dropout, site, column, tokens=tokens).reshape(y.shape)


def implementation(dtype, head_width: int, t: int) -> Literal["hopper", "cudnn", "xla"]:
    """What attends over rows of t with heads of this dtype and width: our kernel, cuDNN, or products and a softmax by XLA."""
    if refuses(dtype, head_width, t) is None:
        return "hopper"
    on_gpu = jax.default_backend() == "gpu"
    return "cudnn" if on_gpu and dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128 else "xla"
