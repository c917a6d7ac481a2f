"""DELLA: drop entries at random, the small ones more often."""

import numpy as np
import torch
from numpy.typing import NDArray

from adaptlib.errors import UsageError
from adaptlib.merging.draws import draws
from adaptlib.merging.entries import Chunk, by_entries, elected, share
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part

STEPS = 1 << 16  # probabilities are multiples of 1/STEPS


def della(
    part: Part,
    *,
    density: float = 0.2,
    epsilon: float = 0.1,
    scale: float = 1.0,
    elect: str = "total",
    seed: int = 0,
) -> Update:
    """DELLA: entries are dropped at random, small ones more often, and those left are rescaled;
    then at each entry the mean is taken of those experts that have the sign on which they agree.

    With r = 0 .. d_in - 1 the rank of |ΔW_i| in its row, rising, an entry is kept with probability
    p = (`density` - `epsilon`) + 2 `epsilon` r / (d_in - 1), and divided by p. Sign and mean as in
    `ties`; `elect="none"` takes Σ w_i τ_i instead. w_i = 1 where none is given.

    Deep et al. 2024 (arXiv:2406.11617), section 2: MagPrune, elect, fuse. mergekit's `della` and
    `della_linear` have the same p, but may rescale to the norm from before. PEFT has none.
    """
    share("density", density)
    if not 0 <= epsilon < density or density + epsilon > 1:
        raise UsageError(
            f"epsilon is from 0, below density, and density + epsilon at most 1; got epsilon "
            f"{epsilon}, density {density}"
        )
    ranks = torch.arange(part.shape[1]).double() / max(1, part.shape[1] - 1)
    chances = (((density - epsilon) + 2 * epsilon * ranks) * STEPS).round().clamp(min=1).numpy()
    seeds = [part.generator(seed, i).initial_seed() for i in range(len(part.deltas))]
    return by_entries(
        part,
        elected(part.weights, scale, elect),
        lambda i, chunk: _drop(chunk, i, chances, seeds[i]),
        whole_rows=True,
    )


def _drop(chunk: Chunk, i: int, chances: NDArray[np.float64], seed: int) -> None:
    """Drop and rescale in place. Numbers are drawn for the ranks of a row, which need no looking
    up of chances; `chances` are those of 0 .. d_in - 1, times STEPS."""
    x, width = chunk.values[i].numpy(), chunk.width
    most = (chances - 1).astype(np.uint16)  # of what is drawn, to be kept
    factors = (STEPS / chances).astype(np.float32)
    if chunk.units is None:
        sizes = np.abs(x).reshape(-1, width)
        order = _order_of_rows(sizes)
        drawn = draws(seed, chunk.where(), np.uint16).reshape(-1, width)
        by_place = np.empty_like(sizes)
        np.put_along_axis(by_place, order, (drawn <= most) * factors, axis=1)
        x *= by_place.reshape(-1)
        return
    held = np.flatnonzero(x)  # what is not held is zero, and so of the lowest ranks
    rows, columns = np.divmod(chunk.positions().numpy()[held], width)
    order = np.lexsort((columns, np.abs(x[held]), rows))
    held, rows = held[order], rows[order]
    ranks = width - (np.searchsorted(rows, rows, side="right") - np.arange(len(rows)))
    drawn = draws(seed, rows * width + ranks, np.uint16)
    x[held] *= (drawn <= most[ranks]) * factors[ranks]


def _order_of_rows(sizes: NDArray[np.float32]) -> NDArray[np.int64]:
    """The columns of each row from the smallest size to the largest, of equal ones the first first.
    Sizes and columns are sorted as one number: twice as fast as an argsort."""
    keys = sizes.view(np.int32).astype(np.int64) << 32  # floats above 0 are ordered as their bits
    keys |= np.arange(sizes.shape[1])
    keys.sort(axis=1)
    return keys & 0xFFFFFFFF
