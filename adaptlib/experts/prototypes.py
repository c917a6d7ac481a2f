"""The catalogue: what routing must know of each expert to find those that fit, for thousands.

An expert's prototype at a module is the top right singular vector of its update (Arrow, Ostapenko
et al. 2024, section 4.2), d_in numbers; its sketch is the same vector in SIZE dimensions. Both are
made once for each expert, kept in segments (segments.py) and mapped, so that opening a library of
10,000 experts reads none of them.
"""

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.experts.codec import unpack
from adaptlib.experts.expert import Expert
from adaptlib.experts.library import Library
from adaptlib.experts.segments import (
    FULL,
    SIZE,
    Segment,
    Shapes,
    compact,
    hash_table,
    read_segments,
    write_segment,
)
from adaptlib.experts.shelf import read_packed

Signature = tuple[tuple[str, tuple[int, int]], ...]  # sorted by module


@final
@dataclass(frozen=True, eq=False)
class Pack:
    """The experts of a catalogue that have one signature: the same modules, of the same shapes.

    `tables` are the mapped prototypes of each segment, and `rows` says which of its rows are the
    experts here; `names` goes through the first table's, then the next one's. `sketches` are those
    of the same experts, mapped where a segment has no others.
    """

    shapes: Shapes
    names: tuple[str, ...]
    fingerprints: tuple[str, ...]
    tables: tuple[Float[Tensor, "_ width"], ...]
    rows: tuple[Int[Tensor, " _"], ...]
    sketches: tuple[Float[Tensor, "module _ size"], ...]

    @property
    def widths(self) -> list[int]:
        """d_in of each module, in the order of the columns of `prototypes`."""
        return [d_in for _, d_in in self.shapes.values()]

    def prototypes(
        self, index: Int[Tensor, " some"], module: str | None = None
    ) -> Float[Tensor, "some width"]:
        """The prototypes of some of the experts here, at all modules side by side or at one."""
        begin, end = 0, sum(self.widths)
        if module is not None:
            place = list(self.shapes).index(module)
            begin = sum(self.widths[:place])
            end = begin + self.widths[place]
        rising, order = index.sort()
        found = torch.empty(len(index), end - begin)
        first = done = 0
        for table, rows in zip(self.tables, self.rows, strict=True):
            last = first + len(rows)
            upto = int(torch.searchsorted(rising, last))
            if upto > done:
                chosen = rows[rising[done:upto] - first]
                torch.index_select(table[:, begin:end], 0, chosen, out=found[done:upto])
            first, done = last, upto
        if torch.equal(rising, index):
            return found
        return torch.empty_like(found).index_copy_(0, order, found)


