"""GenKnowSub: take from each expert what any text teaches (arXiv:2505.10939, "General Knowledge
Subtraction"). It makes new experts; any router may then choose among them, Arrow in the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch

from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts.arithmetic import weighted_sum
from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta

On = Literal["updates", "factors"]


def subtract(
    experts: Mapping[str, Expert], general: Mapping[str, Expert], *, on: On = "updates"
) -> dict[str, Expert]:
    """Each expert less the mean of the `general` ones, which were trained on plain text (in the
    paper, 5,000 pieces of Wikipedia in each of up to three languages).

    `updates` is ΔW - mean ΔW_g, exactly: of LoRA experts the ranks add up, of sparse ones the
    positions unite. `factors` is what PEFT and the authors' code do, (B - mean B_g)(A - mean A_g),
    for LoRA of one rank and scale. That is another expert: with one general expert it is
    ΔW - ΔW_g + (2 ΔW_g - B_g A - B A_g), scale left out.

    An expert gets no module that it does not have: there the difference would be -ΔW_g for all
    such experts alike, which tells a router nothing (the paper's adapters all have the same
    modules). A general expert that lacks a module counts as 0 in the mean there.

    The card loses what is no longer true, its metrics, gate and PEFT's config, and says under
    `subtracted` what was done. UsageError for no general experts or another `on`; RefusedError for
    LoRA and sparse experts together, and with `factors` for sparse experts, several ranks or
    scales; BaseMismatchError for other shapes.
    """
    if on not in get_args(On):
        raise UsageError(f"on is one of {', '.join(get_args(On))}; got {on!r}")
    taken = dict(general.items())  # each is read once: a library reads files
    if not taken:
        raise UsageError("there are no general experts to subtract")
    found = {}
    for name, expert in experts.items():
        deltas = {}
        for module, delta in expert.deltas.items():
            others = {n: v.deltas[module] for n, v in taken.items() if module in v.deltas}
            for other, value in others.items():
                _check(f"{module} of {name}", delta, f"that of {other}", value, on)
            deltas[module] = _less(delta, list(others.values()), len(taken), on)
        untrue = ("gate", "metrics", "peft")
        card = {key: value for key, value in expert.card.items() if key not in untrue}
        card["subtracted"] = {"general": list(taken), "on": on}
        found[name] = replace(expert, deltas=deltas, card=card, gates={})
    return found


def _check(this: str, delta: Delta, that: str, other: Delta, on: str) -> None:
    if delta.shape != other.shape:
        raise BaseMismatchError(f"{this} is {delta.shape}, {that} is {other.shape}")
    if delta.kind != other.kind:
        raise RefusedError(
            f"{this} is {delta.kind}, {that} is {other.kind}: their difference is neither of low "
            "rank nor sparse",
            hint="general experts of the same kind",
        )
    if on == "updates":
        return
    if not (isinstance(delta, LoRADelta) and isinstance(other, LoRADelta)):
        raise RefusedError(f"{this} is sparse and has no factors", hint='on="updates"')
    if (delta.rank, delta.scale) != (other.rank, other.scale):
        raise RefusedError(
            f"{this} has rank {delta.rank} and scale {delta.scale:g}, {that} {other.rank} and "
            f"{other.scale:g}: factors are subtracted where both are the same",
            hint='on="updates"',
        )


def _less(delta: Delta, others: Sequence[Delta], count: int, on: str) -> Delta:
    """`delta` less the mean of `others` and of `count - len(others)` zeros."""
    if not others:
        return delta
    if on == "factors":
        assert isinstance(delta, LoRADelta)
        loras = [other for other in others if isinstance(other, LoRADelta)]
        a = delta.a.float() - torch.stack([o.a.float() for o in loras]).sum(0) / count
        b = delta.b.float() - torch.stack([o.b.float() for o in loras]).sum(0) / count
        return LoRADelta(a, b, delta.scale)
    return weighted_sum([delta, *others], [1.0, *([-1 / count] * len(others))])
