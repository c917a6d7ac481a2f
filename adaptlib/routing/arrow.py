"""Arrow: route by each update's top input direction (arXiv:2405.11157, section 4.2)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Choice, Mix, Router


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Arrow(Router):
    """Each token goes to the experts whose ΔW acts most on its direction; nothing is trained.

    At a module, logit_i = |x · v_i| / temperature, where v_i is the top right singular vector of
    ΔW_i (`prototypes`, one row for each of `columns`) and x is not normalised; then the `top_k`
    largest, and a softmax over these.
    """

    prototypes: Mapping[str, Float[Tensor, "expert d_in"]]
    top_k: int
    temperature: float
    name = "arrow"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise UsageError(f"top_k is 1 or more; got {self.top_k}")
        if not self.temperature > 0:
            raise UsageError(f"temperature is more than 0; got {self.temperature}")
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
    ) -> "Arrow":
        """Take the prototypes from the experts' parameters. Where fewer than `top_k` experts have
        a module, all of them are chosen. Fit again after an expert changed.

        UsageError for no experts, top_k < 1, temperature <= 0 or an unknown mix.
        """
        if not experts:
            raise UsageError("a router needs one expert at least; got none")
        columns: dict[str, list[int]] = {}
        directions: dict[str, list[Tensor]] = {}
        for i, expert in enumerate(experts.values()):
            for module, delta in expert.deltas.items():
                columns.setdefault(module, []).append(i)
                directions.setdefault(module, []).append(delta.top_direction().cpu())
        return cls(
            experts=tuple(experts),
            columns={module: tuple(indices) for module, indices in columns.items()},
            mix=mix,
            prototypes={module: torch.stack(rows) for module, rows in directions.items()},
            top_k=min(top_k, len(experts)),
            temperature=temperature,
        )

    @property
    def most(self) -> int:
        return min(self.top_k, max(len(here) for here in self.columns.values()))

    def route(self, module: str, x: Float[Tensor, "tok d_in"]) -> Choice:
        columns = self.columns_at(module)
        prototypes = self.prototypes[module].to(x.device)
        logits = (x.float() @ prototypes.T).abs() / self.temperature  # (tok, experts here)
        top, place = logits.topk(min(self.top_k, len(columns)), dim=-1)
        if len(columns) < len(self.experts):
            place = torch.tensor(columns, device=x.device)[place]
        return Choice(place, top.softmax(-1))

    def place(self, devices: Mapping[str, torch.device]) -> "Arrow":
        placed = {m: rows.to(devices[m]) for m, rows in self.prototypes.items()}
        return replace(self, prototypes=placed)
