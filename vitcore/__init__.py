"""A Vision Transformer backend: pure functions over a nested dict, on kernels written by hand."""

# isort: off
from kernels import refused  # before jax is imported
# isort: on

from vitcore.config import ViTConfig as ViTConfig
from vitcore.families import variant as variant
from vitcore.look import attention_rollout as attention_rollout
from vitcore.look import position_similarity as position_similarity
from vitcore.look import projection_filters as projection_filters
from vitcore.look import token_distances as token_distances
from vitcore.model import apply as apply
from vitcore.model import attention_maps as attention_maps
from vitcore.model import attention_statistics as attention_statistics
from vitcore.model import features as features
from vitcore.model import init as init
from vitcore.on_mesh import apply_on as apply_on
from vitcore.on_mesh import attention_maps_on as attention_maps_on
from vitcore.on_mesh import attention_statistics_on as attention_statistics_on
from vitcore.on_mesh import features_on as features_on
from vitcore.ops import FUSED as FUSED
from vitcore.ops import GPU as GPU
from vitcore.ops import INTERPRET as INTERPRET
from vitcore.ops import REFERENCE as REFERENCE
from vitcore.ops import Ops as Ops
from vitcore.ops import fused as fused
from vitcore.optax_labels import layer_indices as layer_indices
from vitcore.optax_labels import optax_labels as optax_labels
from vitcore.optax_labels import per_layer as per_layer
from vitcore.resnet import ResNetStem as ResNetStem
from vitcore.resnet_models import ResNetConfig as ResNetConfig
from vitcore.sharding import partition_specs as partition_specs
from vitcore.weight_tree import load as load
from vitcore.weight_tree import save as save

refused.no_more()


def __getattr__(name: str) -> str:
    """`vitcore.__version__`, that of what is installed."""
    if name == "__version__":
        from importlib.metadata import version

        return version("vitcore")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
