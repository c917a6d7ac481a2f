"""What a merge keeps of the matrix it arrives at: LoRA of some rank, or some entries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.merging.factors import as_lora, dense_svd, factors, svd_of
from adaptlib.merging.largest import index_of_largest

Kind = Literal["lora", "sparse"]
ROWS = 256  # of a matrix and its approximation, compared at once
Update = Delta | Float[Tensor, "d_out d_in"]  # what a merge makes of one module


@final
@dataclass(frozen=True)
class Form:
    """How the result is kept. None leaves it to the experts: of their kind (LoRA where they are of
    both), and as large as all of them together, so that nothing exact is cut and methods are
    compared at one size.

    `rank` is that of a LoRA; `keep_ratio` the share of the entries of ΔW that a sparse result
    keeps, those of largest size, module by module.
    """

    kind: Kind | None = None
    rank: int | None = None
    keep_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in (None, "lora", "sparse"):
            raise UsageError(f"a merge is kept as lora or sparse; got {self.kind!r}")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"a rank is 1 or more; got {self.rank}")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise UsageError(f"keep_ratio is above 0 and at most 1; got {self.keep_ratio}")
        if self.rank is not None and (self.kind == "sparse" or self.keep_ratio is not None):
            raise UsageError(
                "a rank is of a LoRA, a keep_ratio of a sparse result",
                hint='kind="lora" with rank, or kind="sparse" with keep_ratio',
            )
        if self.keep_ratio is not None and self.kind == "lora":
            raise UsageError("keep_ratio is of a sparse result", hint='kind="sparse"')

    def kind_for(self, deltas: Sequence[Delta]) -> Kind:
        """The kind that a result from these updates has."""
        if self.kind is not None:
            return self.kind
        if self.rank is not None:
            return "lora"
        if self.keep_ratio is not None:
            return "sparse"
        return "sparse" if all(delta.kind == "sparse" for delta in deltas) else "lora"


@final
@dataclass(frozen=True, eq=False)
class Kept:
    """A delta, and the squared Frobenius norms of the matrix before (None where nothing is lost: it
    is the delta's, and costs more than an exact sum itself) and of what is lost."""

    delta: Delta
    whole: float | None
    lost: float


def keep(update: Update, deltas: Sequence[Delta], form: Form) -> Kept:
    """`update` in the form that was asked for; `deltas` are the experts' own at this module, by
    which its size goes where none was."""
    if form.kind_for(deltas) == "lora":
        return _as_lora(update, _rank(deltas, form))
    return _as_sparse(update, deltas, form.keep_ratio)


def _rank(deltas: Sequence[Delta], form: Form) -> int:
    d_out, d_in = deltas[0].shape
    most = min(d_out, d_in)
    if form.rank is not None:
        return min(form.rank, most)
    sizes = [d.rank if isinstance(d, LoRADelta) else d.params / (d_out + d_in) for d in deltas]
    return min(max(1, round(sum(sizes))), most)


def _as_lora(update: Update, rank: int) -> Kept:
    if not isinstance(update, LoRADelta):
        dense = update if isinstance(update, Tensor) else update.dense()
        lora = as_lora(dense_svd(dense, rank))
        return Kept(lora, *_compared(dense, lora))
    if update.rank <= rank:
        return Kept(update, None, 0.0)
    found = svd_of(factors(update))
    squares = found.s.double().square()
    first = type(found)(found.u[:, :rank], found.s[:rank], found.vt[:rank])
    return Kept(as_lora(first), float(squares.sum()), float(squares[rank:].sum()))


def _as_sparse(update: Update, deltas: Sequence[Delta], keep_ratio: float | None) -> Kept:
    size = deltas[0].shape[0] * deltas[0].shape[1]
    if isinstance(update, SparseDelta) and keep_ratio is None:
        return Kept(update, None, 0.0)
    if keep_ratio is not None:
        count = max(1, round(keep_ratio * size))
    elif all(isinstance(delta, SparseDelta) for delta in deltas):
        count = _held_by_any(deltas)
    else:
        count = sum(delta.params for delta in deltas)
    dense = update if isinstance(update, Tensor) else update.dense()
    flat = dense.reshape(-1)
    index = index_of_largest(flat, count)
    values = flat[index]
    index, values = index[values != 0], values[values != 0]
    whole, kept = _sum_of_squares(flat), _sum_of_squares(values)
    shape = (dense.shape[0], dense.shape[1])
    if size < 2**31:
        index = index.to(torch.int32)
    return Kept(SparseDelta(index, values, shape), whole, max(0.0, whole - kept))


def _held_by_any(deltas: Sequence[Delta]) -> int:
    d_out, d_in = deltas[0].shape
    held = torch.zeros(d_out * d_in, dtype=torch.bool)
    for delta in deltas:
        assert isinstance(delta, SparseDelta)
        rows, columns, _ = delta.entries()
        held[(rows * d_in + columns).to(held.device)] = True
    return int(held.count_nonzero())


def _compared(dense: Float[Tensor, "d_out d_in"], lora: LoRADelta) -> tuple[float, float]:
    """The squared norms of a matrix and of what the LoRA lacks of it. From the difference: as the
    difference of the norms a small error would drown in what float32 leaves of a large one."""
    whole = lost = 0.0
    for rows, b in zip(dense.split(ROWS), lora.b.split(ROWS), strict=True):
        whole += _sum_of_squares(rows)
        lost += _sum_of_squares(rows - b @ lora.a)
    return whole, lost


def _sum_of_squares(values: Tensor) -> float:
    """In float64, without a copy of a large matrix in it."""
    pieces = values.reshape(-1).split(1 << 20)
    return sum(float(piece.double().square().sum()) for piece in pieces)


def squared(delta: Delta) -> float:
    """‖ΔW‖²."""
    return max(0.0, delta.inner(delta))
