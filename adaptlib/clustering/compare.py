"""Two clusterings side by side: who moved, what was split and what was merged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from adaptlib.errors import UsageError

PART = 0.2  # of a cluster: what is smaller than this, or one expert alone, is no part of a split


@final
@dataclass(frozen=True)
class Move:
    """An expert that is in another cluster now. None stands for no cluster: an outlier."""

    name: str
    before: str | None
    after: str | None


@final
@dataclass(frozen=True)
class Difference:
    """What differs between two clusterings, `before` and `after`, on the experts in both.

    `matched` maps labels of `before` to those of `after` with the largest overlap in all, each
    once. `moved` are experts that left the match of their cluster; a whole cluster that is called
    otherwise now has not moved. `split` maps a label of `before` to the parts it went into, and
    `merged` one of `after` to those it came from, with the number of experts, where there are two
    parts or more of at least 2 experts and a fifth of it. `ari` and `nmi` are None where fewer
    than 2 experts are in both; each outlier counts as a cluster of its own.
    """

    matched: dict[str, str]
    moved: tuple[Move, ...]
    split: dict[str, dict[str, int]]
    merged: dict[str, dict[str, int]]
    gone: tuple[str, ...]
    new: tuple[str, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    changed: tuple[str, ...]
    common: int
    ari: float | None
    nmi: float | None

    @property
    def same(self) -> bool:
        """Whether both put the same experts together."""
        return not (self.moved or self.gone or self.new or self.only_before or self.only_after)


def compare(
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
    *,
    outliers: tuple[Sequence[str], Sequence[str]] = ((), ()),
    digests: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> Difference:
    """How one clustering (label -> names) became another.

    Clusters are matched so that the number of experts that stay is largest (Kuhn 1955, the
    Hungarian method; SciPy's). `outliers` are experts in no cluster and `digests` what each name
    meant, of both. Raises UsageError where an expert is in two clusters of one.
    """
    old, new = _labels(before, outliers[0]), _labels(after, outliers[1])
    common = sorted(old.keys() & new.keys())
    table = np.zeros((len(before), len(after)), dtype=np.int64)
    row, column = ({label: i for i, label in enumerate(labels)} for labels in (before, after))
    for name in common:
        a, b = old[name], new[name]
        if a is not None and b is not None:
            table[row[a], column[b]] += 1
    labels_before, labels_after = list(before), list(after)
    pairs = zip(*linear_sum_assignment(-table), strict=True)
    matched = {labels_before[i]: labels_after[j] for i, j in pairs if table[i, j]}
    moved = tuple(
        Move(name, old[name], new[name])
        for name in common
        if not _stays(old[name], new[name], matched)
    )
    ari, nmi = agreement(_flat(old, common), _flat(new, common))
    return Difference(
        matched=matched,
        moved=moved,
        split={
            label: parts
            for label, counts in zip(labels_before, table, strict=True)
            if len(parts := _parts(labels_after, counts)) > 1
        },
        merged={
            label: parts
            for label, counts in zip(labels_after, table.T, strict=True)
            if len(parts := _parts(labels_before, counts)) > 1
        },
        gone=tuple(label for label in before if label not in matched),
        new=tuple(label for label in after if label not in matched.values()),
        only_before=tuple(sorted(old.keys() - new.keys())),
        only_after=tuple(sorted(new.keys() - old.keys())),
        changed=tuple(
            name
            for name in common
            if name in digests[0] and name in digests[1] and digests[0][name] != digests[1][name]
        ),
        common=len(common),
        ari=ari,
        nmi=nmi,
    )


def agreement(one: Sequence[object], other: Sequence[object]) -> tuple[float | None, float | None]:
    """The adjusted Rand index (Hubert and Arabie 1985; 0 by chance, 1 where equal) and the
    normalised mutual information (0 to 1, above 0 by chance too) of two labellings of the same
    things. None of fewer than two things."""
    if len(one) < 2:
        return None, None
    # Labels of any type as numbers: scikit-learn warns of strings that look like many classes.
    first, second = (np.unique([str(x) for x in labels], return_inverse=True)[1]
                     for labels in (one, other))  # fmt: skip
    return (
        float(adjusted_rand_score(first, second)),
        float(normalized_mutual_info_score(first, second)),
    )


def _labels(
    clusters: Mapping[str, Sequence[str]], outliers: Sequence[str]
) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, label in _placed(clusters, outliers):
        if name in found:
            raise UsageError(f"expert {name!r} is in two clusters, {found[name]!r} and {label!r}")
        found[name] = label
    return found


def _placed(
    clusters: Mapping[str, Sequence[str]], outliers: Sequence[str]
) -> Iterator[tuple[str, str | None]]:
    for label, names in clusters.items():
        for name in names:
            yield name, label
    for name in outliers:
        yield name, None


def _stays(before: str | None, after: str | None, matched: Mapping[str, str]) -> bool:
    if before is None or after is None:
        return before is after
    return matched.get(before) == after


def _flat(labels: Mapping[str, str | None], names: Sequence[str]) -> list[tuple[str, str]]:
    """A label for each name, of which no two outliers share one."""
    return [
        ("outlier", name) if (label := labels[name]) is None else ("cluster", label)
        for name in names
    ]


def _parts(labels: list[str], counts: Int[np.ndarray, " part"]) -> dict[str, int]:
    """The labels that hold a real part of a cluster, largest first."""
    least = max(2.0, PART * counts.sum())
    order = np.argsort(-counts, kind="stable")
    return {labels[i]: int(counts[i]) for i in order if counts[i] >= least}
