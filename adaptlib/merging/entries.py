"""Entry by entry: merges whose result at a position comes of the experts' entries there.

The experts' matrices are never there whole. A chunk is a rectangle of the module, or, where all
experts are sparse, the positions in a few rows that any of them holds; it fits a cache.
"""

import numbers
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, final, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.merging.draws import Where
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part

CHUNK = 1 << 20  # entries of all experts together
ROWS = 16  # at least as many at once: with fewer, A is read again for every row or two

Elect = Literal["total", "frequency", "none"]


@final
@dataclass(frozen=True, eq=False)
class Chunk:
    """What is looked at at once: row for row the same entries of each expert.

    `values` are theirs to change in place: the next chunk comes in the same memory. The entries
    are those of `rows` and `columns`, row by row; or of `units` among them, which count entries or
    blocks in `rows` as SparseDelta does.
    """

    values: Float[Tensor, "expert entry"]
    rows: range
    columns: range
    width: int  # d_in
    held: Bool[Tensor, "expert unit"] | None = None  # of which the expert has a value
    units: Int[Tensor, " unit"] | None = None
    block: int = 1

    @property
    def first(self) -> int:
        """No entry is before this position."""
        return self.rows.start * self.width + self.columns.start

    @property
    def final(self) -> int:
        """No entry is after this position."""
        return (self.rows.stop - 1) * self.width + self.columns.stop - 1

    def positions(self) -> Int[Tensor, " entry"]:
        """Where in the matrix each entry is: row · d_in + column."""
        if self.units is not None:
            values = torch.empty(len(self.units), *(() if self.block == 1 else (self.block,) * 2))
            shape = (len(self.rows), self.width)
            rows, columns, _ = SparseDelta(self.units, values, shape, self.block).entries()
        else:
            rows = torch.arange(len(self.rows)).repeat_interleave(len(self.columns))
            columns = torch.arange(self.columns.start, self.columns.stop).repeat(len(self.rows))
        return (rows + self.rows.start) * self.width + columns

    def where(self) -> Where:
        """The same, as a range where they are all entries of whole rows."""
        if self.units is None and len(self.columns) == self.width:
            return range(self.rows.start * self.width, self.rows.stop * self.width)
        return self.positions().numpy()


Prune = Callable[[int, Chunk], None]  # changes the entries of one expert, by its place in the part
Combine = Callable[[Chunk], Float[Tensor, " entry"]]


def by_entries(
    part: Part, combine: Combine, prune: Prune | None = None, *, whole_rows: bool = False
) -> Update:
    """The merged update of one module: each expert's entries pruned, then combined.

    A matrix, or where all experts are sparse a SparseDelta of the positions that any of them holds
    and that came out other than zero, in blocks where all experts are in blocks.
    """
    device = next(iter(_tensors(part))).device
    out = torch.empty(0)
    index: list[Tensor] = []
    values: list[Tensor] = []
    block = _block_of(part)
    for chunk in chunks(part, whole_rows=whole_rows):
        if prune is not None:
            for i in range(len(part.deltas)):
                prune(i, chunk)
        found = combine(chunk)
        if chunk.units is None:
            if not len(out):
                out = torch.empty(part.shape)
            out[chunk.rows.start : chunk.rows.stop, chunk.columns.start : chunk.columns.stop] = (
                found.view(len(chunk.rows), len(chunk.columns))
            )
            continue
        found = found.view(len(chunk.units), -1)
        alive = found.any(dim=1)
        before = chunk.rows.start // block * (chunk.width // block)
        index.append(chunk.units[alive] + before)
        values.append(found[alive])
    if len(out):
        return out.to(device)
    places = torch.cat(index) if index else torch.zeros(0, dtype=torch.long)
    kept = torch.cat(values) if values else torch.zeros(0)
    kept = kept.reshape((-1,) if block == 1 else (len(places), block, block))
    if part.shape[0] * part.shape[1] < 2**31:
        places = places.to(torch.int32)
    return SparseDelta(places.to(device), kept.to(device), part.shape, block)


def weighted(weights: Sequence[float], scale: float = 1.0) -> Combine:
    """Σ w_i x_i."""
    shares = torch.tensor(weights) * scale
    return lambda chunk: shares @ chunk.values


def elected(weights: Sequence[float], scale: float, elect: str) -> Combine:
    """The mean of what agrees with the sign that the experts elect (TIES, section 3):
    Σ w_i x_i / n over the n experts whose x_i has the sign of Σ x_i (`total`), or the sign that
    more experts have (`frequency`). A tie is a plus, as in PEFT and mergekit. With `none`,
    Σ w_i x_i."""
    if elect not in get_args(Elect):
        raise UsageError(f"elect is one of {', '.join(get_args(Elect))}; got {elect!r}")
    if elect == "none":
        return weighted(weights, scale)
    shares = torch.tensor(weights) * scale

    def combine(chunk: Chunk) -> Tensor:
        x = chunk.values
        total = x.sum(dim=0) if elect == "total" else x.sign().sum(dim=0)
        sign = (total >= 0).float().mul_(2).sub_(1)
        x.mul_(sign).relu_()  # what agrees, as a plus
        merged = (shares @ x).mul_(sign)
        return merged.div_(x.sign_().sum(dim=0).clamp_(min=1))

    return combine


