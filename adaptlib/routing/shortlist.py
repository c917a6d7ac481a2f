"""A shortlist: the few of thousands of experts to which Arrow would give most of its weight.

    held = catalogue(library)
    names = shortlist(held, model, inputs, size=32)
    shelf = Shelf(library, budget=2 * 1024**3)
    attach(model, {name: shelf[name] for name in names}, arrow(held, list(names)))

One pass of the base alone, and two stages on what each module saw of the prompt:

1. `estimate` scores all experts by the energy of the prompt along their prototypes, from sketches:
   per module the tokens become DIRECTIONS directions of SIZE numbers. That is 2 · experts ·
   modules · SIZE · DIRECTIONS operations and 4 · experts · modules · SIZE bytes, however long the
   prompt. For 10,000 experts with 42 modules: 0.2 Gflop, 215 MB.
2. `weigh` gives the best CANDIDATES of these exactly what Arrow gives where there are no others:
   2 · tokens · candidates · W operations and 4 · candidates · W bytes, W the sum of the modules'
   d_in. For 32 tokens, 256 candidates, W of 26,688: 0.4 Gflop, 27 MB.

The pass itself is 5.4 Gflop there. What this costs and misses: benchmarks/synthetic.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from adaptlib.errors import UsageError
from adaptlib.experts.base import BaseModel, check_fit
from adaptlib.experts.prototypes import Catalogue, Pack, sketch
from adaptlib.routing.arrow import Arrow
from adaptlib.routing.router import Mix, Scope

TOKENS = 32  # of each prompt that are looked at, evenly spread
DIRECTIONS = 2  # of the prompt at a module, for stage 1; up to 8 found nothing more
CANDIDATES = 256  # for stage 2, or four times the shortlist where that is more
CHUNK = 1 << 22  # scores that stage 2 holds at once


def shortlist(
    catalogue: Catalogue,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    size: int = 32,
    top_k: int = 4,
    temperature: float = 1.0,
) -> dict[str, float]:
    """The `size` experts to which Arrow with this `top_k` and `temperature` would give most weight,
    best first, with the share of all weight that each would get, as far as the candidates show;
    all experts where there are no more.

    `inputs` are what the model takes: `input_ids`, and the `attention_mask` where there is
    padding. Of several prompts all tokens count alike. Experts that do not fit the model's shapes
    are left out; one of another base model with the same shapes is not, so give a catalogue of the
    names that are meant. `model` runs as it is, and should have no experts attached.

    UsageError for a size below 1 or no real token, BaseMismatchError where no expert fits.
    """
    if size < 1:
        raise UsageError(f"a shortlist has 1 expert or more; got size {size}")
    if top_k < 1 or not temperature > 0:
        raise UsageError(
            f"top_k is 1 or more and temperature above 0; got {top_k} and {temperature}"
        )
    packs = fitting(catalogue, model)
    seen = look(model, inputs, list(dict.fromkeys(m for pack in packs for m in pack.shapes)))
    total = sum(len(pack.names) for pack in packs)
    count = min(total, max(CANDIDATES, 4 * size))
    if count < total:
        best = torch.cat(estimate(packs, seen)).topk(count).indices
    else:
        best = torch.arange(total)
    weights = weigh(packs, best, seen, top_k=top_k, temperature=temperature)
    order = weights.argsort(descending=True, stable=True)[:size]
    names = [name for pack in packs for name in pack.names]
    return {names[best[i]]: float(weights[i]) for i in order.tolist()}


def arrow(
    catalogue: Catalogue,
    names: Sequence[str],
    *,
    top_k: int = 4,
    temperature: float = 1.0,
    mix: Mix = "outputs",
    scope: Scope = "token",
    threshold: float | None = None,
) -> Arrow:
    """`Arrow.fit` of these experts, bit for bit, without reading them."""
    names = tuple(dict.fromkeys(names))
    if not names:
        raise UsageError("a router needs one expert at least; got none")
    found: dict[str, list[int]] = {}
    prints: list[str] = []
    for i, name in enumerate(names):
        pack, place = catalogue.pack(name)
        prints.append(pack.fingerprints[place])
        for module in pack.shapes:
            found.setdefault(module, []).append(i)
    return Arrow(
        experts=names,
        fitted=tuple(prints),
        columns={module: tuple(here) for module, here in found.items()},
        mix=mix,
        scope=scope,
        threshold=threshold,
        prototypes={
            module: catalogue.prototypes(module, [names[i] for i in here])
            for module, here in found.items()
        },
        top_k=min(top_k, len(names)),
        temperature=temperature,
    )


def fitting(catalogue: Catalogue, model: nn.Module) -> list[Pack]:
    """The packs whose modules the model has, with these shapes. BaseMismatchError, about the
    first, where there is none."""
    base = BaseModel.of(model)
    packs = [pack for pack in catalogue.packs if pack.shapes.items() <= base.modules.items()]
    if not packs:
        first = catalogue.packs[0]
        check_fit(first.names[0], first.shapes, {}, base)
    return packs


# -- the pass -------------------------------------------------------------------------------------


def look(
    model: nn.Module, inputs: Mapping[str, Tensor], modules: Sequence[str]
) -> dict[str, Float[Tensor, "tok d_in"]]:
    """What each of `modules` sees in one pass of the model: up to TOKENS tokens of each prompt,
    evenly spread over those that are no padding, on the CPU. Modules that see the same tensor have
    the same one here; one that is not reached has none."""
    ids = inputs.get("input_ids")
    shape = (ids if ids is not None else inputs["inputs_embeds"]).shape[:2]
    watch = _Watch(_picked(inputs.get("attention_mask"), shape), shape.numel())
    named = dict(model.named_modules())
    handles = [
        named[name].register_forward_pre_hook(_Look(name, watch), with_kwargs=True)
        for name in modules
    ]
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in watch.seen.items() if len(parts) > 1} | {
        name: parts[0] for name, parts in watch.seen.items() if len(parts) == 1
    }


def _picked(mask: Tensor | None, shape: torch.Size) -> Int[Tensor, " tok"]:
    """The tokens to look at, counted through all prompts."""
    real = torch.ones(shape, dtype=torch.bool)
    if mask is not None and mask.ndim == 2:
        real = mask[:, mask.shape[1] - shape[1] :].cpu() != 0
    chosen = [
        row.nonzero()[:, 0][_spread(int(row.sum()))] + i * shape[1] for i, row in enumerate(real)
    ]
    picked = torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.long)
    if not len(picked):
        raise UsageError(f"the prompts have no token; got {shape[0]} of length {shape[1]}")
    return picked


def _spread(count: int) -> Int[Tensor, " some"]:
    """Up to TOKENS of `count` places, evenly spread, the first and the last among them."""
    if count <= TOKENS:
        return torch.arange(count)
    return torch.linspace(0, count - 1, TOKENS).round().long()


@final
@dataclass(eq=False)
class _Watch:
    """What was seen in a pass, and the tensor that was seen last: q, k and v see one after the
    other."""

    picked: Int[Tensor, " tok"]
    tokens: int
    seen: dict[str, list[Tensor]] = field(default_factory=dict)
    last: tuple[Tensor, Tensor] | None = None


@final
@dataclass(frozen=True, eq=False)
class _Look:
    name: str
    watch: _Watch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        (x,) = (*args, *named.values())  # Linear calls its one input `input`, Conv1D `x`
        watch = self.watch
        if watch.last is None or watch.last[0] is not x:
            flat = x.detach().reshape(-1, x.shape[-1])
            # A module that sees fewer tokens, such as a head that is given the last, sees real ones
            rows = watch.picked if len(flat) == watch.tokens else _spread(len(flat))
            watch.last = (x, flat.index_select(0, rows.to(flat.device)).float().cpu())
        watch.seen.setdefault(self.name, []).append(watch.last[1])


# -- stage 1 --------------------------------------------------------------------------------------


def estimate(
    packs: Sequence[Pack], seen: Mapping[str, Float[Tensor, "tok d_in"]]
) -> list[Float[Tensor, " expert"]]:
    """How well each expert of each pack fits the prompt, from sketches; comparable over all.

    At a module, the energy Σ_t (x_t · v_i)² of the tokens, each of length 1 since each has the same
    weight to give; counted in standard deviations over all experts that have the module, so that
    no module decides alone, and added up.
    """
    axes = _axes(seen)
    energies = [_energies(pack, axes) for pack in packs]
    moments: dict[str, tuple[float, float, float]] = {}  # count, Σ e, Σ e²
    for pack, energy in zip(packs, energies, strict=True):
        totals, squares = energy.sum(1).tolist(), energy.square().sum(1).tolist()
        for module, total, square in zip(pack.shapes, totals, squares, strict=True):
            n, t, s = moments.get(module, (0.0, 0.0, 0.0))
            moments[module] = (n + energy.shape[1], t + total, s + square)
    result = []
    for pack, energy in zip(packs, energies, strict=True):
        scale, shift = [], 0.0
        for module in pack.shapes:
            n, total, squares = moments[module]
            mean = total / n
            deviation = max(squares / n - mean * mean, 0.0) ** 0.5
            # below a thousandth of the mean it may be rounding alone
            scale.append(1 / deviation if deviation > 1e-3 * mean else 0.0)
            shift += mean * scale[-1]
        result.append(torch.tensor(scale) @ energy - shift)
    return result


def _energies(
    pack: Pack, axes: Mapping[str, Float[Tensor, "axis d_in"]]
) -> Float[Tensor, "module expert"]:
    """Of each expert at each module, the energy along the sketches of the prompt's axes."""
    none = {m: torch.zeros(DIRECTIONS, d_in) for m, (_, d_in) in pack.shapes.items()}
    rows = torch.cat([axes.get(module, none[module]) for module in pack.shapes], dim=1)
    small = sketch(pack.shapes, rows).mT
    parts = [torch.bmm(part, small) for part in pack.sketches]
    # summing so few by an axis of the tensor would take twice as long
    sums = [sum((e[:, :, j].square() for j in range(DIRECTIONS)), e.new_zeros(())) for e in parts]
    return torch.cat(sums, dim=1)


