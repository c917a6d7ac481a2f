"""Trimming: of each expert's update only the largest entries, or all but the largest.

A cut says where they end. Those of LoRA are found in one pass over chunks: a sample of entries says
between which two sizes a cut must be; what is above is only counted, and only what is between is
collected. A selection among all entries takes ten times as long, and each expert's matrix. If the
sample misled, that is seen, and all entries of that expert are looked at.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.merging.entries import Chunk, chunks, share
from adaptlib.merging.largest import kth_largest
from adaptlib.merging.merge import Part

SAMPLE = 1 << 14
SMALL = 1 << 17  # a matrix this small is looked at whole


class Cut(NamedTuple):
    """Above it are |x| > size, and |x| = size at positions up to `last` (None: at all)."""

    size: float
    last: int | None = None


class _Between(NamedTuple):
    """What one pass found: how many sizes are at the upper end of a bracket or above, and those
    inside it, chunk by chunk; none where these were too many to keep."""

    above: int
    inside: list[NDArray[np.float32]]


def cuts(part: Part, *counts: int) -> list[tuple[Cut, ...]]:
    """For each expert, where its `counts` largest of all d_out · d_in entries end."""
    size = part.shape[0] * part.shape[1]
    found: dict[tuple[int, int], Cut] = {}
    brackets: dict[tuple[int, int], tuple[float, float]] = {}
    for i, delta in enumerate(part.deltas):
        sample = _sample(delta) if isinstance(delta, LoRADelta) and size > SMALL else None
        for count in counts:
            if not 0 < count < size:
                found[i, count] = Cut(0.0 if count else np.inf)
            elif isinstance(delta, SparseDelta):
                found[i, count] = _cut_of_sparse(delta, count)
            else:
                brackets[i, count] = _bracket(sample, count / size)
    open_: dict[tuple[int, int], tuple[float, int, list[int]]] = {}
    for (i, count), (above, inside) in _between(part, brackets).items():
        wanted = count - above
        held = sum(map(len, inside))
        if inside and wanted > held and brackets[i, count][0] == 0:  # all others are zeros
            found[i, count] = Cut(0.0)
            continue
        if not 0 < wanted <= held:  # the sample misled
            inside = [chunk.values[i].abs().numpy() for chunk in chunks(part)]
            wanted = count
        sizes = np.concatenate(inside)
        least = kth_largest(sizes, wanted)
        ties = wanted - int(np.count_nonzero(sizes > least))
        found[i, count] = Cut(least)
        if least > 0 and ties < np.count_nonzero(sizes == least):
            where = [number for number, piece in enumerate(inside) if (piece == least).any()]
            open_[i, count] = (least, ties, where)
    found |= _parted(part, open_)
    return [tuple(found[i, count] for count in counts) for i in range(len(part.deltas))]


def kept_count(part: Part, density: float) -> int:
    """How many entries a share is, rounded down as PEFT does, but never none."""
    return max(1, int(share("density", density) * part.shape[0] * part.shape[1]))


def trim(chunk: Chunk, i: int, cut: Cut, *, keep: Literal["above", "below"] = "above") -> None:
    """Zero in place what of the `i`th expert's entries is on the other side of the cut."""
    x = chunk.values[i]
    if cut.last is not None and chunk.first <= cut.last < chunk.final:
        sizes = x.abs()
        equal = (sizes == cut.size) & (chunk.positions() <= cut.last)
        above = x * ((sizes > cut.size) | equal)
    else:
        with_equal = cut.last is None or chunk.final <= cut.last
        before = float(np.nextafter(np.float32(cut.size), np.float32(0)))
        above = torch.hardshrink(x, before if with_equal else cut.size)  # |x| > that
    if keep == "above":
        x.copy_(above)
    else:
        x.sub_(above)


def _sample(delta: LoRADelta) -> NDArray[np.float32]:
    """|ΔW| at some entries, always the same places, falling."""
    generator = torch.Generator().manual_seed(0)
    d_out, d_in = delta.shape
    rows = torch.randint(d_out, (SAMPLE,), generator=generator)
    columns = torch.randint(d_in, (SAMPLE,), generator=generator)
    a, b = delta.a.float().cpu(), delta.b.float().cpu() * delta.scale
    sizes = (b[rows] * a[:, columns].T).sum(dim=1).abs()
    return np.sort(sizes.numpy())[::-1]


def _bracket(sample: NDArray[np.float32] | None, share: float) -> tuple[float, float]:
    """The sizes that a cut is between, where `share` of the entries are above it: four standard
    deviations of its rank in the sample to either side, and some for small shares."""
    if sample is None:
        return 0.0, np.inf
    n = len(sample)
    slack = 4 * (n * share * (1 - share)) ** 0.5 + 8
    first, last = int(share * n - slack), int(share * n + slack) + 1
    return (
        float(sample[last]) if last < n else 0.0,
        float(sample[first]) if first >= 0 else np.inf,
    )


def _between(
    part: Part, brackets: dict[tuple[int, int], tuple[float, float]]
) -> dict[tuple[int, int], _Between]:
    """One pass over all entries for all brackets."""
    if not brackets:
        return {}
    most = max(SMALL, part.shape[0] * part.shape[1] // 8)
    above = dict.fromkeys(brackets, 0)
    held = dict.fromkeys(brackets, 0)
    inside: dict[tuple[int, int], list[NDArray[np.float32]]] = {key: [] for key in brackets}
    for chunk in chunks(part):
        sizes = chunk.values.abs_().numpy()
        for key, (low, high) in brackets.items():
            x = sizes[key[0]]
            over = x > low
            between = x[over & (x < high)]
            above[key] += int(np.count_nonzero(over)) - len(between)
            held[key] += len(between)
            if held[key] <= most:
                inside[key].append(between)
            else:  # a matrix of few different sizes
                inside[key].clear()
    return {key: _Between(above[key], inside[key] * (held[key] <= most)) for key in brackets}


def _parted(
    part: Part, cuts: dict[tuple[int, int], tuple[float, int, list[int]]]
) -> dict[tuple[int, int], Cut]:
    """The cuts that part entries of one size: of such a size, how many are above, and in which
    chunks they are. That is common: a large matrix has more entries than there are floats."""
    if not cuts:
        return {}
    numbers = sorted({number for _, _, where in cuts.values() for number in where})
    positions: dict[tuple[int, int], list[NDArray[np.int64]]] = {key: [] for key in cuts}
    for number, chunk in zip(numbers, chunks(part, only=set(numbers)), strict=True):
        for key, (size, _, where) in cuts.items():
            if number in where:
                equal = chunk.values[key[0]].abs().numpy() == size
                positions[key].append(chunk.positions().numpy()[equal])
    return {
        key: Cut(size, _kth_least(np.concatenate(positions[key]), ties))
        for key, (size, ties, _) in cuts.items()
    }


def _kth_least(positions: NDArray[np.int64], count: int) -> int:
    return int(np.partition(positions, count - 1)[count - 1])


def _cut_of_sparse(delta: SparseDelta, count: int) -> Cut:
    """Entries that are not held are zeros."""
    sizes = delta.values.float().abs().reshape(-1).cpu().numpy()
    if count >= len(sizes):
        return Cut(0.0)
    least = kth_largest(sizes, count)
    equal = np.flatnonzero(sizes == least)
    ties = count - int(np.count_nonzero(sizes > least))
    if least == 0 or ties == len(equal):
        return Cut(least)
    rows, columns, _ = delta.entries()
    positions = (rows * delta.shape[1] + columns).cpu().numpy()[equal]
    return Cut(least, _kth_least(positions, ties))
