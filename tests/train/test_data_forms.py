"""Every form of a set: the same examples for the same seed, and one clear line for everything that can be wrong with one."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module  # type: ignore[attr-defined]
from PIL import Image
from sklearn.datasets import load_sample_images

from train.data import DataError, absolute, check_classes, open_source, train_batches
from train.data import tar as tar_source
from train.data.pack import Pack, pack
from train.data.sampling import replacements

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("china", "digit", "flower")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def jpeg(picture, **options):
    data = io.BytesIO()
    picture.save(data, "JPEG", **{"quality": 92, **options})
    return data.getvalue()


def write_folder(root, split="train", count=9):
    """Class folders: crops of the two photographs that scikit-learn ships, and digits, as JPEGs of many sizes."""
    from sklearn.datasets import load_digits

    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    digits = load_digits().images  # type: ignore[attr-defined]
    rng = np.random.default_rng(len(split))
    for name, photo in (("china", china), ("digit", None), ("flower", flower)):
        place = root / split / name
        place.mkdir(parents=True)
        for k in range(count):
            if photo is None:
                picture = Image.fromarray((digits[k] * 15.9).astype(np.uint8)).resize((40 + k, 48)).convert("RGB")
            else:
                left, top, side = (int(rng.integers(low, high)) for low, high in ((0, 300), (0, 200), (100, 200)))
                picture = photo.crop((left, top, left + side + 30, top + side)).resize((90 + k, 80))
            (place / f"{k}.jpg").write_bytes(jpeg(picture, subsampling=k % 3))


def environment_of():
    """For subprocesses: this checkout first."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def examples(source):
    """(data, label, class folder/file name) of every example, in order."""
    for i in range(len(source)):
        data, label, name = source.encoded(i)
        yield data, label, "/".join(name.split("/")[-2:])


