"""Which experts are one expert: copies, and what differs by no more than rounding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from adaptlib.errors import RefusedError, UsageError

# Measured on the 211 experts of the 40 bundled tasks: of different tasks a cosine of .873 at most
# (next .627; .2 at the .998 quantile); of one task in two kinds .25. A copy rounded to 8 bits has
# .9996, to 4 bits .9955, and one cut from rank 8 to 6 .997.
THRESHOLD = 0.99
TOLERANCE = 0.05  # by which the norms may differ, as a share of the larger
SHORT = 256  # numbers of a row's random projection, by which most pairs are told apart
SLACK = 1.7  # a squared distance of projections is below this times the true one: 8 deviations
CHUNK = 1 << 20  # numbers handled at once


@final
@dataclass(frozen=True)
class Duplicates:
    """Experts that are one expert: `names`, sorted.

    `cosine` is the least to the first of them, in ΔW. `copies` are those among them that are the
    same to the last bit, as groups of names: what can be removed at no loss.
    """

    names: tuple[str, ...]
    cosine: float
    copies: tuple[tuple[str, ...], ...]


def near_duplicates(
    names: Sequence[str],
    rows: Float[np.ndarray, "expert feature"],
    *,
    scales: Float[np.ndarray, " expert"] | None = None,
    digests: Mapping[str, str] | None = None,
    threshold: float = THRESHOLD,
    tolerance: float = TOLERANCE,
) -> list[Duplicates]:
    """The groups of two or more experts that are one expert, the largest first.

    `rows`, times `scales` where those are given, are sketches of ΔW (`experts.sketches`), whose
    inner products are about those of ΔW; factors will not do, since one ΔW has many. Two experts
    are one where their cosine is `threshold` or more and their norms differ by `tolerance` of the
    larger at most, for half an expert is another expert; so is what is linked by such pairs.
    Experts that are zero are one. `digests` names exact copies.

    No (expert, expert) array is made: random projections of the rows (Johnson and Lindenstrauss
    1984) tell most pairs apart, a chunk of experts at a time, and the rows decide on the rest.
    Raises UsageError for a threshold that is no cosine, RefusedError for NaN.
    """
    if not 0 < threshold <= 1:
        raise UsageError(
            f"the threshold is a cosine above 0 and up to 1; got {threshold:g}",
            hint=f"--duplicates {THRESHOLD}",
        )
    if not 0 <= tolerance < 1:
        raise UsageError(f"the tolerance is a share from 0 to below 1; got {tolerance:g}")
    if not len(names):
        return []
    table = _Rows.of(rows, scales)
    if not np.isfinite(table.norms).all():
        bad = names[int(np.flatnonzero(~np.isfinite(table.norms))[0])]
        raise RefusedError(
            f"expert {bad!r} holds NaN or infinity, so it is like no other",
            hint="leave it out, or train it again",
        )
    digests = digests or {}
    component = _components(table, _first_copies(names, digests), threshold, tolerance)
    members: dict[int, list[int]] = {}
    for i, label in enumerate(component.tolist()):
        members.setdefault(label, []).append(i)
    groups = [_group(names, table, where, digests) for where in members.values() if len(where) > 1]
    return sorted(groups, key=lambda group: (-len(group.names), group.names[0]))


@final
@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows, their lengths, and the norms of the experts they stand for."""

    rows: Float[np.ndarray, "expert feature"]
    lengths: Float[np.ndarray, " expert"]
    norms: Float[np.ndarray, " expert"]

    @classmethod
    def of(
        cls, rows: Float[np.ndarray, "expert feature"], scales: Float[np.ndarray, " expert"] | None
    ) -> "_Rows":
        lengths = np.concatenate(
            [np.linalg.norm(rows[part].astype(np.float64), axis=1) for part in _parts(rows)]
        )
        return cls(rows, lengths, lengths if scales is None else lengths * np.abs(scales))

    def unit(self, where: Int[np.ndarray, " some"] | slice) -> Float[np.ndarray, "some feature"]:
        """Some rows at length 1, those of zero experts at length 0."""
        lengths = self.lengths[where]
        return self.rows[where] / np.where(lengths == 0, 1, lengths)[:, None].astype(np.float32)

    def short(self) -> Float[np.ndarray, "expert short"]:
        """All rows in SHORT numbers, whose distances are about those of the unit rows, or these
        themselves where they are no longer."""
        width = self.rows.shape[1]
        if width <= SHORT:
            return self.unit(slice(None))
        turn = np.random.default_rng(0).standard_normal((width, SHORT), dtype=np.float32)
        turn /= SHORT**0.5
        return np.concatenate([self.unit(part) @ turn for part in _parts(self.rows)])


