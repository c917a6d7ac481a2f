"""What a router does apart from what it scores: whom it chooses, how decidedly, at what cost.

Entropies are in nats, of weights divided by their sum; 0 where the base answers alone.
"""

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.base import BaseModel
from adaptlib.experts.expert import Expert
from adaptlib.routing.attach import Routed, attach
from adaptlib.routing.per_task import TaskRouter
from adaptlib.routing.router import Router
from adaptlib.routing.texts import TextEmbedding, TextRouter
from adaptlib.routing.trace import Trace
from adaptlib.training.tokens import pad_of, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE = 0.01  # of all weight: an expert with less is hardly used
TIMED = 64  # prompts whose prefill is timed


@final
@dataclass(frozen=True, slots=True)
class Quality:
    """What `measure` found.

    `agreement` is the share of prompts whose own expert has the most weight, over the prompts
    that have one; None where none has. `entropy` is the mean over prompts of the entropy of a
    prompt's mean weights, `token_entropy` that of one choice, for a token at a module.

    `used` is as how many experts with equal weight all prompts together use: the exponential of
    the entropy of the mean weights; `above` is how many experts have more than 1% of the weight.
    `varied` is `used` over the exponential of `entropy`, as how many different mixtures the prompts
    get: 1 where every prompt gets the same. A router has collapsed where `used` or `varied` is
    near 1 although the prompts are of many tasks.

    `cost` is multiply-adds a prompt token over those of the base, in linear layers, attention's
    own products left out; `seconds` and `base_seconds` are of one prefill each (None where not
    timed). `chosen` has each prompt's expert with the most weight, None where the base answers
    alone; `confusion` counts (own expert, chosen expert); `shares` are the mean weights, largest
    first.
    """

    agreement: float | None
    entropy: float
    token_entropy: float
    used: float
    above: int
    varied: float
    cost: float
    seconds: float | None
    base_seconds: float | None
    chosen: tuple[str | None, ...]
    confusion: Mapping[tuple[str, str | None], int]
    shares: Mapping[str, float]

    def document(self) -> dict[str, Any]:
        """As the JSON document of an evaluation has it."""
        names = ("agreement", "entropy", "token_entropy", "used", "above", "varied", "cost")
        kept = {name: getattr(self, name) for name in (*names, "seconds", "base_seconds")}
        pairs = [{"own": own, "expert": e, "n": n} for (own, e), n in self.confusion.items()]
        return {**kept, "confusion": pairs, "shares": dict(self.shares)}


def measure(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    experts: Mapping[str, Expert],
    router: Router,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    own: Sequence[str | None],
    batch_size: int = 16,
    repeats: int = 3,
) -> Quality:
    """Ask `router` about prompts: texts, or token ids as the model will be given them.

        measure(model, tokenizer, experts, router, ["Sum: 1 2", ...], own=["sums", ...])

    A prompt's weights are means over its tokens, and over the modules that see every token. `own`
    is each prompt's right expert; None, or one that the router does not know, leaves the prompt out
    of `agreement` and `confusion`. `repeats` prefills of the same prompts (at most 64 of them,
    evenly picked) are timed with experts and as many without, in turns, of which the medians are
    taken; with 0 nothing is timed. The model is left as it was. UsageError for no prompts, one
    without tokens, and another number of `own`.
    """
    ids = _ids(tokenizer, prompts)
    if len(own) != len(ids):
        raise UsageError(f"own is one expert or None a prompt: {len(ids)} of them; got {len(own)}")
    if batch_size < 1:
        raise UsageError(f"batch_size is 1 or more; got {batch_size}")
    held = dict(experts.items())  # each is read once: a library reads files
    pad = pad_of(tokenizer)
    with attach(model, held, router, tokenizer=tokenizer) as routed:
        costs = _Costs.of(model, held, router)
        seen = _see(routed, ids, costs, pad, batch_size)
    weights = _normalised(seen.weights)
    first = _chosen(router, tokenizer, ids, seen.weights)
    known = set(router.experts)
    pairs = [(o, e) for o, e in zip(own, first, strict=True) if o is not None and o in known]
    mean = seen.weights.mean(0)
    entropy = _entropy(weights).mean().item()
    total = max(mean.sum().item(), 1e-300)
    used = math.exp(_entropy(_normalised(mean)).item())
    seconds = None
    if repeats > 0:
        step = math.ceil(len(ids) / TIMED)
        batches = list(_batches(ids[::step], pad, routed.device, batch_size))
        seconds = _time(model, tokenizer, held, router, [b for _, b in batches], costs, repeats)
    order = mean.argsort(descending=True, stable=True).tolist()
    return Quality(
        agreement=sum(o == e for o, e in pairs) / len(pairs) if pairs else None,
        entropy=entropy,
        token_entropy=seen.token_entropy,
        used=used,
        above=int((mean > SHARE * total).sum()) if mean.any() else 0,
        varied=max(1.0, used / math.exp(entropy)),
        cost=1 + (seen.added + costs.asking) / costs.base,
        seconds=seconds[0] if seconds else None,
        base_seconds=seconds[1] if seconds else None,
        chosen=tuple(first),
        confusion=dict(Counter(pairs)),
        shares={router.experts[i]: mean[i].item() for i in order},
    )