def write_tar(source, path, each=7, labels="number", images=(".jpg",)):
    """WebDataset shards PATH-000000.tar, ...; labels: number (.cls), name (.cls with classes.txt) or json."""
    found = list(examples(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    if labels != "json":
        (path.parent / "classes.txt").write_text("".join(f"{c}\n" for c in source.classes))
    for shard, start in enumerate(range(0, len(found), each)):
        with tarfile.open(f"{path}-{shard:06d}.tar", "w") as tar:
            for k, (data, label, name) in enumerate(found[start : start + each]):
                text = {"number": str(label), "name": source.classes[label], "json": json.dumps({"label": label, "of": name})}[
                    labels
                ]
                key = f"{start + k:08d}"
                for member, content in (
                    (f"{key}{images[k % len(images)]}", data),
                    (f"{key}.{'json' if labels == 'json' else 'cls'}", text.encode()),
                ):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def write_parquet(source, path, each=10, label_type=None, metadata=True):
    """The hub's layout, in files of three row groups."""
    found = list(examples(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"names": list(source.classes), "_type": "ClassLabel"}}
    info = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if metadata else None
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    count = -(-len(found) // each)
    for shard in range(count):
        part = found[shard * each : (shard + 1) * each]
        table = pa.table(
            {
                "image": pa.array([{"bytes": data, "path": name} for data, _, name in part], image_type),
                "label": pa.array([label for _, label, _ in part], pa.int64()).cast(label_type or pa.int64()),
            }
        ).replace_schema_metadata(info)
        pq.write_table(table, f"{path}-{shard:05d}-of-{count:05d}.parquet", row_group_size=4)


TFDS = """
import sys
import tensorflow_datasets as tfds
from train.data import open_source

class Forms(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = sys.argv[2]
    def _info(self):
        label = tfds.features.ClassLabel(names=self.source.classes)
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(encoding_format="jpeg"), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)
    def _split_generators(self, manager):
        return {"train": self._generate_examples(self.source)}
    def _generate_examples(self, source):
        import io
        for i in range(len(source)):
            data, label, name = source.encoded(i)
            yield i, {"image": io.BytesIO(data), "label": label}

Forms.source = open_source(sys.argv[1], "train")
Forms(data_dir=sys.argv[2], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One set as class folders, and in every other form."""
    root = tmp_path_factory.mktemp("forms")
    write_folder(root / "folder")
    write_folder(root / "folder", "val", count=4)
    for split in ("train", "val"):
        source = open_source(f"folder:{root / 'folder'}", split)
        write_tar(source, root / "tar" / split)
        write_tar(source, root / "tar-names" / split, labels="name", images=(".jpeg", ".JPG"))
        write_parquet(source, root / "parquet" / ("validation" if split == "val" else split))
        (root / "packed").mkdir(exist_ok=True)
        pack(source, str(root / "packed"), split, Pack(src="", dst="", shard_images=11, workers=1))
    return root


SPECS = {
    "folder": "folder:{root}/folder",
    "tar": "tar:{root}/tar/{{split}}-*.tar",
    "tar-names": "tar:{root}/tar-names",
    "parquet": "parquet:{root}/parquet",
    "arrayrecord": "arrayrecord:{root}/packed/{{split}}-*.arrayrecord",
}


def spec(root, form):
    return SPECS[form].format(root=root)


def batches(source, count=4, **options: Any):
    settings: dict[str, Any] = dict(image_size=32, channels=3, batch_size=8, seed=5) | options
    with train_batches(source, **settings) as stream:
        return [next(stream) for _ in range(count)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


# --- all forms alike --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in SPECS if form != "folder"])
@pytest.mark.parametrize("split", ["train", "train[25%:]", "train[classes=flower,0]", "train[classes=1-2][:7]"])
def test_every_form_gives_the_same_examples(root, form, split):
    folder, other = open_source(spec(root, "folder"), split), open_source(spec(root, form), split)
    assert len(other) == len(folder) > 5
    assert other.classes == folder.classes
    np.testing.assert_array_equal(other.labels(), folder.labels())
    assert_same(batches(other), batches(folder))
    for i in (0, len(other) - 1):
        np.testing.assert_array_equal(other[i].image, folder[i].image)
        assert other[i].label == folder[i].label == other.labels()[i]
        assert other[i].name == other.example_name(i)


@pytest.mark.parametrize("form", SPECS)
def test_every_form_has_val_and_travels_to_workers(root, form):
    source = open_source(spec(root, form), "val")
    assert len(source) == 12
    check_classes(open_source(spec(root, form), "train"), source)
    source[0]  # opens what it holds open
    copy = pickle.loads(pickle.dumps(source))
    for i in range(len(source)):
        np.testing.assert_array_equal(copy[i].image, source[i].image)


def test_what_tfds_prepared(root, tmp_path):
    script = tmp_path / "prepare.py"
    script.write_text(TFDS)
    command = [sys.executable, str(script), spec(root, "folder"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment_of())
    assert done.returncode == 0, done.stderr
    place = f"tfds:{tmp_path / 'forms' / '1.0.0'}"
    folder, source = open_source(spec(root, "folder"), "train"), open_source(place, "train")
    assert source.classes == folder.classes
    np.testing.assert_array_equal(source.labels(), folder.labels())
    assert_same(batches(source), batches(folder))
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[3].image, folder[3].image)
    cut = open_source(place, "train[:5]")
    assert [cut.example_name(i).rpartition("/")[2] for i in range(5)] == list("01234"), "tfds ranges are in the prepared order"
    with pytest.raises(DataError) as error:
        open_source(place, "val")
    one_line(error, "has no split 'val'; it has train")
    with pytest.raises(DataError) as error:
        open_source("tfds:no_such_set_as_this", "train")
    one_line(error, "tfds:no_such_set_as_this", "dataset_info.json")
    shard = next((tmp_path / "forms" / "1.0.0").glob("*train*record*"))
    shard.unlink()
    with pytest.raises(DataError) as error:
        open_source(place, "train")[0]
    one_line(error, "forms/1.0.0")


def test_cifar_is_the_pixels_of_its_records(tmp_path):
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (60, 3, 32, 32), np.uint8)
    labels = np.arange(60, dtype=np.uint8) % 10
    for k in range(5):
        rows = [labels[10 * k : 10 * k + 10, None], planes[10 * k : 10 * k + 10].reshape(10, -1)]
        np.concatenate(rows, axis=1).tofile(tmp_path / f"data_batch_{k + 1}.bin")
    np.concatenate([labels[50:, None], planes[50:].reshape(10, -1)], axis=1).tofile(tmp_path / "test_batch.bin")
    (tmp_path / "batches.meta.txt").write_text("\n".join(f"class{k}" for k in range(10)) + "\n\n")
    train, test = open_source(f"cifar:{tmp_path}", "train"), open_source(f"cifar:{tmp_path}", "val")
    assert (len(train), len(test), train.classes[3]) == (50, 10, "class3")
    np.testing.assert_array_equal(train[23].image, planes[23].transpose(1, 2, 0))
    np.testing.assert_array_equal(test[4].image, planes[54].transpose(1, 2, 0))
    np.testing.assert_array_equal(train.labels(), labels[:50])
    (tmp_path / "packed").mkdir()
    pack(train, str(tmp_path / "packed"), "train", Pack(src="", dst="", shard_images=20, workers=1))
    assert_same(batches(open_source(f"arrayrecord:{tmp_path / 'packed'}", "train"), image_size=40), batches(train, image_size=40))


def test_cifar_100_takes_the_fine_label(tmp_path):
    record = np.zeros((3, 3074), np.uint8)
    record[:, 0], record[:, 1] = 19, [7, 99, 0]
    record.tofile(tmp_path / "train.bin")
    source = open_source(f"cifar:{tmp_path}", "train")
    assert source.labels().tolist() == [7, 99, 0]
    assert len(source.classes) == 100


def test_packed_digits_train_as_the_digits(tmp_path):
    source = open_source("digits", "train")
    pack(source, str(tmp_path), "train", Pack(src="", dst="", shard_images=600, workers=1))
    packed = open_source(f"arrayrecord:{tmp_path}", "train")
    assert packed.augment == "digits"
    options: dict[str, Any] = dict(image_size=8, channels=1, batch_size=64)
    for a, b in zip(batches(packed, **options), batches(source, **options), strict=True):
        np.testing.assert_allclose(
            a["image"], b["image"], atol=1e-6
        )  # grey went through RGB, whose weights add up to 1 in rounding
        np.testing.assert_array_equal(a["label"], b["label"])


def test_labels_in_json_and_without_class_names(root, tmp_path):
    source = open_source(spec(root, "folder"), "train")
    write_tar(source, tmp_path / "train", labels="json")
    tar = open_source(f"tar:{tmp_path}", "train")
    assert tar.classes == ("0", "1", "2")
    np.testing.assert_array_equal(tar.labels(), source.labels())
    write_parquet(source, tmp_path / "train", metadata=False)
    parquet = open_source(f"parquet:{tmp_path}", "train")
    assert parquet.classes == ("0", "1", "2")
    assert_same(batches(parquet), batches(tar))


# --- parts of a split -------------------------------------------------------------------------------------------------------


def test_ranges_are_disjoint_and_cover_and_mix_the_classes(root):
    open_part = lambda part: open_source("digits", f"train{part}")  # noqa: E731
    full = open_source("digits", "train")
    whole = {full.example_name(i) for i in range(1442)}
    names = lambda s: {s.example_name(i) for i in range(len(s))}  # noqa: E731
    for cut in ("99%", "50%", "100", "-10%"):
        first, rest = open_part(f"[:{cut}]"), open_part(f"[{cut}:]")
        assert names(first).isdisjoint(names(rest))
        assert names(first) | names(rest) == whole
    assert len(open_part("[:99%]")) == 1428
    assert len(open_part("[100:250]")) == 150
    assert len(open_part("[-10%:]")) == 144
    # a hundredth of class folders is not their last class
    assert len({*open_part("[90%:]").labels().tolist()}) == 10
    assert len({*open_source(spec(root, "folder"), "train[50%:]").labels().tolist()}) == 3


def test_classes_are_chosen_and_numbered_anew():
    low, high = open_source("digits:0-4", "train"), open_source("digits", "train[classes=5-9]")
    assert low.classes == tuple("01234")
    assert high.classes == tuple("56789")
    assert sorted({*low.labels().tolist()}) == sorted({*high.labels().tolist()}) == [0, 1, 2, 3, 4]
    assert len(low) + len(high) == 1442
    full = open_source("digits", "train")
    known = {full.example_name(i): full[i] for i in range(len(full))}
    for source, first in ((low, 0), (high, 5)):
        for i in range(0, len(source), 50):
            example = source[i]
            assert known[example.name].label == example.label + first
            np.testing.assert_array_equal(known[example.name].image, example.image)
    assert open_source("digits:7,3,0-1", "val").classes == tuple("0137")


def test_a_list_of_names_is_left_out(root, tmp_path):
    source = open_source(spec(root, "tar"), "train")
    gone = [source.example_name(i) for i in (0, 5, 26)]
    (tmp_path / "removed.json").write_text(json.dumps({"removed": gone}))
    (tmp_path / "removed.txt").write_text("\n".join(gone))
    for name in ("removed.json", "removed.txt"):
        rest = open_source(spec(root, "tar"), f"train[without={tmp_path / name}]")
        assert len(rest) == len(source) - 3
        assert not {*gone} & {rest.example_name(i) for i in range(len(rest))}
    with pytest.raises(DataError) as error:
        open_source(spec(root, "folder"), f"train[without={tmp_path / 'removed.json'}]")
    one_line(error, "3 of the 3 examples")


def test_a_pattern_without_splits_is_train_and_can_be_cut(root):
    place = f"tar:{root}/tar/train-*.tar"
    first, rest = open_source(place, "train[:75%]"), open_source(place, "train[75%:]")
    assert (len(first), len(rest)) == (20, 7)
    with pytest.raises(DataError) as error:
        open_source(place, "val")
    one_line(error, "names no splits", "{split}")


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train[classes=cat,3,china]", "has no class cat, 3; it has 3 classes: china, digit, flower"),
        ("train[:0]", "[:0] left none"),
        ("train[9]", "[9] is no range"),
        ("train[a:]", "[a:] is no range"),
        ("train[kind=1]", "[kind=1] after a split is not understood"),
        ("train[", "the split 'train[' is not understood"),
        ("train[without=nowhere.json]", "cannot read the list nowhere.json: No such file"),
    ],
)
def test_what_a_split_may_not_be(root, split, words):
    with pytest.raises(DataError) as error:
        open_source(spec(root, "folder"), split)
    one_line(error, words)


def test_classes_that_differ_between_splits(root):
    train = open_source(spec(root, "folder"), "train")
    with pytest.raises(DataError) as error:
        check_classes(train, open_source("digits", "val"))
    one_line(error, "china, digit, flower", "digits/val has 0, 1, 2, 3, 4 and 5 more", "the same class names in the same order")


def test_absolute_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("folder:x/y") == f"folder:{tmp_path}/x/y"
    assert absolute("tar:x-{split}-*.tar") == f"tar:{tmp_path}/x-{{split}}-*.tar"
    assert [absolute(s) for s in ("digits", "digits:0-4", "tfds:cifar10", "what:x")] == [
        "digits",
        "digits:0-4",
        "tfds:cifar10",
        "what:x",
    ]


# --- what can be wrong ------------------------------------------------------------------------------------------------------


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def copied(root, tmp_path, form):
    shutil.copytree(root / {"arrayrecord": "packed"}.get(form, form), tmp_path / form)
    return tmp_path / form


def shard_of(place):
    return sorted(place.glob("train-*"))[1]


@pytest.mark.parametrize("form", ["tar", "parquet", "arrayrecord"])
def test_no_shards_at_all(tmp_path, form):
    with pytest.raises(DataError) as error:
        open_source(f"{form}:{tmp_path}/nowhere/{{split}}-*", "train")
    one_line(error, f"no file fits {tmp_path}/nowhere/train-*", "correct the pattern")
    with pytest.raises(DataError) as error:
        open_source(f"{form}:", "train")
    one_line(error, "needs a pattern")


@pytest.mark.parametrize(("form", "pattern"), [("tar", "{split}-{000000..000003}.tar"), ("arrayrecord", "{split}-*.arrayrecord")])
def test_a_missing_shard(root, tmp_path, form, pattern):
    place = copied(root, tmp_path, form)
    gone = shard_of(place)
    gone.unlink()
    with pytest.raises(DataError) as error:
        open_source(f"{form}:{place}/{pattern}", "train")
    one_line(error, gone.name, "missing; restore")


@pytest.mark.parametrize("form", ["tar", "parquet", "arrayrecord"])
@pytest.mark.parametrize("keep", [0.0, 0.4, 0.9, "no end"])
def test_a_truncated_shard(root, tmp_path, form, keep):
    place = copied(root, tmp_path, form)
    shard = shard_of(place)
    content = shard.read_bytes()
    if keep == "no end":  # of a tar: cut exactly behind a member
        content = content.rstrip(b"\0")
        content = content.ljust(-(-len(content) // 512) * 512, b"\0")
        if form != "tar":
            content = content[:-1]
    else:
        content = content[: int(keep * len(content))]
    shard.write_bytes(content)
    with pytest.raises(DataError) as error:
        open_source(f"{form}:{place}", "train")
    one_line(error, shard, "restore")


def test_a_shard_that_shrinks_while_it_is_read(root, tmp_path):
    place = copied(root, tmp_path, "tar")
    source = open_source(f"tar:{place}", "train")
    shard_of(place).write_bytes(b"")
    with pytest.raises(DataError) as error:
        [source[i] for i in range(len(source))]
    one_line(error, shard_of(place), "shorter since it was indexed")


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_compressed_shard(tmp_path, packed):
    with tarfile.open(tmp_path / "train-0.tar", f"w:{packed}") as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("0.cls"), io.BytesIO(b""))
    with pytest.raises(DataError) as error:
        open_source(f"tar:{tmp_path}", "train")
    one_line(error, "is compressed", "decompress")


def tar_of(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)


@pytest.mark.parametrize(
    ("label", "classes", "words"),
    [
        (b"1.5", "", "is '1.5'; a number from 0 up is required"),
        (b"-1", "", "is '-1'; a number"),
        (b"cat", "", "is 'cat'; a number"),
        (b"cat", "dog\nbird\n", "is 'cat'; a number below 2 or one of the names in classes.txt (dog, bird)"),
        (b"2", "dog\nbird\n", "is 2; a number below 2"),
        (b"x" * 70000, "", "has 70,000 bytes"),
        (None, "", "0.jpg has no label"),
    ],
)
def test_labels_of_the_wrong_kind_in_a_tar(tmp_path, label, classes, words):
    picture = jpeg(Image.new("RGB", (8, 8)))
    tar_of(tmp_path / "train-0.tar", ("0.jpg", picture), *([("0.cls", label)] if label is not None else [("1.cls", b"0")]))
    if classes:
        (tmp_path / "classes.txt").write_text(classes)
    with pytest.raises(DataError) as error:
        open_source(f"tar:{tmp_path}", "train")
    one_line(error, tmp_path / "train-0.tar", words)


def test_a_tar_is_never_extracted_and_its_names_are_no_paths(tmp_path):
    """Members that would escape, links to files outside and devices: names for a log at most."""
    picture, secret = jpeg(Image.new("RGB", (8, 8), "red")), tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(Image.new("RGB", (9, 9), "blue")))
    tar_of(
        tmp_path / "train-0.tar",
        ("../../escape.jpg", picture), ("../../escape.cls", b"0"),
        ("/absolute.jpg", picture), ("/absolute.cls", b"1"),
        ("link.jpg", (tarfile.SYMTYPE, str(secret))), ("link.cls", b"0"),
        ("hard.jpg", (tarfile.LNKTYPE, str(secret))), ("hard.cls", b"0"),
        ("device.jpg", (tarfile.CHRTYPE, "")), ("device.cls", b"0"),
    )  # fmt: skip
    before = {*tmp_path.rglob("*")}
    source = open_source(f"tar:{tmp_path}", "train")
    assert [source.example_name(i).partition(".tar/")[2] for i in range(len(source))] == ["../../escape.jpg", "/absolute.jpg"]
    assert source[1].image.shape == (8, 8, 3)
    assert {*tmp_path.rglob("*")} == before
    assert not (tmp_path.parent / "escape.jpg").exists()
    assert not Path("/absolute.jpg").exists()
    kinds = {what: count for what, (count, _) in source.left_out.found.items()}  # type: ignore[attr-defined]
    assert kinds == {
        "link members": 1, "hard links to what is not before them": 1, "device members": 1, "labels without an image": 3,
    }  # fmt: skip


def test_a_member_that_claims_to_be_huge_costs_nothing(tmp_path):
    """A header that says 300 MB, in a shard that really is so long (with a hole): refused by its size, before memory is taken."""
    info = tarfile.TarInfo("0.jpg")
    info.size = 300 * 2**20
    label = tarfile.TarInfo("0.cls")
    label.size = 1
    with open(tmp_path / "train-0.tar", "wb") as file:
        file.write(info.tobuf())
        file.seek(info.size, 1)
        file.write(label.tobuf() + b"0".ljust(512, b"\0") + bytes(1024))
    source = open_source(f"tar:{tmp_path}", "train")
    with pytest.raises(DataError) as error:
        source[0]
    one_line(error, "314,572,800 bytes")


def test_a_header_that_is_huge_is_refused(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.cls")
        info.pax_headers = {"comment": "x" * 2**21}
        tar.addfile(info)
    with pytest.raises(DataError) as error:
        open_source(f"tar:{tmp_path}", "train")
    one_line(error, tmp_path / "train-0.tar", "a header of 2,097,")


@pytest.mark.parametrize("kind", [pa.float64(), pa.string()])
def test_labels_of_the_wrong_type_in_parquet(root, tmp_path, kind):
    write_parquet(open_source(spec(root, "folder"), "train"), tmp_path / "train", label_type=kind)
    with pytest.raises(DataError) as error:
        open_source(f"parquet:{tmp_path}", "train")
    one_line(error, "the column label of", f"is {kind}; integers are required")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"pixels": pa.array([1]), "label": pa.array([1])}, "has the columns pixels (int64), label (int64); an image column"),
        ({"image": pa.array(["x"]), "label": pa.array([1])}, "the column image of"),
        ({"image": pa.array([b"x"]), "label": pa.array([None], pa.int64())}, "1 rows without a value"),
        (
            {"image": pa.array([b"x"]), "label": pa.array([-1])},
            "has a label -1, 0 to 2147483646 are required; use a split that is labelled",
        ),
    ],
)
def test_parquet_of_another_layout(tmp_path, columns, words):
    pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    with pytest.raises(DataError) as error:
        open_source(f"parquet:{tmp_path}", "train")
    one_line(error, words)


