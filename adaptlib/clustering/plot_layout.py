"""Where experts stand on a map: three ways to put many dimensions on a plane."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.manifold import TSNE, smacof
from threadpoolctl import threadpool_limits

from adaptlib.errors import UsageError

LAYOUTS = ("mds", "pca", "tsne")
# Experts up to which these take seconds: each step of SMACOF takes all pairs, 500 times.
MDS_MOST, TSNE_MOST = 400, 5000


def place(
    unit: Float[np.ndarray, "expert component"], layout: str = "mds"
) -> tuple[Float[np.ndarray, "expert 2"], str]:
    """A point for each of these unit rows, and what the distances on the plane mean.

    `mds`: distances follow sqrt(2 - 2 cos) as far as a plane allows (`plane`). `pca`: the two
    directions of most variance, for any number of experts. `tsne`: neighbours stay neighbours (van
    der Maaten and Hinton 2008, scikit-learn's), and what is far apart says little. Where there are
    too many experts for `mds`, or too few to have neighbours, it is `pca`, and the words say so.
    """
    if layout not in LAYOUTS:
        raise UsageError(
            f"no layout is called {layout!r}; there are {', '.join(LAYOUTS)}", hint="mds"
        )
    if layout == "tsne" and len(unit) >= 5 and len(np.unique(unit, axis=0)) > 2:
        return _tsne(unit), "t-SNE: near is alike, far says little"
    if layout == "mds" and len(unit) <= MDS_MOST:
        return plane(np.clip(unit @ unit.T, -1.0, 1.0)), "close together = alike"
    points, share = _axes(unit)
    why = f" ({len(unit):,} are too many for mds)" if layout == "mds" else ""
    return points, f"the two principal axes{why}, {share:.0%} of the variance"


def plane(
    similarity: Float[np.ndarray, "expert expert"],
) -> Float[np.ndarray, "expert 2"]:
    """Points whose distances follow sqrt(2 - 2 cos), by SMACOF (de Leeuw 1977), scikit-learn's.

    It starts from the two principal axes. Those alone would put several of many equally unlike
    groups on one spot; a random start would draw another map each time.
    """
    wanted = np.sqrt(np.clip(2 - 2 * similarity, 0, None))
    np.fill_diagonal(wanted, 0)
    centre = np.eye(len(wanted)) - 1 / len(wanted)
    values, vectors = np.linalg.eigh(-0.5 * centre @ wanted**2 @ centre)
    axes = vectors[:, ::-1][:, :2] * np.sqrt(np.clip(values[::-1][:2], 0, None))
    points = np.zeros((len(wanted), 2))
    points[:, : axes.shape[1]] = axes
    if points.any():
        found: Any = smacof(wanted, init=points, n_init=1, max_iter=500)
        points = found[0]
    return _signed(points)


def sample(groups: Int[np.ndarray, " expert"], most: int) -> Int[np.ndarray, " some"]:
    """At most about `most` rows, evenly from each group and one of each at least, always the same
    ones; all where there are no more."""
    if len(groups) <= most:
        return np.arange(len(groups))
    chosen = []
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        count = max(1, round(len(rows) * most / len(groups)))
        chosen.append(rows[np.linspace(0, len(rows) - 1, count).round().astype(int)])
    return np.sort(np.concatenate(chosen))


def _axes(
    unit: Float[np.ndarray, "expert component"],
) -> tuple[Float[np.ndarray, "expert 2"], float]:
    """The two directions of most variance, and their share of it."""
    centred = unit - unit.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    points = np.zeros((len(unit), 2))
    points[:, : min(2, unit.shape[1])] = centred @ vectors[:, ::-1][:, :2]
    total = values.sum()
    return _signed(points), float(values[::-1][:2].sum() / total) if total > 0 else 1.0


def _tsne(unit: Float[np.ndarray, "expert component"]) -> Float[np.ndarray, "expert 2"]:
    start = _axes(unit)[0]
    start = start / start[:, 0].std() * 1e-4  # as scikit-learn has it for its own
    with threadpool_limits(limits=1):  # sums of one order, so the same map each time
        found = TSNE(
            init=start.astype(np.float32),
            perplexity=min(30.0, (len(unit) - 1) / 3),
            random_state=0,
        ).fit_transform(unit)
    return _signed(np.asarray(found, np.float64))


def _signed(points: Float[np.ndarray, "expert 2"]) -> Float[np.ndarray, "expert 2"]:
    """Of an axis and its mirror image, always the same one."""
    largest = np.abs(points).argmax(axis=0)
    return points * np.where(points[largest, [0, 1]] < 0, -1.0, 1.0)
