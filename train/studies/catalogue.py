"""The studies: each a function from a setting to its runs, and what the paper found, as `Study`.

Two sizes of each: the paper's models and steps, and toys that two cores train in minutes on the embedded digits: pre-trained on the
digits 0 to 4, measured on 5 to 9 as the paper measures on ImageNet: 5-shot linear on the frozen representation, and fine-tuned.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from train import recipes
from train.studies import paper
from train.studies.records import Run, Setting, Study, words

BATCH = 128  # of toys; the 32-pixel ResNets take a quarter
TOY_STEPS = 600
TOY_TUNE = 100
SHOTS = {"shots": 5, "seeds": 3}
RESNET_TOY = {"image_size": 32, "batch_size": 32}  # a ResNet divides its image by 32


def _name(*parts: Any) -> str:
    """A run's name, and its directory's."""
    return "-".join(str(part) for part in parts).replace("/", "_").replace(" ", "-")


def begun(
    s: Setting, at: Mapping[str, Any], model: str, *, toy_steps: float = TOY_STEPS, epochs: int | None = None,
    measures: tuple[str, ...] = ("fewshot",), name: str | None = None, **options: Any,
) -> list[Run]:  # fmt: skip
    """A pre-training and what measures it. at: where it stands in the study. epochs: on JFT, at the paper's size, if not those that
    its recipe lists first. measures: of "fewshot", "finetune". options: of train.pretrain, over those of the setting."""
    name = name or _name(*at.values())
    if s.toy:
        every = s.steps(toy_steps)
        base: dict[str, Any] = {"recipe": "digits", "representation_size": 0, "batch_size": BATCH} | _small(s, model)
        base |= {"steps": every, "eval_every": max(1, every // 5), "checkpoint_every": max(1, every // 2), "keep": 1}
    else:
        base = _by_table_3(s, model, epochs)
    base |= {"model": model, "data": s.data, "seed": s.seed} | options
    runs = [Run(name=name, job="pretrain", options=words(base), at=at)]
    if "fewshot" in measures:
        few = {"data": s.to, **SHOTS, **({"seeds": 20} if s.toy else {})}
        runs.append(Run(name=f"{name}.fewshot", job="fewshot", options=words(few), after=name))
    if "finetune" in measures:
        runs.append(tuned(s, name, model))
    return runs


def tuned(s: Setting, name: str, model: str, **options: Any) -> Run:
    """The fine-tuning of a pre-training, the paper's ImageNet recipe without its grid."""
    if s.toy:
        steps = s.steps(TOY_TUNE)
        base: dict[str, Any] = {"recipe": "digits", "steps": steps, "eval_every": steps, "checkpoint_every": steps, "keep": 1}
        base |= _small(s, model)
    else:
        base = {"recipe": "imagenet", "steps": s.steps(recipes.TABLE_4["imagenet"].steps)}
        base |= {"image_size": 378} if model == "ViT-H/14" else {}  # 384 is no multiple of its patches
    base |= {"data": s.to, "seed": s.seed} | options
    return Run(name=f"{name}.finetune", job="finetune", options=words(base), after=name)


def _small(s: Setting, model: str) -> dict[str, Any]:
    """How large a toy's images are, where not as the digits are: your own are shrunk to 16 pixels."""
    return RESNET_TOY if _is_resnet(model) else {} if s.digits else {"image_size": 16}


def _is_resnet(model: str) -> bool:
    return "ViT" not in model and "Nano" not in model


# What Table 3 has for R152x2 and ViT-L/32 on JFT, by value: for R200x3 and for patches of which it has no row.
NO_ROW: dict[str, Any] = {
    "recipe": "digits", "batch_size": 4096, "image_size": 224, "learning_rate": 6e-4, "decay": "linear", "weight_decay": 0.1,
    "dropout": 0, "clip_norm": 0, "loss": "sigmoid", "head_bias": -10, "antialias": "False",
}  # fmt: skip
TWO_ROWS = ("ViT-L/16", "R50+ViT-L/16")  # of 7 and of 14 epochs


