"""How sure a score is, and a difference of two: over tasks, and over the rows within them.

A score is a mean over tasks of a mean over rows, so that every task counts alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from adaptlib.errors import UsageError

RESAMPLES = 10_000
PERMUTATIONS = 10_000
LEVEL = 0.95
_AT_ONCE = 1 << 22  # numbers drawn at a time


@final
@dataclass(frozen=True, slots=True)
class Paired:
    """What `a` has more than `b` on the same rows: the difference of their means with its interval,
    `p`, and on how many tasks it has more, as much, or less."""

    difference: float
    low: float
    high: float
    p: float
    more: int
    equal: int
    less: int


def interval(
    tasks: Sequence[np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """The mean over the tasks of the mean over their rows, and its 95% percentile interval (low,
    high), by the bootstrap. Each task is the values of its rows.

    One resample draws as many tasks as there are, with replacement, and for each draw of a task as
    many of its rows as it has, with replacement. UsageError for no tasks, or one without rows.
    """
    values = [np.asarray(task, dtype=float) for task in tasks]
    if not values or not all(len(task) for task in values):
        raise UsageError("an interval wants one task at least, and rows in each of them")
    random = np.random.default_rng(seed)
    drawn = random.integers(len(values), size=(resamples, len(values)))
    counted = all(np.isin(task, (-1, 0, 1)).all() for task in values)
    means = (_counted if counted else _resampled)(values, drawn, random)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(means.mean(axis=1), [tail, 100 - tail])
    return float(np.mean([task.mean() for task in values])), float(low), float(high)


def _counted(
    tasks: Sequence[np.ndarray], drawn: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """The mean of resampled rows for each drawn task, where all values are -1, 0 or 1. How many of
    n rows drawn with replacement are 1 and how many -1 is multinomial, so these counts are drawn,
    not the rows."""
    n = np.array([len(task) for task in tasks])[drawn]
    up = np.array([np.mean(task == 1) for task in tasks])
    down = np.array([np.mean(task == -1) for task in tasks])
    plus = random.binomial(n, up[drawn])
    # of the other rows, each is -1 with this probability
    rest = np.divide(down, 1 - up, out=np.zeros(len(tasks)), where=up < 1)
    minus = random.binomial(n - plus, np.minimum(rest, 1)[drawn])
    return (plus - minus) / n


def _resampled(
    tasks: Sequence[np.ndarray], drawn: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """The same for any values."""
    means = np.empty(drawn.shape)
    for t, task in enumerate(tasks):
        here = np.flatnonzero(drawn == t)
        step = max(1, _AT_ONCE // len(task))
        for i in range(0, len(here), step):
            part = here[i : i + step]
            rows = random.integers(len(task), size=(len(part), len(task)), dtype=np.int32)
            means.flat[part] = task[rows].mean(axis=1)
    return means


def paired(
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    *,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Paired:
    """Compare two on the same rows of the same tasks.

    `p` is two-sided, of a sign-flip permutation test: if the two are alike, each row's difference
    might as well have the other sign. It is (1 + k) / (1 + permutations), where k permutations
    give a mean over tasks at least as far from 0. It says nothing of other tasks; the interval, for
    which tasks are resampled too, does. UsageError where the rows are not the same.
    """
    if [len(task) for task in a] != [len(task) for task in b]:
        raise UsageError(
            "two that are compared were asked the same rows of the same tasks; got "
            f"{[len(task) for task in a]} and {[len(task) for task in b]}"
        )
    differences = [
        np.asarray(x, dtype=float) - np.asarray(y, dtype=float) for x, y in zip(a, b, strict=True)
    ]
    difference, low, high = interval(differences, resamples=resamples, seed=seed)
    means = np.array([task.mean() for task in differences])
    return Paired(
        difference,
        low,
        high,
        _flipped(differences, permutations, seed),
        int((means > 0).sum()),
        int((means == 0).sum()),
        int((means < 0).sum()),
    )


def _flipped(differences: Sequence[np.ndarray], count: int, seed: int) -> float:
    """The share of random signs of the rows that give as large a mean over tasks."""
    weights = np.concatenate([task / (len(task) * len(differences)) for task in differences])
    total = weights.sum()
    weights = weights[weights != 0]  # their sign does not matter
    least = abs(total) * (1 - 1e-9) - 1e-12  # sums in another order differ in the last bits
    random, reached = np.random.default_rng(seed), 0
    step = max(1, _AT_ONCE // max(1, len(weights)))
    for i in range(0, count, step):
        rows = min(step, count - i)
        bits = np.frombuffer(random.bytes(rows * -(-len(weights) // 8)), dtype=np.uint8)
        signs = np.unpackbits(bits.reshape(rows, -1), axis=1, count=len(weights))
        sums = 2 * (signs @ weights) - weights.sum()
        reached += int((np.abs(sums) >= least).sum())
    return (1 + reached) / (1 + count)