def test_parquet_rows_without_bytes_are_bad_images(tmp_path):
    image = pa.array([{"bytes": None, "path": "a.jpg"}, {"bytes": jpeg(Image.new("RGB", (8, 8))), "path": None}])
    pq.write_table(pa.table({"image": image, "label": pa.array([0, 1])}), tmp_path / "train-0.parquet")
    source = open_source(f"parquet:{tmp_path}", "train")
    with pytest.raises(DataError) as error:
        source[0]
    one_line(error, "holds no bytes", "train-0.parquet#0.0")
    assert source[1].image.shape == (8, 8, 3)


def test_cifar_that_is_none(tmp_path):
    with pytest.raises(DataError) as error:
        open_source(f"cifar:{tmp_path}", "train")
    one_line(error, tmp_path, "no file fits")
    np.zeros((2, 3073), np.uint8).tofile(tmp_path / "data_batch_1.bin")
    with pytest.raises(DataError) as error:
        open_source(f"cifar:{tmp_path}", "train")
    one_line(error, "holds data_batch_1.bin of data_batch_1.bin to data_batch_5.bin")
    np.zeros(5000, np.uint8).tofile(tmp_path / "test_batch.bin")
    with pytest.raises(DataError) as error:
        open_source(f"cifar:{tmp_path}", "test")
    one_line(error, "test_batch.bin has 5,000 bytes, no multiple of the 3073")
    np.full((2, 3073), 77, np.uint8).tofile(tmp_path / "test_batch.bin")
    with pytest.raises(DataError) as error:
        open_source(f"cifar:{tmp_path}", "test")
    one_line(error, "a label 77 with 10 classes")
    with pytest.raises(DataError) as error:
        open_source(f"cifar:{tmp_path}", "dev")
    one_line(error, "'train' and 'test'")


