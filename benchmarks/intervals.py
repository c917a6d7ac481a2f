"""Bootstrap intervals of means over tasks of shares of rows."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def interval(
    tasks: Sequence[np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """The mean over the tasks of the mean over their rows, and its percentile interval (low, high).

    Each task is the values of its rows, all of them -1, 0 or 1: hits, or differences of paired hits.
    One resample draws as many tasks as there are, with replacement, and for each draw of a task as
    many of its rows as it has, with replacement. How many of n rows drawn with replacement are 1
    and how many -1 is multinomial, so these counts are drawn, not the rows.
    """
    count = len(tasks)
    rows = np.array([len(task) for task in tasks])
    up = np.array([np.mean(task == 1) for task in tasks])
    down = np.array([np.mean(task == -1) for task in tasks])
    random = np.random.default_rng(seed)
    drawn = random.integers(count, size=(resamples, count))
    n = rows[drawn]
    plus = random.binomial(n, up[drawn])
    # of the other rows, each is -1 with this probability
    rest = np.divide(down, 1 - up, out=np.zeros(count), where=up < 1)
    minus = random.binomial(n - plus, np.minimum(rest, 1)[drawn])
    means = ((plus - minus) / n).mean(axis=1)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(np.mean([task.mean() for task in tasks])), float(low), float(high)
