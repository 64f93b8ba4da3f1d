"""Names as they come: odd files in folders, members of shards as others write them, splits and classes of like names."""

import io
import logging
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from train.data import DataError, open_source
from train.data.files import open_regular, read_text
from train.data.select import parse_split
from train.data.tar_headers import TarError, members


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VITCORE_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(value=9, kind="JPEG"):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(out, kind)
    return out.getvalue()


def shard(path, *found):
    """A tar of (name, content) in this order; a content (type, link) is that kind of member."""
    with tarfile.open(path, "w") as tar:
        for name, content in found:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def names_of(source):
    return [source.example_name(i).partition(".tar/")[2] for i in range(len(source))]


# --- members of shards --------------------------------------------------------------------------------------------------------

P, L = picture(), b"0"


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        ([("cat.000.jpg", P), ("cat.000.cls", L), ("cat.001.jpg", P), ("cat.001.cls", L)], ["cat.000.jpg", "cat.001.jpg"]),
        ([("7.jpg", P), ("7.seg.png", P), ("7.cls", L), ("8.jpg", P), ("8.cls", L)], ["7.jpg", "8.jpg"]),
        ([("7.cls", L), ("7.photo.jpg", P)], ["7.photo.jpg"]),
        ([("7.png", P), ("7.jpg", P), ("7.cls", L)], ["7.jpg"]),
        ([("7.webp", picture(1, "WEBP")), ("7.cls", L)], ["7.webp"]),
        ([("a/7.jpg", P), ("a/7.cls", L), ("b/7.jpg", P), ("b/7.cls", L)], ["a/7.jpg", "b/7.jpg"]),
        ([("._7.jpg", L), ("7.jpg", P), ("__MACOSX/._7.jpg", L), ("7.cls", L)], ["7.jpg"]),
        ([("7.jpg", P), ("7.cls", L), ("8.jpg", (tarfile.LNKTYPE, "7.jpg")), ("8.cls", L)], ["7.jpg", "8.jpg"]),
        ([("./7.jpg", P), ("./7.cls", L)], ["./7.jpg"]),
        ([("7.JPG", P), ("7.CLS", L), ("7.txt", b"a caption")], ["7.JPG"]),
        ([("7.jpg", P), ("7.json", b'{"caption": "x"}'), ("7.cls", L)], ["7.jpg"]),
    ],
    ids=[
        "dots",
        "another view",
        "one and one",
        "two forms",
        "webp",
        "folders",
        "mac",
        "hard link",
        "dot folder",
        "capitals",
        "json",
    ],
)
def test_a_shard_as_others_write_it(tmp_path, found, taken):
    shard(tmp_path / "train-0.tar", *found)
    source = open_source(f"tar:{tmp_path}", "train")
    assert names_of(source) == taken
    for index in range(len(source)):
        assert source[index].image.shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([("7.left.jpg", P), ("7.right.jpg", P), ("7.cls", L)], "is one of 2 images of a label; a sample has one image"),
        ([("7.jpg", P), ("7.cls", L), ("8.jpg", P), ("8.cls", L), ("7.jpg", P), ("7.cls", L)], "the name 7.jpg comes twice"),
        ([("7.jpg", P), ("7.jpg", P), ("7.cls", L)], "the name 7.jpg comes twice"),
        ([("7.jpg", P), ("8.jpg", P), ("7.cls", L)], "7.jpg has no label"),
        ([("7.jpg", P), ("7.json", b"{}")], "holds no 'label'"),
    ],
)
def test_a_shard_that_does_not_say_what_belongs_together_is_refused(tmp_path, found, words):
    shard(tmp_path / "train-0.tar", *found)
    with pytest.raises(DataError, match=words):
        open_source(f"tar:{tmp_path}", "train")


def header(size=b"00000000000\0", kind=b"0", name=b"x.jpg"):
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157] = name, size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(**attributes):
    records = b""
    for key, value in attributes.items():
        body = f" {key}={value}\n".encode()
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        records += str(length).encode() + body
    return header(b"%011o\0" % len(records), b"x") + records + bytes(-len(records) % 512)