def test_arrayrecord_needs_its_manifest(root, tmp_path):
    place = copied(root, tmp_path, "arrayrecord")
    (place / "train.labels").write_bytes(b"12")
    with pytest.raises(DataError) as error:
        open_source(f"arrayrecord:{place}", "train")
    one_line(error, "train.labels", "pack again")
    (place / "train.json").write_text("{")
    with pytest.raises(DataError) as error:
        open_source(f"arrayrecord:{place}", "train")
    one_line(error, "train.json is damaged")
    (place / "train.json").unlink()
    with pytest.raises(DataError) as error:
        open_source(f"arrayrecord:{place}", "train")
    one_line(error, "what train.data.pack writes", "tfds:FOLDER")


def test_a_record_that_is_none_of_ours(root, tmp_path):
    place = copied(root, tmp_path, "arrayrecord")
    manifest = json.loads((place / "train.json").read_text())
    shard = manifest["shards"][0]
    writer = array_record_module.ArrayRecordWriter(str(place / shard["file"]), "group_size:1")
    for k in range(shard["count"]):
        writer.write(msgpack.packb({"image": b"", "label": 0, "name": "x"}) if k else b"\xc1")
    writer.close()
    shard["bytes"] = (place / shard["file"]).stat().st_size
    (place / "train.json").write_text(json.dumps(manifest))
    source = open_source(f"arrayrecord:{place}", "train")
    for index, words in ((0, "cannot read record 0"), (1, "the file is empty")):
        with pytest.raises(DataError) as error:
            source[index]
        one_line(error, words)


