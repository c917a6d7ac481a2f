"""LAG: a shortlist by Arrow, then the best of it by SpectR (arXiv:2507.05346, "Arrow Retrieval" and
"SpectR Reranking")."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Mix, Scope, fingerprints
from adaptlib.routing.spectr import SpectralRouter, lengths, spectra


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LAG(SpectralRouter):
    """Arrow's speed in a large library, with SpectR's precision; nothing is trained.

    At a module, the `shortlist` experts with the largest |a*_i · x| (equation 6; a*_i is the top
    right singular vector of ΔW_i, `prototypes`), and of these the one with the largest ‖A*_i x‖
    (equation 7). With shortlist 1 it is Arrow's best; with as many as there are experts, SpectR's.
    The paper has one library of tasks and one of knowledge and takes one expert from each; here
    there is one library.

    The score of an expert off the shortlist is -inf. That is why `top_k` (1 in the paper) is at
    most `shortlist`, and why the scope is `token`: the tokens of a prompt have different
    shortlists, so that a mean over them would be -inf for nearly every expert.
    """

    prototypes: Mapping[str, Float[Tensor, "here d_in"]]
    shortlist: int
    name = "lag"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "token":
            raise UsageError(
                f"router lag makes a shortlist for each token, so a whole {self.scope} has none; "
                f"got scope {self.scope!r}",
                hint='scope="token", or SpectR, which scores all experts for every token',
            )
        if self.shortlist < 1:
            raise UsageError(f"shortlist is 1 or more; got {self.shortlist}")
        if self.top_k > self.shortlist:
            raise UsageError(
                f"top_k are of the shortlist, so at most {self.shortlist}; got {self.top_k}",
                hint=f"shortlist={self.top_k}",
            )

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        shortlist: int = 20,
        top_k: int = 1,
        sparse_rank: int = 8,
        temperature: float = 1.0,
        mix: Mix = "outputs",
        scope: Scope = "token",
        threshold: float | None = None,
    ) -> "LAG":
        """Take the directions from the experts' parameters; `sparse_rank` is SpectR's.

        UsageError for no experts, top_k, shortlist or sparse_rank < 1, top_k above shortlist,
        temperature <= 0, an unknown mix, or a scope other than "token".
        """
        held = dict(experts.items())  # each is read once: a library reads files
        columns, directions, ranks = spectra(held, sparse_rank)
        return cls(
            experts=tuple(held),
            fitted=fingerprints(held),
            columns=columns,
            mix=mix,
            scope=scope,
            threshold=threshold,
            top_k=min(top_k, len(held)),
            temperature=temperature,
            directions=directions,
            ranks=ranks,
            prototypes={m: _first(rows, ranks[m]) for m, rows in directions.items()},
            shortlist=shortlist,
        )

    def scores(self, module: str, x: Float[Tensor, "tok d_in"]) -> Float[Tensor, "tok here"]:
        here = len(self.columns_at(module))
        x, ranks = x.float(), self.ranks[module]
        rows = self.directions[module].to(x.device)
        if self.shortlist >= here:
            return lengths(x @ rows.T, ranks)
        arrows = (x @ self.prototypes[module].to(x.device).T).abs()
        short = arrows.topk(self.shortlist, dim=1).indices
        scores = torch.full_like(arrows, -torch.inf)
        if 3 * short.numel() < here:  # copying rows costs about three times using them in place
            return scores.scatter(1, short, _lengths_of(x, rows, ranks, short))
        return scores.scatter(1, short, lengths(x @ rows.T, ranks).gather(1, short))

    def look(
        self,
        module: str,
        x: Float[Tensor, "sequence tok d_in"],
        mask: Bool[Tensor, "sequence tok"],
    ) -> Float[Tensor, "sequence 1"]:
        """The mean `closeness` alone: with scope "token" nothing else is asked for."""
        return super().look(module, x, mask)[:, -1:]

    def place(
        self, devices: Mapping[str, torch.device], groups: Sequence[tuple[str, ...]] = ()
    ) -> "LAG":
        return replace(
            self,
            directions={m: rows.to(devices[m]) for m, rows in self.directions.items()},
            prototypes={m: rows.to(devices[m]) for m, rows in self.prototypes.items()},
        )


def _first(rows: Float[Tensor, "rows d_in"], ranks: Tensor) -> Float[Tensor, "here d_in"]:
    """Each expert's first row; zeros for an expert without."""
    found = rows.new_zeros(len(ranks), rows.shape[1])
    some = ranks > 0
    found[some] = rows[(ranks.cumsum(0) - ranks)[some]]
    return found


def _lengths_of(
    x: Float[Tensor, "tok d_in"],
    rows: Float[Tensor, "rows d_in"],
    ranks: Tensor,
    short: Tensor,
) -> Float[Tensor, "tok short"]:
    """The lengths for each token's own experts `short` (tok, short), from their rows alone."""
    width = max(1, int(ranks.max()))
    start, count = (ranks.cumsum(0) - ranks).to(x.device), ranks.to(x.device)
    place = torch.arange(width, device=x.device)
    real = place < count[short][:, :, None]  # (tok, short, width)
    index = (start[short][:, :, None] + place).clamp_max(len(rows) - 1)
    projected = torch.bmm(rows[index.flatten(1)], x[:, :, None]).view(index.shape)
    return torch.linalg.vector_norm(projected * real, dim=2)