@pytest.mark.parametrize(
    "content",
    [
        header(b"\xff" * 12),  # a negative size, in binary
        header(b"\x80" + b"\x7f" * 11),  # a huge one
        header(b"-0000000001\0"),
        pax(size=-512) + header(),
        pax(size=2**62) + header(),
        header(b"\x80" + b"\0" * 3 + b"\xff" * 8, b"x"),  # attributes of 2**64 bytes
        header(b"\x80" + b"\0" * 3 + b"\xff" * 8, b"L"),
        header() + b"x" * 512,
        header(b"%011o\0" % 512, b"x") + b"999999 path=x\n".ljust(512, b"\0"),
    ],
    ids=["negative", "huge", "minus", "pax minus", "pax huge", "attributes", "long name", "rubbish behind", "attribute cut"],
)
def test_hostile_headers_end_at_once(tmp_path, content):
    (tmp_path / "train-0.tar").write_bytes(content + bytes(1024))
    with pytest.raises(DataError, match="damaged or cut short"):
        open_source(f"tar:{tmp_path}", "train")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_what_tarfile_finds(tmp_path, form):
    """Long names, long links, names that are no ASCII, folders, links, in every format that tarfile writes."""
    long = "f/" * 30 + "n" * 90 + ".jpg"
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name, kind, link, content in (
            ("a.jpg", tarfile.REGTYPE, "", b"1234"), (long, tarfile.REGTYPE, "", b"5" * 513), ("ä.jpg", tarfile.REGTYPE, "", b""),
            ("folder", tarfile.DIRTYPE, "", b""), ("hard", tarfile.LNKTYPE, "a.jpg", b""), ("soft", tarfile.SYMTYPE, "b" * 90, b""),
            ("last.cls", tarfile.REGTYPE, "", b"7"),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(m.name, m.linkname, m.size, m.offset_data) for m in tar]
    with open_regular(str(tmp_path / "a.tar")) as file:
        found = list(members(file))
        assert [(m.name.rstrip("/"), m.link, m.size, m.start) for m in found] == expected
    assert [m.kind for m in found] == ["file", "file", "file", "folder", "hard link", "link", "file"]


def test_two_archives_in_one_file_are_refused(tmp_path):
    one = shard(tmp_path / "a.tar", ("7.jpg", P)).read_bytes()
    (tmp_path / "b.tar").write_bytes(one + one)
    with open_regular(str(tmp_path / "b.tar")) as file, pytest.raises(TarError, match="several archives"):
        list(members(file))


# --- folders ------------------------------------------------------------------------------------------------------------------


def write_folder(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture())


def test_what_a_folder_leaves_out_is_said_once(tmp_path, caplog):
    write_folder(
        tmp_path, "train/a/0.jpg", "train/a/1.webp", "train/a/.DS_Store", "train/a/notes.txt", "train/a/more/2.jpg", "train/x.csv"
    )
    caplog.set_level(logging.WARNING, "train.data")
    for _ in range(2):
        assert len(open_source(f"folder:{tmp_path}", "train")) == 2
    (said,) = [r.getMessage() for r in caplog.records]
    for part in ("4 left out", "1 .txt", "1 hidden", "1 folders within a class", "1 beside the class folders"):
        assert part in said


def test_folders_named_by_numbers_have_the_labels_of_their_numbers(tmp_path):
    write_folder(tmp_path, *(f"train/{c}/0.jpg" for c in range(1, 13)))
    whole = open_source(f"folder:{tmp_path}", "train")
    assert whole.classes == tuple(map(str, range(1, 13)))
    for text, expected in (("1-4", "1 2 3 4"), ("1,2,3,4", "1 2 3 4"), ("10", "10"), ("9-11,2", "2 9 10 11")):
        assert open_source(f"folder:{tmp_path}", f"train[classes={text}]").classes == tuple(expected.split())
    with pytest.raises(DataError, match="has no class 0-4"):
        open_source(f"folder:{tmp_path}", "train[classes=0-4]")


def test_names_that_are_no_utf_8_are_kept(tmp_path):
    write_folder(tmp_path, "train/a/0.jpg")
    os.rename(os.fsencode(tmp_path / "train" / "a"), os.fsencode(tmp_path) + b"/train/caf\xe9")
    source = open_source(f"folder:{tmp_path}", "train")
    assert os.fsencode(source.example_name(0)).endswith(b"caf\xe9/0.jpg")
    assert source[0].image.shape == (8, 8, 3)
    with pytest.raises(DataError) as error:
        open_source(f"folder:{tmp_path}", "train[classes=none]")
    assert r"caf\xe9" in str(error.value)
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("name", ["set [2012]", "[a]", "x[!b]", "a*b", "wh?t", "{1..3}"])
def test_any_name_of_a_folder_is_its_name(tmp_path, name):
    place = tmp_path / name
    write_folder(place, "train/a/0.jpg")
    shard(place / "train-0.tar", ("0.jpg", P), ("0.cls", L))
    for spec in (f"folder:{place}", f"tar:{place}", f"tar:{place}/{{split}}-*.tar", f"tar:{place}/train-{{0..0}}.tar"):
        assert len(open_source(spec, "train")) == 1
    (place / "list.txt").write_text(str(place / "train" / "a" / "1.jpg"))
    write_folder(place, "train/a/1.jpg")
    assert len(open_source(f"folder:{place}", f"train[without={place}/list.txt]")) == 1


