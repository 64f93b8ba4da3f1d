"""What travels beside the arrays through a forward pass, as one record, and the part of it that a block sees."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from kernels import dropout as drop
from kernels.dropout import Dropout
from vitcore.collectives import MeshShape, Shard, gather
from vitcore.drop_path import DropPath
from vitcore.stacks import Stacks


class Capture(NamedTuple):
    """What a forward pass keeps of its blocks, which are counted from 1.

    features: the blocks whose outputs are kept. maps: the blocks whose attention maps are kept. statistics: the blocks of whose
    attention these statistics are kept: mean, the maps' mean over the heads; row, the first token's row of each head's map;
    distances, of pairs of tokens, [T, T] numbers: how far each head looks (`kernels/attention/statistics/reference.py`).
    """

    features: tuple[int, ...] = ()
    maps: tuple[int, ...] = ()
    statistics: tuple[int, ...] = ()
    mean: bool = False
    row: bool = False
    distances: Any = None


class Context(NamedTuple):
    """How a forward pass runs. All but dropout_key and first_example is static.

    ops: the `vitcore.ops.Ops` it is made of, None for what suits the platform. dtype: of activations and of the operands of
    products. mesh: inside a `shard_map` the shape of the mesh, else None. shard: how the data axis
    splits the parameters (`collectives.Shard`). remat: as in `vitcore.apply`. dropout_key: a JAX PRNG
    key, or None. first_example: the global index of images[0], which keys the dropout masks. edit: a function (patch embeddings
    [B, N, D] in dtype, first_example) -> the same shape and dtype, between the projection and the position embedding; or None.
    capture: what to keep of the blocks, None for nothing. specs: the PartitionSpecs of the parameters, which `vitcore.model`
    fills in.
    """

    ops: Any = None  # Ops or None: `vitcore.model.prepared` chooses, so that whoever reads it finds Ops
    dtype: Any = jnp.float32
    mesh: MeshShape | None = None
    shard: Shard = "parameters"
    remat: int = 0
    dropout_key: Any = None
    first_example: Any = 0
    edit: Callable[[Any, Any], Any] | None = None
    capture: Capture | None = None
    specs: Any = None

    @property
    def gathers_again(self) -> bool:
        """Whether the backward pass gathers a layer's weights once more, so that no step holds those of all layers."""
        return self.mesh is not None and self.mesh.data > 1 and self.shard == "parameters"

    def take(self, params, *path: str):
        """The subtree of the parameters at `path`, ready for use: whole over "data", as `collectives.gather` says."""
        specs = self.specs
        for key in path:
            params, specs = params[key], specs[key]
        return gather(params, specs, self.mesh, self.dtype)


class Layer(NamedTuple):
    """What a block is told besides its input and its weights.

    dropout: of this layer, or None. tokens: how many of the T tokens are real, None for all (the others are padding, which no token
    may see). stacks: where the layer's weights lie in the arrays of all layers, None where they do not. path: of stochastic depth,
    or None. The parts of the residual that the devices of a model axis add are to be multiplied by `residual_scale`.
    """

    context: Context
    dropout: Dropout | None = None
    tokens: int | None = None
    stacks: Stacks | None = None
    path: DropPath | None = None

    @property
    def padding(self) -> dict[str, int]:
        """The option `tokens` of an op, for ops that the model pads its tokens for."""
        return {} if self.tokens is None else {"tokens": self.tokens}

    def half(self, op: Callable, x, weights, places: tuple[int, int], **options):
        """A half block of x: `op` with its weights, those that lie in arrays of all layers in place. places: as in `residual`."""
        options |= {"dropout": self.dropout, **self.padding}

        def run(residual_scale):
            if self.stacks is None:
                return op(x, weights, residual_scale=residual_scale, **options)
            found, names = self.stacks.found(weights)
            y = op(x, found, residual_scale=residual_scale, **options)
            if isinstance(y, tuple):
                y, arrays = y
                self.stacks.put(names, arrays)
            return y

        return self.residual(run, x, weights.out_bias, places)

    def residual(self, run: Callable, x, bias, places: tuple[int, int]):
        """A half block of x [B, T, D]; with stochastic depth what it adds to each image is times the image's multiplier.

        run: (residual_scale) -> the op's result with residual and output bias [D] of that scale. places: where its output is
        dropped, of `kernels.dropout`, and which half it is, of `vitcore.drop_path`.
        """
        if self.path is None:
            return run(self.residual_scale)
        acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
        site, half = places
        bias = (self.residual_scale * bias).astype(acc_dtype)
        if self.dropout is not None:  # with the rest of what the op would add, as the op does
            bias = drop.apply(jnp.broadcast_to(bias, x.shape), self.dropout, site, tokens=self.tokens)
        added = run(0.0).astype(acc_dtype) + bias
        m = self.path.multiplier(half, x.shape[0]).astype(acc_dtype)
        return (self.residual_scale * x.astype(acc_dtype) + m * added).astype(x.dtype)

    @property
    def residual_scale(self) -> float:
        mesh = self.context.mesh
        return 1.0 / mesh.model if mesh else 1.0