@pytest.mark.parametrize(("name", "module"), [("tfds", "tensorflow_datasets"), ("parquet", "pyarrow.parquet")])
def test_a_missing_extra_is_one_line(root, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError) as error:
        open_source({"tfds": "tfds:cifar10", "parquet": spec(root, "parquet")}[name], "train")
    one_line(error, f"the source '{name}' is not installed", f"pip install 'vitcore[{name}]'")


# --- the kept index ---------------------------------------------------------------------------------------------------------


def test_a_changed_set_is_noticed_though_every_time_says_the_same(root, tmp_path, monkeypatch):
    """Copies keep times (rsync -a, tar -x): what tells is the names, the sizes and the time at which the file system did it."""
    place = tmp_path / "folder"
    shutil.copytree(root / "folder", place)
    assert len(open_source(f"folder:{place}", "train")) == 27
    held = os.stat(place / "train" / "china")
    (place / "train" / "china" / "new.jpg").write_bytes((place / "train" / "china" / "0.jpg").read_bytes())
    os.utime(place / "train" / "china", ns=(held.st_atime_ns, held.st_mtime_ns))
    assert len(open_source(f"folder:{place}", "train")) == 28

    shard, built = tmp_path / "train-0.tar", []
    monkeypatch.setattr(tar_source, "_images", lambda *args, of=tar_source._images: built.append(args[0]) or of(*args))
    picture = jpeg(Image.new("RGB", (8, 8)))
    tar_of(shard, ("0.jpg", picture), ("0.cls", b"1"))
    for _ in range(2):
        assert open_source(f"tar:{tmp_path}", "train").labels().tolist() == [1]
    assert len(built) == 1  # the second time from what was kept
    held = os.stat(shard)
    tar_of(tmp_path / "new", ("0.jpg", picture), ("0.cls", b"2"))
    shard.write_bytes((tmp_path / "new").read_bytes())
    os.utime(shard, ns=(held.st_atime_ns, held.st_mtime_ns))
    assert os.stat(shard).st_size == held.st_size
    assert open_source(f"tar:{tmp_path}", "train").labels().tolist() == [2]


def test_a_damaged_or_unwritable_cache_costs_time_only(root, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("VITCORE_CACHE", str(tmp_path / "cache"))
    first = open_source(spec(root, "tar"), "train")
    (kept,) = (tmp_path / "cache" / "indices").iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    again = open_source(spec(root, "tar"), "train")
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(first.start, again.start)  # type: ignore[attr-defined]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITCORE_CACHE", str(tmp_path / "file"))
    assert len(open_source(spec(root, "tar"), "train")) == 27
    assert re.search(r"cannot keep the index of tar .*VITCORE_CACHE", caplog.text)


def test_replacements_go_by_seed_and_index():
    assert replacements(1000, 3, 17).tolist() == replacements(1000, 3, 17).tolist()
    assert (
        len({*replacements(10**6, 3, 17).tolist(), *replacements(10**6, 3, 18).tolist(), *replacements(10**6, 4, 17).tolist()})
        == 48
    )
    places = np.concatenate([replacements(7, 0, i) for i in range(300)])
    assert np.bincount(places, minlength=7).min() > 500