def test_brackets_of_a_path_pair():
    assert parse_split("train[without=a[b]/c][:9]") == ("train", ["without=a[b]/c", ":9"])
    with pytest.raises(DataError, match="not understood"):
        parse_split("train[without=a[b]")


def test_a_split_is_not_another_whose_name_begins_alike(tmp_path, caplog):
    for name, count in (("train-0", 1), ("trainval-0", 2), ("train_extra-0", 3), ("val-000", 1), ("validation-000", 4)):
        shard(tmp_path / f"{name}.tar", *(m for i in range(count) for m in ((f"{i}.jpg", P), (f"{i}.cls", L))))
    caplog.set_level(logging.WARNING, "train.data")
    assert len(open_source(f"tar:{tmp_path}", "train")) == 1
    assert "train_extra-0.tar" in caplog.text
    assert len(open_source(f"tar:{tmp_path}", "val")) == 1
    (tmp_path / "train-0.tar").unlink()
    shard(tmp_path / "train_more-0.tar", ("0.jpg", P), ("0.cls", L))
    with pytest.raises(DataError, match=r"several sets begin with train: train_extra-0\.tar, train_more-0\.tar"):
        open_source(f"tar:{tmp_path}", "train")


def test_a_pipe_or_a_device_in_place_of_any_file_is_one_line(tmp_path):
    shard(tmp_path / "train-0.tar", ("0.jpg", P), ("0.cls", L))
    os.mkfifo(tmp_path / "classes.txt")
    with pytest.raises(DataError, match=r"classes\.txt: it is no regular file"):
        open_source(f"tar:{tmp_path}", "train")
    with pytest.raises(DataError, match="it is no regular file"):
        open_source("digits", f"train[without={tmp_path / 'classes.txt'}]")
    with pytest.raises(DataError, match="it is no regular file"):
        read_text("/dev/zero", "the list")
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "train-0.tar").unlink()
    os.mkfifo(tmp_path / "train-0.tar")
    with pytest.raises(DataError, match="no file fits"):
        open_source(f"tar:{tmp_path}", "train")


# --- tables -------------------------------------------------------------------------------------------------------------------


def table(path, labels, kind=None, names=None, more=None):
    columns = {"image": pa.array([P] * len(labels)), "label": pa.array(labels, kind or pa.int64())} | (more or {})
    found = pa.table(columns)
    if names:
        import json

        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        for name in more or ():
            features = {name: {"_type": "Image" if name < "label" else "ClassLabel", "names": ["no"]}} | features
        found = found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(found, path)


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()])
def test_labels_of_any_integer_type(tmp_path, kind):
    table(tmp_path / "train-0.parquet", [0, 3, 1], kind)
    assert open_source(f"parquet:{tmp_path}", "train").labels().tolist() == [0, 3, 1]


@pytest.mark.parametrize(
    ("labels", "kind"), [([0, 2**40], pa.int64()), ([2**63], pa.uint64()), ([-1], pa.int8()), ([2], pa.int64())]
)
def test_labels_out_of_range_are_refused(tmp_path, labels, kind):
    table(tmp_path / "train-0.parquet", labels, kind, names=["a", "b"])
    with pytest.raises(DataError, match="0 to 1 are required"):
        open_source(f"parquet:{tmp_path}", "train")


def test_files_that_number_the_same_classes_differently_are_brought_together(tmp_path):
    table(tmp_path / "train-0.parquet", [0, 1], names=["a", "b"])
    table(tmp_path / "train-1.parquet", [0, 1, 1], names=["b", "a"])
    source = open_source(f"parquet:{tmp_path}", "train")
    assert source.classes == ("a", "b")
    assert source.labels().tolist() == [0, 1, 1, 0, 0]
    table(tmp_path / "train-2.parquet", [0], names=["a", "c"])
    with pytest.raises(DataError, match=r"train-2.parquet has other classes than .*train-0.parquet"):
        open_source(f"parquet:{tmp_path}", "train")


def test_the_usual_columns_win_over_the_first(tmp_path):
    more = {"depth": pa.array([b"x"]), "mood": pa.array([0], pa.int64())}
    table(tmp_path / "train-0.parquet", [1], names=["a", "b"], more=more)
    source = open_source(f"parquet:{tmp_path}", "train")
    assert source.classes == ("a", "b")
    np.testing.assert_array_equal(source[0].image, np.asarray(Image.open(io.BytesIO(P))))
