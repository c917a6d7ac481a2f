"""Arrow: route by each update's top input direction (arXiv:2405.11157, section 4.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Choice, Mix, Scope, columns_of, fingerprints
from adaptlib.routing.scoring import ScoringRouter


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Arrow(ScoringRouter):
    """Each token goes to the experts whose ΔW acts most on its direction; nothing is trained.

    At a module, score_i = |x · v_i|, where v_i is the top right singular vector of ΔW_i
    (`prototypes`, one row for each of `columns`) and x is not normalised; then the `top_k`
    largest, and a softmax over these divided by `temperature`.
    """

    prototypes: Mapping[str, Float[Tensor, "expert d_in"]]
    # of modules that see the same input, by the first of them; made by `place`
    stacked: Mapping[str, Float[Tensor, "_ _"]] = field(default_factory=dict, repr=False)
    name = "arrow"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prototypes.keys() != self.columns.keys():
            raise UsageError("prototypes and columns name different modules")
        for module, rows in self.prototypes.items():
            if rows.ndim != 2 or len(rows) != len(self.columns[module]):
                raise UsageError(
                    f"{module} wants prototypes ({len(self.columns[module])}, d_in), one for each "
                    f"expert there; got {tuple(rows.shape)}"
                )

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

    def scores(self, module: str, x: Float[Tensor, "tok d_in"]) -> Float[Tensor, "tok here"]:
        self.columns_at(module)
        return (x.float() @ self.prototypes[module].to(x.device).T).abs()

    def route_all(self, modules: Sequence[str], x: Float[Tensor, "tok d_in"]) -> Choice:
        stacked = self.stacked.get(modules[0])
        if stacked is None:
            return super().route_all(modules, x)
        scores = (x.float() @ stacked.T).abs()
        return self.choose(modules[0], scores.unflatten(1, (len(modules), -1)))

    def place(
        self, devices: Mapping[str, torch.device], groups: Sequence[tuple[str, ...]] = ()
    ) -> "Arrow":
        placed = {m: rows.to(devices[m]) for m, rows in self.prototypes.items()}
        stacked = {group[0]: torch.cat([placed[m] for m in group]) for group in groups}
        for group in groups:  # views, so that nothing is there twice
            parts = stacked[group[0]].split([len(placed[m]) for m in group])
            placed |= dict(zip(group, parts, strict=True))
        return replace(self, prototypes=placed, stacked=stacked)
