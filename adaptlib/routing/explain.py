"""What a routing did, as plain data: by token, by layer, and without one of its experts.

Shares are of the routing weight, from 0 to 1. Entropies are in bits: of the weights of the experts
divided by their sum, so that 2 bits are as many experts as 4 with equal weight; 0 where the base
answers alone. The top expert is the one with the most weight, of equal ones the first of
`Trace.experts`, and None where no expert has any.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.routing.trace import Trace

FEW = 5  # experts named for a token
FEWER = 4  # experts named for a token at a layer


def explain(trace: Trace, tokens: Sequence[str]) -> dict[str, Any]:
    """The record of one prompt, of which `tokens` are the texts (`pieces`), as plain data:

    - `tokens`: for each `token` the top `expert` by mean weight over all modules, that `weight`,
      the `entropy` of these weights, the first few `experts`, and `layers`, the top expert at each
      of `layers` below that saw all tokens.
    - `layers`: for each `layer` (its number, or a module outside all layers by its name) the
      `experts` by mean weight over its modules and tokens, largest first; the `entropy` of these;
      `agreement`, the mean over the other layers of how often both have the same top expert for a
      token; and `with_whole`, how often its top expert is the token's. None where there is no
      other layer, and at a module that did not see every token.
    - `agreement`: the mean over all pairs of layers of the share of tokens for which both have the
      same top expert; 1 for a router that chooses once for a prompt. None for a single layer.
    - `entropy`: `whole`, of all shares; `token`, the mean of the tokens'; `choice`, the mean over
      modules and tokens of that of one choice. Each is at most the one before it where all modules
      saw all tokens.

    UsageError where the record is of another number of tokens.
    """
    seen = _see(trace, len(tokens))
    names = trace.experts
    layers = [layer for layer, weights in seen.layers.items() if weights is not None]
    tops = {layer: _tops(weights) for layer, weights in seen.layers.items() if weights is not None}
    of_token = seen.whole.tolist()
    whole = _tops(seen.whole)
    by_token = [
        {
            "token": token,
            "expert": None if top is None else names[top],
            "weight": 0.0 if top is None else row[top],
            "entropy": entropy(row),
            "experts": _named(names, row)[:FEW],
            "layers": [_name(names, tops[layer][i]) for layer in layers],
        }
        for i, (token, row, top) in enumerate(zip(tokens, of_token, whole, strict=True))
    ]
    pairs = {
        one: [_same(tops[one], tops[other]) for other in layers if other != one] for one in layers
    }
    by_layer = [
        {
            "layer": layer,
            "experts": _named(names, seen.means[layer]),
            "entropy": entropy(seen.means[layer]),
            "agreement": _mean(pairs.get(layer, ())),
            "with_whole": _same(tops[layer], whole) if layer in tops else None,
        }
        for layer in seen.layers
    ]
    shares = list(trace.shares().values())
    return {
        "tokens": by_token,
        "layers": by_layer,
        "agreement": _mean([share for shares in pairs.values() for share in shares]),
        "entropy": {
            "whole": entropy(shares),
            "token": _mean([token["entropy"] for token in by_token]),
            "choice": seen.choice,
        },
    }


def choices(trace: Trace, tokens: int) -> dict[str, Any]:
    """By layer and token together, which is much, and so in short: `names` of the experts, `layers`
    and `choices[layer][token]`, the first few [index in names, weight] by weight over the layer's
    modules, weights to three digits. Modules that did not see every token are left out."""
    seen = _see(trace, tokens)
    found: list[list[list[list[float]]]] = []
    for weights in seen.layers.values():
        if weights is None:
            continue
        top, index = weights.topk(min(FEWER, weights.shape[1]), dim=1)
        rows = zip(index.tolist(), top.tolist(), strict=True)
        found.append(
            [[[i, round(w, 3)] for i, w in zip(*row, strict=True) if w >= 0.0005] for row in rows]
        )
    return {
        "names": list(trace.experts),
        "layers": [layer for layer, weights in seen.layers.items() if weights is not None],
        "choices": found,
    }


def removed(expert: str, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """Who takes the weight of an expert: its `share`, and the shares of the others `before` and
    `after` a router of the same options was fitted without it, largest gain first.

    Shares are by name, as `Trace.shares` gives them; `after` is empty where nobody is left, and the
    base answers alone."""
    names = [name for name in {**before, **after} if name != expert]
    moved = [
        {"name": name, "before": before.get(name, 0.0), "after": after.get(name, 0.0)}
        for name in names
        if before.get(name, 0.0) or after.get(name, 0.0)
    ]
    moved.sort(key=lambda entry: (entry["before"] - entry["after"], entry["name"]))
    return {"expert": expert, "share": before.get(expert, 0.0), "shares": moved}


def next_token(
    before: Float[Tensor, " vocabulary"],
    after: Float[Tensor, " vocabulary"],
    decode: Callable[[list[int]], str],
) -> dict[str, Any]:
    """How the distribution of the next token moves, from its logits before and after: the most
    likely `token` and its `probability` for each, and `kl`, the Kullback-Leibler divergence
    Σ p log2(p / q) in bits of `after` (q) from `before` (p). None where a
    number is not finite."""
    p, q = (logits.detach().double().cpu().log_softmax(0) for logits in (before, after))
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))  # 0 log 0 is 0
    moved = terms.sum().item() / math.log(2)

    def likely(logs: Tensor) -> dict[str, Any]:
        best = int(logs.argmax())
        probability = logs[best].exp().item()
        return {
            "token": decode([best]),
            "probability": probability if math.isfinite(probability) else None,
        }

    return {
        "before": likely(p),
        "after": likely(q),
        "kl": max(moved, 0.0) if math.isfinite(moved) else None,
    }


def overlap(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """How much of the routing weight two routers give to the same experts: Σ min of the shares, 1
    for equal ones and 0 where they have no expert in common."""
    return sum(min(share, other.get(name, 0.0)) for name, share in one.items())


def entropy(weights: Iterable[float]) -> float:
    """In bits, of weights divided by their sum; 0 where all are 0."""
    held = [weight for weight in weights if weight > 0]
    total = sum(held)
    return max(0.0, -sum(w / total * math.log2(w / total) for w in held)) if held else 0.0


def pieces(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """The text of each token; a character of several tokens stands at the last of them."""
    found, start = [], 0
    for end in range(1, len(ids) + 1):
        text = decode(list(ids[start:end]))
        whole = not text.endswith("\ufffd") or end == len(ids)
        found.append(text if whole else "")
        start = end if whole else start
    return found


class _Seen(NamedTuple):
    """Mean weights over modules. `layers` holds None for a layer that did not see every token."""

    means: dict[int | str, list[float]]
    layers: dict[int | str, Float[Tensor, "tok expert"] | None]
    whole: Float[Tensor, "tok expert"]
    choice: float


def _see(trace: Trace, tokens: int) -> _Seen:
    """Modules are added up one by one: all of them at once would be large."""
    called = {module: calls for module, calls in trace.choices.items() if calls}
    counts = {module: sum(len(c.index) for c in calls) for module, calls in called.items()}
    most = max(counts.values(), default=0)
    if most != tokens and most != 1:  # 1: a router that chooses once for all tokens
        raise UsageError(f"the record is of {most} tokens; got the texts of {tokens}")
    number = len(trace.experts)
    whole = torch.zeros(tokens, number, dtype=torch.float64)
    sums: dict[int | str, Tensor | None] = {}
    of_layer: dict[int | str, list[Tensor]] = {}
    entropies: list[float] = []
    complete: dict[int | str, int] = {}
    for module, calls in called.items():
        rows = torch.cat(
            [
                torch.zeros(len(index), number, dtype=torch.float64).scatter(
                    1, index.cpu(), weight.double().cpu()
                )
                for index, weight in calls
            ]
        )
        layer = _layer(module)
        of_layer.setdefault(layer, []).append(rows.mean(0))
        share = rows / rows.sum(1, keepdim=True).clamp_min(1e-300)
        entropies.append(-torch.xlogy(share, share).sum(1).mean().item() / math.log(2))
        sums.setdefault(layer, None)
        if len(rows) == most:
            before = sums[layer]
            rows = rows.expand(tokens, -1)
            sums[layer] = rows if before is None else before + rows
            complete[layer] = complete.get(layer, 0) + 1
            whole += rows
    return _Seen(
        means={layer: torch.stack(rows).mean(0).tolist() for layer, rows in of_layer.items()},
        layers={
            layer: None if total is None else total / complete[layer]
            for layer, total in sums.items()
        },
        whole=whole / max(1, sum(complete.values())),
        choice=max(0.0, _mean(entropies) or 0.0),
    )


def _layer(module: str) -> int | str:
    number = re.search(r"(?:^|\.)(\d+)\.", module)
    return int(number[1]) if number else module


def _tops(weights: Float[Tensor, "tok expert"]) -> list[int | None]:
    # not argmax, which may give any of several that are equal
    return [
        max(range(len(row)), key=row.__getitem__) if any(row) else None for row in weights.tolist()
    ]


def _name(names: Sequence[str], index: int | None) -> str | None:
    return None if index is None else names[index]


def _named(names: Sequence[str], weights: Sequence[float]) -> list[dict[str, Any]]:
    held = [
        {"name": name, "weight": weight}
        for name, weight in zip(names, weights, strict=True)
        if weight > 0
    ]
    return sorted(held, key=lambda entry: -entry["weight"])


def _same(one: Sequence[int | None], other: Sequence[int | None]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _mean(values: Iterable[float]) -> float | None:
    held = list(values)
    return sum(held) / len(held) if held else None
