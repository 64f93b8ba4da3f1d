"""The paper's compute accounting (Table 6): FLOPs of a model, two a multiply-add, of the matrix products alone.

    forward = 2 (N P^2 C D + L (4 T D^2 + 2 T^2 D + 2 T D F) + D R + R V)      N patches, T tokens, R = D without a hidden layer
    training step = 3 forward                                                  two products behind each one

Norms, softmax, GELU and sums are not counted, nor is anything computed twice. With a hidden layer of width D, 18,291 classes and
303 million images an epoch this gives the paper's exaFLOPs: B/16 224, L/16 783 (7 epochs), H/14 4262 (14 epochs).
"""

from vitcore.config import ViTConfig

JFT_IMAGES = 303_000_000  # an epoch of JFT-300M
JFT_CLASSES = 18_291
BACKWARD = 2  # products behind each one of the forward pass


def multiply_adds(config: ViTConfig) -> dict[str, int]:
    """Multiply-adds of the forward pass for one image, by part: patch_embed, projections, attention, mlp, head."""
    c, d, t = config, config.width, config.tokens
    rows, columns = c.grid
    hidden = c.width * c.representation_size if c.representation_size else 0
    return {
        "patch_embed": rows * columns * c.patch_size**2 * c.channels * d,
        "projections": c.depth * 4 * t * d * d,
        "attention": c.depth * 2 * t * t * d,
        "mlp": c.depth * 2 * t * d * c.mlp_dim,
        "head": hidden + c.feature_size * c.num_classes,
    }


def flops(config: ViTConfig, batch: int = 1, *, train: bool = False) -> int:
    """FLOPs of a forward pass over `batch` images, or of a training step."""
    return 2 * batch * sum(multiply_adds(config).values()) * (1 + BACKWARD if train else 1)


def pretraining_exaflops(config: ViTConfig, epochs: float, *, images: int = JFT_IMAGES) -> float:
    """exaFLOPs of a whole pre-training, as Table 6 has them; `config` with the hidden layer and the classes of the run."""
    return epochs * flops(config, images, train=True) / 1e18
