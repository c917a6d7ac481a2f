"""Arrow: route by each update's top input direction (arXiv:2405.11157, section 4.2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch

from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Mix, Scope, columns_of, fingerprints
from adaptlib.routing.scoring import PrototypeRouter


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Arrow(PrototypeRouter):
    """Each token goes to the experts whose ΔW acts most on its direction; nothing is trained.

    At a module, score_i = |x · v_i|, where v_i is the top right singular vector of ΔW_i
    (`prototypes`, one row for each of `columns`) and x is not normalised; then the `top_k`
    largest, and a softmax over these divided by `temperature`.
    """

    name = "arrow"

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        top_k: int = 4,
        temperature: float = 1.0,
        mix: Mix = "outputs",
        scope: Scope = "token",
        threshold: float | None = None,
    ) -> "Arrow":
        """Take the prototypes from the experts' parameters. Where fewer than `top_k` experts have
        a module, all of them are chosen. Fit again after an expert changed.

        UsageError for no experts, top_k < 1, temperature <= 0, an unknown mix or scope.
        """
        held = dict(experts.items())  # each is read once: a library reads files
        columns = columns_of(held)
        values = list(held.values())
        return cls(
            experts=tuple(held),
            fitted=fingerprints(held),
            columns=columns,
            mix=mix,
            scope=scope,
            threshold=threshold,
            prototypes={
                module: torch.stack(
                    [values[i].deltas[module].top_direction().cpu() for i in indices]
                )
                for module, indices in columns.items()
            },
            top_k=min(top_k, len(held)),
            temperature=temperature,
        )
