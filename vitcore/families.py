"""Families of models, a table from the type of a configuration to the functions that make and run its models.

family_of(config).leaves(config)                               every parameter, as `vitcore.parameters.Leaf`
family_of(config).represent(params, images, config, context)   images to what the head reads
variant("ViT-B/16", image_size=384)                            the configuration of a name that any family knows
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from vitcore import config as vit_config
from vitcore import parameters, resnet_models, vit
from vitcore.config import ViTConfig
from vitcore.heads import head_leaves
from vitcore.parameters import Leaf
from vitcore.resnet_models import ResNetConfig


class Family(NamedTuple):
    """One family of models. Its configurations have the fields image_size, channels, num_classes, representation_size and
    head_bias, and the properties image_shape, width (of the representation) and feature_size (of what the head reads).

    leaves: (config) -> its leaves but for the head's, which every family shares. represent: (params, images [B, Y, X, C] floats,
    config, context) -> (y [B, D] in context.dtype, what `context.capture` asks for, by its fields' names). parse: (name) -> the
    fields of a named model, None for a name that is not the family's. names: some that it is known by, for suggestions. spelling:
    of all. fit: (path, array, config, new, method) -> a leaf as a model of another image size has it. by_xla: (config, ops, dtype
    of activations, heads of a device) -> the parts that XLA compiles, where no op stands for them or these ops leave them to it,
    for people. head: (config) -> the head's leaves, the same in every family but for their names in files.
    """

    leaves: Callable
    represent: Callable
    parse: Callable[[str], dict[str, Any] | None]
    names: tuple[str, ...]
    spelling: str
    fit: Callable
    by_xla: Callable
    head: Callable = head_leaves


FAMILIES: dict[type, Family] = {
    ViTConfig: Family(
        leaves=vit.leaves,
        represent=vit.represent,
        parse=vit_config.parse,
        names=vit_config.NAMES,
        fit=vit.fit,
        by_xla=vit.by_xla,
        spelling=f"ViT-{{{','.join(vit_config.SIZES)}}}/P with any patch side P, Axial-ViT-B/P, R50+ViT-B/16 or /32, "
        "DINOv2-{S,B,L,g}/14, DINOv3-{S,S+,B,L,H+,7B}/16",
    ),
    ResNetConfig: Family(
        leaves=resnet_models.leaves,
        represent=resnet_models.represent,
        parse=resnet_models.parse,
        names=resnet_models.NAMES,
        fit=resnet_models.fit,
        by_xla=resnet_models.by_xla,
        head=resnet_models.head,
        spelling="R{50,101,152,200}xW, with -post for the hybrids' form, AxialResNet-50",
    ),
}


def family_of(config) -> Family:
    """The family of a configuration. ValueError for anything else."""
    if type(config) not in FAMILIES:
        known = ", ".join(kind.__name__ for kind in FAMILIES)
        raise ValueError(f"config is a {type(config).__name__}: one of {known} is required, e.g. vitcore.variant('ViT-B/16')")
    return FAMILIES[type(config)]


@cache
def leaves(config) -> tuple[Leaf, ...]:
    """Every parameter of a model: the list that init, partition_specs, checks, counts and weight files read. ValueError where two
    have one path."""
    found = (*family_of(config).leaves(config), *family_of(config).head(config))
    paths = [leaf.path for leaf in found]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise ValueError(f"two leaves of this model have the path {'/'.join(twice)}: give each entry's leaves names of their own")
    return found


def variant(name: str, **changes):
    """The configuration of a named model, "ViT-{Nano,Ti,S,B,L,H}/P" with any patch side P, with `changes` to its fields.

        variant("ViT-B/16", image_size=384, num_classes=10)

    Raises ValueError for an unknown name, with the nearest known ones, or an unknown field.
    """
    for kind, family in FAMILIES.items():
        if (given := family.parse(name)) is not None:
            fields = {field.name for field in dataclasses.fields(kind)}
            if unknown := set(changes) - fields:
                raise ValueError(
                    f"unknown field {', '.join(sorted(unknown))} of {kind.__name__}: it has {', '.join(sorted(fields))}"
                )
            return kind(**{**given, **changes})
    known = [name for family in FAMILIES.values() for name in family.names]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    spellings = "; ".join(family.spelling for family in FAMILIES.values())
    raise ValueError(f"unknown model {name!r}: did you mean {', '.join(near)}? ({spellings})")


def fields_of(name: str) -> frozenset[str]:
    """The fields of the configuration of a named model; none for an unknown name."""
    kinds = (kind for kind, family in FAMILIES.items() if family.parse(name) is not None)
    return frozenset(field.name for kind in kinds for field in dataclasses.fields(kind))


def named(name: str, **asked):
    """`variant` with those of the fields asked for that the model's family has; None asks for nothing."""
    known = fields_of(name)
    return variant(name, **{field: value for field, value in asked.items() if field in known and value is not None})


def changed(config, **asked):
    """The configuration with those of the fields asked for that its family has; None asks for nothing."""
    known = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{field: value for field, value in asked.items() if field in known and value is not None})


def fitted(params, config, new, *, method: Literal["corners", "half-pixel"] = "corners"):
    """Parameters of `config` for `new`, the same model at another image size: position embeddings resampled to its grid, a tree of
    numpy arrays. method: as in `vitcore.posemb`. Raises ValueError where the models differ in more than that."""
    fit = family_of(config).fit
    out = {path: fit(path, array, config, new, method) for path, array in parameters.flat(params).items()}
    parameters.check(out := parameters.nested(out), leaves(new))
    return out


def restored(fields: Mapping[str, Any]):
    """The configuration with these fields, as `dataclasses.asdict` and JSON leave them. ValueError where no family has them."""
    for kind in FAMILIES:
        if set(fields) <= {field.name for field in dataclasses.fields(kind)}:
            with contextlib.suppress(TypeError):  # a field without default is missing
                return kind(**fields)
    raise ValueError(f"no family of models has the fields {', '.join(sorted(fields))}")
