"""What the tests of Hopper's kernels share."""

import jax
import pytest

from kernels.attention.hopper.plan import CAPABILITY


@pytest.fixture
def on_hopper():
    """A card that these kernels run on, and products beside them in full precision; the reason why not elsewhere."""
    if (found := getattr(jax.devices()[0], "compute_capability", "none")) != CAPABILITY:
        pytest.skip(f"compute capability {found}: these kernels run on {CAPABILITY}")
    with jax.default_matmul_precision("highest"):
        yield
