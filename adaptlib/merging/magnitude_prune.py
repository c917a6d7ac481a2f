"""Magnitude pruning, then a sum."""

from adaptlib.merging.entries import by_entries, weighted
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part
from adaptlib.merging.trim import cuts, kept_count, trim


def magnitude_prune(part: Part, *, density: float = 0.2) -> Update:
    """The mean, or any weighted sum, of the experts' largest entries.

    ΔW = Σ w_i τ_i, with τ_i = ΔW_i where |ΔW_i| is among its `density` · d_out · d_in largest, else
    0, and w_i = 1/N where none is given. TIES without the election; PEFT's `magnitude_prune_svd`
    (`on="factors"`: its `magnitude_prune`).
    """
    ends = cuts(part, kept_count(part, density))
    return by_entries(part, weighted(part.weights), lambda i, chunk: trim(chunk, i, ends[i][0]))
