"""Measure a model: `python -m train.evaluate`.

    python -m train.evaluate --init runs/NAME --data digits --split val
    python -m train.evaluate --init ViT-B_16.npz --data folder:/data/imagenet --real real.json
    python -m train.evaluate --init ViT-B_16.npz --data folder:/data/objectnet --objectnet objectnet-1.0/mappings

Every image is scored exactly once, on any mesh. Printed: top-1 and top-5; with --real the ReaL accuracy beside it, with --objectnet
top-1 and top-5 by its class map instead (and its red border of one pixel is cut off). Into --out go evaluation.json (with the
accuracy of every class, and which were taken for which) and confusion.png. What counts and what does not: `train/scores.py`.
"""

import csv
import dataclasses
import importlib.util
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train import distributed, scores
from train.files import make_directory, write_atomically
from train.job import agree, end, say
from train.options import InitOptions, MeshOptions, check_init, check_numbers, measuring


@dataclass(frozen=True, kw_only=True)
class Evaluate(InitOptions, MeshOptions):
    """Top-1 and top-5 accuracy of a model, ReaL, ObjectNet, and every class."""

    init: str = ""
    """.npz, .safetensors or a run's directory. Required."""
    data: str = "digits"
    split: str = "val"
    real: str | None = None
    """real.json: ReaL labels of ImageNet's validation images."""
    objectnet: str | None = None
    """The mappings directory of ObjectNet, or a JSON file {folder: [ImageNet classes]}; the data are its folders, which Pillow
    reads."""
    image_size: int | None = None
    """Default: the model's; the position embedding is fitted to it."""
    preprocess: Literal["resize", "resize-center", "center"] = "resize"
    """resize: to the square. resize-center: to a larger square, and its middle. center: the shorter side to 256/224 of the square,
    averaging, and the middle."""
    antialias: bool | None = None
    """Whether shrinking averages over pixels. Default: as a run was trained; no for a file."""
    gelu: Literal["tanh", "erf", "quick", "silu"] | None = None
    batch_size: int = 256
    predictions: str | None = None
    """A .csv or .parquet for what was made of each image: its name, its class, the five likeliest and their probabilities."""
    accept_data: bool = False
    """Take labels by number though the class names are not those that the model was trained for."""
    out: str | None = None
    """Directory for evaluation.json and confusion.png. Default: evaluation/ in the run, or beside the file."""


@dataclass(frozen=True)
class Trimmed:
    """A source whose images have lost a border of one pixel."""

    source: Any
    border: int = 1
    name: str = field(init=False, default="")

    def __post_init__(self):
        object.__setattr__(self, "name", self.source.name)

    def __getattr__(self, name):
        if name.startswith("__") or name in ("source", "encoded"):  # the encoded bytes still have the border
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        example = self.source[index]
        b = self.border
        return example._replace(image=example.image[b:-b, b:-b])


def main(argv: list[str] | None = None) -> int:
    """The job. Returns the exit code."""
    return measuring(Evaluate, "train.evaluate", run, argv)


def run(args: Evaluate) -> dict:
    """Measures, prints, writes. What evaluation.json holds."""
    import jax.numpy as jnp

    from train.data import by_names, open_source
    from train.data.identity import check, fingerprint, trained_on
    from train.frozen import Reader, make_predict, put_params
    from train.pretrained import open_pretrained, store
    from vitcore.sharding import MeshShape, check_mesh

    check_init(args.init)
    check_numbers(args)
    check_predictions(args.predictions)
    if args.real and args.objectnet:
        raise ValueError("--real and --objectnet belong to different images: give one of them")
    args.join()
    real = None if args.real is None else scores.read_real(args.real)
    mapped = None if args.objectnet is None else scores.read_objectnet(args.objectnet)
    source: Any = open_source(args.data, args.split)
    agree(args, images=fingerprint(source))
    mesh, where = args.make_mesh()
    ops = args.choose_ops(mesh, where)
    stored = store(args.init)
    distributed.agree(model=stored.model)
    model = open_pretrained(stored, image_size=args.image_size, gelu=args.gelu, **args.told)
    config = model.config
    check_mesh(config, MeshShape.of(mesh))
    if not config.num_classes:
        raise ValueError(
            f"{args.init} predicts no classes: put a head on it with train.finetune --init {args.init}, or measure its features "
            "with train.fewshot"
        )
    if mapped is None and config.num_classes != len(source.classes):
        raise ValueError(
            f"the model has {config.num_classes} classes, {source.name} has {len(source.classes)}: evaluate it on the classes it "
            "was trained for"
        )
    if mapped is None:
        source, line = by_names(source, model.classes, model.about, accept=args.accept_data)
        if line:
            say(line)
    if line := trained_on(check(model.data), source, args.init):
        say(line)
    if mapped is not None:
        if config.num_classes != 1000:
            raise ValueError(f"the model has {config.num_classes} classes: --objectnet requires ImageNet's 1000")
        source = Trimmed(source)
    names = [source.example_name(i) for i in range(len(source))] if real is not None else []
    wanted = None if real is None else scores.real_labels(real, names, config.num_classes)

    reader = Reader(
        batch_size=args.batch_size, preprocess=args.preprocess, threads=args.threads, decoder=args.decoder, pixels=model.pixels,
        antialias=model.antialias if args.antialias is None else args.antialias,
    )  # fmt: skip
    predict = make_predict(config, mesh, ops=ops, dtype=jnp.dtype(args.dtype), scored=True)
    params = put_params(model.params, config, mesh)
    (best, scored), labels, places = reader.all(lambda images: predict(params, images), source, config, mesh)
    wanted = None if wanted is None else [wanted[i] for i in places]
    result = {"model": model.about} | stored.model | measure(best, labels, source.classes, config.num_classes, wanted, mapped)
    if distributed.rank() == 0:
        lost = f" of {len(source)}; the others cannot be read" if len(labels) < len(source) else ""
        say(f"{model.about} on {source.name}; {where}; {len(labels)} images{lost}")
        for line in describe(result):
            say(line)
        say(write(result, best, labels, source.classes, args, mapped is None))
        if args.predictions:
            files = [source.example_name(int(i)) for i in places]
            known = source.classes if config.num_classes == len(source.classes) else None
            say(write_predictions(args.predictions, files, labels, best, scored, source.classes, known))
    return result