def share(name: str, value: float, *, zero: bool = False) -> float:
    """A share that was given as an option; UsageError outside 0 to 1."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not (value >= 0 if zero else value > 0) or not value <= 1:
        least = "from 0" if zero else "above 0"
        raise UsageError(f"{name} is a share, {least} and at most 1; got {value!r}")
    return float(value)


def chunks(
    part: Part, *, whole_rows: bool = False, only: Container[int] | None = None
) -> Iterator[Chunk]:
    """All entries of a module in pieces, always cut alike, so that two passes see the same bits.
    `only` are the numbers of those that are wanted, where experts are not all sparse."""
    sparse = [delta for delta in part.deltas if isinstance(delta, SparseDelta)]
    if len(sparse) == len(part.deltas):
        yield from _sparse_chunks(part, sparse)
    else:
        yield from _dense_chunks(part, whole_rows or bool(sparse), only)


def _dense_chunks(part: Part, whole_rows: bool, only: Container[int] | None) -> Iterator[Chunk]:
    d_out, d_in = part.shape
    n = len(part.deltas)
    blocks = any(isinstance(delta, SparseDelta) and delta.block > 1 for delta in part.deltas)
    high = max(ROWS, CHUNK // (n * d_in)) if not blocks else max(16, CHUNK // (n * d_in) & ~15)
    wide = d_in if whole_rows else min(d_in, max(1, CHUNK // (n * high)))
    high = min(high, d_out)
    sides = [_sides(d) if isinstance(d, LoRADelta) else None for d in part.deltas]
    loras = [pair for pair in sides if pair is not None]
    one = len(loras) == n and len({a.shape[0] for _, a in loras}) == 1
    left = torch.stack([b for b, _ in loras]) if one else torch.empty(0)
    right = torch.stack([a for _, a in loras]) if one else torch.empty(0)
    memory = torch.empty(n * high * wide)
    grid = product(range(0, d_out, high), range(0, d_in, wide))
    for number, (row, column) in enumerate(grid):
        if only is not None and number not in only:
            continue
        rows = range(row, min(row + high, d_out))
        columns = range(column, min(column + wide, d_in))
        size = n * len(rows) * len(columns)
        values = memory[:size].view(n, len(rows), len(columns))
        up, across = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        if one:
            torch.bmm(left[:, up], right[:, :, across], out=values)
        else:
            for i, (pair, delta) in enumerate(zip(sides, part.deltas, strict=True)):
                if pair is None:
                    assert isinstance(delta, SparseDelta)
                    values[i] = band(delta, rows).dense()
                else:
                    torch.mm(pair[0][up], pair[1][:, across], out=values[i])
        yield Chunk(values.view(n, -1), rows, columns, d_in)


def _sparse_chunks(part: Part, deltas: Sequence[SparseDelta]) -> Iterator[Chunk]:
    d_out, d_in = part.shape
    n = len(deltas)
    block = _block_of(part)
    filled = min(1.0, sum(delta.params for delta in deltas) / (d_out * d_in))
    high = max(ROWS, int(CHUNK / (n * d_in * max(filled, 1e-3))))
    if any(delta.block > 1 for delta in deltas):
        high = max(16, high & ~15)
    for row in range(0, d_out, high):
        rows = range(row, min(row + high, d_out))
        here = [_of_block(band(delta, rows), block) for delta in deltas]
        places = [delta.index.long() for delta in here]
        any_ = torch.zeros(len(rows) * d_in // block**2, dtype=torch.bool)
        for place in places:
            any_[place] = True
        units = any_.nonzero().squeeze(1)
        if not len(units):
            continue
        slot = any_.cumsum(0) - 1
        values = torch.zeros(n, len(units), block**2)
        held = torch.zeros(n, len(units), dtype=torch.bool)
        for i, (delta, place) in enumerate(zip(here, places, strict=True)):
            values[i, slot[place]] = delta.values.float().reshape(-1, block**2)
            held[i, slot[place]] = True
        yield Chunk(values.view(n, -1), rows, range(d_in), d_in, held, units, block)


def band(delta: SparseDelta, rows: range) -> SparseDelta:
    """Some rows of a sparse update, whole blocks of them, on the CPU."""
    across = delta.shape[1] // delta.block
    ends = torch.tensor([rows.start // delta.block * across, rows.stop // delta.block * across])
    low, high = torch.searchsorted(delta.index, ends.to(delta.index)).tolist()
    index = delta.index[low:high].cpu() - int(ends[0])
    values = delta.values[low:high].cpu()
    return SparseDelta(index, values, (len(rows), delta.shape[1]), delta.block)


def _block_of(part: Part) -> int:
    """That of all the updates, or 1."""
    blocks = {delta.block for delta in part.deltas if isinstance(delta, SparseDelta)}
    return blocks.pop() if len(blocks) == 1 else 1


def _of_block(delta: SparseDelta, block: int) -> SparseDelta:
    if delta.block == block:
        return delta
    rows, columns, values = delta.entries()
    index, order = (rows * delta.shape[1] + columns).sort()
    return SparseDelta(index, values[order], delta.shape)


def _sides(delta: LoRADelta) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
    return delta.b.float().cpu() * delta.scale, delta.a.float().cpu()


def _tensors(part: Part) -> Iterator[Tensor]:
    for delta in part.deltas:
        yield delta.b if isinstance(delta, LoRADelta) else delta.values  # pyright: ignore
