"""Uniform: every expert, equally. The plain average that a router has to beat."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Choice, Mix, Router, columns_of, fingerprints


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Uniform(Router):
    """At each module every expert that has it, all with the same weight (μ in arXiv:2405.11157,
    section 4.1, with mix="factors")."""

    name = "uniform"

    @classmethod
    def fit(cls, experts: Mapping[str, Expert], *, mix: Mix = "outputs") -> "Uniform":
        """UsageError for no experts or an unknown mix."""
        held = dict(experts.items())  # each is read once: a library reads files
        return cls(
            experts=tuple(held), fitted=fingerprints(held), columns=columns_of(held), mix=mix
        )

    def route(self, module: str, x: Float[Tensor, "tok d_in"]) -> Choice:
        columns = self.columns_at(module)
        shape = (len(x), len(columns))
        index = torch.tensor(columns, device=x.device).expand(shape)
        return Choice(index, torch.full(shape, 1 / len(columns), device=x.device))
