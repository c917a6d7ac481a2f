"""Which entries of a module a sparse adapter keeps: scores, and the top of them.

A selection is a function and a line in `SELECTIONS`. The sources: arXiv:2507.07140 section 3 and
its ablations (sensitivity, magnitude, gradient, random), and SHiRA, arXiv:2406.13175 section 3.1
(struct, rand, weight magnitude, gradient, SNIP).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Matrix = Float[Tensor, "d_out d_in"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """What a score may look at, of one module: its weight W, the update Ŵ so far, ∂L/∂Ŵ at mask
    one, the number of entries that will be kept, and a generator seeded for this module."""

    weight: Matrix
    update: Matrix
    gradient: Matrix
    keep: int
    generator: torch.Generator


@final
@dataclass(frozen=True, slots=True)
class Selection:
    """A score (d_out, d_in), and when it is taken: again and again within the first `epoch`, or
    once at the `start`. Without `gradient` no gradient is computed for it (it is zero)."""

    score: Callable[[Candidates], Matrix]
    when: Literal["epoch", "start"]
    gradient: bool


def sensitivity(of: Candidates) -> Matrix:
    """Ŵ ⊙ ∂L/∂Ŵ, signed: ∂L/∂M at M = 1 ("max connection sensitivity")."""
    return of.update * of.gradient


def magnitude(of: Candidates) -> Matrix:
    """|Ŵ|: what has moved most."""
    return of.update.abs()


def gradient(of: Candidates) -> Matrix:
    """|∂L/∂Ŵ|."""
    return of.gradient.abs()


def random(of: Candidates) -> Matrix:
    """Drawn from `init_seed`; SHiRA-Rand."""
    return torch.rand(of.weight.shape, generator=of.generator).to(of.weight.device)


def shira_weight(of: Candidates) -> Matrix:
    """|W|: SHiRA-WM."""
    return of.weight.abs()


def shira_snip(of: Candidates) -> Matrix:
    """|W ⊙ ∂L/∂W|: SHiRA-SNIP."""
    return (of.weight * of.gradient).abs()


def shira_struct(of: Candidates) -> Matrix:
    """The diagonal, then whole rows at even distances: SHiRA-Struct."""
    d_out, d_in = of.weight.shape
    score = torch.zeros(d_out, d_in)
    rows = max(0, of.keep - max(d_out, d_in)) // d_in
    chosen = torch.linspace(0, d_out - 1, rows + 1).round().long()  # one more, for the remainder
    score[chosen] = torch.linspace(1, 0.5, rows + 1)[:, None]
    longest = torch.arange(max(d_out, d_in))
    score[longest % d_out, longest % d_in] = 2.0  # a diagonal that wraps around
    return score.to(of.weight.device)


SELECTIONS: dict[str, Selection] = {
    "gradient": Selection(gradient, "epoch", True),
    "magnitude": Selection(magnitude, "epoch", False),
    "random": Selection(random, "start", False),
    "sensitivity": Selection(sensitivity, "epoch", True),
    "shira-gradient": Selection(gradient, "start", True),
    "shira-snip": Selection(shira_snip, "start", True),
    "shira-struct": Selection(shira_struct, "start", False),
    "shira-weight": Selection(shira_weight, "start", False),
}


def kept(places: int, ratio: float) -> int:
    """How many of `places` entries or blocks a keep ratio leaves; one at least."""
    return max(1, round(ratio * places))


def top(score: Matrix, *, ratio: float, block: int) -> Bool[Tensor, "rows columns"]:
    """The mask of the highest scores; for blocks of the highest sums, one place a block."""
    if block > 1:
        rows, columns = (side // block for side in score.shape)
        score = score.reshape(rows, block, columns, block).sum((1, 3))
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[score.flatten().topk(kept(score.numel(), ratio)).indices] = True
    return mask.view_as(score)