def _axes(
    seen: Mapping[str, Float[Tensor, "tok d_in"]],
) -> dict[str, Float[Tensor, "axis d_in"]]:
    """For each module DIRECTIONS axes a_j with Σ_j a_j a_jᵀ about Σ_t x_t x_tᵀ, the x_t of length
    1: the largest directions, by one step of subspace iteration from a fixed start and Nyström's
    formula (Halko et al. 2011, arXiv:0909.4061, sections 4.5 and 5.4), all of it in the space of
    the tokens, which are fewer. Inputs of one shape are done together."""
    alike: dict[tuple[int, ...], dict[int, Tensor]] = {}
    for x in seen.values():
        alike.setdefault(tuple(x.shape), {})[id(x)] = x
    found: dict[int, Tensor] = {}
    for (tok, _), inputs in alike.items():
        x = normalize(torch.stack(list(inputs.values())), dim=2)
        gram = x @ x.mT
        start = torch.randn(tok, DIRECTIONS, generator=torch.Generator().manual_seed(0))
        y = gram @ normalize(gram @ start, dim=1)
        values, vectors = torch.linalg.eigh(y.mT @ y)
        enough = values > 1e-6 * values[:, -1:]  # fewer where the tokens have fewer
        root = torch.where(enough, values.clamp_min(1e-30).rsqrt(), 0.0)
        axes = (y @ (vectors * root[:, None, :])).mT @ x
        found |= dict(zip(inputs, axes, strict=True))
    return {module: found[id(x)] for module, x in seen.items()}


