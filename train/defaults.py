"""The options of a pre-training run with every open value filled in from its recipe (paper Table 3)."""

import dataclasses
import os
from typing import Any

from kernels.layer_norm.reference import EPS
from train import masked, recipes
from train.optimizers import WHOLE
from train.options import check_numbers, resolve_images


def resolve(args: Any, *, examples: int) -> Any:
    """`args`, a `train.pretrain.Pretrain`, with every open value filled in from the recipe: what config.json holds.
    examples: training images there are.

    Raises ValueError for unknown names and values that do not fit together.
    """
    from train.data import absolute
    from vitcore import families, variant

    digits = args.data.partition(":")[0] == "digits"
    name = ("digits" if digits else "imagenet") if args.recipe is None else args.recipe
    hides = args.objective == "masked"
    model = recipes.default_model("digits" if digits else name, masked=hides) if args.model is None else args.model
    shown = variant(model, image_size=_some_size(model))  # an unknown model is the first thing to say
    recipe = masked.recipe_of(args, name, model)
    has = families.fields_of(model)
    for field in ("pool", "position", "dropout", "drop_path"):
        if getattr(args, field) and field not in has:
            option = field.replace("_", "-")
            raise ValueError(f"--{option} {getattr(args, field)}: {model} is a ResNet, which has no {option}: leave it out")

    args.check_ablation(model)
    args.check_sam()

    def given(value, default):
        return default if value is None else value

    if args.subset is not None and not 1 <= args.subset <= examples:
        raise ValueError(f"--subset {args.subset}: {args.data} has {examples} training images, choose 1 to {examples}")
    check_numbers(args, positive="epochs fewshot_every", natural="subset_seed early_stop representation_size")
    if max(args.seed, args.subset_seed) >= 2**63:
        raise ValueError(f"--seed {args.seed}, --subset-seed {args.subset_seed}: seeds below 2**63 are required")
    if not 0 <= (args.drop_path or 0) < 1:
        raise ValueError(f"--drop-path {args.drop_path}: a rate in [0, 1) is required")
    if not 0 <= args.polyak < 1:
        raise ValueError(f"--polyak {args.polyak}: a decay in [0, 1) is required")
    batch = given(args.batch_size, recipe.batch_size)
    epochs = given(args.epochs, recipe.epochs)
    steps = given(args.steps, recipes.steps_of(epochs, args.subset or examples, batch))
    every = max(1, steps // 20)
    # a run shorter than its recipe's warm-up keeps the warm-up's share of a tenth
    warmup = given(args.warmup_steps, recipe.warmup_steps if recipe.warmup_steps < steps else steps // 10)
    rate = given(args.learning_rate, recipe.base_lr)
    form = given(args.weight_decay_form, recipe.weight_decay_form if args.optimizer is None else "adamw")
    # in the other form than the recipe's: adamw's decay is multiplied by the rate, the independent form's has the peak rate in it
    other = {"independent": rate, "adamw": 1 / rate if rate else 1.0}[form] if form != recipe.weight_decay_form else 1.0
    weight_decay = given(args.weight_decay, recipe.weight_decay * other)
    loss = given(args.loss, recipe.loss)
    smoothing = given(args.label_smoothing, recipe.label_smoothing if loss == recipe.loss else 0.0)
    checked = dataclasses.replace(  # the recipe's own checks, on what the command line made of it
        recipe,
        dropout=given(args.dropout, recipe.dropout if "dropout" in has else 0.0),
        clip_norm=given(args.clip_norm, recipe.clip_norm) or None,
        label_smoothing=smoothing,
        loss=loss,
        batch_size=batch,
        warmup_steps=warmup,
        image_size=given(args.image_size, recipe.image_size),
    )
    return dataclasses.replace(
        args,
        config=None,
        data=absolute(args.data),
        init=args.init if args.init is None or "://" in args.init else os.path.abspath(args.init),
        model=model,
        recipe=name,
        steps=steps,
        epochs=None,
        batch_size=batch,
        image_size=checked.image_size,
        **masked.resolve(args),
        representation_size=given(args.representation_size, given(args.width, shown.width) if "width" in has and not hides else 0),
        dropout=checked.dropout,
        drop_path=given(args.drop_path, 0.0),
        pool=given(args.pool, _own(shown, "pool", recipe.pool)),
        position=given(args.position, _own(shown, "position", recipe.position)),
        gelu=given(args.gelu, getattr(shown, "gelu", "tanh")),
        eps=given(args.eps, getattr(shown, "eps", EPS)),
        learning_rate=rate,
        warmup_steps=warmup,
        decay=given(args.decay, recipe.decay),
        weight_decay=weight_decay,
        weight_decay_form=form,
        clip_norm=checked.clip_norm or 0.0,
        first_moment=given(args.first_moment, "float32" if args.optimizer in WHOLE else recipe.first_moment),
        loss=loss,
        head_bias=given(args.head_bias, recipe.first_bias(loss)),
        label_smoothing=smoothing,
        **resolve_images(args, recipe),
        log_every=given(args.log_every, max(1, min(50, steps // 100))),
        eval_every=given(args.eval_every, every),
        checkpoint_every=given(args.checkpoint_every, every),
    )


def _own(shown, field: str, asked: str) -> str | None:
    """A recipe's pool or position embedding; the model's own where the recipe has the usual one, or where the model's position
    embedding is another than that; None for a model without."""
    usual, own = {"pool": "token", "position": "1d"}[field], getattr(shown, field, None)
    return own if asked == usual or (field == "position" and own != usual) else asked


def _some_size(model: str) -> int:
    """Some image side that a model of this name accepts: two of what its name divides it by, or what a ResNet divides it by."""
    tail = model.rpartition("/")[2]
    return 2 * int(tail) if tail.isdigit() and int(tail) else 32