def _ids(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str] | Sequence[Sequence[int]]
) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(tokens(tokenizer, texts, special=True))
    ids = [next(encoded) if isinstance(p, str) else list(p) for p in prompts]
    if not ids or not all(ids):
        raise UsageError("a router is asked about prompts; got none, or one without tokens")
    return ids


# -- whom it chooses -------------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False)
class _Seen:
    """By prompt the mean weights, the entropy of one choice, and the multiply-adds of the chosen
    experts, a token."""

    weights: Float[Tensor, "prompt expert"]
    token_entropy: float
    added: float


def _see(
    routed: Routed, ids: Sequence[Sequence[int]], costs: "_Costs", pad: int, batch_size: int
) -> _Seen:
    weights = torch.zeros(len(ids), len(routed.router.experts), dtype=torch.float64)
    entropies, choices, added = 0.0, 0, 0.0
    for chosen, batch in _batches(ids, pad, routed.device, batch_size):
        with torch.inference_mode(), routed.record() as trace:
            routed(**batch, **costs.options)
        real = batch["attention_mask"].bool().cpu()
        rows = torch.zeros(len(chosen), weights.shape[1], dtype=torch.float64)
        modules = 0
        for module, index, weight in _rows(trace, real):
            entropies += _entropy(_normalised(weight)).sum().item()
            choices += len(weight)
            added += (costs.of_expert[module][index] * (weight > 0)).sum().item()
            whose = real.nonzero()[:, 0]
            flat = whose[:, None] * rows.shape[1] + index
            rows.view(-1).index_add_(0, flat.flatten(), weight.flatten())
            modules += 1
        if not modules:
            raise UsageError(f"no module of router {routed.router.name} sees every token")
        weights[chosen] = rows / (modules * real.sum(1, keepdim=True))
    return _Seen(weights, entropies / choices, added / sum(map(len, ids)))


def _rows(
    trace: Trace, real: Bool[Tensor, "sequence tok"]
) -> Iterator[tuple[str, Tensor, Float[Tensor, "tok k"]]]:
    """The choices of each module that saw every token, for those that are no padding."""
    for module, calls in trace.choices.items():
        if sum(len(call.index) for call in calls) == real.numel():
            index, weight = (torch.cat(parts).cpu() for parts in zip(*calls, strict=True))
            kept = real.flatten()
            yield module, index[kept], weight[kept].double()


def _chosen(
    router: Router,
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[Sequence[int]],
    weights: Float[Tensor, "prompt expert"],
) -> list[str | None]:
    """The expert with the most weight; where a text router gives several the same, as LoraRetriever
    does, the one that fits best."""
    top = weights.amax(1, keepdim=True)
    ties = weights >= top * (1 - 1e-6)
    rank = weights
    if isinstance(router, TextRouter):
        texts = tokenizer.batch_decode([list(row) for row in ids], skip_special_tokens=True)
        rank = router.fits(TextEmbedding(router.idf).embed(texts)).double()
        ties = weights > 0  # one that lacks modules weighs less in all, and may fit best
    best = rank.masked_fill(~ties, -torch.inf).argmax(1).tolist()
    alone = (top[:, 0] <= 0).tolist()
    return [None if none else router.experts[i] for i, none in zip(best, alone, strict=True)]


