"""Few-shot evaluation of a frozen model: ridge regression in closed form, `python -m train.fewshot`.

    python -m train.fewshot --init ViT-B_16.npz --data folder:/data/pets
    python -m train.fewshot --init runs/NAME --data digits:5-9 --shots 1 5
    python -m train.fewshot --features pixels --data digits:5-9               the baseline that sees the pixels themselves

Of every class some training images are drawn, and from their features X [K, F] a linear map to targets Y in {-1, +1} is found,

    W = argmin |X W - Y|^2 + l2 |W|^2 = (X'X + l2 I)^-1 X'Y = X'(XX' + l2 I)^-1 Y                    (paper, section 4.1)

whose largest entry is the prediction. As the authors' later code does it: the features are what the head reads, standardised by the
drawn images' mean and deviation, with a constant column of 100 appended (an intercept that the penalty hardly feels); l2 = 2^10;
the mean of three draws.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.files import write_atomically
from train.job import agree, end, say
from train.options import InitOptions, MeshOptions, check_numbers, measuring

BIAS = 100.0
L2 = 2.0**10
SHOTS = (1, 5, 10, 25)
SEEDS = 3
_ATTEMPTS = 3  # at images that can be read; each reads the next of the classes that lack some

log = logging.getLogger("train.fewshot")


# --- the regression ---------------------------------------------------------------------------------------------------------


def prepare(train: np.ndarray, *others: np.ndarray, whiten: bool = True, bias: float = BIAS) -> tuple[np.ndarray, ...]:
    """Feature tables [K, F] as the regression sees them, [K, F + 1] float64: standardised by the first one's columns, constant
    column appended. whiten False leaves the values, bias 0 the columns."""
    mean, deviation = (train.mean(0), train.std(0) + 1e-5) if whiten else (0.0, 1.0)

    def one(x):
        x = (np.asarray(x, np.float64) - mean) / deviation
        return np.pad(x, ((0, 0), (0, 1)), constant_values=bias) if bias else x

    return tuple(one(x) for x in (train, *others))


def ridge(x: np.ndarray, y: np.ndarray, *, l2: float) -> np.ndarray:
    """W [F, V] float64 that minimises |x W - y|^2 + l2 |W|^2; x [K, F], y [K, V]. Solved on the smaller side."""
    rows, columns = x.shape
    if rows >= columns:
        return np.linalg.solve(x.T @ x + l2 * np.eye(columns), x.T @ y)
    return x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(rows), y)


def targets(labels: np.ndarray, classes: int) -> np.ndarray:
    """[K, V] float64: +1 for the label, -1 for the others."""
    return 2.0 * np.eye(classes)[labels] - 1.0


def accuracy(train, labels, test, test_labels, classes: int, *, l2: float = L2, whiten: bool = True, bias: float = BIAS) -> float:
    """The share of test images that the regression on the training features gets right."""
    x, x_test = prepare(train, test, whiten=whiten, bias=bias)
    w = ridge(x, targets(labels, classes), l2=l2)
    return float(((x_test @ w).argmax(1) == test_labels).mean())


def draw(labels: np.ndarray, shots: int, classes: Sequence[str], seed: int) -> np.ndarray:
    """Indices of `shots` examples of every class, class after class; with one seed, fewer shots are the first of more.

    Raises ValueError where a class has fewer, naming it.
    """
    drawn = []
    for found, name in zip(orders(labels, len(classes), seed), classes, strict=True):
        if len(found) < shots:
            raise ValueError(f"class {name!r} has {len(found)} training images, {shots} shots need {shots}: choose fewer --shots")
        drawn.append(found[:shots])
    return np.concatenate(drawn)


def orders(labels: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
    """The indices of each class's examples, in the order in which a draw takes them."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x5407]))
    return [rng.permutation(np.flatnonzero(labels == label)) for label in range(classes)]


# --- on a model -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured. shots: images a class. seeds: draws that are averaged. The rest: as in `accuracy`."""

    shots: tuple[int, ...] = SHOTS
    seeds: int = SEEDS
    l2: float = L2
    whiten: bool = True
    bias: float = BIAS

    def __post_init__(self):
        if not self.shots or min(self.shots) < 1 or self.seeds < 1 or not self.l2 > 0:
            raise ValueError(f"shots={self.shots}, seeds={self.seeds}, l2={self.l2}: positive numbers are required")


