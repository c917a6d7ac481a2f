"""Sums of updates that lose nothing: LoRA ranks add up, sparse positions unite."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Σ w_i ΔW_i, exact, float32. LoRA: A's below one another and w_i · scale_i · B_i side by side,
    so the rank is the sum of the ranks. Sparse: the union of the positions, in blocks where all of
    them are. Raises RefusedError for both kinds together, whose sum is neither."""
    if not deltas or len(deltas) != len(weights):
        raise UsageError(
            f"a sum wants as many weights as updates, 1 or more; got {len(weights)}, {len(deltas)}"
        )
    if len({delta.shape for delta in deltas}) > 1:
        shapes = ", ".join(str(shape) for shape in sorted({delta.shape for delta in deltas}))
        raise BaseMismatchError(f"updates of several shapes have no sum: {shapes}")
    loras = [delta for delta in deltas if isinstance(delta, LoRADelta)]
    if len(loras) == len(deltas):
        scaled = [d.b.float() * (d.scale * w) for d, w in zip(loras, weights, strict=True)]
        return LoRADelta(torch.cat([d.a.float() for d in loras]), torch.cat(scaled, dim=1))
    sparse = [delta for delta in deltas if isinstance(delta, SparseDelta)]
    if len(sparse) != len(deltas):
        raise RefusedError(
            "the sum of a LoRA and a sparse update is neither of low rank nor sparse"
        )
    block, shape = sparse[0].block, sparse[0].shape
    if any(delta.block != block for delta in sparse):
        block = 1
    places, values = [], []
    for delta, weight in zip(sparse, weights, strict=True):
        if delta.block == block:
            places.append(delta.index.long())
            values.append(delta.values.float() * weight)
        else:
            rows, cols, entries = delta.entries()
            places.append(rows * shape[1] + cols)
            values.append(entries.float() * weight)
    index, where = torch.cat(places).unique(return_inverse=True)  # sorted
    total = values[0].new_zeros(len(index), *values[0].shape[1:])
    return SparseDelta(index, total.index_add_(0, where, torch.cat(values)), shape, block)


def combine(experts: Mapping[str, Expert], weights: Mapping[str, float]) -> dict[str, Delta]:
    """Σ w_i ΔW_i of every module that any of the experts has; one that lacks it counts as zero."""
    modules = sorted({module for expert in experts.values() for module in expert.deltas})
    found = {}
    for module in modules:
        here = {name: e.deltas[module] for name, e in experts.items() if module in e.deltas}
        found[module] = weighted_sum(list(here.values()), [weights[name] for name in here])
    return found


def negate(expert: Expert) -> Expert:
    """-ΔW: what an expert learnt, unlearnt (task arithmetic's negation, arXiv:2212.04089)."""
    deltas: dict[str, Delta] = {}
    for module, delta in expert.deltas.items():
        if isinstance(delta, LoRADelta):
            deltas[module] = replace(delta, scale=-delta.scale)
        else:
            assert isinstance(delta, SparseDelta)
            deltas[module] = replace(delta, values=-delta.values)
    return replace(expert, deltas=deltas, card=_card("negated", expert), gates={})


def interpolate(one: Expert, other: Expert, share: float = 0.5) -> Expert:
    """(1 - share) ΔW + share ΔW'; outside 0..1 it extrapolates. BaseMismatchError for experts of
    two base models; RefusedError for two kinds."""
    if one.base != other.base:
        raise BaseMismatchError(f"experts of two base models: {one.base!r} and {other.base!r}")
    both = {"one": one, "other": other}
    deltas = combine(both, {"one": 1 - share, "other": share})
    return Expert(one.base, deltas, _card("interpolated", one) | {"share": share})


def _card(what: str, expert: Expert) -> dict[str, Any]:
    """Only what is still true of an expert after arithmetic: its base."""
    kept = {key: expert.card[key] for key in ("base",) if key in expert.card}
    return kept | {"arithmetic": what}
