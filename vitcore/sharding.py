"""Where each parameter lives on a mesh ("data", "model").

The columns of q, k, v (whole heads) and the hidden columns of the MLP are split over "model", so a half block needs one sum
at its end. Every matrix is split over "data" besides, along an axis of rows where it has one (where a data axis has parts, along
its columns over those that do not divide the rows), and brought together layer by layer when it is used; vectors are too small to
be worth a collective each and stay whole. Optimizer state follows the parameters. Batches are split over "data" and replicated over
"model". Each leaf's own record says how it is split.
"""

from functools import cache, partial

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from vitcore import families, parameters
from vitcore.collectives import AXES as AXES
from vitcore.collectives import Axes as Axes
from vitcore.collectives import MeshShape as MeshShape
from vitcore.collectives import Shard as Shard
from vitcore.collectives import without_data


def check_mesh(config, mesh: MeshShape) -> None:
    """Raise ValueError where heads, hidden columns or whatever else is split do not divide over the model axis."""
    parameters.check_mesh(families.leaves(config), mesh)


def partition_specs(config, mesh: Mesh | AbstractMesh | MeshShape | None, *, shard: Shard = "parameters", axes: Axes = AXES):
    """The PartitionSpec of every parameter: a tree like that of `init`. With mesh None: nothing is split.

    axes: what a `Mesh` calls its data and model axis, as in `apply_on`. Where the data axis does not divide a matrix's rows, its
    columns are split in their place, and where it does not divide these the matrix stays whole. Of several names, as in
    axes=(("data", "rest"), "model"), rows are split over those that divide them and columns over the others. With shard="none"
    nothing is split over the data axis. Raises ValueError where the model axis does not divide, and for names that the mesh has
    not.
    """
    shape = mesh if isinstance(mesh, MeshShape) else MeshShape(1, 1) if mesh is None else MeshShape.of(mesh, axes)
    return jax.tree.map(lambda spec: spec, _specs(config, shape, shard == "none"))  # a tree of the caller's own


@cache
def _specs(config, shape: MeshShape, whole: bool):
    specs = parameters.specs(families.leaves(config), shape)
    return jax.tree.map(partial(without_data, mesh=shape), specs, is_leaf=lambda x: isinstance(x, P)) if whole else specs
