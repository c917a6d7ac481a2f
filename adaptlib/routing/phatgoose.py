"""PHATGOOSE: route by gates that were trained with the experts (arXiv:2402.05859, section 3.2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Mix, Scope, columns_of, fingerprints
from adaptlib.routing.scoring import PrototypeRouter


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PHATGOOSE(PrototypeRouter):
    """Each token goes to the experts whose gates it resembles most. A gate v was trained after its
    expert, to say by σ(v · x) for which tokens the expert's update is wanted
    (`adaptlib.learned.gates`).

    At a module, score_i = LN(x) · LN(v_i) / √d_in, where LN makes the mean of a vector's entries 0
    and their variance 1; then the `top_k` largest and a softmax, as in the paper. `prototypes` are
    LN(v_i) / √d_in. Where an expert has no gate it is never chosen.
    """

    name = "phatgoose"

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        top_k: int = 2,
        temperature: float = 1.0,
        mix: Mix = "outputs",
        scope: Scope = "token",
        threshold: float | None = None,
    ) -> "PHATGOOSE":
        """Read the experts' gates. Where fewer than `top_k` experts have one at a module, all of
        these are chosen.

        UsageError for no experts, experts without a gate, top_k < 1, temperature <= 0, an unknown
        mix or scope.
        """
        held = dict(experts.items())  # each is read once: a library reads files
        known = columns_of(held)
        if without := [name for name, expert in held.items() if not expert.gates]:
            shown = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
            raise UsageError(
                f"router phatgoose needs a gate with every expert; {len(without)} of {len(held)} "
                f"have none: {shown}",
                hint=f"adaptlib train-router phatgoose --experts {','.join(without[:5])} TASKS",
            )
        gates = [expert.gates for expert in held.values()]
        gated = {m: tuple(i for i in here if m in gates[i]) for m, here in known.items()}
        columns = {module: here for module, here in gated.items() if here}
        return cls(
            experts=tuple(held),
            fitted=fingerprints(held),
            columns=columns,
            mix=mix,
            scope=scope,
            threshold=threshold,
            prototypes={
                module: standardised(torch.stack([gates[i][module].cpu() for i in here]))
                / gates[here[0]][module].numel() ** 0.5
                for module, here in columns.items()
            },
            top_k=min(top_k, len(held)),
            temperature=temperature,
        )

    def against(
        self, x: Float[Tensor, "tok d_in"], rows: Float[Tensor, "row d_in"]
    ) -> Float[Tensor, "tok row"]:
        return standardised(x) @ rows.T

    def closeness(
        self, x: Float[Tensor, "tok d_in"], scores: Float[Tensor, "tok here"]
    ) -> Float[Tensor, " tok"]:
        """The cosine of LN(x) and the nearest LN(v): both have length √d_in."""
        return scores.amax(1) / x.shape[1] ** 0.5


def standardised(rows: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
    """Each row with mean 0 and variance 1, float32; zeros where all its entries are equal."""
    return functional.layer_norm(rows.float(), rows.shape[1:], eps=1e-12)
