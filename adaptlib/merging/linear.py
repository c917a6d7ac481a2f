"""Weighted sums of updates, exact, in factor space."""

from adaptlib.errors import RefusedError
from adaptlib.experts.arithmetic import weighted_sum
from adaptlib.merging.factors import stacked
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part


def linear(part: Part) -> Update:
    """The mean, or any weighted sum: ΔW = Σ w_i ΔW_i, with w_i = 1/N where none is given.

    Exact in factor space. PEFT's `linear` sums A's and B's apart and so has cross terms; `on`
    `factors` gives that. AdapterSoup, model soups (arXiv:2203.05482).
    """
    return _sum(part, 1.0)


def task_arithmetic(part: Part, *, scale: float = 0.4) -> Update:
    """Task arithmetic: ΔW = scale · Σ w_i ΔW_i, with w_i = 1 where none is given.

    Ilharco et al. 2023 (arXiv:2212.04089), section 4; scale 0.4 is what the sparse adapters' paper
    takes (arXiv:2507.07140). A negative weight unlearns.
    """
    return _sum(part, scale)


def cat(part: Part) -> Update:
    """The exact sum as LoRA of a higher rank: A's below one another, B's side by side.

    ΔW = Σ w_i ΔW_i with w_i = 1 where none is given, as PEFT's `cat`.
    """
    return _sum(part, 1.0)


def svd(part: Part) -> Update:
    """The sum at the rank of one expert: the best ΔW of that rank for Σ w_i ΔW_i.

    By a singular value decomposition in factor space, exact (Eckart and Young). The rank is the
    largest of the experts' where none is given. PEFT's `svd` is this.
    """
    return _sum(part, 1.0)


def _sum(part: Part, scale: float) -> Update:
    weights = [scale * weight for weight in part.weights]
    try:
        return weighted_sum(part.deltas, weights)
    except RefusedError:  # of both kinds
        left, right = stacked(part.deltas, weights)
        return left @ right
