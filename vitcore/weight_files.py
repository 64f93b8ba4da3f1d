"""Reading and writing .npz and .safetensors as named arrays, where the file may come from a stranger.

Nothing in a file is believed before it is checked against the file itself: no pickle is ever read, a header's claim must be borne
out by the bytes that are there, and an array is only read when the caller, who knows what shape it wants, asks for it.
Opening reads headers alone, and at most `MOST_HEADER` bytes of those.
"""

import base64
import contextlib
import errno
import io
import json
import math
import os
import secrets
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from vitcore.json_text import parse as parse_json

MOST_HEADER = 2**22  # bytes of a zip's directory or a safetensors header: ViT-H with its optimizer takes a tenth of that
_MOST_NPY_HEADER = 10_000  # bytes, as numpy's own bound
_CHUNK = 2**20
_COMMENT = b"vitcore:"
_BF16 = np.dtype(ml_dtypes.bfloat16)
_SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": _BF16}


class WeightError(ValueError):
    """Something is wrong with a file of weights. The message is one line: which file, what, and what to do."""


class Stored(NamedTuple):
    """An array in a file. dtype: numpy's, bfloat16 where the file has raw pairs of bytes. read: the array itself."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def kind(path) -> str:
    """ "npz" or "safetensors", by the name of the file. WeightError for any other."""
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix not in (".npz", ".safetensors") and os.path.isfile(os.path.join(path, "config.json")):
        raise WeightError(
            f"{path} is the directory of a run: python -m train.pretrained {path} FILE.safetensors makes a file of its weights, "
            "with a name that ends in .npz or .safetensors"
        )
    if suffix not in (".npz", ".safetensors"):
        raise WeightError(f"{path}: a name that ends in .npz or .safetensors is required, which says what the file is")
    return suffix[1:]


@contextlib.contextmanager
def opened(path) -> Iterator[dict[str, Stored]]:
    """{name: Stored} of a file; the arrays can be read while it is open.

    Raises WeightError for whatever is wrong with the file's form, the caller's reads included; OSError where it cannot be opened.
    """
    path = os.fspath(path)
    if not os.path.exists(path) and not path.endswith((".npz", ".safetensors")):
        raise WeightError(f"{path}: there is no such file or directory: a run's directory, an .npz or a .safetensors is required")
    form = kind(path)
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would be waited for, a device read, for ever
        raise WeightError(f"{path} is no regular file: give an .npz or .safetensors")
    try:
        with (_npz if form == "npz" else _safetensors)(path) as arrays:
            yield arrays
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
        raise WeightError(f"{path} is cut short or damaged ({_line(error)}): get it again") from error


def metadata(path) -> dict[str, str]:
    """What a file says of itself: its metadata, or the comment of an .npz of ours. For a file that `opened` has accepted."""
    path = os.fspath(path)
    if kind(path) == "npz":
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment
        if not comment.startswith(_COMMENT):
            return {}
        try:
            packed = base64.b64decode(comment[len(_COMMENT) :])
            told = parse_json(zlib.decompressobj().decompress(packed, MOST_HEADER))
            return {str(key): str(value) for key, value in told.items()}
        except (ValueError, AttributeError) as error:
            raise WeightError(f"{path}: what it says of its model is damaged ({_line(error)}): get it again") from error
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return dict(file.metadata() or {})


def write(path, arrays: dict[str, np.ndarray], about: dict[str, str] | None = None) -> None:
    """Writes arrays, which appear under `path` whole or not at all. bfloat16 goes into an .npz as raw pairs of bytes, as the
    releases have it. about: what `metadata` gives back. ValueError where that is more than an .npz's comment holds; OSError."""
    path = os.fspath(path)
    form = kind(path)
    comment = _COMMENT + base64.b64encode(zlib.compress(json.dumps(about or {}).encode(), 9))
    if form == "npz" and len(comment) > zipfile.ZIP_MAX_COMMENT:
        raise WeightError(f"{path}: the class names do not fit into an .npz: write a .safetensors, or leave them out")
    with appearing(path) as (file, partial):
        if form == "npz":
            np.savez(file, allow_pickle=False, **{k: a.view("V2") if a.dtype == _BF16 else a for k, a in arrays.items()})
            file.close()
            if about:
                with zipfile.ZipFile(partial, "a") as archive:
                    archive.comment = comment
        else:
            from safetensors import SafetensorError
            from safetensors.numpy import save_file

            mode = os.fstat(file.fileno()).st_mode & 0o777
            try:
                save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, partial, metadata=about)
            except SafetensorError as error:  # a full disk: safetensors raises no OSError for it
                raise OSError(f"cannot write {path}: {_line(error)}") from error
            os.chmod(partial, mode)  # safetensors makes a file of its own


