"""Model Breadcrumbs: neither the smallest entries nor the outliers."""

from adaptlib.errors import UsageError
from adaptlib.merging.entries import Chunk, by_entries, share, weighted
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part
from adaptlib.merging.trim import cuts, trim


def breadcrumbs(
    part: Part, *, beta: float = 0.9, gamma: float = 0.99, scale: float = 0.4
) -> Update:
    """Model Breadcrumbs: the sum of the experts' middle entries, without the small ones and without
    the outliers.

    ΔW = scale · Σ w_i τ_i, with τ_i = ΔW_i but 0 for the `beta` share of smallest |ΔW_i| and for
    the 1 - `gamma` share of largest, module by module; w_i = 1 where none is given.

    Davari and Belilovsky 2023 (arXiv:2312.06795), section 3; the values are those of the sparse
    adapters' paper (arXiv:2507.07140). PEFT has none. mergekit's `breadcrumbs` is this with density
    = gamma - beta and its gamma = 1 - gamma.
    """
    share("beta", beta, zero=True)
    share("gamma", gamma)
    if beta >= gamma:
        raise UsageError(f"beta is below gamma, or nothing is left; got {beta} and {gamma}")
    size = part.shape[0] * part.shape[1]
    middle, top = size - int(beta * size), size - int(gamma * size)
    ends = cuts(part, middle, top)

    def prune(i: int, chunk: Chunk) -> None:
        small, large = ends[i]
        trim(chunk, i, small)
        trim(chunk, i, large, keep="below")

    return by_entries(part, weighted(part.weights, scale), prune)
