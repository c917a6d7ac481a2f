"""Segments: what was computed for some experts of one signature, in a file that never changes.

    derived/<folder>/<recipe>-<key>/<content>.safetensors

    signature    (bytes,)          U8    JSON, the shape of each module: {name: [d_out, d_in], ...}
    digests      (n, 32)           U8    of the experts' manifests

and what the `Form` of the folder says; in `prototypes`, which is what routing looks at:

    fingerprints (n, 32)           U8    of their updates, see `Expert.fingerprint`
    prototypes   (n, W)            F32   module after module in that order, W the sum of their d_in
    sketches     (module, n, SIZE) F32   each module's prototypes in SIZE dimensions

`key` is a hash of the signature and `content` the SHA-256 of the file, each cut to 32 digits. A row
depends on its expert and the recipe alone, so it cannot go stale. A file is written beside its
place, flushed and renamed; it is hashed whenever it is opened, and one that is damaged is as if it
were not there: no flipped bit gets into an answer. Two processes that write at once waste work and
nothing else: a digest that is in two files is in one when they are merged.

They are merged as in a log-structured store: each is larger than all smaller ones together, and one
that stops being so is merged with them. So n experts that come one by one are in log2(n) + 1 files
at most, and each is copied log2(n) times at most. Files of FULL bytes or more are left alone and
merged ones are not above twice that, so neither building nor merging needs much memory.

No torch: `gc` must not wait for it.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from adaptlib.errors import AdaptlibError, CorruptError, NotFoundError
from adaptlib.experts.derived import look
from adaptlib.experts.tensors import RawTensor, encode, map_file, parse_json, read_tensors

RECIPE = "1"
SIZE = 128  # dimensions of a sketch of a prototype
FULL = 128 * 1024 * 1024  # bytes
DAY = 24 * 60 * 60  # seconds

Shapes = Mapping[str, tuple[int, int]]  # (d_out, d_in) by module, sorted


@final
@dataclass(frozen=True, eq=False)
class Form:
    """What segments of one kind hold beside the digests. `parts` gives, by name, a dtype and the
    shape for some modules, in which -1 is the axis of the experts."""

    folder: str
    recipe: str  # what a row holds; another recipe has other folders
    parts: Mapping[str, tuple[str, Callable[[Shapes], tuple[int, ...]]]]

    def axis(self, part: str) -> int:
        """Which axis of a part is that of the experts."""
        return self.parts[part][1]({}).index(-1)


PROTOTYPES = Form(
    "prototypes",
    RECIPE,
    {
        "fingerprints": ("U8", lambda _: (-1, 32)),
        "prototypes": ("F32", lambda shapes: (-1, sum(d_in for _, d_in in shapes.values()))),
        "sketches": ("F32", lambda shapes: (len(shapes), -1, SIZE)),
    },
)


@final
@dataclass(frozen=True, eq=False)
class Segment:
    """`digests` (n, 32), and the `parts` that its form says; mapped from `path` where there is
    one."""

    form: Form
    digests: np.ndarray
    parts: Mapping[str, np.ndarray]
    path: Path | None = None

    @classmethod
    def of(
        cls, digests: Iterable[str], parts: Mapping[str, np.ndarray], form: Form = PROTOTYPES
    ) -> "Segment":
        """A segment in memory, of digests as text."""
        return cls(form, hash_table(digest.removeprefix("sha256:") for digest in digests), parts)

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def nbytes(self) -> int:
        return self.digests.nbytes + sum(part.nbytes for part in self.parts.values())

    def names(self) -> list[str]:
        """The digests as text."""
        return [f"sha256:{digest}" for digest in _texts(self.digests)]

    def prints(self) -> list[str]:
        """The fingerprints as text."""
        return _texts(self.parts["fingerprints"])


def hash_table(hashes: Iterable[str]) -> np.ndarray:
    """SHA-256s in hexadecimal as rows of 32 bytes."""
    rows = b"".join(bytes.fromhex(text) for text in hashes)
    return np.frombuffer(rows, dtype=np.uint8).reshape(-1, 32)


def _texts(table: np.ndarray) -> list[str]:
    text = table.tobytes().hex()
    return [text[i : i + 64] for i in range(0, len(text), 64)]


# -- reading --------------------------------------------------------------------------------------


def read_segments(root: Path, form: Form = PROTOTYPES) -> list[tuple[Shapes, list[Segment]]]:
    """All segments of this form below `root`, those of one signature together. What is broken is
    left out."""
    found: list[tuple[Shapes, list[Segment]]] = []
    for folder in look(root, f"{form.recipe}-*"):
        shapes, segments = read_folder(folder, form)
        if segments:
            found.append((shapes, segments))
    return found


def read_folder(folder: Path, form: Form) -> tuple[Shapes, list[Segment]]:
    """The segments in one folder, and the shapes of their modules."""
    shapes: Shapes = {}
    segments: list[Segment] = []
    for _ in range(3):
        segments, gone = [], False
        for path in look(folder, "*.safetensors"):
            try:
                shapes, segment = _read(path, form)
                segments.append(segment)
            except NotFoundError:  # another process has just merged it: what it made is there now
                gone = True
            except (AdaptlibError, OSError):
                pass
        if not gone:
            break
    return shapes, segments


def _read(path: Path, form: Form = PROTOTYPES) -> tuple[Shapes, Segment]:
    if path.name != _content_name(_pieces(path)):
        raise CorruptError(f"{path} does not hold what its name says")
    tensors = read_tensors(str(path), map_file(path))
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if found.keys() != {"signature", "digests", *form.parts}:
        raise CorruptError(f"{path} is no segment: it has the tensors {', '.join(found)[:200]}")
    signature = tensors["signature"].numpy().tobytes()
    shapes = _parse(path, signature)
    n = found["digests"][1][0] if found["digests"][1] else 0
    wanted = {"signature": ("U8", (len(signature),)), "digests": ("U8", (n, 32))}
    for part, (dtype, shape) in form.parts.items():
        wanted[part] = (dtype, tuple(n if side == -1 else side for side in shape(shapes)))
    if found != wanted or n == 0:
        raise CorruptError(f"{path} is no segment: its tensors do not fit its signature")
    parts = {part: tensors[part].numpy() for part in form.parts}
    segment = Segment(form, tensors["digests"].numpy(), parts, path)
    if path.parent.name != _folder_name(signature, form):
        raise CorruptError(f"{path} does not hold what its name says")
    return shapes, segment


def _parse(path: Path, signature: bytes) -> Shapes:
    said = parse_json(str(path), signature)
    try:
        return {module: (int(d_out), int(d_in)) for module, (d_out, d_in) in said.items()}
    except (AttributeError, TypeError, ValueError):
        raise CorruptError(f"{path} has a signature that is none: {signature[:80]!r}") from None


def _signature(shapes: Shapes) -> bytes:
    return json.dumps(dict(sorted(shapes.items())), separators=(",", ":")).encode()


def _folder_name(signature: bytes, form: Form) -> str:
    return f"{form.recipe}-{hashlib.sha256(signature).hexdigest()[:32]}"


def _content_name(pieces: Iterable[bytes | memoryview]) -> str:
    """By what is in it, so that two processes that made the same rows write one file."""
    hashed = hashlib.sha256()
    for piece in pieces:
        hashed.update(piece)
    return f"{hashed.hexdigest()[:32]}.safetensors"


def _pieces(path: Path) -> Iterator[memoryview]:
    """A file's bytes. Read and not mapped: a page of a mapping that was touched stays in memory."""
    buffer = memoryview(bytearray(1 << 20))
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise CorruptError(f"{path} is not a regular file")
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]
    except FileNotFoundError:
        raise NotFoundError(f"{path} is not there") from None


