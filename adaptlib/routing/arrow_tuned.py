"""Arrow with its scores set right by a few prompts of each expert's task, or by plain text. This
project's own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts.expert import Expert
from adaptlib.routing.arrow import Arrow
from adaptlib.routing.centroid import borrowed, prompt_ids, sample_texts
from adaptlib.routing.router import Mix, Scope
from adaptlib.routing.scoring import ScoringRouter

BATCH = 16
PENALTY = 0.01  # on the squares of the weights, over the experts
START = 3.0  # each expert's weights begin as equal shares of this


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TunedArrow(ScoringRouter):
    """Arrow's score, centred and standardised, with a weight that is learned.

    At a module, score_i = w_i (|(x - c) · v_i| - m_i) / s_i + b_i: c is the mean of what enters the
    module (all hidden states share a direction, and an expert whose v_i lies along it would win
    everywhere), m_i and s_i the mean and spread of expert i's score over the prompts, w_i a weight
    for this module and expert, b_i one for the expert. `centre` is c, `scale` w_i / s_i, `shift` is
    b_i - w_i m_i / s_i. The default is one expert for a whole prompt.
    """

    prototypes: Mapping[str, Float[Tensor, "here d_in"]] = field(repr=False)
    centre: Mapping[str, Float[Tensor, " d_in"]] = field(repr=False)
    scale: Mapping[str, Float[Tensor, " here"]] = field(repr=False)
    shift: Mapping[str, Float[Tensor, " here"]] = field(repr=False)
    name = "arrow_tuned"

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        model: Any,
        tokenizer: Any,
        samples: Mapping[str, Sequence[str]] | None = None,
        texts: Sequence[str] | None = None,
        count: int = 20,
        top_k: int = 1,
        temperature: float = 1.0,
        mix: Mix = "outputs",
        scope: Scope = "prompt",
        threshold: float | None = None,
    ) -> "TunedArrow":
        """Run `model`, the base without experts, over the first `count` of each expert's `samples`,
        prompts of its task as the model will be given them, and learn the weights by logistic
        regression: which expert's task a prompt is of. From `texts` alone, any text, scores are
        centred and standardised, and all weights are equal.

        UsageError for no experts, an expert without samples, neither samples nor texts, count or
        top_k < 1, temperature <= 0, an unknown mix or scope; BaseMismatchError where the model
        lacks a module, RefusedError where one sees only some of the tokens.
        """
        arrow = Arrow.fit(experts, top_k=top_k, temperature=temperature, mix=mix)
        if samples is None and not texts:
            raise UsageError(
                "the tuned Arrow wants prompts of every expert's task, or plain texts; got neither",
                hint="--samples DIR",
            )
        owners = None
        if samples is not None:
            groups = sample_texts(arrow.experts, samples, count)
            ids = [
                row
                for name, some in groups.items()
                for row in prompt_ids(name, some, tokenizer, model)
            ]
            owners = torch.tensor(
                [i for i, some in enumerate(groups.values()) for _ in some], dtype=torch.long
            )
        else:
            assert texts is not None
            ids = prompt_ids("the texts", texts, tokenizer, model)
        modules = dict(model.named_modules())
        if missing := [module for module in arrow.columns if module not in modules]:
            raise BaseMismatchError(f"the experts adapt {missing[0]}, which this model lacks")
        watched = {module: modules[module] for module in arrow.columns}
        with borrowed(model):
            centre = _means(model, watched, ids)
            found = _scores(model, watched, ids, arrow.prototypes, centre)
        mean = {module: rows.mean(0) for module, rows in found.items()}
        spread = {m: rows.std(0, correction=0).clamp_min(1e-6) for m, rows in found.items()}
        standard = {m: (rows - mean[m]) / spread[m] for m, rows in found.items()}
        weights, bias = _equal(arrow) if owners is None else _learn(arrow, standard, owners)
        # a prompt's score of an expert is the mean over its modules, so weights are as many times
        held = torch.zeros(len(arrow.experts))
        for here in arrow.columns.values():
            held[list(here)] += 1
        scale, shift = {}, {}
        for module, here in arrow.columns.items():
            w = weights[module] * held[list(here)]
            scale[module] = (w / spread[module]).float()
            shift[module] = (bias[list(here)] - w * mean[module] / spread[module]).float()
        return cls(
            experts=arrow.experts,
            fitted=arrow.fitted,
            columns=arrow.columns,
            mix=mix,
            scope=scope,
            threshold=threshold,
            top_k=arrow.top_k,
            temperature=temperature,
            prototypes=arrow.prototypes,
            centre={module: value.float() for module, value in centre.items()},
            scale=scale,
            shift=shift,
        )

    def scores(self, module: str, x: Float[Tensor, "tok d_in"]) -> Float[Tensor, "tok here"]:
        self.columns_at(module)
        rows, centre = (t[module].to(x.device) for t in (self.prototypes, self.centre))
        scale, shift = (t[module].to(x.device) for t in (self.scale, self.shift))
        return ((x.float() - centre) @ rows.T).abs() * scale + shift

    def closeness(
        self, x: Float[Tensor, "tok d_in"], scores: Float[Tensor, "tok here"]
    ) -> Float[Tensor, " tok"]:
        """The largest score: how far above what it has on other tasks' prompts."""
        return scores.amax(1)

    def place(
        self, devices: Mapping[str, torch.device], groups: Sequence[tuple[str, ...]] = ()
    ) -> "TunedArrow":
        tables = {
            name: {m: value.to(devices[m]) for m, value in getattr(self, name).items()}
            for name in ("prototypes", "centre", "scale", "shift")
        }
        return replace(self, **tables)


