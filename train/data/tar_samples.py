"""From the members of a WebDataset shard to samples: which members belong together, which of them is the image, which the label.

Members that follow one another and share a folder and a name up to its first dot are one group, as WebDataset has it. Within it

    cat.000.jpg  cat.000.cls  cat.001.jpg  cat.001.cls    names that are the same up to the last dot go together: two samples
    7.jpg  7.seg.png  7.cls                               a name that goes on behind that of a labelled image is left out
    7.photo.jpg  7.cls                                    the one image and the one label of a group belong together
    7.jpg  7.png  7.cls                                   the image is the first that there is in the order of EXTENSIONS
    7.left.jpg  7.right.jpg  7.cls                        refused: nothing says which

and a name that comes again is refused. Hidden files and what a Mac adds (._NAME, __MACOSX) are left out; a hard link is the file
that it names, where that came before. What is left out is counted.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from train.data.decode import EXTENSIONS
from train.data.source import DataError, LeftOut
from train.data.tar_headers import Member

IMAGES = tuple(extension[1:] for extension in EXTENSIONS)
LABELS = ("cls", "json")


class Sample(NamedTuple):
    """image, label: members. others: further label members, to be asked where `label` holds none."""

    image: Member
    labels: tuple[Member, ...]


class _Part:
    """Members whose names agree up to the last dot, by extension."""

    def __init__(self):
        self.of: dict[str, Member] = {}

    def first(self, extensions: Iterable[str]) -> list[Member]:
        return [self.of[extension] for extension in extensions if extension in self.of]


def samples(members: Iterable[Member], path: str, left_out: LeftOut) -> Iterator[Sample]:
    """The samples of a shard in its order. Raises DataError, naming the shard `path`."""
    group: dict[str, _Part] = {}
    key, seen = None, set()
    for member in _files(members, path, left_out):
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.rpartition(".")
        stem, extension = (stem, extension.lower()) if dot else (base, "")
        if (folder, base.partition(".")[0]) != key:
            yield from _of_group(group, path, left_out)
            key, group = (folder, base.partition(".")[0]), {}
        name = f"{folder}/{stem}.{extension}"
        if extension in IMAGES or extension in LABELS:
            if name in seen:
                raise DataError(f"in the shard {path} the name {member.name} comes twice; every sample needs a name of its own")
            seen.add(name)
            group.setdefault(stem, _Part()).of[extension] = member
        else:
            left_out.add(f".{extension} members" if extension else "members without an ending", f"{path}/{member.name}")
    yield from _of_group(group, path, left_out)


def _files(members: Iterable[Member], path: str, left_out: LeftOut) -> Iterator[Member]:
    known: dict[str, Member] = {}
    for member in members:
        parts = member.name.removeprefix("./").split("/")
        if member.kind == "folder":
            continue
        if any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts):
            left_out.add("hidden", f"{path}/{member.name}")
        elif member.kind == "hard link":
            there = known.get(member.link)
            if there is None:
                left_out.add("hard links to what is not before them", f"{path}/{member.name}")
                continue
            known[member.name] = there._replace(name=member.name)
            yield known[member.name]
        elif member.kind == "file":
            known[member.name] = member
            yield member
        else:
            left_out.add(f"{member.kind} members", f"{path}/{member.name}")


def _of_group(group: dict[str, _Part], path: str, left_out: LeftOut) -> Iterator[Sample]:
    images = {stem: part for stem, part in group.items() if part.first(IMAGES)}
    labels = {stem: part for stem, part in group.items() if part.first(LABELS)}
    both = images.keys() & labels.keys()
    if not both and len(images) == 1 and len(labels) == 1:
        ((_, image),), ((_, label),) = images.items(), labels.items()
        yield _sample(image, label, path, left_out)
        return
    for stem, part in group.items():
        if stem in both:
            yield _sample(part, part, path, left_out)
        elif stem in labels:
            left_out.add("labels without an image", f"{path}/{part.first(LABELS)[0].name}")
        elif any(stem.startswith(f"{other}.") for other in both):
            left_out.add("further images of a sample", f"{path}/{part.first(IMAGES)[0].name}")
        else:
            name = part.first(IMAGES)[0].name
            if len(images) > 1 and labels and not both:
                raise DataError(f"in the shard {path} {name} is one of {len(images)} images of a label; a sample has one image")
            raise DataError(f"in the shard {path} {name} has no label: a .cls, or a .json with 'label', must follow or precede it")


def _sample(image: _Part, label: _Part, path: str, left_out: LeftOut) -> Sample:
    taken, *further = image.first(IMAGES)
    for member in further:
        left_out.add("further images of a sample", f"{path}/{member.name}")
    return Sample(taken, tuple(label.first(LABELS)))
