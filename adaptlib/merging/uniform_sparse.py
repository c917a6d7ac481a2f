"""The sparse adapters' merge: a sum over how many hold the entry."""

import torch
from torch import Tensor

from adaptlib.experts.sparse import SparseDelta
from adaptlib.merging.entries import Chunk, band, by_entries
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part


def uniform_sparse(part: Part, *, scale: float = 1.0) -> Update:
    """The sparse adapters' merge: each entry is the mean over the experts that hold it, so that
    what only one expert learnt is not thinned out.

    ΔW = scale · Σ w_i ΔW_i / F, with F the number of experts that hold the entry, and w_i = 1 where
    none is given. A sparse expert holds its positions, a LoRA or full update every entry that is
    not exactly 0. Where nobody does, ΔW = 0.

    Arnob et al. 2025 (arXiv:2507.07140). Its authors' code (`UniformSparse` in mttl) counts entries
    that are not 0; here a position that is held counts whatever its value. Neither PEFT nor
    mergekit has it.
    """
    shares = torch.tensor(part.weights) * scale

    def combine(chunk: Chunk) -> Tensor:
        return (shares @ chunk.values).div_(_holders(part, chunk).clamp_(min=1))

    return by_entries(part, combine)


def _holders(part: Part, chunk: Chunk) -> Tensor:
    """How many experts hold each entry."""
    if chunk.held is not None:
        return chunk.held.sum(dim=0).float().repeat_interleave(chunk.block**2)
    count = torch.zeros(chunk.values.shape[1])
    for x, delta in zip(chunk.values, part.deltas, strict=True):
        if isinstance(delta, SparseDelta):  # among others: whole rows
            rows, columns, _ = band(delta, chunk.rows).entries()
            count[rows * chunk.width + columns] += 1
        else:
            count += x != 0
    return count