def measure(read: Callable[[Any], tuple[np.ndarray, np.ndarray]], train, test, protocol: Protocol) -> dict[int, list[float]]:
    """{shots: the accuracy of each draw}. read: a source's features [K, F] and the places of the K images that can be read, in its
    order, or NoImage. train, test: sources.

    Only the images that are drawn are read of the training source. In the place of one that cannot be read comes the next of its
    class; a class that has none then is left out, which is said.
    """
    labels, most = np.asarray(train.labels()), max(protocol.shots)
    draw(labels, most, train.classes, 0)  # raises ValueError
    drawn = [orders(labels, len(train.classes), seed) for seed in range(protocol.seeds)]
    features = _read_few(read, train, [order for each in drawn for order in each], most)
    x_test, tested = read(test)
    test_labels = np.asarray(test.labels())[tested]
    out: dict[int, list[float]] = {}
    for k in protocol.shots:
        for each in drawn:
            there = [[i for i in order.tolist() if i in features][:k] for order in each]
            chosen = [i for few in there for i in few]
            one = accuracy(
                np.stack([features[i] for i in chosen]), labels[chosen], x_test, test_labels, len(train.classes),
                l2=protocol.l2, whiten=protocol.whiten, bias=protocol.bias,
            )  # fmt: skip
            out.setdefault(k, []).append(one)
    for name, order in zip(train.classes, drawn[0], strict=True):
        if not any(i in features for i in order.tolist()):
            log.warning("of class %r no image that was tried can be read: the few shots are without it", name)
    return out


def _read_few(read, train, each: list[np.ndarray], most: int) -> dict[int, np.ndarray]:
    """{index: features} of at least the first `most` of each order that can be read, after a few attempts. NoImage."""
    from train.data.select import Selected
    from train.frozen import NoImage

    features, bad, problem = {}, set(), None
    for _ in range(_ATTEMPTS):
        first = {i for order in each for i in [i for i in order.tolist() if i not in bad][:most]}
        if not (wanted := np.array(sorted(first - features.keys()), np.int64)).size:
            break
        few = Selected(source=train, name=f"{train.name} (few shots)", indices=wanted, classes=train.classes)
        try:
            x, there = read(few)
        except NoImage as error:
            x, there, problem = [], np.zeros(0, np.int64), error
        features |= dict(zip(wanted[there].tolist(), x, strict=True))
        bad |= set(wanted.tolist()) - features.keys()
    if not features:
        raise problem or NoImage(f"{train.name} has no images")
    return features


def usual_preprocess(source) -> str:
    """As the authors' later code has it: 256 x 256, whatever the shape, and the middle 224; the digits as they are."""
    return "resize" if source.augment == "digits" else "resize-center"


def probe(
    config, mesh, train, test, *, protocol: Protocol | None = None, batch_size: int = 256, preprocess: str | None = None,
    antialias: bool = False, threads: int | None = None, decoder: str = "pillow", ops=None, dtype=None,
    read: Literal["pre-logits", "representation"] = "pre-logits",
) -> Callable[[Any], dict[str, float]]:  # fmt: skip
    """A function of parameters on `mesh` -> {"fewshot_5": accuracy, ...}: the measurement that pre-training takes as it goes.

    config: of the parameters. train, test: sources with the same classes. The compiled function is made once. Every process of a
    job calls it. preprocess: None for what `python -m train.fewshot` takes: the two give the same number. Raises ValueError at once
    where a class has too few images.
    """
    import jax.numpy as jnp

    from train.frozen import Reader, make_features

    protocol = protocol or Protocol()
    try:
        for k in protocol.shots:
            draw(np.asarray(train.labels()), k, train.classes, 0)
    except ValueError as error:  # whose cure is an option of train.fewshot
        why = str(error).rpartition(": ")[0]
        raise ValueError(f"--fewshot-every: {why}: leave it out, python -m train.fewshot --shots measures afterwards") from None
    features = make_features(config, mesh, ops=ops, dtype=dtype or jnp.float32, read=read)
    reader = Reader(
        batch_size=batch_size,
        preprocess=preprocess or usual_preprocess(train),
        antialias=antialias,
        threads=threads,
        decoder=decoder,
    )

    def run(params) -> dict[str, float]:
        def read(source):
            x, _, places = reader.all(partial(features, params), source, config, mesh)
            return x, places

        found = measure(read, train, test, protocol)
        return {f"fewshot_{k}": float(np.mean(values)) for k, values in found.items()}

    return run