def _sync(path: str) -> None:
    """A file's bytes, or a directory's names, onto the disk; a file system that cannot sync a directory is left alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def appearing(path: str | os.PathLike) -> Iterator[tuple[BinaryIO, str]]:
    """A new file to write, and its name meanwhile: behind the block it stands under `path`, after an exception nowhere. OSError."""
    partial = f"{os.fspath(path)}.{secrets.token_hex(4)}.tmp"
    # not by tempfile, whose files are for their owner alone: modes follow the umask, as those of any other file do
    with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "w+b") as file:
        try:
            yield file, partial
            if not file.closed:
                file.flush()
            _sync(partial)  # a loss of power leaves what was there before, or this file whole
            os.replace(partial, path)
            _sync(os.path.dirname(os.path.abspath(path)))  # from here on, a power cut too, the name is this file's
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise


# --- .npz -------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _npz(path: str):
    _check_directory(path)
    with zipfile.ZipFile(path) as archive:
        arrays: dict[str, Stored] = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            parts = info.filename.replace("\\", "/").split("/")
            if info.filename.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or not info.filename.isprintable():
                raise WeightError(f"{path} holds the name {info.filename!r}, which leaves its folder: no file of weights has that")
            if not info.filename.endswith(".npy") or name in arrays:
                what = "twice" if name in arrays else "which is no .npy array"
                raise WeightError(f"{path} holds {info.filename!r}, {what}: arrays as numpy.savez writes them are required")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                raise WeightError(f"{path}: {name} is encrypted or packed in a way numpy does not write: save it with numpy.savez")
            arrays[name] = _npy(path, archive, info, name)
        yield arrays


def _check_directory(path: str) -> None:
    """Refuse a zip whose directory, which zipfile reads whole, is larger than weights need. BadZipFile where there is none."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - 22 - 2**16 - 20))
        tail = file.read()
        end = tail.rfind(b"PK\5\6")
        if end < 0 or len(tail) < end + 22:
            raise zipfile.BadZipFile("it has no directory at its end")
        directory = struct.unpack_from("<I", tail, end + 12)[0]
        if len(tail) < end + 22 + struct.unpack_from("<H", tail, end + 20)[0]:
            raise zipfile.BadZipFile("its last bytes are missing")
        if tail[end - 20 : end - 16] == b"PK\6\7":  # a zip64's directory is described elsewhere
            file.seek(min(size, struct.unpack_from("<Q", tail, end - 20 + 8)[0]))
            record = file.read(56)
            if len(record) < 56 or record[:4] != b"PK\6\6":
                raise zipfile.BadZipFile("its directory is not where it is said to be")
            directory = struct.unpack_from("<Q", record, 40)[0]
    if directory > MOST_HEADER:
        raise WeightError(f"{path} has a directory of {directory:,} bytes, weights need at most {MOST_HEADER:,}: get another file")


def _npy(path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Stored:
    with archive.open(info) as file:
        start = file.read(8)
        version = start[6:]
        if len(start) < 8 or start[:6] != b"\x93NUMPY" or version not in (b"\1\0", b"\2\0", b"\3\0"):
            raise WeightError(f"{path}: {name} is no .npy array: save it with numpy.savez")
        length = file.read(2 if version == b"\1\0" else 4)
        count = int.from_bytes(length, "little")
        if count > _MOST_NPY_HEADER:
            raise WeightError(
                f"{path}: {name} has a header of {count:,} bytes, at most {_MOST_NPY_HEADER:,} are read: get another file"
            )
        header = file.read(count)
    read_header = np.lib.format.read_array_header_1_0 if version == b"\1\0" else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read_header(io.BytesIO(length + header))
    except Exception as error:  # literal_eval and dtype() raise many kinds
        raise WeightError(f"{path}: {name} has a header that is none ({_line(error)}): get another file") from error
    if dtype.hasobject:
        raise WeightError(f"{path}: {name} holds Python objects, which are not read because they run code: save arrays of numbers")
    begin = 8 + len(length) + count
    _check_size(path, name, shape, dtype, info.file_size - begin)
    if info.compress_type == zipfile.ZIP_STORED and info.file_size > os.path.getsize(path):
        raise zipfile.BadZipFile(f"{name} is larger than the file")
    raw_pairs = dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None

    def read() -> np.ndarray:
        out = np.empty(shape[::-1] if fortran else shape, dtype)
        into, position = out.reshape(-1).view(np.uint8), 0
        with archive.open(info) as file:
            file.read(begin)
            while chunk := file.read(_CHUNK):  # to the end, where zipfile compares the checksum
                into[position : position + len(chunk)] = np.frombuffer(chunk, np.uint8)
                position += len(chunk)
        if position != into.size:
            raise EOFError(f"{name} ends early")
        found = (out.T if fortran else out).view(_BF16 if raw_pairs else dtype)
        return found if found.dtype.isnative else found.astype(native)  # big-endian

    native = _BF16 if raw_pairs else dtype.newbyteorder("=")
    return Stored(shape, native, read)


# --- .safetensors -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _safetensors(path: str):
    from safetensors import SafetensorError, safe_open

    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise WeightError(f"{path} is cut short or no .safetensors: its header should be {length:,} bytes, the file is {size:,}")
    if length > MOST_HEADER:
        raise WeightError(f"{path} has a header of {length:,} bytes, weights need at most {MOST_HEADER:,}: get another file")
    try:
        with safe_open(path, "np") as file:  # compares every offset with the file
            arrays = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                arrays[name] = Stored(shape, np.dtype(_SAFETENSORS.get(dtype, np.void)), lambda name=name: file.get_tensor(name))
            yield arrays
    except SafetensorError as error:
        raise WeightError(f"{path} is cut short or damaged ({_line(error)}): get it again") from error


# --- shared -----------------------------------------------------------------------------------------------------------------


def _check_size(path: str, name: str, shape, dtype: np.dtype, there: int) -> None:
    if any(not isinstance(n, int) or n < 0 for n in shape) or (claimed := math.prod(shape) * dtype.itemsize) != there:
        said = "a shape that is none" if any(n < 0 for n in shape) else f"{claimed:,} bytes"
        raise WeightError(f"{path}: {name} claims {said} as {dtype}{list(shape)}, the file has {max(there, 0):,}: get another file")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
