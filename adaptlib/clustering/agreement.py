"""Whether a clustering is worth anything: measures of it, next to those of controls."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from jaxtyping import Int

from adaptlib.clustering.choose import silhouette, stability
from adaptlib.clustering.compare import agreement
from adaptlib.clustering.groups import CLUSTERINGS
from adaptlib.clustering.mbc import Clustering
from adaptlib.clustering.similarity import Embedding


@final
@dataclass(frozen=True)
class Measures:
    """How good the groups of one method are; None where that cannot be said.

    `silhouette` (-1 to 1): how well parted they are in parameters. `stability` (about 0 to 1):
    whether they stay where a fifth of the experts is left out. `ari` and `nmi`: agreement with the
    categories that the cards name, see `compare.agreement`.
    """

    method: str
    k: int
    silhouette: float | None
    stability: float | None
    ari: float | None
    nmi: float | None


def measures(
    clustering: Clustering, cards: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Measures]:
    """The measures of a clustering and, below, those of controls with as many groups.

    `cards` are the experts' cards by name. The controls are `random` (the same sizes), `text` (by
    the words of the cards) and `category` (what the cards say); the last two are there where cards
    say something that parts experts.
    """
    cards = cards or {}
    experts = Embedding(clustering.names, clustering.unit, clustering.points, cards)
    known = {name: said for name, card in cards.items() if (said := _category(card)) is not None}
    seed, k = clustering.seed, max(1, clustering.k)
    own = _own_labels(clustering)
    labels = {clustering.method: own}
    labels.setdefault("random", np.random.default_rng(seed).permutation(own))
    labels.setdefault("text", CLUSTERINGS["text"](experts, k, seed=seed))
    groups = sorted(set(known.values()))
    labels["category"] = np.array(
        [groups.index(known[n]) if n in known else -1 for n in clustering.names], dtype=np.int64
    )
    held = [i for i, name in enumerate(clustering.names) if name in known]
    said = [known[clustering.names[i]] for i in held]
    found = []
    for method, row in labels.items():
        count = len(np.unique(row[row >= 0]))
        if count < 2 and method in ("text", "category") and method != clustering.method:
            continue
        # Of two outliers, each is alone.
        ari, nmi = agreement(said, [(int(row[i]), i * (row[i] < 0)) for i in held])
        found.append(
            Measures(
                method=method,
                k=count,
                silhouette=silhouette(experts, row),
                # Categories are given, and do not change with who is left out.
                stability=None
                if method == "category"
                else stability(experts, CLUSTERINGS[method], k, seed=seed, labels=row),
                ari=ari,
                nmi=nmi,
            )
        )
    return found


def _own_labels(clustering: Clustering) -> Int[np.ndarray, " expert"]:
    """The number of each expert's group, -1 for outliers."""
    group = {name: i for i, names in enumerate(clustering.clusters.values()) for name in names}
    return np.array([group.get(name, -1) for name in clustering.names], dtype=np.int64)


def _category(card: Mapping[str, Any]) -> str | None:
    said = card.get("category")
    return said if isinstance(said, str) and said.strip() else None