# --- the job ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fewshot(InitOptions, MeshOptions):
    """Few-shot accuracy of a frozen model: closed-form ridge regression from its features."""

    init: str | None = None
    """.npz, .safetensors or a run's directory. Not needed for --features pixels."""
    data: str = "digits"
    train_split: str = "train"
    test_split: str = "val"
    shots: tuple[int, ...] = SHOTS
    """Training images a class."""
    seeds: int = SEEDS
    """Draws, which are averaged."""
    l2: float = L2
    whiten: bool = True
    """Standardise every feature."""
    bias: float = BIAS
    """The constant column; 0 for none."""
    features: Literal["pre-logits", "representation", "tokens", "pixels"] = "pre-logits"
    """What the head reads, the representation before a hidden layer, all tokens behind --block, or (a baseline) the pixels."""
    block: int = 0
    """Of --features tokens: behind which block, from 1; 0 for the last."""
    image_size: int | None = None
    """Default: the model's; the position embedding is fitted to it."""
    preprocess: Literal["resize", "resize-center", "center"] | None = None
    """resize-center: to 256/224 of the square, and the middle. center: the shorter side so, averaging, and the middle. Default:
    resize-center, but resize for the digits."""
    antialias: bool | None = None
    """Whether shrinking averages over pixels. Default: as a run was trained; no for a file."""
    gelu: Literal["tanh", "erf", "quick", "silu"] | None = None
    batch_size: int = 256
    out: str | None = None
    """A JSON file for the result."""


def main(argv: list[str] | None = None) -> int:
    """The job. Returns the exit code."""
    return measuring(Fewshot, "train.fewshot", run, argv)


def run(args: Fewshot) -> dict[int, list[float]]:
    """Measures and prints; {shots: accuracies}."""
    return run_told(args)[0]


def run_told(args: Fewshot) -> tuple[dict[int, list[float]], dict | None]:
    """As `run`, and which weights were measured, `train.pretrained.Stored.model`; None of pixels."""
    import jax
    import jax.numpy as jnp

    from train import distributed
    from train.data import open_source
    from train.data.identity import check, fingerprint, trained_on
    from train.data.select import check_classes
    from train.frozen import Reader, make_features, put_params
    from train.pretrained import open_pretrained, store
    from vitcore.config import ViTConfig
    from vitcore.normalisation import HALF
    from vitcore.pixels import to_unit

    check_numbers(args)
    args.join()
    protocol = Protocol(shots=tuple(args.shots), seeds=args.seeds, l2=args.l2, whiten=args.whiten, bias=args.bias)
    if args.init is None and args.features != "pixels":
        raise ValueError("--init is required: an .npz, a .safetensors or a run's directory; only --features pixels has no model")
    train, test = open_source(args.data, args.train_split), open_source(args.data, args.test_split)
    check_classes(train, test)
    agree(args, images=[fingerprint(train), fingerprint(test)])
    mesh, where = args.make_mesh()
    preprocess, antialias = args.preprocess or usual_preprocess(train), bool(args.antialias)
    pixels, told = HALF, None
    channels = train[0].image.shape[2] if train.decoded else 3
    if args.features == "pixels":
        side = args.image_size or train[0].image.shape[0]
        config = ViTConfig(image_size=side, patch_size=side, width=1, depth=1, mlp_dim=1, num_heads=1, channels=channels)
        about = "the pixels"

        features: Any = jax.jit(lambda images: to_unit(images).reshape(images.shape[0], -1))
    else:
        stored = store(str(args.init))
        told = stored.model
        distributed.agree(model=told)
        model = open_pretrained(stored, image_size=args.image_size, gelu=args.gelu, **args.told)
        config, about = model.config, model.about
        if line := trained_on(check(model.data), test, str(args.init)):
            say(line)
        pixels = model.pixels
        params = put_params(model.params, config, mesh)
        antialias = model.antialias if args.antialias is None else args.antialias
        ops = args.choose_ops(mesh, where)
        function = make_features(config, mesh, ops=ops, dtype=jnp.dtype(args.dtype), read=args.features, block=args.block)

        features = partial(function, params)
    reader = Reader(
        batch_size=args.batch_size, preprocess=preprocess, antialias=antialias, threads=args.threads, decoder=args.decoder,
        pixels=pixels,
    )  # fmt: skip

    def read(source):
        x, _, places = reader.all(features, source, config, mesh)
        return x, places

    found = measure(read, train, test, protocol)
    if distributed.rank() == 0:
        print(f"{about}; {where}; {len(test)} images of {len(test.classes)} classes, {protocol.seeds} draws")
        for k, values in found.items():
            print(f"{k:3d}-shot: {np.mean(values):.2%} +- {np.std(values):.2%}")
        if args.out:
            record = (
                {"options": dataclasses.asdict(args), "model": about}
                | (told or {})
                | {"accuracy": {str(k): v for k, v in found.items()}}
            )
            write_atomically(Path(args.out), json.dumps(record, indent=2) + "\n")
    return found, told


if __name__ == "__main__":
    end(main())
