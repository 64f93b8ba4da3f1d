"""The paper's own numbers, where its tables give them: Tables 5 to 9 (Dosovitskiy et al., ICLR 2021). Shares, but for Table 9.

Figures 4, 8 and 9 print no numbers; what can be read off their axes is not here.
"""

from typing import Any

# Table 5: fine-tuned at 384 pixels, ImageNet top-1. Of images of the pre-training set, the column of the study.
_TABLE_5 = {
    "ViT-B/16": (77.91, 83.97, 84.15),
    "ViT-B/32": (73.38, 81.28, 80.73),
    "ViT-L/16": (76.53, 85.15, 87.12),
    "ViT-L/32": (71.16, 80.99, 84.37),
    "ViT-H/14": (None, 85.13, 88.04),
}
_SETS = (1_281_167, 14_197_122, 303_000_000)  # ImageNet, ImageNet-21k, JFT-300M
TABLE_5: tuple[dict[str, Any], ...] = tuple(
    {"model": model, "images": images, "paper": value / 100}
    for model, values in _TABLE_5.items()
    for images, value in zip(_SETS, values, strict=True)
    if value is not None
)

# Table 6: model, epochs on JFT, ImageNet top-1 fine-tuned, exaFLOPs of pre-training.
_TABLE_6 = (
    ("ViT-B/32", 7, 80.73, 55), ("ViT-B/16", 7, 84.15, 224), ("ViT-L/32", 7, 84.37, 196), ("ViT-L/16", 7, 86.30, 783),
    ("ViT-L/16", 14, 87.12, 1567), ("ViT-H/14", 14, 88.08, 4262),
    ("R50x1", 7, 77.54, 50), ("R50x2", 7, 82.12, 199), ("R101x1", 7, 80.67, 96), ("R152x1", 7, 81.88, 141),
    ("R152x2", 7, 84.97, 563), ("R152x2", 14, 85.56, 1126), ("R200x3", 14, 87.22, 3306),
    ("R50+ViT-B/32", 7, 84.90, 106), ("R50+ViT-B/16", 7, 85.58, 274), ("R50+ViT-L/32", 7, 85.68, 246),
    ("R50+ViT-L/16", 7, 86.60, 859), ("R50+ViT-L/16", 14, 87.12, 1668),
)  # fmt: skip


def family(model: str) -> str:
    """Transformer, hybrid or ResNet, by a model's name."""
    return "Transformer (ViT)" if model.startswith("ViT") else "hybrid" if "+" in model else "ResNet (BiT)"


TABLE_6: tuple[dict[str, Any], ...] = tuple(
    {"family": family(model), "model": model, "epochs": epochs, "exaFLOPs": flops, "paper": value / 100}
    for model, epochs, value, flops in _TABLE_6
)

# Table 7: fine-tuned, the average of five sets, and ImageNet.
TABLE_7: tuple[dict[str, Any], ...] = tuple(
    {"model": model, "optimizer": optimizer, "set": name, "paper": value / 100}
    for name, values in {
        "average": (89.33, 88.79, 94.01, 93.72),
        "ImageNet": (77.54, 78.24, 84.97, 84.37),
    }.items()
    for (model, optimizer), value in zip(
        (("R50x1", "Adam"), ("R50x1", "SGD"), ("R152x2", "Adam"), ("R152x2", "SGD")), values, strict=True
    )
)

# Table 8: ViT-B/16, ImageNet 5-shot linear.
TABLE_8: tuple[dict[str, Any], ...] = tuple(
    {"position": position, "paper": value}
    for position, value in {
        "none": 0.61382, "1d": 0.64206, "1d-layers": 0.63964, "1d-shared": 0.64292, "2d": 0.64001, "2d-layers": 0.64046,
        "2d-shared": 0.64022, "relative": 0.64032,
    }.items()
)  # fmt: skip

# Table 9, in percent, its columns in the order of `train.vtab.TASKS`: natural, specialized, structured.
TABLE_9 = {
    "ViT-H/14 (JFT)": (
        95.3, 85.5, 75.2, 99.7, 97.2, 65.0, 88.9, 83.3, 96.7, 91.4, 76.6, 91.7, 63.8, 53.1, 79.4, 63.3, 84.5, 33.2, 51.2,
    ),
    "ViT-L/16 (JFT)": (
        95.4, 81.9, 74.3, 99.7, 96.7, 63.5, 87.4, 83.6, 96.5, 89.7, 77.1, 86.4, 63.1, 49.7, 74.5, 60.5, 82.2, 36.2, 51.1,
    ),
    "ViT-L/16 (I21k)": (
        90.8, 84.1, 74.1, 99.3, 92.7, 61.0, 80.9, 82.5, 95.6, 85.2, 75.3, 70.3, 56.1, 41.9, 74.7, 64.9, 79.9, 30.5, 41.7,
    ),
}  # fmt: skip

# Section 4.6: masked patch prediction, ViT-B/16 on ImageNet, and the same from scratch.
MASKED: tuple[dict[str, Any], ...] = (
    {"start": "masked patches", "paper": 0.799},
    {"start": "from scratch", "paper": 0.779},
)
