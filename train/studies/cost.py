"""What a study costs: FLOPs by the paper's count (Table 6), and from these, as an estimate, days of TPUv3 cores."""

from dataclasses import replace
from typing import Any

from train import pretrain, recipes
from train.options import parse
from train.studies.records import Run, Setting
from train.tuning import Finetune
from train.tuning import resolve as resolve_finetune
from vitcore import families
from vitcore.flops import JFT_CLASSES, flops

# FLOP/s of one TPUv3 core in training: ViT-B/16's step takes 2,443 thousand cycles an image at 940 MHz by the TPU compiler's
# schedules (docs/yardstick.md; 32 images, what is kept included), 105.5 GFLOP. What a run does on the chip is not measured; the
# paper's own ViT-L/16 (Table 2) came to 26.6e12, its ViT-H/14 to 19.7e12.
V3_FLOPS = 3 * 2 * 17.58e9 * 940e6 / 2.443e6
IMAGENET_CLASSES, DIGITS_CLASSES = 1000, 5


def of_runs(runs: list[Run], setting: Setting) -> dict[str, float]:
    """{run: FLOPs} of training; of a few-shot measurement and of timings, which train nothing, 0."""
    begun = {run.name: _pretrained(run, setting) for run in runs if run.job == "pretrain"}
    found = {}
    for run in runs:
        if run.job == "pretrain":
            config, images = begun[run.name]
            found[run.name] = flops(config, images, train=True)
        elif run.job in ("finetune", "vtab") and run.after is not None:
            found[run.name] = _tuning(run, begun[run.after][0], setting)
        else:
            found[run.name] = 0.0
    return found


def core_days(total: float) -> float:
    """Days of TPUv3 cores that so many FLOPs of training take, an estimate: see V3_FLOPS."""
    return total / V3_FLOPS / 86_400


def _pretrained(run: Run, setting: Setting) -> tuple[Any, int]:
    """The model of a pre-training, and the images that it is shown."""
    full = resolved(run)
    where = (
        dict(classes=DIGITS_CLASSES, channels=1 if setting.digits else 3) if setting.toy else dict(classes=JFT_CLASSES, channels=3)
    )
    assert full.steps is not None
    assert full.batch_size is not None
    return pretrain.model_of(full, **where), full.steps * full.batch_size


def resolved(run: Run) -> pretrain.Pretrain:
    """The options of a pre-training with every open value filled in. ValueError."""
    args = pretrain.parse(list(run.options))
    return pretrain.resolve(args, examples=recipes.JFT_EXAMPLES)


def _tuning(run: Run, config, setting: Setting) -> float:
    """Of a fine-tuning, with every rate of its grid; of VTAB, of its tasks together."""
    if run.job == "vtab":
        from train.vtab import TASKS, TOYS, Vtab

        asked: Any = parse(Vtab, "train.vtab", ["--init", "x", *run.options])
        recipe, runs = recipes.finetune_recipe("vtab"), len(TOYS if asked.toys else TASKS)
        steps, batch, size = (
            asked.steps or recipe.steps,
            asked.batch_size or recipe.batch_size,
            asked.image_size or recipe.image_size,
        )
    else:
        full = resolve_finetune(parse(Finetune, "train.finetune", ["--init", "x", *run.options]))
        assert full.steps is not None
        assert full.batch_size is not None
        steps, batch, size = full.steps, full.batch_size, full.image_size
        runs = len(full.learning_rates) + (full.runs or 1) if full.sweep else 1
    classes = DIGITS_CLASSES if setting.toy else IMAGENET_CLASSES
    tuned = replace(config, image_size=size, num_classes=classes, representation_size=None)
    return flops(families.changed(tuned), runs * steps * batch, train=True)
