"""Random: Arrow with directions that know nothing of the experts. The control for any router."""

import hashlib
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
class Random(ScoringRouter):
    """Arrow (arXiv:2405.11157, section 4.2) with random unit vectors for prototypes: tokens that
    are alike still go to the same experts, but to which ones is chance. A router is worth what it
    gains over this one.

    A prototype depends on the seed, the module, its width and the expert's name, and on nothing
    else: not on the other experts, and not on what the expert has learned.
    """

    prototypes: Mapping[str, Float[Tensor, "here d_in"]]
    # of modules that see the same input, by the first of them; made by `place`
    stacked: Mapping[str, Float[Tensor, "experts width"]] = field(default_factory=dict, repr=False)
    name = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prototypes.keys() != self.columns.keys():
            raise UsageError("prototypes and columns name different modules")

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        seed: int = 0,
        top_k: int = 4,
        temperature: float = 1.0,
        mix: Mix = "outputs",
        scope: Scope = "token",
        threshold: float | None = None,
    ) -> "Random":
        """Draw the prototypes. UsageError for no experts, top_k < 1, temperature <= 0, an unknown
        mix or scope."""
        held = dict(experts.items())  # each is read once: a library reads files
        columns, names, values = columns_of(held), tuple(held), list(held.values())
        return cls(
            experts=names,
            fitted=fingerprints(held),
            columns=columns,
            mix=mix,
            scope=scope,
            threshold=threshold,
            top_k=min(top_k, len(held)),
            temperature=temperature,
            prototypes={
                module: torch.stack(
                    [_draw(seed, module, names[i], values[i].deltas[module].shape[1]) for i in here]
                )
                for module, here in columns.items()
            },
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
    ) -> "Random":
        placed = {m: rows.to(devices[m]) for m, rows in self.prototypes.items()}
        stacked = {group[0]: torch.cat([placed[m] for m in group]) for group in groups}
        for group in groups:  # views, so that nothing is there twice
            parts = stacked[group[0]].split([len(placed[m]) for m in group])
            placed |= dict(zip(group, parts, strict=True))
        return replace(self, prototypes=placed, stacked=stacked)


def _draw(seed: int, module: str, expert: str, width: int) -> Float[Tensor, " d_in"]:
    digest = hashlib.sha256(f"{seed}\0{module}\0{expert}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    v = torch.randn(width, generator=generator, dtype=torch.float64)
    return (v / v.norm()).float()
