"""MoPE: a mixture of parameter-efficient experts with a router that is learned, by token or by
example (arXiv:2309.05444, section 2, and SMEAR, arXiv:2306.03745, section 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Mix, Scope, columns_of, fingerprints
from adaptlib.routing.scoring import ScoringRouter, pool


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class MoPE(ScoringRouter):
    """The score of expert i at a module is w_i · LN(x) + b_i, with LN to mean 0 and variance 1;
    `rows` are the w_i, `bias` the b_i. The weights are a softmax over all experts, or over the
    `top_k` that win.

    By token (scope "token") experts' outputs are mixed, as in a mixture of LoRA; by example (scope
    "sequence") LN is of the mean of the prompt's tokens, and with mix "factors" the experts'
    parameters are averaged, as in SMEAR. `adaptlib train-router mope` learns the router, for new
    experts or for those of a library.
    """

    rows: Mapping[str, Float[Tensor, "here d_in"]] = field(repr=False)
    bias: Mapping[str, Float[Tensor, " here"]] = field(repr=False)
    name = "mope"

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, tables in (("rows", self.rows), ("bias", self.bias)):
            if tables.keys() != self.columns.keys():
                raise UsageError(f"{what} and columns name different modules")
            for module, table in tables.items():
                if len(table) != len(self.columns[module]):
                    raise UsageError(
                        f"{module} wants {what} of {len(self.columns[module])} experts; got "
                        f"{len(table)}"
                    )

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        rows: Mapping[str, Float[Tensor, "here d_in"]],
        bias: Mapping[str, Float[Tensor, " here"]],
        top_k: int | None = None,
        temperature: float = 1.0,
        mix: Mix = "outputs",
        scope: Scope = "token",
        threshold: float | None = None,
    ) -> "MoPE":
        """With rows and biases that were learned for these experts, of each module those of the
        experts there. Without `top_k` every expert has its weight. UsageError where they do not
        fit each other."""
        held = dict(experts.items())  # each is read once: a library reads files
        return cls(
            experts=tuple(held),
            fitted=fingerprints(held),
            columns=columns_of(held),
            mix=mix,
            scope=scope,
            threshold=threshold,
            top_k=len(held) if top_k is None else min(top_k, len(held)),
            temperature=temperature,
            rows=dict(rows),
            bias=dict(bias),
        )

    def scores(self, module: str, x: Float[Tensor, "tok d_in"]) -> Float[Tensor, "tok here"]:
        self.columns_at(module)
        x = nn.functional.layer_norm(x.float(), x.shape[-1:])
        return nn.functional.linear(x, self.rows[module].to(x), self.bias[module].to(x))

    def pooled(
        self,
        module: str,
        x: Float[Tensor, "sequence tok d_in"],
        mask: Bool[Tensor, "sequence tok"],
    ) -> Float[Tensor, "sequence here"]:
        """Of the mean token: SMEAR's router sees what it has averaged."""
        return self.scores(module, pool(x.float(), mask))

    def closeness(
        self, x: Float[Tensor, "tok d_in"], scores: Float[Tensor, "tok here"]
    ) -> Float[Tensor, " tok"]:
        """The largest weight that an expert would have."""
        return (scores / self.temperature).softmax(1).amax(1)

    def place(
        self, devices: Mapping[str, torch.device], groups: Sequence[tuple[str, ...]] = ()
    ) -> "MoPE":
        return replace(
            self,
            rows={module: table.to(devices[module]) for module, table in self.rows.items()},
            bias={module: table.to(devices[module]) for module, table in self.bias.items()},
        )