def _normalised(weights: Float[Tensor, "*row n"]) -> Float[Tensor, "*row n"]:
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)


def _entropy(shares: Float[Tensor, "*row n"]) -> Float[Tensor, "*row"]:
    return -torch.xlogy(shares, shares).sum(-1)


# -- what it costs ---------------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False)
class _Costs:
    """Multiply-adds a token: `base` of all linear modules of the model, `of_expert` by module those
    of each expert's update, `asking` of the router. `options` are of a prefill."""

    base: int
    of_expert: Mapping[str, Float[Tensor, " expert"]]
    asking: float
    options: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any, experts: Mapping[str, Expert], router: Router) -> "_Costs":
        shapes = BaseModel.of(model).modules
        base = sum(d_out * d_in for d_out, d_in in shapes.values())
        of_expert = {}
        for module, here in router.columns.items():
            params = torch.zeros(len(router.experts), dtype=torch.float64)
            for i in here:  # as many numbers, as many products
                params[i] = experts[router.experts[i]].deltas[module].params
            if isinstance(router, TaskRouter):  # one update, mixed beforehand
                params = params.max() * (params > 0) / max(1, int((params > 0).sum()))
            of_expert[module] = params
        # a router that asks the base about a prompt runs all of it once more
        asks = router.scope == "prompt" or router.threshold is not None
        asking = float(base) if asks and router.probes else 0.0
        looks = router.columns if router.scope != "prompt" else router.probes
        asking += sum(_tables(router, module) for module in looks)
        if router.threshold is not None and router.scope != "prompt":
            asking += sum(_tables(router, module) for module in router.probes)
        head = model.get_output_embeddings()
        adapted = any(m is head for name, m in model.named_modules() if name in router.columns)
        options = {"use_cache": False} | ({} if adapted else {"logits_to_keep": 1})
        return cls(base, of_expert, asking, options)


def _tables(router: Router, module: str) -> int:
    """The numbers that a token is multiplied with to be scored at a module: those of the router's
    tables (row, d_in) there."""
    total = 0
    for field in dataclasses.fields(router):
        value = getattr(router, field.name)
        if isinstance(value, Mapping) and field.name != "stacked":  # copies of the others
            table = value.get(module)
            total += table.numel() if isinstance(table, Tensor) and table.ndim == 2 else 0
    return total


def _time(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    experts: Mapping[str, Expert],
    router: Router,
    batches: Sequence[Mapping[str, Tensor]],
    costs: _Costs,
    repeats: int,
) -> tuple[float, float]:
    """The medians of a prefill with experts, and of one without. They take turns, so that what
    else the machine does meets both; the first of each is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        with attach(model, experts, router, tokenizer=tokenizer) as routed:
            first = _prefill(routed, batches, costs.options)
        second = _prefill(model, batches, costs.options)
        if turn:
            times[0].append(first)
            times[1].append(second)
    return statistics.median(times[0]), statistics.median(times[1])


def _prefill(model: Any, batches: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> float:
    def wait() -> None:
        if batches[0]["input_ids"].is_cuda:
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            model(**batch, **options)
    wait()
    return time.perf_counter() - start


def _batches(
    ids: Sequence[Sequence[int]], pad: int, device: torch.device, batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """The places of prompts of about the same length, and the prompts padded on the right."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = len(ids[chosen[-1]])
        rows = [[*ids[i], *[pad] * (width - len(ids[i]))] for i in chosen]
        real = [[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in chosen]
        yield (
            chosen,
            {
                "input_ids": torch.tensor(rows, device=device),
                "attention_mask": torch.tensor(real, device=device),
            },
        )
