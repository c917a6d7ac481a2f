"""Safetensors files, read as hostile input and written so that equal tensors give equal bytes.

    8 bytes   length of the header, little-endian
    header    JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    data      the tensors back to back, row by row: no holes, no overlap, nothing after

safetensors' own reader accepts duplicate names and headers of 100 MB (measured, 0.8.0), so the
header is parsed here first, under limits; what is accepted here it accepts too, and reads alike.
Its own writer orders metadata by a hash map, so files are written here: no metadata, tensors in the
order of that writer (widest dtype first, then name). No torch: reading a header must stay cheap.
"""

import errno
import json
import math
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from adaptlib.errors import CorruptError, NotFoundError, RefusedError

MAX_HEADER = 16 * 1024 * 1024  # bytes
MAX_TENSORS = 65_536
MAX_AXES = 8
MAX_NAME = 512  # characters
MAX_SIDE = 2**63 - 1  # of one axis, and of all of them together
MAX_DEPTH = 64  # of JSON: a manifest must stay readable wherever it is read
# Of one JSON text, before it is parsed: small texts can stand for very many values. A header of
# MAX_TENSORS tensors with MAX_AXES axes has 18 and 10 of these for each.
MAX_MARKS = 20 * MAX_TENSORS  # { [ : and ,
MAX_QUOTES = 16 * MAX_TENSORS

# dtype -> (bytes an item, numpy type of its bits); in the order in which safetensors sorts them
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "u1"),
    "U8": (1, "u1"),
    "I8": (1, "i1"),
    "I16": (2, "<i2"),
    "F16": (2, "<f2"),
    "BF16": (2, "<u2"),
    "I32": (4, "<i4"),
    "F32": (4, "<f4"),
    "F64": (8, "<f8"),
    "I64": (8, "<i8"),
}
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_ODD = (errno.ENXIO, errno.ENODEV, errno.ELOOP)  # a socket, a device without a driver, a loop
_RANK = {dtype: i for i, dtype in enumerate(DTYPES)}
_PICKLES = (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))  # torch.save, pickle


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as bytes. `data` is its row-major content, `dtype` a safetensors name."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def params(self) -> int:
        return self.data.nbytes // DTYPES[self.dtype][0]

    def numpy(self) -> np.ndarray:
        """Its content without a copy; bfloat16 as the uint16 of its bits."""
        return np.frombuffer(self.data, dtype=DTYPES[self.dtype][1]).reshape(self.shape)

    def finite(self) -> bool:
        """No NaN and no infinity in it."""
        if self.dtype not in FLOATS:
            return True
        flat = self.numpy().reshape(-1)
        step = 1 << 20
        if self.dtype == "BF16":
            return all(
                not ((flat[i : i + step] & 0x7F80) == 0x7F80).any()
                for i in range(0, flat.size, step)
            )
        return all(bool(np.isfinite(flat[i : i + step]).all()) for i in range(0, flat.size, step))


class Span(NamedTuple):
    """Where a tensor is in its file, in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    stop: int

    @property
    def params(self) -> int:
        return (self.stop - self.begin) // DTYPES[self.dtype][0]

    def cut(self, view: memoryview) -> RawTensor:
        """The tensor, as a view into the bytes of the whole file."""
        return RawTensor(self.dtype, self.shape, view[self.begin : self.stop])


def map_file(path: Path, *, writable: bool = True) -> memoryview:
    """The bytes of a file, mapped, private and `writable` in memory (the file cannot change)."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        if size == 0:
            return memoryview(b"")
        access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
        return memoryview(mmap.mmap(file.fileno(), size, access=access))


def release(view: memoryview) -> None:
    """Give back the memory that looking at a part of a file has filled, where it is mapped and not
    writable: whoever goes through a large file needs no more than its largest tensor. What is
    looked at again is read again."""
    mapped = view.obj
    if not view.readonly or not isinstance(mapped, mmap.mmap) or not view.nbytes:
        return
    if hasattr(mapped, "madvise"):
        begin = _address(view) - _address(mapped)
        begin -= begin % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, begin, min(view.nbytes, len(mapped) - begin))


def _address(buffer: memoryview | mmap.mmap) -> int:
    return np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]


