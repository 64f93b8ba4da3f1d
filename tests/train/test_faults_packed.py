"""A packed set from a stranger, whose checksums are right: of what it says nothing is believed."""

import json
import os
import shutil
from typing import Any

import msgpack
import pytest
from array_record.python import array_record_module  # type: ignore[attr-defined]

from train.data import DataError, open_source, pack
from train.data.arrayrecord import checksum

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack.run(pack.Pack(src="digits:0-2", dst=str(folder), splits=("train",), shard_images=200, workers=1))
    return folder


def of_the_first(name, value):
    def change(said, folder):
        said["shards"][0][name] = value

    return change


def of_all(name, value):
    def change(said, folder):
        said[name] = value

    return change


def records(content: Any):
    """Every record of the first shard is `content`, bytes."""

    def change(said, folder):
        shard = said["shards"][0]
        writer = array_record_module.ArrayRecordWriter(str(folder / shard["file"]), "group_size:1,uncompressed")
        for _ in range(shard["count"]):
            writer.write(content)
        writer.close()
        shard["bytes"] = os.path.getsize(folder / shard["file"])

    return change


def twice(said, folder):
    said["shards"][1] = said["shards"][0]


def outside(said, folder):
    said["shards"][0]["file"] = "../../../etc/passwd"


MANIFEST = "its classes or shards are none"
HOSTILE = {
    "no shards": (of_all("shards", 5), MANIFEST),
    "no shard": (of_all("shards", [5]), MANIFEST),
    "no classes": (of_all("classes", "abc"), MANIFEST),
    "no augmentation": (of_all("augment", 7), MANIFEST),
    "a name that is none": (of_the_first("file", 5), MANIFEST),
    "fewer than none": (of_the_first("count", -5), MANIFEST),
    "more than finite": (of_the_first("count", 1e300), MANIFEST),
    "more than there are": (of_the_first("count", 2**62), "is missing or not of the"),
    "a size that is none": (of_the_first("bytes", None), MANIFEST),
    "no checksum": (of_the_first("sha256", None), MANIFEST),
    "a shard twice": (twice, MANIFEST),
    "a shard elsewhere": (outside, "are missing"),
    "a record that is a list": (records(msgpack.packb([1])), "it holds no image, label and name"),
    "a record without image": (records(msgpack.packb({"label": 0, "name": "x"})), "it holds no image, label and name"),
    "an image that is a number": (
        records(msgpack.packb({"image": 5, "label": 0, "name": "x"})),
        "it holds no image, label and name",
    ),
    "a list of four billion": (records(b"\xdd\xff\xff\xff\xff"), "cannot read record 0"),
    "nested without end": (records(b"\x91" * 100_000), "cannot read record 0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_packed_set_that_lies_is_refused_in_one_line(packed, tmp_path, name):
    change, words = HOSTILE[name]
    folder = tmp_path / "set"
    shutil.copytree(packed, folder)
    said = json.loads((folder / "train.json").read_text())
    change(said, folder)
    (folder / "train.json").write_text(json.dumps(said | {"sha256": checksum(said)}))
    with pytest.raises(DataError) as refused:
        _ = open_source(f"arrayrecord:{folder}", "train")[0]
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
