"""DARE: drop entries at random, and rescale those that are left."""

from adaptlib.merging.draws import survivors
from adaptlib.merging.entries import Chunk, Prune, by_entries, elected, share, weighted
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part


def dare_linear(part: Part, *, density: float = 0.2, seed: int = 0) -> Update:
    """DARE: the mean, or any weighted sum, of what is left of each expert when entries are dropped
    at random, rescaled so that it is the same on average.

    ΔW = Σ w_i m_i ⊙ ΔW_i / `density`, with each entry of m_i 1 with probability `density`, else 0,
    and w_i = 1/N where none is given. The same `seed` drops the same entries of an expert at the
    same place in the order, of any kind, whatever else is merged.

    Yu et al. 2024 (arXiv:2311.03099), whose drop rate is 1 - density. PEFT's
    `dare_linear_svd` (`on="factors"`: its `dare_linear`), but its draws are torch's global ones.
    """
    kept = share("density", density)
    return by_entries(
        part, weighted(part.weights, 1 / kept), _dropping(part, kept, seed), whole_rows=True
    )


def dare_ties(
    part: Part, *, density: float = 0.2, scale: float = 1.0, elect: str = "total", seed: int = 0
) -> Update:
    """DARE, then TIES without its trimming: entries are dropped at random and rescaled, then at
    each entry the mean is taken of those experts that have the sign on which they agree.

    τ_i = m_i ⊙ ΔW_i / `density` as in `dare_linear`; sign and mean as in `ties`, with w_i = 1 where
    none is given.

    Yu et al. 2024 (arXiv:2311.03099). PEFT's `dare_ties_svd` (`on="factors"`: its
    `dare_ties`), but its draws are torch's global ones.
    """
    kept = share("density", density)
    return by_entries(
        part,
        elected(part.weights, scale / kept, elect),
        _dropping(part, kept, seed),
        whole_rows=True,
    )


def _dropping(part: Part, density: float, seed: int) -> Prune | None:
    """Zeroes what is dropped. All that is kept is divided by one number, so that is left to the
    weights."""
    if density >= 1:
        return None
    seeds = [part.generator(seed, i).initial_seed() for i in range(len(part.deltas))]

    def prune(i: int, chunk: Chunk) -> None:
        x = chunk.values[i].numpy()
        x *= survivors(seeds[i], density, chunk.where())

    return prune