# -- stage 2 --------------------------------------------------------------------------------------


def weigh(
    packs: Sequence[Pack],
    chosen: Int[Tensor, " some"],
    seen: Mapping[str, Float[Tensor, "tok d_in"]],
    *,
    top_k: int,
    temperature: float,
) -> Float[Tensor, " some"]:
    """The share of all routing weight that Arrow gives each of the `chosen` experts where there are
    no others; `chosen` counts through the packs."""
    order = chosen.argsort()
    ends = torch.tensor([len(pack.names) for pack in packs]).cumsum(0)
    bounds = [0, *torch.searchsorted(chosen[order], ends).tolist()]
    first = [0, *ends.tolist()]
    held = [
        pack.prototypes(chosen[order[bounds[p] : bounds[p + 1]]] - first[p])
        for p, pack in enumerate(packs)
    ]
    columns = [
        dict(zip(pack.shapes, rows.split(pack.widths, dim=1), strict=True))
        for pack, rows in zip(packs, held, strict=True)
    ]
    groups: dict[tuple[Any, ...], list[str]] = {}  # modules at which the same experts are
    for module, x in seen.items():
        here = tuple(p for p, by in enumerate(columns) if module in by and len(by[module]))
        if here:
            groups.setdefault((here, len(x)), []).append(module)
    weight = torch.zeros(len(chosen), dtype=torch.float64)
    for (here, tok), modules in groups.items():
        owners = torch.cat([order[bounds[p] : bounds[p + 1]] for p in here])
        step = max(1, CHUNK // (tok * len(owners)))
        for i in range(0, len(modules), step):
            part = modules[i : i + step]
            scores = torch.empty(len(part), len(owners), tok)
            for out, module in zip(scores, part, strict=True):
                rows = [columns[p][module] for p in here]
                table = rows[0] if len(rows) == 1 else torch.cat(rows)
                torch.mm(table, seen[module].T, out=out)
            top, place = scores.abs_().topk(min(top_k, len(owners)), dim=1)
            shares = (top / temperature).softmax(1).double()
            weight.index_add_(0, owners[place.flatten()], shares.flatten())
    return (weight / weight.sum().clamp_min(1e-12)).float()
