"""Families of models, a table from the type of a configuration to the functions that make and run its models.

family_of(config).leaves(config)                               every parameter, as `vitcore.parameters.Leaf`
family_of(config).represent(params, images, config, context)   images to what the head reads
variant("ViT-B/16", image_size=384)                            the configuration of a name that any family knows
"""

import dataclasses
import difflib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from vitcore import config as vit_config
from vitcore import vit
from vitcore.config import ViTConfig
from vitcore.heads import head_leaves
from vitcore.parameters import Leaf


class Family(NamedTuple):
    """One family of models. Its configurations have the fields image_size, channels, num_classes, representation_size and
    head_bias, and the properties image_shape, width (of the representation) and feature_size (of what the head reads).

    leaves: (config) -> its leaves but for the head's, which every family shares. represent: (params, images [B, Y, X, C] floats,
    config, context) -> (y [B, D] in context.dtype, what `context.capture` asks for, by its fields' names). parse: (name) -> the
    fields of a named model, None for a name that is not the family's. names: some that it is known by, for suggestions. spelling:
    of all.
    """

    leaves: Callable
    represent: Callable
    parse: Callable[[str], dict[str, Any] | None]
    names: tuple[str, ...]
    spelling: str


FAMILIES: dict[type, Family] = {
    ViTConfig: Family(
        leaves=vit.leaves,
        represent=vit.represent,
        parse=vit_config.parse,
        names=vit_config.NAMES,
        spelling=f"ViT-{{{','.join(vit_config.SIZES)}}}/P with any patch side P",
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
    """Every parameter of a model: the list that init, partition_specs, checks, counts and weight files read."""
    return (*family_of(config).leaves(config), *head_leaves(config))


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