# -- writing --------------------------------------------------------------------------------------


def write_segment(root: Path, shapes: Shapes, segment: Segment) -> Segment:
    """Put a segment in its place and map it. Where it cannot be written it stays in memory: a
    library may be for reading only, or its disk full."""
    signature = _signature(shapes)
    tensors = {"signature": RawTensor("U8", (len(signature),), memoryview(signature))}
    dtypes = {"digests": "U8"} | {part: dtype for part, (dtype, _) in segment.form.parts.items()}
    for part, dtype in dtypes.items():
        array = segment.digests if part == "digests" else segment.parts[part]
        array = np.ascontiguousarray(array)
        tensors[part] = RawTensor(dtype, array.shape, array.reshape(-1).data)
    folder = root / _folder_name(signature, segment.form)
    path = folder / _content_name(encode(tensors))
    partial = path.with_name(f".{path.stem}.{os.getpid()}-{time.time_ns()}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.writelines(encode(tensors))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return _read(path, segment.form)[1]
    except (OSError, AdaptlibError):  # the second where gc has just removed it
        return segment


def compact(
    root: Path,
    shapes: Shapes,
    segments: Sequence[Segment],
    kept: Callable[[], Collection[str]],
) -> list[Segment]:
    """Merge segments of one signature until each is larger than all smaller ones together. The
    merged one has each digest once, and of these only those in `kept`, which is asked where
    something is merged: to know it, a library reads every ref."""
    held = list(segments)
    while True:
        small = sorted((s for s in held if s.path and s.nbytes < FULL), key=len)
        victims = small[: merged([len(segment) for segment in small])]
        while sum(victim.nbytes for victim in victims) > 2 * FULL:
            victims.pop()
        if not victims:
            return held
        whole = _join(victims, set(kept()))
        others = [segment for segment in held if segment not in victims]
        if len(whole):
            whole = write_segment(root, shapes, whole)
            if whole.path is None:  # it could not be written, so what it was made from stays
                return held
            others.append(whole)
        for path in {victim.path for victim in victims} - {whole.path}:
            _remove(path)
        held = others


def merged(sizes: Sequence[int]) -> int:
    """How many of the segments with these `sizes`, which rise, are to be merged: all up to the
    last that is not larger than the smaller ones together."""
    count = total = 0
    for i, size in enumerate(sizes):
        if i and size <= total:
            count = i + 1
        total += size
    return count


def _join(segments: Sequence[Segment], kept: Collection[str]) -> Segment:
    """One segment, in memory, of the rows whose digests are in `kept`, each once."""
    seen: set[str] = set()
    rows: list[list[int]] = []
    for segment in segments:
        names = segment.names()
        rows.append([i for i, name in enumerate(names) if name in kept and name not in seen])
        seen |= {names[i] for i in rows[-1]}
    first, n = segments[0], len(seen)
    digests = np.concatenate([s.digests[index] for s, index in zip(segments, rows, strict=True)])
    parts: dict[str, np.ndarray] = {}
    for part, example in first.parts.items():
        axis = first.form.axis(part)
        shape = (*example.shape[:axis], n, *example.shape[axis + 1 :])
        parts[part] = np.empty(shape, example.dtype)
        begin = 0
        for segment, index in zip(segments, rows, strict=True):
            end = begin + len(index)
            for place in np.ndindex(shape[:axis]):
                source, target = segment.parts[part][place], parts[part][place]
                np.take(source, index, axis=0, out=target[begin:end], mode="clip")
            begin = end
    return Segment(first.form, digests, parts)


# -- upkeep ---------------------------------------------------------------------------------------


def forget_rows(
    library: Path, kept: Collection[str], form: Form = PROTOTYPES, *, dry_run: bool = False
) -> tuple[int, int]:
    """Give back what the rows of experts that are not in `kept` take, digests as text;
    (rows, bytes). A file is written again without them once they are half of it or more. Broken
    files, other recipes' and writes that were left unfinished a day ago go too."""
    root, keep = library / "derived" / form.folder, set(kept)
    count = size = 0
    for path in look(root, "*/*"):
        try:
            state = path.stat()
        except OSError:  # merged just now; or the next gc may be able to look
            continue
        if path.suffix == ".partial" and time.time() - state.st_mtime < DAY:
            continue
        try:
            shapes, segment = _read(path, form)
        except NotFoundError:
            continue
        except AdaptlibError:
            size += state.st_size
            if not dry_run:
                _remove(path)
            continue
        except OSError:
            continue
        n, alive = len(segment), sum(name in keep for name in segment.names())
        if 2 * alive > n:
            continue
        count += n - alive
        size += segment.nbytes * (n - alive) // n
        if dry_run or (alive and not write_segment(root, shapes, _join([segment], keep)).path):
            continue
        _remove(path)
    for folder in look(root, "*"):
        with suppress(OSError):  # which says that something is in it
            folder.rmdir()
    return count, size


def _remove(path: Path | None) -> None:
    with suppress(OSError):
        if path is not None:
            path.unlink(missing_ok=True)
