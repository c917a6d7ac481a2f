"""Sketches of whole experts, made when they are added: clustering reads these and no expert.

    derived/sketches/<recipe>-<key>/<content>.safetensors   see segments.py

    scales   (n,)                    F32
    rows     (n, module · SIDE²)     F16   the sketch of each module (projection.py), sorted by name

An expert's sketch is its row times its scale; the largest entry of a row is 1. float16 rounds an
entry by a two-thousandth at most, the sketch itself errs by a tenth. `add` writes a file for each
expert; they are merged when there are many. What is missing is made when it is asked for.

No torch: `add` and `gc` must not wait for it.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np

from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts.codec import Packed, assemble, parse_manifest, parts_of
from adaptlib.experts.damage import read_object, view_object
from adaptlib.experts.projection import module_seed, sketch_lora, sketch_sparse
from adaptlib.experts.segments import (
    FULL,
    Form,
    Segment,
    Shapes,
    compact,
    read_folder,
    read_segments,
    write_segment,
)
from adaptlib.experts.tensors import RawTensor, release
from library_store import Digest

if TYPE_CHECKING:
    from adaptlib.experts.library import Library

SIDE, SEED = 16, 0  # SIDE² numbers for each module
LOOSE = 64  # files of a folder from which `add` merges them
SKETCHES = Form(
    "sketches",
    f"1-{SIDE}-{SEED}",
    {
        "scales": ("F32", lambda _: (-1,)),
        "rows": ("F16", lambda shapes: (-1, len(shapes) * SIDE**2)),
    },
)


@final
@dataclass(frozen=True, eq=False)
class SketchTable:
    """The sketches of experts of one base model: `rows` (expert, feature), float16, times `scales`
    (expert,), in the order of `names`, which are sorted. Each of `modules`, the sorted ones that
    any of them has, takes SIDE² columns, zeros where an expert lacks it."""

    names: tuple[str, ...]
    modules: tuple[str, ...]
    scales: np.ndarray
    rows: np.ndarray


Signature = tuple[tuple[str, tuple[int, int]], ...]  # sorted by module


def sketch_expert(packed: Packed, *, seed: int = SEED, side: int = SIDE) -> np.ndarray:
    """The sketches of all modules side by side, float32; `Delta.sketch` of each."""
    row = np.empty((len(packed.modules), side**2), np.float32)
    for place, (name, module) in zip(row, sorted(packed.modules.items()), strict=True):
        options = {"seed": module_seed(seed, name), "size": side**2}
        if packed.kind == "lora":
            a, b = (floats(packed.tensors[f"{name}.{part}"]) for part in ("lora_a", "lora_b"))
            place[:] = sketch_lora(a, b, module.scale or 0.0, **options)
        else:
            index = packed.tensors[f"{name}.index"].numpy()
            values = floats(packed.tensors[f"{name}.values"])
            place[:] = sketch_sparse(index, values, module.shape, **options)
        for part in parts_of(packed.kind):
            release(packed.tensors[f"{name}.{part}"].data)
    return row.reshape(-1)


def floats(raw: RawTensor) -> np.ndarray:
    """A tensor as float32."""
    found = raw.numpy()
    if raw.dtype == "BF16":
        return (found.astype(np.uint32) << 16).view(np.float32)
    return found.astype(np.float32, copy=False)


# -- keeping --------------------------------------------------------------------------------------


def keep_sketch(library: Path, digest: str, shapes: Shapes, row: np.ndarray) -> None:
    """Put the sketch of an expert that was just added, (feature,), where `sketches` looks for it.
    Where it cannot be written nothing is lost."""
    shapes = dict(sorted(shapes.items()))
    root = library / "derived" / SKETCHES.folder
    path = write_segment(root, shapes, _segment([(digest, row)])).path
    with suppress(OSError):
        if path is not None and sum(1 for _ in os.scandir(path.parent)) > LOOSE:
            segments = read_folder(path.parent, SKETCHES)[1]
            compact(root, shapes, segments, lambda: {n for s in segments for n in s.names()})


def sketches(
    library: "Library",
    names: Sequence[str] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> SketchTable:
    """The sketches of a library's experts, or of some of its names; those that are missing are made
    and kept, and `progress` is told after each how many of them are done, and of how many.

    UsageError where there is no expert, BaseMismatchError where two disagree on a module's shape,
    RefusedError where a sketch holds NaN or infinity, as that of an expert with such numbers would.
    """
    wanted = library.names() if names is None else {name: library.digest(name) for name in names}
    if not wanted:
        raise UsageError("there are no experts to group", hint="adaptlib add SOURCE")
    root = library.path / "derived" / SKETCHES.folder if library.path else None
    found = {tuple(s.items()): held for s, held in (read_segments(root, SKETCHES) if root else [])}
    known = {digest for held in found.values() for s in held for digest in s.names()}
    missing = {digest: name for name, digest in wanted.items() if digest not in known}
    for signature, segments in _made(library, root, missing, progress):
        found.setdefault(signature, []).extend(segments)
    if root is not None:
        for signature, segments in found.items():
            found[signature] = compact(
                root,
                dict(signature),
                segments,
                lambda: {*library.tags().values(), *wanted.values()},
            )
    return _table(wanted, found)


def _made(
    library: "Library",
    root: Path | None,
    missing: Mapping[str, str],
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[Signature, list[Segment]]]:
    """Segments of the experts that have no row; written as they come, so that what was done when
    this is stopped is not done again."""
    held: dict[Signature, list[tuple[str, np.ndarray]]] = {}
    size = 0

    def written() -> Iterator[tuple[Signature, list[Segment]]]:
        while held:
            signature, rows = held.popitem()
            segment = _segment(rows)
            if root is not None:
                segment = write_segment(root, dict(signature), segment)
            yield signature, [segment]

    for i, (digest, name) in enumerate(missing.items(), start=1):
        manifest = parse_manifest(name, read_object(library.store, Digest.parse(digest)))
        blob = view_object(library.store, Digest.parse(manifest.blob.digest))
        packed = assemble(name, manifest, blob)
        row = sketch_expert(packed)
        held.setdefault(tuple(sorted(packed.shapes.items())), []).append((digest, row))
        size += row.nbytes // 2
        if size >= FULL:
            size = 0
            yield from written()
        if progress is not None:
            progress(i, len(missing))
    yield from written()


def _segment(rows: Sequence[tuple[str, np.ndarray]]) -> Segment:
    digests, parts = zip(*rows, strict=True)
    table = np.stack(parts)
    with np.errstate(invalid="ignore", over="ignore"):
        scales = np.abs(table).max(axis=1)
        scales = np.where(np.isfinite(scales) & (scales > 0), scales, np.float32(1))
        halves = (table / scales[:, None]).astype(np.float16)
    return Segment.of(digests, {"scales": scales, "rows": halves}, SKETCHES)


def _table(wanted: Mapping[str, str], found: dict[Signature, list[Segment]]) -> SketchTable:
    names = tuple(sorted(wanted))
    called: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        called.setdefault(wanted[name], []).append(i)
    used = [s for s, held in found.items() if any(d in called for x in held for d in x.names())]
    shapes: dict[str, tuple[int, int]] = {}
    for signature in used:
        for module, shape in signature:
            if shapes.setdefault(module, shape) != shape:
                raise BaseMismatchError(
                    f"two experts disagree on the shape of {module!r}, {shapes[module]} and "
                    f"{shape}, so they are for several base models",
                    hint="group the experts of one base model at a time",
                )
    modules = sorted(shapes)
    column = {module: i * SIDE**2 for i, module in enumerate(modules)}
    scales = np.zeros(len(names), np.float32)
    rows = np.zeros((len(names), len(modules) * SIDE**2), np.float16)
    for signature in used:
        begins = [column[module] for module, _ in signature]
        whole = len(begins) == len(modules)
        segments = found.pop(signature)
        while segments:  # let go of one after another: a mapped page that was read is memory
            segment = segments.pop()
            pairs = [(p, i) for p, d in enumerate(segment.names()) for i in called.pop(d, ())]
            if not pairs:
                continue
            places, targets = (np.array(side) for side in zip(*pairs, strict=True))
            scales[targets] = segment.parts["scales"][places]
            held = segment.parts["rows"]
            if whole:
                for place, target in pairs:
                    rows[target] = held[place]
                continue
            for at, begin in enumerate(begins):
                part = held[:, at * SIDE**2 : (at + 1) * SIDE**2]
                rows[targets, begin : begin + SIDE**2] = part[places]
    _finite(names, modules, rows)
    return SketchTable(names, tuple(modules), scales, rows)


def _finite(names: tuple[str, ...], modules: Sequence[str], rows: np.ndarray) -> None:
    for i, row in enumerate(rows):
        if not np.isfinite(row).all():
            module = modules[int(np.flatnonzero(~np.isfinite(row))[0]) // SIDE**2]
            raise RefusedError(
                f"expert {names[i]!r} holds NaN or infinity in {module!r}, or numbers too large, "
                "so it is like no other",
                hint="leave it out, or train it again",
            )