def open_regular(path: Path) -> BinaryIO:
    """A file to read. NotFoundError where there is none; RefusedError where it is a pipe, a device
    or a directory: reading these can wait for ever, or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _ABSENT:
            raise NotFoundError(f"{path} is not there") from None
        if error.errno in _ODD:
            raise RefusedError(f"{path} is not a regular file") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RefusedError(f"{path} is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def brief(text: str, most: int = 120) -> str:
    """Text from outside as errors show it: quoted, without control characters, and cut."""
    return repr(cut(text, most))


def cut(text: str, most: int = 120) -> str:
    """Text of at most `most` characters; where it is longer, without its middle."""
    return text if len(text) <= most else f"{text[: most - most // 3 - 3]}...{text[-(most // 3) :]}"


def read_tensors(source: str, view: memoryview) -> dict[str, RawTensor]:
    """The tensors of a safetensors file, sorted by name, as views into `view`. Raises as `layout`
    does."""
    return {name: span.cut(view) for name, span in layout(source, view).items()}


def layout(source: str, view: memoryview) -> dict[str, Span]:
    """Where the tensors of a safetensors file are, sorted by name. Only its header is looked at.

    `source` names the file in errors. Raises CorruptError where the file is not what it says
    (truncated, wrong sizes, holes, trailing bytes) and RefusedError where it is over a limit or
    ambiguous (duplicate names, a dtype outside the allow-list).
    """
    if len(view) < 8:
        raise CorruptError(f"{source} is not a safetensors file: {len(view)} bytes, want 8 or more")
    length = int.from_bytes(view[:8], "little")
    if length > MAX_HEADER:
        if bytes(view[:2]) in _PICKLES:
            raise RefusedError(
                f"{source} is a pickle, whatever its name; loading it can run code",
                hint="save the adapter as safetensors (PEFT: save_pretrained does)",
            )
        if length > len(view) - 8:
            raise CorruptError(
                f"{source} says its header has {length:,} bytes; the file has {len(view):,}"
            )
        raise RefusedError(
            f"{source} has a header of {length:,} bytes; at most {MAX_HEADER:,} are read"
        )
    if length > len(view) - 8:
        raise CorruptError(
            f"{source} is truncated: its header has {length:,} bytes, the file {len(view):,}"
        )
    header = bytes(view[8 : 8 + length])
    if not header.startswith(b"{"):
        raise CorruptError(f"{source} has a header that is not a JSON object: no {{ at its start")
    # Counted before parsing, which would take seconds and gigabytes for what is refused after.
    if header.count(b'"data_offsets"') > MAX_TENSORS or _too_many(header):
        raise RefusedError(f"{source} has a header of more than {MAX_TENSORS:,} tensors")
    entries = _parse(source, header)
    _check_metadata(source, entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise RefusedError(
            f"{source} has {len(entries):,} tensors; at most {MAX_TENSORS:,} are read"
        )
    start, data = 8 + length, len(view) - 8 - length
    spans = {name: _span(source, name, entry) for name, entry in entries.items()}
    end = 0
    for name, (_, _, begin, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise CorruptError(f"{source}: tensor {name!r} begins at {begin}, expected {end}")
        end = stop
    if end != data:
        raise CorruptError(f"{source} holds {data:,} bytes of data; its header says {end:,}")
    return {
        name: Span(dtype, shape, start + begin, start + stop)
        for name, (dtype, shape, begin, stop) in sorted(spans.items())
    }


def _span(source: str, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    _check_name(source, name)
    try:
        dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [*shape, begin, stop]
    except (KeyError, TypeError, ValueError):
        raise CorruptError(
            f"{source}: tensor {brief(name)} lacks dtype, shape or data_offsets"
        ) from None
    if entry.keys() != _FIELDS:
        raise CorruptError(
            f"{source}: tensor {brief(name)} has more than dtype, shape and data_offsets"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        said = brief(dtype, 60) if isinstance(dtype, str) else type(dtype).__name__
        raise RefusedError(
            f"{source}: tensor {brief(name)} has dtype {said}; supported: {', '.join(DTYPES)}"
        )
    fits = isinstance(shape, list) and len(shape) <= MAX_AXES
    for n in whole if fits else ():
        fits = fits and type(n) is int and 0 <= n <= MAX_SIDE
    if not fits:
        raise CorruptError(f"{source}: tensor {brief(name)} has a shape or offsets that cannot be")
    size = DTYPES[dtype][0] * math.prod(shape)
    most = size or DTYPES[dtype][0] * math.prod(filter(None, shape))
    if most > MAX_SIDE:  # also of an empty one: (0, 2**62, 9)
        raise CorruptError(
            f"{source}: tensor {brief(name)} of {dtype} {shape} is larger than can be"
        )
    if stop - begin != size:
        raise CorruptError(
            f"{source}: tensor {brief(name)} of {dtype} {shape} takes {size:,} bytes; "
            f"its offsets span {stop - begin:,}"
        )
    return dtype, tuple(shape), begin, stop


def _check_metadata(source: str, metadata: Any) -> None:
    """It is not used, but what safetensors itself would not read is not a safetensors file."""
    try:
        for key, value in metadata.items():
            (key + value).encode()
    except (AttributeError, TypeError, UnicodeEncodeError):
        raise CorruptError(f"{source} has a __metadata__ that is not of text by text") from None


def _check_name(source: str, name: str) -> None:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise RefusedError(
            f"{source} has a tensor name of {len(name)} characters that is empty, over {MAX_NAME} "
            f"long or not printable: {name[:40]!r}"
        )


def parse_json(source: str, text: bytes) -> Any:
    """Strict JSON: duplicate keys, NaN, values without number and nesting without end are errors
    that name `source`."""
    check_values(source, text)
    value = _parse(source, text)
    check_depth(source, value)
    return value


def check_values(source: str, text: bytes | memoryview) -> None:
    """RefusedError where JSON stands for more values than are read here, before any is made."""
    if _too_many(bytes(text)):
        raise RefusedError(f"{source} holds more than {MAX_MARKS:,} values")


def check_depth(source: str, value: Any) -> None:
    """RefusedError where objects and lists are more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [one for one in level if isinstance(one, dict | list)]
        if not nested:
            return
        level = [
            inner for one in nested for inner in (one.values() if isinstance(one, dict) else one)
        ]
    raise RefusedError(f"{source} is nested more than {MAX_DEPTH} deep")