def measure(best, labels, classes, count: int, real=None, mapped=None) -> dict:
    """Numbers from the predictions best [K, 5] (classes, best first) of images with these labels."""
    result: dict[str, Any] = {"images": len(labels)}

    def put(name, right, counted):
        result[name] = {"right": int(right), "counted": int(counted), "accuracy": right / counted if counted else None}

    if mapped is not None:
        for k in (1, 5):
            put(f"objectnet_top{k}", *scores.objectnet_accuracy(best, labels, classes, mapped, k))
        return result
    for k in (1, 5):
        if k < count:
            put(f"top{k}", scores.top(best, labels, k).sum(), len(labels))
    if real is not None:
        put("real", *scores.real_accuracy(best, real))
    matrix = scores.confusion(best[:, 0], labels, count)
    rows = matrix.sum(1)
    result["classes"] = {
        name: {"right": int(matrix[i, i]), "counted": int(rows[i]), "accuracy": matrix[i, i] / rows[i] if rows[i] else None}
        for i, name in enumerate(classes)
    }
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    worst = np.argsort(-off, axis=None, kind="stable")[:20]
    pairs = [(int(i) // count, int(i) % count) for i in worst]
    result["confused"] = [[classes[a], classes[b], int(off[a, b])] for a, b in pairs if off[a, b]]
    result["mean_per_class"] = float(np.mean([one["accuracy"] for one in result["classes"].values() if one["counted"]]))
    return result


_SAID = {"top1": "top-1", "top5": "top-5", "real": "ReaL", "objectnet_top1": "ObjectNet top-1", "objectnet_top5": "ObjectNet top-5"}


def describe(result: dict) -> list[str]:
    """The printed lines."""
    lines = [
        f"{said}: {result[key]['right']} of {result[key]['counted']} right, {result[key]['accuracy']:.2%}"
        for key, said in _SAID.items()
        if key in result and result[key]["counted"]
    ]
    if "mean_per_class" in result:
        lines.append(f"mean of the classes' accuracies: {result['mean_per_class']:.2%}")
    if result.get("confused"):
        a, b, n = result["confused"][0]
        lines.append(f"most often confused: {a} taken for {b}, {n} times")
    return lines


def write(result: dict, best, labels, classes, args: Evaluate, picture: bool) -> str:
    """evaluation.json and confusion.png; says where they are."""
    init = Path(args.init)
    out = Path(args.out) if args.out else (init if init.is_dir() else init.parent) / "evaluation"
    make_directory(out)
    write_atomically(out / "evaluation.json", json.dumps({"options": dataclasses.asdict(args)} | result, indent=2) + "\n")
    if not picture:
        return f"{out / 'evaluation.json'}"
    matrix = scores.confusion(best[:, 0], labels, len(classes))
    scores.draw(matrix, classes, out / "confusion.png", f"{init.name} on {args.data}, {args.split}")
    return f"{out / 'evaluation.json'}, {out / 'confusion.png'}"


def check_predictions(path: str | None) -> None:
    """Raises ValueError where --predictions cannot be written, before anything is computed."""
    if path is None:
        return
    if Path(path).suffix not in (".csv", ".parquet"):
        raise ValueError(f"--predictions {path}: a name that ends in .csv or .parquet is required")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--predictions {path}: {Path(path).absolute().parent} is no directory: make it, or name another")
    if Path(path).suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"--predictions {path}: .parquet needs pyarrow: pip install 'vitcore[parquet]', or write a .csv")


def write_predictions(path: str, files: list[str], labels, best, scored, classes, known) -> str:
    """A row for each image, to a .csv or .parquet, whole or not at all; says where.

    Columns: name, label, and top1, score1, top2, ... classes by their names where the model's are the source's (`known`), else by
    number.
    """
    rows: dict[str, list] = {"name": files, "label": [classes[i] for i in labels.tolist()]}
    for k in range(best.shape[1]):
        rows[f"top{k + 1}"] = [known[i] if known else i for i in best[:, k].tolist()]
        rows[f"score{k + 1}"] = scored[:, k].tolist()
    if path.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(rows), sink)
        content: Any = sink.getvalue().to_pybytes()
    else:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(rows)
        writer.writerows(zip(*rows.values(), strict=True))
        content = text.getvalue()
    write_atomically(Path(path), content)
    return f"{path}: {len(files)} predictions"


if __name__ == "__main__":
    end(main())
