"""The paper's compute accounting (Table 6): FLOPs of a model, two a multiply-add, of the matrix products alone.

    forward = 2 (N P^2 C D + L (4 T D^2 + 2 T^2 D + 2 T D F) + D R + R V)      N patches, T tokens, R = D without a hidden layer
    training step = 3 forward                                                  two products behind each one

Each leaf's own record says the multiply-adds of what it is used in; those of q k' and of the product with v stand with the kernel
of q, k and v. Norms, softmax, GELU and sums are not counted, nor is anything computed twice. With a hidden layer of width D,
18,291 classes and 303 million images an epoch this gives the paper's exaFLOPs: B/16 224, L/16 783 (7 epochs), H/14 4262 (14
epochs).
"""

from vitcore import families, parameters

JFT_IMAGES = 303_000_000  # an epoch of JFT-300M
JFT_CLASSES = 18_291
BACKWARD = 2  # products behind each one of the forward pass


def multiply_adds(config) -> dict[str, int]:
    """Multiply-adds of the forward pass for one image, by part: of a ViT patch_embed, projections, attention, mlp, head."""
    return parameters.multiply_adds(families.leaves(config))


def flops(config, batch: int = 1, *, train: bool = False) -> int:
    """FLOPs of a forward pass over `batch` images, or of a training step."""
    return 2 * batch * sum(multiply_adds(config).values()) * (1 + BACKWARD if train else 1)


def pretraining_exaflops(config, epochs: float, *, images: int = JFT_IMAGES) -> float:
    """exaFLOPs of a whole pre-training, as Table 6 has them; `config` with the hidden layer and the classes of the run."""
    return epochs * flops(config, images, train=True) / 1e18
