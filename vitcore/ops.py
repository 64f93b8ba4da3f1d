"""Ops: the functions a model calls, as one record passed as one static argument. A new device is a new record, nothing else."""

from collections.abc import Callable
from typing import NamedTuple

from kernels.attention.reference import attention_half
from kernels.layer_norm.reference import layer_norm
from kernels.mlp.reference import mlp_half
from kernels.patch_embed.reference import patch_embed


class Ops(NamedTuple):
    """What a ViT is made of; each field has the signature and the meaning of the function of its name in `kernels/*/reference.py`."""

    patch_embed: Callable
    attention_half: Callable
    mlp_half: Callable
    layer_norm: Callable


REFERENCE = Ops(patch_embed, attention_half, mlp_half, layer_norm)


def resolve(ops: Ops | None) -> Ops:
    """The ops to run: those given, or with None what suits the platform."""
    return REFERENCE if ops is None else ops
