"""Files from strangers: weights, shards and images that lie about their size, hold code, or name places outside; with the memory
each takes, in a process of its own.
"""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.fault_jobs import ROOT, environment
from vitcore import init, save, variant

pytestmark = pytest.mark.faults
MB = 2**20
MODEL = 5_717_416 * 4  # bytes of ViT-Ti/16 in float32


class Bomb:
    """What pickle runs when it reads this."""

    def __reduce__(self):
        return (os.mkdir, ("pickle-was-run",))


def npy(array=None, *, header=None, body=b"") -> bytes:
    """An .npy: of an array, or with a header that says what it likes."""
    if header is None:
        out = io.BytesIO()
        np.lib.format.write_array(out, array, allow_pickle=True)  # pyright: ignore
        return out.getvalue()
    text = repr(header).encode().ljust(118) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + body


def archive(path, members: dict[str, bytes], compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as file:
        for name, data in members.items():
            file.writestr(name, data)


def commented(path, count):
    """A zip whose directory is nearly all comments, the longest there can be."""
    with zipfile.ZipFile(path, "w") as file:
        for k in range(count):
            info = zipfile.ZipInfo(f"{k}.npy")
            info.comment = bytes(2**16 - 1)
            file.writestr(info, b"")


def zeros(path, name, shape, claimed=None):
    """A member of zeros, packed a thousandfold."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open(name, "w", force_zip64=True) as member:
        member.write(npy(header={"descr": "<f4", "fortran_order": False, "shape": claimed or shape}))
        for _ in range(int(np.prod(shape)) * 4 // MB):
            member.write(bytes(MB))


def tensors(path, header: bytes | dict, body=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)


def sparse(path, start: bytes, size: int):
    """A file that claims, and has, a size that no disk holds."""
    path.write_bytes(start)
    os.truncate(path, size)


def jpeg(size=(64, 48)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def png(width, height, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size, with other chunks before its data; its data are zeros, packed."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(16 * MB), 9)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def shard(path, *members, cut=None):
    """A tar of (name, content) or TarInfo."""
    with tarfile.open(path, "w") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    if cut is not None:
        os.truncate(path, cut)


def entry(name, kind=tarfile.REGTYPE, *, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def header_of(name, size) -> bytes:
    """A tar's header of a member that is not there."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def claim(shape, descr="<f4") -> bytes:
    return npy(header={"descr": descr, "fortran_order": False, "shape": shape})


def f32(shape, end, start=0) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def chunk(kind: bytes, content=b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def many(part: bytes, start: bytes, end: bytes, size=4 * MB) -> bytes:
    """An image file with a part over and over, which is good otherwise."""
    return start + part * (size // len(part)) + end


def small_png() -> tuple[bytes, bytes]:
    """A PNG, cut behind its header."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()[:33], out.getvalue()[33:]


def run_lengths(side) -> bytes:
    """A BMP whose rows are runs of at most 255 pixels; side: a multiple of 256, its pixels being one fewer a run."""
    row = b"\xff\7" * (side // 256) + bytes([side // 256, 7]) + b"\0\0"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(row) * side, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 99, 0, 0, 54 + 1024) + header + bytes(1024) + row * side


def small_gif() -> tuple[bytes, bytes]:
    """A GIF, cut behind its table of colours."""
    out = io.BytesIO()
    Image.new("P", (8, 8)).save(out, "GIF")
    start = 13 + (3 << (out.getvalue()[10] & 7) + 1)
    return out.getvalue()[:start], out.getvalue()[start:]


def gif(width, height) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"


def bmp(width, height) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 99, 0, 0, 54) + header


CODE = b"__import__('os').mkdir('x')"
HUGE = (2**20, 2**20, 2)
KERNEL = "embedding/kernel"  # as the released files name it: [16, 16, 3, 192]
HOSTILE = {
    # weights
    "pickle.npz": lambda p: p.write_bytes(pickle.dumps({"a": Bomb()})),
    "objects.npz": lambda p: archive(p, {f"{KERNEL}.npy": npy(np.array([Bomb()], object))}),
    "a pickle for an array.npz": lambda p: archive(p, {f"{KERNEL}.npy": pickle.dumps(Bomb())}),
    "terabytes.npz": lambda p: archive(p, {f"{KERNEL}.npy": claim(HUGE)}),
    "negative.npz": lambda p: archive(p, {f"{KERNEL}.npy": claim((-1, 4))}),
    "wide elements.npz": lambda p: archive(p, {f"{KERNEL}.npy": claim((9,), "<U999999999")}),
    "zeros.npz": lambda p: zeros(p, f"{KERNEL}.npy", (512 * MB // 4,)),
    "more zeros than claimed.npz": lambda p: zeros(p, f"{KERNEL}.npy", (512 * MB // 4,), (16, 16, 3, 192)),
    "outside.npz": lambda p: archive(p, {"../../escaped.npy": npy(np.zeros(3, np.float32))}),
    "absolute.npz": lambda p: archive(p, {"/tmp/escaped.npy": npy(np.zeros(3, np.float32))}),
    "cut.npz": lambda p: (archive(p, {f"{KERNEL}.npy": npy(np.zeros(9999, np.float32))}), os.truncate(p, 9999)),
    "empty.npz": lambda p: p.write_bytes(b""),
    "million members.npz": lambda p: archive(p, {f"{i}": b"" for i in range(60_000)}),
    "directory of comments.npz": lambda p: commented(p, 1000),
    "code as header.npz": lambda p: archive(p, {f"{KERNEL}.npy": b"\x93NUMPY\1\0" + struct.pack("<H", 64) + CODE.ljust(64)}),
    "header of terabytes.safetensors": lambda p: tensors(p, b"{}", length=2**50),
    "header of a gigabyte.safetensors": lambda p: sparse(p, struct.pack("<Q", 2**30) + b'{"a":' + b" " * 99, 2**31),
    "array of terabytes.safetensors": lambda p: tensors(p, {"a": f32(HUGE, 2**43)}),
    "array larger than its bytes.safetensors": lambda p: tensors(p, {"a": f32(HUGE, 8)}, bytes(8)),
    "overlap.safetensors": lambda p: tensors(
        p, {k: f32([2], 8) for k in "ab"}, bytes(8)),
    "pickle.safetensors": lambda p: p.write_bytes(pickle.dumps(Bomb())),
    "no JSON.safetensors": lambda p: tensors(p, b"[" * 9999),
    "cut.safetensors": lambda p: tensors(p, {"a": f32([4], 16)}, bytes(3)),
    "empty.safetensors": lambda p: p.write_bytes(b""),
    "million entries.safetensors": lambda p: tensors(
        p, {str(i): f32([0], 0) for i in range(200_000)}),
    # shards
    "attributes of a gigabyte.tar": lambda p: sparse(p, _extended("x", 2**30), 512 + 2**30 + 10240),
    "link.tar": lambda p: shard(p, entry("a.jpg", tarfile.SYMTYPE, link="/etc/passwd"), ("a.cls", b"0")),
    "hard link.tar": lambda p: shard(p, entry("a.jpg", tarfile.LNKTYPE, link="../../escaped.jpg"), ("a.cls", b"0")),
    "device.tar": lambda p: shard(p, entry("a.jpg", tarfile.CHRTYPE), ("a.cls", b"0")),
    "member of terabytes.tar": lambda p: p.write_bytes(header_of("a.jpg", 2**42) + bytes(1024)),
    "member of a gigabyte.tar": lambda p: sparse(p, header_of("a.jpg", 2**30), 512 + 2**30 + 10240),
    "image of a gigabyte.tar": lambda p: sparse(
        p, header_of("a.cls", 1) + b"0".ljust(512, b"\0") + header_of("a.jpg", 2**30), 1536 + 2**30 + 10240),
    "label of a gigabyte.tar": lambda p: sparse(p, header_of("a.cls", 2**30), 512 + 2**30 + 10240),
    "packed.tar": lambda p: p.write_bytes(gzip.compress(bytes(256 * MB))),
    "cut.tar": lambda p: shard(p, ("a.jpg", jpeg()), ("a.cls", b"0"), cut=900),
    "empty.tar": lambda p: p.write_bytes(b""),
    "noise.tar": lambda p: p.write_bytes(np.random.default_rng(0).bytes(99999)),
    "name of a gigabyte.tar": lambda p: sparse(p, _extended("././@LongLink", 2**30, tarfile.GNUTYPE_LONGNAME), 512 + 2**30 + 10240),
    "bomb inside.tar": lambda p: shard(p, ("a.jpg", png(30000, 30000)), ("a.cls", b"0")),
    "label that is code.tar": lambda p: shard(p, ("a.jpg", jpeg()), ("a.cls", CODE)),
    # images
    "bomb.png": lambda p: p.write_bytes(png(30000, 30000)),
    "largest.png": lambda p: p.write_bytes(png(2**31 - 1, 2**31 - 1)),
    "text bomb.png": lambda p: p.write_bytes(png(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(bytes(900 * MB), 9)))),
    "profile bomb.png": lambda p: p.write_bytes(png(8, 8, (b"iCCP", b"k\0\0" + zlib.compress(bytes(900 * MB), 9)))),
    "segments.jpg": lambda p: p.write_bytes(many(b"\xff\xfe\0\2", jpeg()[:2], jpeg()[2:])),
    "filling.jpg": lambda p: p.write_bytes(many(b"\xff", jpeg()[:2], jpeg()[2:])),
    "exif again and again.jpg": lambda p: p.write_bytes(
        many(b"\xff\xe1\xff\0Exif\0\0".ljust(0xFF02, b"\0"), jpeg()[:2], jpeg()[2:], 20 * MB)),
    "chunks.png": lambda p: p.write_bytes(many(chunk(b"abCd"), *small_png())),
    "chunks behind.png": lambda p: p.write_bytes(many(chunk(b"abCd"), small_png()[0] + small_png()[1][:-12], chunk(b"IEND"))),
    "profiles.png": lambda p: p.write_bytes(many(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(MB - 9), 9)), *small_png())),
    "blocks.gif": lambda p: p.write_bytes(many(b"!\xfe\1a\0", *small_gif())),
    "runs.bmp": lambda p: p.write_bytes(run_lengths(8192)),
    "bomb.gif": lambda p: p.write_bytes(gif(65535, 65535)),
    "bomb.jpg": lambda p: p.write_bytes(jpeg().replace(struct.pack(">HH", 64, 48), struct.pack(">HH", 65500, 65500))),
    "bomb.bmp": lambda p: p.write_bytes(bmp(50000, -50000)),
    "postscript.jpg": lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(escaped) (w) file\n"),
    "gigabyte.jpg": lambda p: sparse(p, jpeg(), 2**30),
    "cut.jpg": lambda p: p.write_bytes(jpeg()[:700]),
    "empty.jpg": lambda p: p.write_bytes(b""),
    "text.jpg": lambda p: p.write_bytes(b"not an image"),
    "folder.jpg": lambda p: p.mkdir(),
    "pipe.jpg": lambda p: os.mkfifo(p),
    "device.jpg": lambda p: p.symlink_to("/dev/zero"),
}  # fmt: skip


def _extended(name, size, kind=tarfile.XHDTYPE) -> bytes:
    """A tar's header that announces more of the header, in so many bytes."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def limit(name: str) -> int:
    """What a file of this kind may take, in bytes, as docs/reliability.md promises it: the model that was asked for and 4 MiB; the
    headers of a shard; four bytes of each of 89 million pixels. Not the code's own constants: they may be what is wrong."""
    if name.endswith((".npz", ".safetensors")):
        return MODEL + 4 * MB
    if name.endswith(".tar"):
        return 16 * MB
    return 4 * 89_478_485


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the worker says of each file, by name; and that the good ones of each kind are read."""
    folder = tmp_path_factory.mktemp("hostile") / "deep" / "files"
    folder.mkdir(parents=True)
    import jax

    config = variant("ViT-Ti/16")
    params = init(jax.random.key(0), config)
    assert abs(sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / MODEL - 1) < 0.05
    for name in ("warm.npz", "warm.safetensors"):
        save(folder / name, params, config)
    shard(folder / "warm.tar", ("a.jpg", jpeg()), ("a.cls", b"0"))
    (folder / "warm.jpg").write_bytes(jpeg((600, 800)))
    for name, make in HOSTILE.items():
        make(folder / name)
    before = {path for path in folder.parent.parent.rglob("*")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "hostile_worker.py"), str(folder)],
        cwd=ROOT, env=environment() | {"VITCORE_CACHE": str(folder.parent / "cache")}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    created = {path for path in folder.parent.parent.rglob("*")} - before
    assert all("cache" in str(path) for path in created), created  # no path escapes, no code runs
    assert not Path("/tmp/escaped.npy").exists()
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {entry["file"]: entry for entry in found}  # the warm ones twice, the second counts


@pytest.mark.parametrize("name", ["warm.npz", "warm.safetensors", "warm.tar", "warm.jpg"])
def test_a_good_file_is_read_within_the_limit(answers, name):
    assert answers[name]["refused"] is None
    # The arrays as they are read, and as they are put on a device, and 8 MiB for what the process does besides: 14 measurements
    # gave 46.6 to 48.4 MB and one, on a busy machine, 55.5. A third copy would make 70.
    assert answers[name]["memory"] < 2 * limit(name) + 8 * MB


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_and_takes_no_memory(answers, name):
    answer = answers[name]
    assert answer["refused"] in ("WeightError", "DataError", "BadImage", "ValueError"), answer
    assert "\n" not in answer["said"]
    assert len(answer["said"]) < 4000  # a mismatch of weights names every entry
    assert Path(name).name in answer["said"] or Path(name).stem in answer["said"]
    assert answer["memory"] < 1.5 * limit(name), answer


def test_the_largest_is_said(answers):
    slow = max((answers[name]["seconds"], name) for name in HOSTILE)
    assert max(answers[name]["cpu_seconds"] for name in HOSTILE) < 25
    print(f"the longest took {slow[0]:.1f} s ({slow[1]}), all {sum(answers[name]['seconds'] for name in HOSTILE):.0f} s")
    for kind in (".npz", ".safetensors", ".tar", (".png", ".gif", ".jpg", ".bmp")):
        most = max((answers[name]["memory"], name) for name in HOSTILE if name.endswith(kind))
        print(f"{sum(name.endswith(kind) for name in HOSTILE)} hostile {kind}: at most {most[0] / MB:.1f} MB ({most[1]}), "
              f"the limit being {limit(most[1]) / MB:.0f} MB")  # fmt: skip