def _too_many(text: bytes) -> bool:
    marks = sum(text.count(mark) for mark in (b"{", b"[", b":", b","))
    return marks > MAX_MARKS or text.count(b'"') > MAX_QUOTES


def _parse(source: str, text: bytes) -> Any:
    try:
        return json.loads(
            text.decode(),  # json.loads would also guess UTF-16 and UTF-32
            object_pairs_hook=partial(_unique, source),
            parse_constant=partial(_constant, source),
            parse_int=_integer,
        )
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{source} is not JSON: {str(error)[:200]}") from None


def _unique(source: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RefusedError(f"{source} has the key {twice[:80]!r} twice")
    return result


def _constant(source: str, value: str) -> Any:
    raise CorruptError(f"{source} holds {value}, which is not JSON")


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # as others read it, safetensors among them


def encode(tensors: Mapping[str, RawTensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file with these tensors and no metadata, in pieces.

    Equal to what `safetensors` itself writes, so the digest of the same tensors is one digest.
    Raises RefusedError for what `read_tensors` would not read again.
    """
    order = sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))
    entries: dict[str, Any] = {}
    begin = 0
    for name in order:
        _check_name("the expert", name)
        tensor = tensors[name]
        end = begin + tensor.data.nbytes
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(order) > MAX_TENSORS or len(header) > MAX_HEADER:
        raise RefusedError(
            f"an expert of {len(order):,} tensors and a header of {len(header):,} bytes cannot be "
            f"kept; at most {MAX_TENSORS:,} and {MAX_HEADER:,}"
        )
    yield len(header).to_bytes(8, "little") + header
    for name in order:
        yield tensors[name].data.cast("B") if tensors[name].data.nbytes else b""
        release(tensors[name].data)


def encoded_size(pieces: Iterable[bytes | memoryview]) -> int:
    """Bytes in all the pieces."""
    return sum(len(piece) for piece in pieces)
