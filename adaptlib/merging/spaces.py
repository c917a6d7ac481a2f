"""The space that the updates of a module reach together, and their coordinates there.

N experts of rank r move a module within N·r directions of its output, and see N·r of its input. An
orthonormal basis U of the first and V of the second make each ΔW_i a small matrix M_i = Uᵀ ΔW_i V
with ΔW_i = U M_i Vᵀ: a merge of the M_i, lifted, is one of the ΔW_i (KnOTS, arXiv:2410.19735; Core
Space, arXiv:2509.17786). Neither basis is formed: it is L @ mix with L the experts' B side by side,
and coordinates come from LᵀL.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.experts.delta import Delta
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.merging.factors import Factors, directions, factors, principal, root
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part


@final
@dataclass(frozen=True, eq=False)
class Side:
    """An orthonormal basis (d, k) of one side, stack @ mix; without a stack that is `mix`, and
    without both it is the identity. `gram` is stackᵀ stack, `blocks` who has which columns."""

    stack: Float[Tensor, "d rank"] | None = None
    mix: Float[Tensor, "rank k"] | None = None
    gram: Float[Tensor, "rank rank"] | None = None
    blocks: tuple[slice, ...] = ()

    def inside(self, which: int, factor: Float[Tensor, "d few"]) -> Float[Tensor, "k few"]:
        """The coordinates of an expert's factor, float64."""
        if self.gram is not None and self.mix is not None:
            return self.mix.T @ self.gram[:, self.blocks[which]]
        return factor.double() if self.mix is None else self.mix.T @ factor.double()

    def lift(self, x: Float[Tensor, "k few"]) -> Float[Tensor, "d few"]:
        """basis @ x, float32; summed in float64, since `mix` is large where factors are alike."""
        x = x.double() if self.mix is None else self.mix @ x.double()
        return (x if self.stack is None else self.stack @ x).float()


@final
@dataclass(frozen=True, eq=False)
class Space:
    """The space of a part, and the way back. Pairs are made when they are asked for, so that one
    expert's matrices are held at a time. Weights are in them: w_i ΔW_i is what is merged."""

    part: Part
    left: Side
    right: Side

    @property
    def shape(self) -> tuple[int, int]:
        """(k, k2), what the M_i are."""
        sides = zip((self.left, self.right), self.part.shape, strict=True)
        k, k2 = (d if side.mix is None else side.mix.shape[1] for side, d in sides)
        return k, k2

    def zeros(self, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        """A sum to begin with, float64, where the updates are."""
        return torch.zeros(rows, columns, dtype=torch.float64, device=self.pair(0).left.device)

    def pair(self, which: int) -> Factors:
        """M_i = Uᵀ (w_i ΔW_i) V as two factors, float64."""
        left, right = _pair(self.part, which)
        return Factors(self.left.inside(which, left), self.right.inside(which, right.T).T)

    def pairs(self) -> Iterator[Factors]:
        """The pairs of all experts, in their order."""
        return (self.pair(which) for which in range(len(self.part.deltas)))

    def small(self) -> Part:
        """The part as it looks from inside, for a merge that is to be done here. All at once: of
        LoRA that is little, of sparse experts one module each, since turned they are dense."""
        deltas = tuple(
            LoRADelta(pair.right.float().contiguous(), pair.left.float().contiguous())
            for pair in self.pairs()
        )
        return replace(self.part, deltas=deltas, weights=(1.0,) * len(deltas))

    def lift(self, left: Float[Tensor, "k few"], right: Float[Tensor, "few k2"]) -> Update:
        """U @ left @ right @ Vᵀ: LoRA of rank `few`, or dense where that is less to hold."""
        if not left.shape[1]:  # a rank of zero would be no LoRA
            left, right = left.new_zeros(len(left), 1), right.new_zeros(1, right.shape[1])
        rank, (d_out, d_in) = left.shape[1], self.part.shape
        b, a = self.left.lift(left), self.right.lift(right.T).T.contiguous()
        return LoRADelta(a, b) if rank * (d_out + d_in) <= d_out * d_in else b @ a

    def lift_update(self, update: Delta | Float[Tensor, "k k2"]) -> Update:
        """What a merge made of `small`, lifted."""
        if isinstance(update, LoRADelta):
            return self.lift(update.b * update.scale, update.a)
        dense = update if isinstance(update, Tensor) else update.dense()
        eye = torch.eye(min(dense.shape), device=dense.device)
        tall = dense.shape[0] > dense.shape[1]
        return self.lift(dense, eye) if tall else self.lift(eye, dense)


def space_of(part: Part, *, exact: bool = False) -> Space:
    """The space of w_1 ΔW_1 ... w_n ΔW_n. With `exact` its bases are the left singular vectors of
    [ΔW_1 ... ΔW_n] side by side and the right ones of the same below one another: the only choice
    that does not change with A -> R A, B -> B R⁻¹, for merges that work on entries. Without it a
    side where the updates reach everything keeps its own basis, which is cheaper."""
    return Space(part, side_of(part, "left", exact=exact), side_of(part, "right", exact=exact))


def side_of(part: Part, side: str, *, exact: bool = False) -> Side:
    """The basis of one side, `left` (d_out) or `right` (d_in)."""
    size = part.shape[0] if side == "left" else part.shape[1]
    if sum(map(_most, part.deltas)) < size:
        own, roots, blocks, end = [], [], [], 0
        for which in range(len(part.deltas)):
            mine, other = _sided(part, which, side)
            own.append(mine)
            roots.append(root(other.T @ other))
            blocks.append(slice(end, end := end + mine.shape[1]))
        stack = torch.cat(own, dim=1)
        gram = stack.T @ stack
        return Side(stack, directions(gram, torch.block_diag(*roots))[0], gram, tuple(blocks))
    if not exact:
        return Side()
    total: Tensor | float = 0.0
    for which in range(len(part.deltas)):
        mine, other = _sided(part, which, side)
        total = mine @ (other.T @ other) @ mine.T + total
    assert isinstance(total, Tensor)
    return Side(mix=principal(total)[0])


def _pair(part: Part, which: int) -> Factors:
    """An expert's factors with its weight in the left one."""
    left, right = factors(part.deltas[which])
    return Factors(left * part.weights[which], right)


def _sided(part: Part, which: int, side: str) -> tuple[Tensor, Tensor]:
    """The factor of this side (d, few), and the other (d', few), float64."""
    left, right = _pair(part, which)
    mine, other = (left, right.T) if side == "left" else (right.T, left)
    return mine.double(), other.double()


def _most(delta: Delta) -> int:
    """What the rank of an update is at most."""
    if isinstance(delta, LoRADelta):
        return delta.rank
    assert isinstance(delta, SparseDelta)
    rows, columns, _ = delta.entries()
    return max(1, min(len(rows.unique()), len(columns.unique())))
