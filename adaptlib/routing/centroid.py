"""Centroid matching: route to the experts whose task's hidden states are most like the token's (CM
in arXiv:2405.11157, among its baselines)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts.expert import Expert
from adaptlib.routing.router import Mix, Scope, columns_of, fingerprints
from adaptlib.routing.scoring import ScoringRouter


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class CentroidMatching(ScoringRouter):
    """Each token goes to the experts with the nearest `centroids`: the mean direction of the
    hidden states with which sample prompts of an expert's task end, one for each module.

    The score is the cosine of x, as it enters the module, and the centroid. Cosines are close
    together, so that with temperature 1 the chosen have nearly equal weights.
    """

    centroids: Mapping[str, Float[Tensor, "here d_in"]]
    name = "cm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centroids.keys() != self.columns.keys():
            raise UsageError("centroids and columns name different modules")

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        model: Any,
        tokenizer: Any,
        samples: Mapping[str, Sequence[str]],
        count: int = 10,
        top_k: int = 4,
        temperature: float = 1.0,
        mix: Mix = "outputs",
        scope: Scope = "token",
        threshold: float | None = None,
    ) -> "CentroidMatching":
        """Run `model`, the base without experts, once for each expert, over the first `count` of
        its `samples`, prompts of its task as the model will be given them. Of a prompt that is
        longer than the model's context, the end is used.

        UsageError for no experts, an expert without samples, a sample without tokens, count or
        top_k < 1, temperature <= 0, an unknown mix or scope; BaseMismatchError where the model
        lacks a module, RefusedError where one sees only some of the tokens.
        """
        held = dict(experts.items())  # each is read once: a library reads files
        columns = columns_of(held)
        texts = sample_texts(held, samples, count)
        modules = dict(model.named_modules())
        if missing := [module for module in columns if module not in modules]:
            raise BaseMismatchError(f"the experts adapt {missing[0]}, which this model lacks")
        centroids: dict[str, list[Tensor]] = {module: [] for module in columns}
        with borrowed(model):
            for name, expert in held.items():
                ids = prompt_ids(name, texts[name], tokenizer, model)
                wanted = {module: modules[module] for module in expert.deltas}
                for module, ends in _ends(model, wanted, ids).items():
                    mean = nn.functional.normalize(ends, dim=1).mean(0)
                    centroids[module].append(nn.functional.normalize(mean, dim=0).cpu())
        return cls(
            experts=tuple(held),
            fitted=fingerprints(held),
            columns=columns,
            mix=mix,
            scope=scope,
            threshold=threshold,
            top_k=min(top_k, len(held)),
            temperature=temperature,
            centroids={module: torch.stack(rows) for module, rows in centroids.items()},
        )

    def scores(self, module: str, x: Float[Tensor, "tok d_in"]) -> Float[Tensor, "tok here"]:
        self.columns_at(module)
        return nn.functional.normalize(x.float(), dim=1) @ self.centroids[module].to(x.device).T

    def closeness(
        self, x: Float[Tensor, "tok d_in"], scores: Float[Tensor, "tok here"]
    ) -> Float[Tensor, " tok"]:
        """The largest cosine."""
        return scores.amax(1)

    def place(
        self, devices: Mapping[str, torch.device], groups: Sequence[tuple[str, ...]] = ()
    ) -> "CentroidMatching":
        placed = {m: rows.to(devices[m]) for m, rows in self.centroids.items()}
        return replace(self, centroids=placed)


def sample_texts(
    experts: Iterable[str], samples: Mapping[str, Sequence[str]], count: int
) -> dict[str, list[str]]:
    """The first `count` samples of each expert. UsageError for one that has none."""
    if count < 1:
        raise UsageError(f"count is 1 or more; got {count}")
    found = {}
    for name in experts:
        given = samples.get(name, ())
        if isinstance(given, str) or not len(given):
            raise UsageError(
                f"this router wants sample prompts of every expert, a list of texts; {name} "
                f"has {'one text' if given else 'none'}",
                hint=f"samples={{{name!r}: [about 10 prompts of its task], ...}}",
            )
        found[name] = list(given[:count])
    return found


def prompt_ids(name: str, texts: Sequence[str], tokenizer: Any, model: Any) -> list[list[int]]:
    """The ids of each text as a prompt: without an eos that the tokenizer puts at the end."""
    eos, found = tokenizer.eos_token_id, []
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    for ids in tokenizer(list(texts), verbose=False).input_ids:
        ids = list(ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids)
        if not ids:
            raise UsageError(f"a sample of {name} has no tokens")
        found.append(ids[-limit:])
    return found


def _ends(
    model: Any, modules: Mapping[str, nn.Module], ids: Sequence[Sequence[int]]
) -> dict[str, Float[Tensor, "sequence d_in"]]:
    """The last token of each sequence as it enters each module, float32."""
    width = max(map(len, ids))
    padded = [[*row, *[row[-1]] * (width - len(row))] for row in ids]
    real = [[1] * len(row) + [0] * (width - len(row)) for row in ids]
    last = torch.tensor([len(row) - 1 for row in ids])
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            (x,) = (*args, *named.values())  # Linear calls its one input `input`, Conv1D `x`
            flat = x.reshape(-1, x.shape[-1])
            if len(flat) % len(ids):
                raise RefusedError(f"{name} sees some of the tokens, so it has no last one")
            split = flat.unflatten(0, (len(ids), -1))
            at = last.to(x.device) if split.shape[1] == width else torch.full_like(last, -1)
            seen[name] = split[torch.arange(len(ids), device=x.device), at.to(x.device)].float()

        return hook

    handles = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in modules.items()]
    try:
        model(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(real, device=model.device),
            use_cache=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    if missed := sorted(modules.keys() - seen.keys()):
        raise RefusedError(f"{missed[0]} did not run on the samples, so it has no centroid")
    return seen


@contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """Without gradients and dropout; each module's mode is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
