"""The named models of DINOv2 (arXiv:2304.07193, Table 17) and DINOv3 (arXiv:2508.10104, Table 2): their shapes, as data.

"DINOv2-g/14" and "DINOv3-S+/16" stand for ViTConfigs without a head, as the releases have them. DINOv3's hidden widths are those of
each of the two projections of a gated MLP. Of its biases those of keys are zero by construction, and the 7B has none of q, k, v.
"""

import re
from typing import Any

_V2: dict[str, Any] = dict(block="layerscale", gelu="erf", image_size=518, num_classes=0)
_V3: dict[str, Any] = dict(
    block="layerscale", gelu="erf", position="rope", qkv_bias="qv", registers=4, eps=1e-5, num_classes=0
)  # fmt: skip
_GATED: dict[str, Any] = dict(block="layerscale-gated", gelu="silu")

# version -> size -> fields
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "2": {
        "S": _V2 | dict(width=384, depth=12, mlp_dim=1536, num_heads=6),
        "B": _V2 | dict(width=768, depth=12, mlp_dim=3072, num_heads=12),
        "L": _V2 | dict(width=1024, depth=24, mlp_dim=4096, num_heads=16),
        "g": _V2 | _GATED | dict(width=1536, depth=40, mlp_dim=4096, num_heads=24),
    },
    "3": {
        "S": _V3 | dict(width=384, depth=12, mlp_dim=1536, num_heads=6),
        "S+": _V3 | _GATED | dict(width=384, depth=12, mlp_dim=1536, num_heads=6),
        "B": _V3 | dict(width=768, depth=12, mlp_dim=3072, num_heads=12),
        "L": _V3 | dict(width=1024, depth=24, mlp_dim=4096, num_heads=16),
        "H+": _V3 | _GATED | dict(width=1280, depth=32, mlp_dim=5120, num_heads=20),
        "7B": _V3 | _GATED | dict(width=4096, depth=40, mlp_dim=8192, num_heads=32, qkv_bias="none"),
    },
}
_PATCH = {"2": 14, "3": 16}
NAMES = tuple(f"DINOv{version}-{size}/{_PATCH[version]}" for version, sizes in SIZES.items() for size in sizes)


def parse(name: str) -> dict[str, Any] | None:
    """The fields of "DINOv2-{S,B,L,g}/P" or "DINOv3-{S,S+,B,L,H+,7B}/P" with any patch side P (releases: 14, 16); None for another.

    Another patch side than DINOv2's 14 has the usual image size.
    """
    match = re.fullmatch(r"DINOv([23])-([\w+]+)/([1-9]\d*)", name)
    if not match or match[2] not in SIZES[match[1]]:
        return None
    fields = {**SIZES[match[1]][match[2]], "patch_size": int(match[3])}
    if fields.get("image_size", 0) % fields["patch_size"]:
        del fields["image_size"]
    return fields