@final
@dataclass(frozen=True, eq=False)
class Catalogue:
    """Names of experts and what the index keeps of each. `packs` are the experts of one signature
    each; `where` is the pack of each name, and its place there."""

    names: tuple[str, ...]
    digests: Mapping[str, str]
    packs: tuple[Pack, ...]
    where: Mapping[str, tuple[int, int]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def pack(self, name: str) -> tuple[Pack, int]:
        """The pack of an expert, and its place in it. NotFoundError suggests the nearest names."""
        if name not in self.where:
            close = difflib.get_close_matches(name, self.names, n=3, cutoff=0.5)
            raise NotFoundError(
                f"no expert named {name!r} in this catalogue of {len(self)}"
                + (f"; did you mean {', '.join(close)}?" if close else "")
            )
        pack, place = self.where[name]
        return self.packs[pack], place

    def prototypes(self, module: str, names: Sequence[str]) -> Float[Tensor, "expert d_in"]:
        """The prototypes of some experts at one module, bit for bit `top_direction` of their
        updates. NotFoundError where one has no such module."""
        places: dict[int, list[tuple[int, int]]] = {}
        for i, name in enumerate(names):
            pack, place = self.pack(name)
            if module not in pack.shapes:
                raise NotFoundError(f"{name} has no module {module}")
            places.setdefault(self.where[name][0], []).append((i, place))
        if not names:
            raise UsageError("prototypes of no experts have no shape; give one name at least")
        parts, order = [], []
        for number, held in places.items():
            index = torch.tensor([place for _, place in held])
            parts.append(self.packs[number].prototypes(index, module))
            order += [i for i, _ in held]
        widths = sorted({part.shape[1] for part in parts})
        if len(widths) > 1:
            raise UsageError(
                f"{module} takes {' and '.join(map(str, widths))} numbers in these experts, which "
                "are for several base models",
                hint="ask for those of one",
            )
        return torch.cat(parts)[torch.tensor(order).argsort()]


def catalogue(
    library: Library,
    names: Sequence[str] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Catalogue:
    """The catalogue of a library, or of some of its names, with the index brought up to date.

    Only experts that are not in the index are read; `progress` is told after each how many of them
    are done, and of how many. The index is written as it grows, so what was done when this is
    stopped is not done again. A library without a path has no index: all its experts are read.

    UsageError where there is no expert.
    """
    wanted = library.names() if names is None else {n: library.digest(n) for n in names}
    if not wanted:
        raise UsageError(
            "a catalogue needs one expert at least; got none", hint="adaptlib add SOURCE"
        )
    root = library.path / "derived" / "prototypes" if library.path else None
    found = {tuple(s.items()): held for s, held in (read_segments(root) if root else [])}
    known = {name for segments in found.values() for s in segments for name in s.names()}
    missing = {digest: name for name, digest in wanted.items() if digest not in known}
    if missing:
        fresh = _Growing(root, found)
        try:
            for i, (digest, name) in enumerate(missing.items(), start=1):
                fresh.add(digest, unpack(read_packed(library, digest, name)))
                if progress is not None:
                    progress(i, len(missing))
        finally:
            fresh.write()
        if root is not None:
            for signature in fresh.touched:
                found[signature] = compact(
                    root,
                    dict(signature),
                    found[signature],
                    lambda: {*library.tags().values(), *wanted.values()},
                )
    return from_segments(wanted, found)


class _Growing:
    """Experts that came since the last write, by signature."""

    def __init__(self, root: Path | None, found: dict[Signature, list[Segment]]) -> None:
        self.root = root
        self.found = found
        self.touched: set[Signature] = set()
        self.held: dict[Signature, list[tuple[str, str, np.ndarray]]] = {}
        self.bytes = 0

    def add(self, digest: str, expert: Expert) -> None:
        signature = tuple(expert.shapes.items())
        row = torch.cat([delta.top_direction().cpu() for delta in expert.deltas.values()])
        held = self.held.setdefault(signature, [])
        held.append((digest, expert.fingerprint, row.numpy()))
        self.bytes += row.nbytes
        if self.bytes >= FULL:
            self.write()

    def write(self) -> None:
        """Put what came into segments."""
        while self.held:
            signature, rows = self.held.popitem()
            digests, prints, parts = zip(*rows, strict=True)
            prototypes = np.stack(parts)
            sketches = sketch(dict(signature), torch.from_numpy(prototypes)).numpy()
            segment = prototype_segment(digests, prints, prototypes, sketches)
            if self.root is not None:
                segment = write_segment(self.root, dict(signature), segment)
            self.found.setdefault(signature, []).append(segment)
            self.touched.add(signature)
        self.bytes = 0


def prototype_segment(
    digests: Sequence[str],
    fingerprints: Sequence[str],
    prototypes: Float[np.ndarray, "n width"],
    sketches: Float[np.ndarray, "module n size"],
) -> Segment:
    """A segment in memory; digests and fingerprints as text."""
    parts = {
        "fingerprints": hash_table(fingerprints),
        "prototypes": prototypes,
        "sketches": sketches,
    }
    return Segment.of(digests, parts)


def from_segments(
    wanted: Mapping[str, str], found: Mapping[Signature, Sequence[Segment]]
) -> Catalogue:
    """The catalogue of `wanted`, digest by name, each in one of the segments of its signature."""
    called: dict[str, list[str]] = {}
    for name, digest in wanted.items():
        called.setdefault(digest, []).append(name)
    packs: list[Pack] = []
    for signature, segments in found.items():
        names: list[str] = []
        prints: list[str] = []
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for segment in segments:
            # a digest that is in two segments is taken from the first
            rows = [(i, called.pop(d)) for i, d in enumerate(segment.names()) if d in called]
            if not rows:
                continue
            index = [i for i, here in rows for _ in here]
            names += [name for _, here in rows for name in here]
            texts = segment.prints()
            prints += [texts[i] for i in index]
            sketches = torch.from_numpy(segment.parts["sketches"])
            chosen = torch.tensor(index)
            if index != list(range(len(segment))):
                sketches = sketches.index_select(1, chosen)
            parts.append((torch.from_numpy(segment.parts["prototypes"]), chosen, sketches))
        if parts:
            tables, rows_of, small = zip(*parts, strict=True)
            pack = Pack(dict(signature), tuple(names), tuple(prints), tables, rows_of, small)
            packs.append(pack)
    where = {n: (p, i) for p, pack in enumerate(packs) for i, n in enumerate(pack.names)}
    return Catalogue(tuple(wanted), dict(wanted), tuple(packs), where)


# -- sketches -------------------------------------------------------------------------------------


def sketch(shapes: Shapes, rows: Float[Tensor, "n width"]) -> Float[Tensor, "module n size"]:
    """`rows` in SIZE dimensions for each module: inner products are kept, on average exactly and
    within 1/√SIZE or so of the lengths.

    The entries get fixed random signs, other ones at each module, and are then projected on SIZE
    fixed orthonormal directions, the same for all modules of one width. Without the signs the
    errors at modules with like inputs would be alike too, and would not average out.
    """
    found = torch.empty(len(shapes), len(rows), SIZE)
    widths = [d_in for _, d_in in shapes.values()]
    parts = list(zip(shapes, rows.split(widths, dim=1), strict=True))
    for width in sorted(set(widths)):  # one product for all modules of a width
        alike = [i for i, d_in in enumerate(widths) if d_in == width]
        flipped = [parts[i][1] * signs(parts[i][0], width) for i in alike]
        found[alike] = torch.stack(flipped) @ directions(width)
    return found


@lru_cache(maxsize=4096)
def signs(module: str, width: int) -> Float[Tensor, " width"]:
    """Fixed random signs for a module, the same on every machine."""
    seed = int.from_bytes(hashlib.sha256(module.encode()).digest()[:7], "big")
    bits = torch.randint(2, (width,), generator=torch.Generator().manual_seed(seed))
    return bits.float() * 2 - 1


@lru_cache(maxsize=64)
def directions(width: int) -> Float[Tensor, "width size"]:
    """SIZE fixed random orthonormal directions, times √(width / SIZE); all there are, where width
    is not above SIZE."""
    if width <= SIZE:
        return torch.eye(width, SIZE)
    generator = torch.Generator().manual_seed(width)
    q, r = torch.linalg.qr(torch.randn(width, SIZE, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()  # which LAPACK leaves open
    return (q * (width / SIZE) ** 0.5).float()
