"""How much VMEM a kernel may take."""

import pytest

from kernels.device import DEVICES, MiB
from kernels.vmem import limit


@pytest.mark.parametrize("name", ["v2", "v3", "v4"])
def test_a_small_vmem_is_the_kernels_whole(name):
    assert limit(DEVICES[name], 1 * MiB) == 16 * MiB


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e", "7x"])
def test_of_a_large_one_xla_gets_the_rest(name):
    device = DEVICES[name]
    assert limit(device, 1 * MiB) == 32 * MiB
    assert limit(device, 40 * MiB) == 60 * MiB
    assert limit(device, int(0.94 * device.vmem_bytes)) == device.vmem_bytes