def _by_table_3(s: Setting, model: str, epochs: int | None) -> dict[str, Any]:
    """The options of a pre-training on JFT as Table 3 has it, with the paper's steps whatever the size of the set."""
    name = f"jft-{epochs}ep" if epochs and model in TWO_ROWS else "jft"
    try:
        recipe = recipes.recipe(name, model)
    except ValueError:
        steps = s.steps(recipes.steps_of(epochs or 7, recipes.JFT_EXAMPLES, NO_ROW["batch_size"]))
        return NO_ROW | {"steps": steps, "warmup_steps": min(10_000, steps // 10)}
    return {"recipe": name, "steps": s.steps(recipes.steps_of(epochs or recipe.epochs, recipe.examples, recipe.batch_size))}


# --- the studies --------------------------------------------------------------------------------------------------------------

SHARES = {"3%": 9 / 303, "10%": 30 / 303, "30%": 90 / 303, "100%": 1.0}


def table5(s: Setting) -> list[Run]:
    """Subsets of the set, as 9, 30, 90 and 303 million images are of JFT, with early stopping and otherwise one recipe."""
    whole, models = (723, ("ViT-Nano/4", "ViT-Nano/2", "R14x0.5")) if s.toy else (
        recipes.JFT_EXAMPLES, ("ViT-B/32", "ViT-B/16", "ViT-L/32", "ViT-L/16", "R50x1", "R152x2"),
    )  # fmt: skip
    return [
        run
        for model in models
        for share, part in SHARES.items()
        for run in begun(
            s, {"model": model, "images": round(whole * part)}, model, toy_steps=60 if _is_resnet(model) else 400,
            measures=("fewshot", "finetune"), name=_name(model, share.rstrip("%")), early_stop=4,
            train_split="train" if part == 1 else f"train[:{100 * part:.3f}%]",
        )
    ]  # fmt: skip


FIG5_TOYS = (
    ("ViT-Nano/4", 600, 1), ("ViT-Nano/2", 600, 1), ("ViT-Nano/2", 600, 2), ("ViT-Ti/4", 300, 1),
    ("R14x0.5", 40, 1), ("R14x0.5", 40, 2), ("R14x1", 40, 1), ("R+Nano/2", 600, 1), ("R+Nano/2", 600, 2),
)  # fmt: skip


def fig5(s: Setting) -> list[Run]:
    """Every model of Table 6; a toy of each family, small and larger, long and short."""
    if s.toy:
        return [
            run
            for model, steps, times in FIG5_TOYS
            for run in begun(
                s, {"family": paper.family(model), "model": model, "epochs": times}, model, toy_steps=steps * times,
                measures=("fewshot", "finetune"), name=_name(model, f"x{times}"),
            )
        ]  # fmt: skip
    return [
        run
        for row in paper.TABLE_6
        for run in begun(
            s, {key: row[key] for key in ("family", "model", "epochs")}, row["model"], epochs=row["epochs"],
            measures=("fewshot", "finetune"), name=_name(row["model"], row["epochs"]),
        )
    ]  # fmt: skip


def table7(s: Setting) -> list[Run]:
    """ResNets by Adam as everywhere, and by SGD with BiT's values: 0.03 for every 256 images, momentum 0.9, decay 1e-4."""
    models = ("R14x0.5", "R14x1") if s.toy else ("R50x1", "R152x2")
    batch = RESNET_TOY["batch_size"] if s.toy else 4096
    by_sgd: dict[str, Any] = {"sgd": 0.9, "learning_rate": 0.03 * batch / 256, "weight_decay": 1e-4}
    return [
        run
        for model in models
        for optimizer, options in (("Adam", dict[str, Any]()), ("SGD", by_sgd))
        for run in begun(
            s, {"model": model, "optimizer": optimizer}, model, toy_steps=40, measures=("fewshot", "finetune"), **options
        )
    ]  # fmt: skip


def table8(s: Setting) -> list[Run]:
    """Every way to tell patches where they are."""
    model = "ViT-Nano/2" if s.toy else "ViT-B/16"
    return [
        run for row in paper.TABLE_8 for run in begun(s, {"position": row["position"]}, model, position=row["position"])
    ]  # fmt: skip


SHAPES: dict[str, tuple[tuple[int, dict[str, Any]], ...]] = {
    # axis: (factor, what changes) around depth 8, width 1024, MLP 2048, patch 32; heads of width 64
    "depth": tuple((n, {"depth": 8 * n}) for n in (1, 2, 4, 8)),
    "width": tuple((n, {"width": 1024 * n, "num_heads": 16 * n}) for n in (1, 2, 4)),
    "MLP width": tuple((n, {"mlp_dim": 2048 * n}) for n in (1, 2, 4, 8)),
    "patch size": tuple((n, {"patch": 32 // n}) for n in (1, 2, 4)),
    "all": tuple(
        (n, {"depth": 8 * n, "width": 1024 * n, "num_heads": 16 * n, "mlp_dim": 2048 * n, "patch": 32 // n}) for n in (1, 2)
    ),
}
TOY_SHAPES: dict[str, tuple[tuple[int, dict[str, Any]], ...]] = {
    "depth": tuple((n, {"depth": n}) for n in (1, 2, 4, 8)),
    "width": tuple((n, {"width": 32 * n, "num_heads": 2 * n}) for n in (1, 2, 4)),
    "MLP width": tuple((n, {"mlp_dim": 64 * n}) for n in (1, 2, 4, 8)),
    "patch size": tuple((n, {"patch": 4 // n}) for n in (1, 2, 4)),
    "all": tuple((n, {"depth": n, "width": 32 * n, "num_heads": 2 * n, "mlp_dim": 64 * n, "patch": 4 // n}) for n in (1, 2, 4)),
}


def fig8(s: Setting) -> list[Run]:
    """One measure of the model at a time, and all together, from one base, which is trained once."""
    base: dict[str, Any] = (
        {"depth": 1, "width": 32, "num_heads": 2, "mlp_dim": 64, "patch": 4}
        if s.toy
        else {"depth": 8, "width": 1024, "num_heads": 16, "mlp_dim": 2048, "patch": 32}
    )
    size, runs = "Nano" if s.toy else "L", []
    for axis, points in (TOY_SHAPES if s.toy else SHAPES).items():
        for factor, change in points:
            if factor == 1 and runs:
                continue  # the base, which all axes share
            shape = base | change
            model = f"ViT-{size}/{shape.pop('patch')}"
            at = {"scaled": "base" if factor == 1 else axis, "factor": factor}
            runs += begun(s, at, model, toy_steps=300, **shape)
    return runs


def fig9(s: Setting) -> list[Run]:
    """A class token and the mean of all tokens, each with several learning rates."""
    model, rates = ("ViT-Nano/2", (5e-4, 2e-3, 8e-3)) if s.toy else ("ViT-B/16", (3e-4, 8e-4, 2e-3))
    heads = {"token": "class token", "gap": "mean of patches (GAP)"}
    return [
        run
        for pool, head in heads.items()
        for rate in rates
        for run in begun(
            s, {"head": head, "rate": rate}, model, name=_name(pool, f"{rate:g}"), pool=pool, learning_rate=rate
        )
    ]  # fmt: skip


def fig2(s: Setting) -> list[Run]:
    """A pre-training, and train.vtab from it; toys without VTAB's sets have tasks made of the digits."""
    if s.vtab is None and not s.toy:
        raise ValueError("this study wants --vtab DIRECTORY: VTAB's sets, prepared as python -m train.vtab --help says of --data")
    model = "ViT-Nano/4" if s.toy else "ViT-L/16"
    options: dict[str, Any] = {"toys": s.vtab is None, "data": s.vtab, "seed": s.seed}
    if s.toy:
        options |= {"steps": s.steps(TOY_TUNE), "batch_size": 64, "image_size": 16}
        start = begun(s, {"model": model}, model, measures=())
    else:
        options |= {"steps": s.steps(recipes.TABLE_4["vtab"].steps)}
        start = begun(s, {"model": model}, model, epochs=14, measures=())
    return [*start, Run(name="vtab", job="vtab", options=words(options), after=start[0].name)]


def masked(s: Setting) -> list[Run]:
    """Masked patch prediction and none, each then fine-tuned at ten images a class, by train.finetune."""
    model = "ViT-Nano/2" if s.toy else "ViT-B/16"
    few = {"split": "train[:50]"} if s.toy else {"split": "train[:10000]"}  # ten of each class, about: drawn at random
    start: dict[str, Any] = {"objective": "masked", "masked_target": "mean"}
    more: dict[str, Any] = {} if s.toy else {"steps": s.steps(100_000)}  # the paper: no more to gain behind these
    learned = begun(s, {"start": "masked patches"}, model, measures=(), **start, **more)
    nothing = begun(s, {"start": "from scratch"}, model, measures=(), **start, **more | {"steps": 1, "learning_rate": 1e-9})
    return [*learned, tuned(s, learned[0].name, model, **few), *nothing, tuned(s, nothing[0].name, model, **few)]


PAPER_MODELS = (
    "ViT-B/32", "ViT-B/16", "ViT-L/32", "ViT-L/16", "ViT-H/14", "R50x1", "R50x2", "R152x2", "R50+ViT-B/32", "R50+ViT-B/16",
)  # fmt: skip
AXIAL_MODELS = ("ViT-B/32", "ViT-B/16", "Axial-ViT-B/32", "Axial-ViT-B/16", "R50x1", "AxialResNet-50")
AXIAL_TOYS = ("ViT-Nano/4", "ViT-Nano/2", "Axial-ViT-Nano/4", "Axial-ViT-Nano/2", "R14x0.5", "AxialResNet-14x0.5")


def fig12(s: Setting) -> list[Run]:
    """bench.throughput on the devices that there are."""
    options: dict[str, Any] = {"minutes": 3 * s.budget} if s.toy else {"models": PAPER_MODELS, "sizes": (64, 128, 224, 384, 512)}
    return [Run(name="throughput", job="throughput", options=words(options))]


def fig13(s: Setting) -> list[Run]:
    """Axial models and what they are compared with, pre-trained and measured; then their speed, by bench.throughput."""
    models = AXIAL_TOYS if s.toy else AXIAL_MODELS
    runs = [
        run
        for model in models
        for run in begun(s, {"model": model}, model, epochs=7, toy_steps=40 if _is_resnet(model) else 300)
    ]  # fmt: skip
    for size in sorted({_size(s, model) for model in models}):
        options: dict[str, Any] = {"models": tuple(model for model in models if _size(s, model) == size), "sizes": (size,)}
        options |= {"batch_sizes": (64,), "minutes": 3 * s.budget} if s.toy else {}
        runs.append(Run(name=f"throughput-{size}", job="throughput", options=(*words(options), "--no-largest")))
    return runs


def _size(s: Setting, model: str) -> int:
    return _small(s, model).get("image_size", 8) if s.toy else 224


FEWSHOT = "ImageNet, 5-shot linear"
STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        Study(
            name="table5", title="Table 5, Figures 3 and 4: how much data", runs=table5, x="images", line="model", log=True,
            xlabel="pre-training images", paper=paper.TABLE_5, paper_what="ImageNet, fine-tuned", paper_x="images",
            note="A run that stops early is measured as it then is; its best validation stands beside.",
        ),
        Study(
            name="fig5", title="Figure 5, Table 6: accuracy against pre-training compute", runs=fig5, x="exaFLOPs", line="family",
            log=True, xlabel="exaFLOPs of pre-training", paper=paper.TABLE_6, paper_what="ImageNet, fine-tuned", paper_x="exaFLOPs",
        ),
        Study(
            name="table7", title="Table 7: ResNets by Adam and by SGD", runs=table7, x="model", line="optimizer",
            paper=paper.TABLE_7, paper_what="fine-tuned, average of five sets", paper_x="model",
            note="The rate decays as the recipe's does, where BiT's falls in three steps.",
        ),
        Study(
            name="table8", title="Table 8: position embedding", runs=table8, x="position", paper=paper.TABLE_8, paper_what=FEWSHOT,
            paper_x="position",
        ),
        Study(
            name="fig8", title="Figure 8: shape of the transformer", runs=fig8, x="exaFLOPs", line="scaled", log=True,
            xlabel="exaFLOPs of pre-training",
        ),
        Study(
            name="fig9", title="Figure 9: class token or mean, and learning rates", runs=fig9, x="rate", line="head", log=True,
            xlabel="peak learning rate",
        ),
        Study(name="fig2", title="Figure 2, Table 9: VTAB", runs=fig2),
        Study(name="fig12", title="Figure 12: images/s and largest batch", runs=fig12),
        Study(
            name="fig13", title="Figure 13: axial attention", runs=fig13, x="exaFLOPs", line="model", log=True,
            xlabel="exaFLOPs of pre-training", speed=True,
        ),
        Study(
            name="masked", title="Section 4.6: masked patch prediction", runs=masked, x="start", paper=paper.MASKED,
            paper_what="ImageNet, fine-tuned on all of it", paper_x="start",
        ),
    )
}  # fmt: skip
ALIASES = {"fig3": "table5", "fig4": "table5", "table6": "fig5", "table9": "fig2"}


def study_of(name: str) -> Study:
    """The study of a name. ValueError, with the nearest, for one there is not."""
    known = (*STUDIES, *ALIASES)
    found = ALIASES.get(name, name)
    if found not in STUDIES:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        said = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"no study is called {name!r}: {said}")
    return STUDIES[found]
