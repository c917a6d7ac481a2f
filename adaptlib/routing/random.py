"""Random: Arrow with directions that know nothing of the experts. The control for any router."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Mix, Scope, columns_of, fingerprints
from adaptlib.routing.scoring import PrototypeRouter


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Random(PrototypeRouter):
    """Arrow (arXiv:2405.11157, section 4.2) with random unit vectors for prototypes: tokens that
    are alike still go to the same experts, but to which ones is chance. A router is worth what it
    gains over this one.

    A prototype depends on the seed, the module, its width and the expert's name, and on nothing
    else: not on the other experts, and not on what the expert has learned.
    """

    name = "random"

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


def _draw(seed: int, module: str, expert: str, width: int) -> Float[Tensor, " d_in"]:
    digest = hashlib.sha256(f"{seed}\0{module}\0{expert}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    v = torch.randn(width, generator=generator, dtype=torch.float64)
    return (v / v.norm()).float()
