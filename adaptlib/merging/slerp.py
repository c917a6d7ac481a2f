"""SLERP: along the arc between two updates, in factor space."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.experts.delta import Delta
from adaptlib.experts.lora import LoRADelta
from adaptlib.merging.entries import share
from adaptlib.merging.kept import Update
from adaptlib.merging.linear import linear
from adaptlib.merging.merge import Part

PARALLEL = 0.9995  # from this |cos| on, the arc is a line


def slerp(part: Part, *, t: float = 0.5) -> Update:
    """SLERP: between two experts along the arc, not the chord, so that the size is kept; of more,
    one after the other.

    With Ω the angle between w_1 ΔW_1 and w_2 ΔW_2 in a module: ΔW = sin((1-t)Ω)/sin Ω · w_1 ΔW_1 +
    sin(tΩ)/sin Ω · w_2 ΔW_2; (1-t) and t where |cos Ω| > 0.9995 or one of them is 0. `t` is the
    share of the second. More than two: the result with the third, and so on, so order matters.
    w_i = 1 where none is given.

    Shoemake 1985; the same as mergekit's `slerp`, which takes two, on the updates in place of the
    weights. One after the other with t = 0.5 is the baseline of arXiv:2507.07140. It is a linear
    combination, so LoRA stays exact. PEFT has none.
    """
    share("t", t, zero=True)
    inner = torch.zeros(part.count, part.count, dtype=torch.float64)
    here = torch.tensor(part.places)
    weights = torch.tensor(part.weights, dtype=torch.float64)
    inner[here[:, None], here] = _gram(part.deltas) * weights[:, None] * weights
    along = _along(inner, t)[here] * weights
    return linear(replace(part, weights=tuple(along.tolist())))


def _along(inner: Float[Tensor, "expert expert"], t: float) -> Float[Tensor, " expert"]:
    """The coefficients of all updates, from their inner products."""
    found = torch.zeros(len(inner), dtype=inner.dtype)
    found[0] = 1.0
    for i in range(1, len(inner)):
        sizes = math.sqrt(max(0.0, float(found @ inner @ found)) * float(inner[i, i]))
        cosine = max(-1.0, min(1.0, float(found @ inner[i]) / sizes)) if sizes else 1.0
        one, other = 1 - t, t
        if abs(cosine) <= PARALLEL:
            angle = math.acos(cosine)
            one, other = math.sin((1 - t) * angle), math.sin(t * angle)
            one, other = one / math.sin(angle), other / math.sin(angle)
        found *= one
        found[i] += other
    return found


def _gram(deltas: Sequence[Delta]) -> Float[Tensor, "expert expert"]:
    """<ΔW_i, ΔW_j>, float64: of LoRA in two products for all pairs."""
    loras = [delta for delta in deltas if isinstance(delta, LoRADelta)]
    if len(loras) == len(deltas):
        a = torch.cat([delta.a.double() for delta in loras])
        b = torch.cat([delta.b.double() * delta.scale for delta in loras], dim=1)
        owner = torch.arange(len(loras)).repeat_interleave(torch.tensor([d.rank for d in loras]))
        of = torch.eye(len(loras), dtype=torch.float64)[owner]
        return of.T @ ((a @ a.T) * (b.T @ b)).cpu() @ of
    found = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for i, one in enumerate(deltas):
        for j, other in enumerate(deltas[: i + 1]):
            found[i, j] = found[j, i] = one.inner(other)
    return found
