"""The table of devices: found by the kind that jax reports, or refused."""

import pytest

from kernels.device import DEVICES, from_kind, gpu


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_a_tpu_is_found_by_its_kind(device):
    assert from_kind(device.kind) is device


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="no kernels for the device kind 'TPU v1'"):
        from_kind("TPU v1")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_found_by_its_kind(kind, name):
    card = gpu(kind)
    assert (card.name if card else None) == name
