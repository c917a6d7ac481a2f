"""Core Space: any merge, done on the small matrices that the experts are in a basis they share."""

import difflib
from dataclasses import replace

from adaptlib.errors import UsageError
from adaptlib.merging.iso_c import iso_c
from adaptlib.merging.kept import Update
from adaptlib.merging.linear import linear
from adaptlib.merging.merge import Part
from adaptlib.merging.spaces import space_of
from adaptlib.merging.ties import ties
from adaptlib.merging.tsv import tsv
from adaptlib.merging.wudi import wudi

INNER = ("iso_c", "linear", "ties", "tsv", "wudi")


def core_space(
    part: Part, *, inner: str = "ties", density: float = 0.2, scale: float = 1.0
) -> Update:
    """Core Space: another merge, done on the small matrices M_i that the experts are in a basis of
    the output and one of the input that all of them share.

    M_i = U_Bᵀ (w_i ΔW_i) V_A; M = inner(M_1 ... M_n); ΔW = U_B M V_Aᵀ. Nothing is lost on the way:
    ΔW_i = U_B M_i V_Aᵀ. Panariello et al. 2025 (arXiv:2509.17786).
    `inner` is linear (scale · Σ M_i: the sum, as without), ties (with `density`), tsv (of each
    expert 1/n of the M_i's size, so all of LoRA's r), iso_c or wudi. Only ties is another
    merge here than outside: the others do not depend on the basis, but tsv on the size. KnOTS is
    ties with V_A = 1.

    U_B and V_A are the singular vectors of [ΔW_1 ... ΔW_n] and of the same below one another. The
    paper takes those of [B_1 ... B_n] and of the stacked A, which span the same space but turn with
    A -> R A, B -> B R⁻¹, though no ΔW changes; ties would with them.
    """
    if inner not in INNER:
        close = difflib.get_close_matches(inner, INNER, n=1)
        raise UsageError(
            f"core_space merges with {', '.join(INNER)}; got {inner!r}"
            + (f"; did you mean {close[0]}?" if close else "")
        )
    space = space_of(part, exact=inner == "ties")
    small = space.small()
    if inner == "ties":
        return space.lift_update(ties(small, density=density, scale=scale))
    if inner == "linear":
        return space.lift_update(linear(replace(small, weights=(scale,) * len(small.weights))))
    return space.lift_update({"iso_c": iso_c, "tsv": tsv, "wudi": wudi}[inner](small, scale=scale))
