"""What was chosen while a model ran: who answered, per module and per token."""

from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.routing.router import Choice


@final
@dataclass(frozen=True, eq=False)
class Trace:
    """The choices of every module (in model order) and forward call, as `Routed.record` saw them.

    A `mask`, such as the attention mask of the prompt, is nonzero at the tokens that count. It is
    for the first tokens recorded; those after it, which `generate` made, all count. A module that
    saw another number of tokens, such as a head that is given the last one only, counts whole.
    """

    experts: tuple[str, ...]
    choices: dict[str, list[Choice]] = field(default_factory=dict)

    def shares(self, *, mask: Shaped[Tensor, "*tok"] | None = None) -> dict[str, float]:
        """Each expert's mean weight over modules and tokens: sums to 1, largest first."""
        rows = self.layers(mask=mask).values()
        means = torch.tensor(list(rows), dtype=torch.float64).mean(0).tolist()
        pairs = zip(self.experts, means, strict=True)
        return dict(sorted(pairs, key=lambda pair: -pair[1]))

    def layers(self, *, mask: Shaped[Tensor, "*tok"] | None = None) -> dict[str, tuple[float, ...]]:
        """For each module the mean weight of each of `experts`."""
        weights = self._weights()
        real = None
        if mask is not None:
            real = mask.detach().cpu().flatten() != 0
            if not bool(real.any()):
                raise UsageError("the mask leaves no token")
            if all(len(calls[0].index) != len(real) for calls in self.choices.values() if calls):
                seen = len(next(calls for calls in self.choices.values() if calls)[0].index)
                raise UsageError(
                    f"the mask is for {len(real)} tokens; the first recorded call had {seen}"
                )
        means: dict[str, tuple[float, ...]] = {}
        for module, weight in weights.items():
            if real is not None and len(self.choices[module][0].index) == len(real):
                later = torch.ones(len(weight) - len(real), dtype=torch.bool)
                weight = weight[torch.cat([real, later])]
            means[module] = tuple(weight.double().mean(0).tolist())
        return means

    def tokens(self) -> Float[Tensor, "tok expert"]:
        """For each token the mean weight over modules. Modules that did not see every token are
        left out. Sequences of a batch follow each other, so record one prompt at a time."""
        weights = list(self._weights().values())
        count = max(len(weight) for weight in weights)
        return torch.stack([weight for weight in weights if len(weight) == count]).mean(0)

    def _weights(self) -> dict[str, Float[Tensor, "tok expert"]]:
        found: dict[str, Tensor] = {}
        for module, calls in self.choices.items():
            parts = [
                torch.zeros(len(index), len(self.experts)).scatter(1, index.cpu(), weight.cpu())
                for index, weight in calls
                if len(index)
            ]
            if parts:
                found[module] = torch.cat(parts)
        if not found:
            raise UsageError(
                "nothing was recorded",
                hint="call the routed model inside `with routed.record() as trace:`",
            )
        return found
