"""ScoringRouter: a number for each token and expert, the largest of which win."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.routing.router import Choice, Router

Weights = Literal["softmax", "equal"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringRouter(Router):
    """The `top_k` experts with the largest scores; their weights are a softmax over these scores
    divided by `temperature`, or `equal`.

    A subclass gives `scores`. The scope follows from them: a token has its own scores, a sequence
    the mean over its tokens, a prompt the mean over its tokens and, of each expert, its modules.
    """

    top_k: int
    temperature: float = 1.0
    weights: Weights = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise UsageError(f"top_k is 1 or more; got {self.top_k}")
        if not self.temperature > 0:
            raise UsageError(f"temperature is more than 0; got {self.temperature}")
        if self.weights not in get_args(Weights):
            raise UsageError(
                f"weights is one of {', '.join(get_args(Weights))}; got {self.weights!r}"
            )

    @abstractmethod
    def scores(self, module: str, x: Float[Tensor, "tok d_in"]) -> Float[Tensor, "tok here"]:
        """The score of each of `columns[module]` for each token, float32, larger is better."""

    def pooled(
        self,
        module: str,
        x: Float[Tensor, "sequence tok d_in"],
        mask: Bool[Tensor, "sequence tok"],
    ) -> Float[Tensor, "sequence here"]:
        """The scores of whole sequences, with scope "sequence"; padding has `mask` False."""
        return pool(self.scores(module, x.flatten(0, 1)).unflatten(0, mask.shape), mask)

    @property
    def most(self) -> int:
        return min(self.top_k, max(len(here) for here in self.columns.values()))

    def route(self, module: str, x: Float[Tensor, "tok d_in"]) -> Choice:
        return self.choose(module, self.scores(module, x))

    def choose(self, module: str, scores: Float[Tensor, "row *module here"]) -> Choice:
        """The winners of each row of scores at `module`, or at several that have the same ones."""
        columns = self.columns_at(module)
        top, place = scores.topk(min(self.top_k, len(columns)), dim=-1)
        if len(columns) < len(self.experts):
            place = torch.tensor(columns, device=scores.device)[place]
        return Choice(place, self._weights(top))

    def _weights(self, top: Float[Tensor, "row *module k"]) -> Float[Tensor, "row *module k"]:
        if self.weights == "equal":
            return torch.full_like(top, 1 / top.shape[-1])
        return (top if self.temperature == 1 else top / self.temperature).softmax(-1)

    # -- for whole prompts ------------------------------------------------------------------------

    @property
    def probes(self) -> tuple[str, ...]:
        return tuple(self.columns)

    def look(
        self,
        module: str,
        x: Float[Tensor, "sequence tok d_in"],
        mask: Bool[Tensor, "sequence tok"],
    ) -> Float[Tensor, "sequence here_and_1"]:
        """The mean score of each of `columns[module]`, and after them the mean `closeness`."""
        flat = x.reshape(-1, x.shape[-1])
        scores = self.scores(module, flat)
        seen = torch.cat([scores, self.closeness(flat, scores)[:, None]], dim=1)
        return pool(seen.unflatten(0, mask.shape), mask)

    def closeness(
        self, x: Float[Tensor, "tok d_in"], scores: Float[Tensor, "tok here"]
    ) -> Float[Tensor, " tok"]:
        """How well the best expert fits each token, whatever the token's length. Here the largest
        score over the length of `x`; where scores are projections on unit vectors, a cosine."""
        return scores.amax(1) / x.float().norm(dim=1).clamp_min(1e-12)

    def weigh(
        self, seen: Mapping[str, Float[Tensor, "sequence _"]], texts: Sequence[str] | None
    ) -> Float[Tensor, "sequence expert"]:
        first = next(iter(seen.values()))
        total, count = (
            first.new_zeros(len(first), len(self.experts)),
            first.new_zeros(len(self.experts)),
        )
        for module, row in seen.items():
            columns = torch.tensor(self.columns[module], device=first.device)
            total.index_add_(1, columns, row[:, :-1].to(first.device))
            count[columns] += 1
        mean = (total / count.clamp_min(1)).masked_fill(count == 0, -torch.inf)
        top, index = mean.topk(min(self.top_k, int((count > 0).sum())), dim=-1)
        return torch.zeros_like(total).scatter(1, index, self._weights(top))

    def confidence(
        self, seen: Mapping[str, Float[Tensor, "sequence _"]], texts: Sequence[str] | None
    ) -> Float[Tensor, " sequence"]:
        """The mean `closeness` over tokens and modules."""
        device = next(iter(seen.values())).device
        return torch.stack([row[:, -1].to(device) for row in seen.values()]).mean(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class PrototypeRouter(ScoringRouter):
    """A router that keeps one direction of each expert at each module, `prototypes`, a row for each
    of `columns`, and scores a token by what `against` says: here |x · v_i|; x is not normalised."""

    prototypes: Mapping[str, Float[Tensor, "here d_in"]]
    # of modules that see the same input, by the first of them; made by `place`
    stacked: Mapping[str, Float[Tensor, "_ _"]] = field(default_factory=dict, repr=False)

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

    def against(
        self, x: Float[Tensor, "tok d_in"], rows: Float[Tensor, "row d_in"]
    ) -> Float[Tensor, "tok row"]:
        """How well each token fits each of these prototypes, float32."""
        return (x.float() @ rows.T).abs()

    def scores(self, module: str, x: Float[Tensor, "tok d_in"]) -> Float[Tensor, "tok here"]:
        self.columns_at(module)
        return self.against(x, self.prototypes[module].to(x.device))

    def route_all(self, modules: Sequence[str], x: Float[Tensor, "tok d_in"]) -> Choice:
        stacked = self.stacked.get(modules[0])
        if stacked is None:
            return super().route_all(modules, x)
        scores = self.against(x, stacked)
        return self.choose(modules[0], scores.unflatten(1, (len(modules), -1)))

    def place(
        self, devices: Mapping[str, torch.device], groups: Sequence[tuple[str, ...]] = ()
    ) -> "PrototypeRouter":
        placed, stacked = stack(self.prototypes, devices, groups)
        return replace(self, prototypes=placed, stacked=stacked)


def stack(
    tables: Mapping[str, Float[Tensor, "_ _"]],
    devices: Mapping[str, torch.device],
    groups: Sequence[tuple[str, ...]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tables of all modules on their devices, and those of each group under each other, by its
    first module; the first are views of the second, so that nothing is there twice."""
    placed = {module: rows.to(devices[module]) for module, rows in tables.items()}
    stacked = {group[0]: torch.cat([placed[m] for m in group]) for group in groups}
    for group in groups:
        parts = stacked[group[0]].split([len(placed[m]) for m in group])
        placed |= dict(zip(group, parts, strict=True))
    return placed, stacked


def pool(
    values: Float[Tensor, "sequence tok n"], mask: Bool[Tensor, "sequence tok"]
) -> Float[Tensor, "sequence n"]:
    """The mean over the tokens of each sequence that are no padding."""
    real = mask.to(values.dtype)[:, :, None]
    return (values * real).sum(1) / real.sum(1).clamp_min(1)