def _components(
    table: _Rows, component: Int[np.ndarray, " expert"], threshold: float, tolerance: float
) -> Int[np.ndarray, " expert"]:
    """For each expert the number of its group. `component` is what is known before.

    Sorted by norm, an expert's partners are those that follow it within the tolerance, so that a
    block of the cosine matrix holds few more pairs than are asked for.
    """
    order = np.argsort(table.norms, kind="stable")
    norms = table.norms[order]
    ends = np.searchsorted(norms, norms / (1 - tolerance) * (1 + 1e-9), side="right")
    short = table.short()[order]
    lengths = np.einsum("ij,ij->i", short, short)
    far = SLACK * (2 - 2 * threshold) + 1e-5  # rounding of float32
    begin, n = 0, len(norms)
    while begin < n:
        end = min(n, begin + max(1, CHUNK // max(n, table.rows.shape[1])))
        reach = int(ends[end - 1])  # ends do not fall
        inner = short[begin:end] @ short[begin:reach].T
        maybe = lengths[begin:end, None] + lengths[begin:reach] - 2 * inner <= far
        # Pairs in order, within the tolerance, and not known to be one.
        place = np.arange(begin, reach)
        maybe &= place[None] > np.arange(begin, end)[:, None]
        maybe &= place[None] < ends[begin:end, None]
        maybe &= component[order[begin:reach]][None] != component[order[begin:end]][:, None]
        component = _joined(table, order[begin:reach], maybe, component, threshold)
        begin = end
    return component


def _joined(
    table: _Rows,
    order: Int[np.ndarray, " some"],
    maybe: Bool[np.ndarray, "first some"],
    component: Int[np.ndarray, " expert"],
    threshold: float,
) -> Int[np.ndarray, " expert"]:
    """`component` after those pairs of one block that the rows themselves confirm.

    `maybe` has a row for each of the first of `order`."""
    left = np.flatnonzero(maybe.any(axis=1))
    a = order[left]
    edges: list[tuple[np.ndarray, np.ndarray]] = []
    step = max(1, CHUNK // table.rows.shape[1])
    for at in range(0, len(order) if len(left) else 0, step):
        right = at + np.flatnonzero(maybe[left, at : at + step].any(axis=0))
        if not len(right):
            continue
        b = order[right]
        same = table.unit(a) @ table.unit(b).T >= threshold - 1e-6
        # Zero experts have no direction, and their norms have passed: they are one.
        same |= (table.norms[a] == 0)[:, None] & (table.norms[b] == 0)[None]
        i, j = np.nonzero(maybe[np.ix_(left, right)] & same)
        edges.append((a[i], b[j]))
    if not edges:
        return component
    one, other = (np.concatenate(side) for side in zip(*edges, strict=True))
    # What is known, as edges from each expert to the first of its group, and what is new.
    _, first, place = np.unique(component, return_index=True, return_inverse=True)
    known = np.arange(len(component))
    i, j = np.concatenate([known, one]), np.concatenate([first[place.reshape(-1)], other])
    graph = coo_matrix((np.ones(len(i), dtype=bool), (i, j)), shape=(len(known),) * 2)
    return connected_components(graph, directed=False)[1]


def _group(
    names: Sequence[str], table: _Rows, where: Sequence[int], digests: Mapping[str, str]
) -> Duplicates:
    where = sorted(where, key=lambda i: names[i])
    first = table.unit(np.array(where[:1]))[0]
    # One row at a time: the group may be all of a library. Zero experts are like one another.
    cosines = [float(table.unit(np.array([i]))[0] @ first) for i in where if table.norms[i]]
    same: dict[str, list[str]] = {}
    for i in where:
        same.setdefault(digests.get(names[i], names[i]), []).append(names[i])
    return Duplicates(
        names=tuple(names[i] for i in where),
        cosine=min([1.0, *cosines]),
        copies=tuple(tuple(held) for held in same.values() if len(held) > 1),
    )


def _first_copies(names: Sequence[str], digests: Mapping[str, str]) -> Int[np.ndarray, " expert"]:
    """For each expert the place of the first with its digest."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(digests.get(n, n), i) for i, n in enumerate(names)])


def _parts(rows: Float[np.ndarray, "expert feature"]) -> Iterator[slice]:
    """Slices of some rows each."""
    step = max(1, CHUNK // max(1, rows.shape[1]))
    return (slice(i, i + step) for i in range(0, len(rows), step))