def _equal(arrow: Arrow) -> tuple[dict[str, Tensor], Tensor]:
    held = torch.zeros(len(arrow.experts))
    for here in arrow.columns.values():
        held[list(here)] += 1
    return {m: 1 / held[list(here)] for m, here in arrow.columns.items()}, torch.zeros(len(held))


def _learn(
    arrow: Arrow,
    standard: Mapping[str, Float[Tensor, "prompt here"]],
    owners: Int[Tensor, " prompt"],
) -> tuple[dict[str, Tensor], Tensor]:
    """Weights by module and expert, and biases: cross-entropy of the own expert and PENALTY times
    the mean over experts of their squared weights."""
    count, modules = len(arrow.experts), list(arrow.columns)
    features = torch.zeros(len(owners), len(modules), count, dtype=torch.float64)
    there = torch.zeros(len(modules), count, dtype=torch.float64)
    for i, module in enumerate(modules):
        here = list(arrow.columns[module])
        features[:, i, here] = standard[module].double()
        there[i, here] = 1
    weights = (START * there / there.sum(0).clamp_min(1)).requires_grad_()
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = torch.einsum("pmi,mi->pi", features, weights) + bias
        value = nn.functional.cross_entropy(scores, owners)
        value = value + PENALTY * weights.square().sum() / count
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    done = weights.detach()
    return {m: done[i, list(arrow.columns[m])] for i, m in enumerate(modules)}, bias.detach()


def _means(
    model: Any, modules: Mapping[str, nn.Module], ids: Sequence[Sequence[int]]
) -> dict[str, Float[Tensor, " d_in"]]:
    """The mean token of all prompts as it enters each module, float64 on the CPU."""
    total: dict[str, Tensor] = {}
    count = sum(map(len, ids))
    for _, module, x, mask in _passes(model, modules, ids):
        part = x[mask].double().sum(0).cpu()
        total[module] = total[module] + part if module in total else part
    return {module: value / count for module, value in total.items()}


def _scores(
    model: Any,
    modules: Mapping[str, nn.Module],
    ids: Sequence[Sequence[int]],
    prototypes: Mapping[str, Tensor],
    centre: Mapping[str, Tensor],
) -> dict[str, Float[Tensor, "prompt here"]]:
    """For each prompt the mean over its tokens of |(x - c) · v_i|, float64 on the CPU."""
    found = {
        module: torch.zeros(len(ids), len(rows), dtype=torch.float64)
        for module, rows in prototypes.items()
    }
    for chosen, module, x, mask in _passes(model, modules, ids):
        rows, middle = (t[module].to(x.device, torch.float32) for t in (prototypes, centre))
        scores = ((x.float() - middle) @ rows.T).abs() * mask[:, :, None]
        found[module][chosen] = (scores.sum(1) / mask.sum(1, keepdim=True)).double().cpu()
    return found


def _passes(
    model: Any, modules: Mapping[str, nn.Module], ids: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], str, Tensor, Bool[Tensor, "sequence tok"]]]:
    """(places of prompts, module, what enters it, which tokens are real), for every batch and
    module."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            (seen[name],) = (*args, *named.values())

        return hook

    handles = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in modules.items()]
    try:
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            width = len(ids[chosen[-1]])
            padded = [[*ids[i], *[ids[i][-1]] * (width - len(ids[i]))] for i in chosen]
            real = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in chosen])
            seen.clear()
            model(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=real.to(model.device),
                use_cache=False,
            )
            for name in modules:
                if name not in seen or seen[name].numel() % (len(chosen) * width):
                    raise RefusedError(f"{name} does not see every token, so it cannot be tuned")
                x = seen[name].reshape(len(chosen), width, -1)
                yield chosen, name, x, real.bool().to(x.device)
    finally:
        for handle in handles:
            handle.remove()
