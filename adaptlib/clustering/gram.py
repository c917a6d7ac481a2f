"""Exact inner products <ΔW_i, ΔW_j> of many experts, in factor space, module by module."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta

CHUNK = 1 << 22  # numbers of a product held at once


def gram_matrix(
    rows: Mapping[str, Expert], columns: Mapping[str, Expert], modules: Sequence[str]
) -> Float[np.ndarray, "row column"]:
    """Σ_module <ΔW_i, ΔW_j> for each expert i of `rows` and j of `columns`; float64. An expert adds
    nothing at a module that it lacks.

    With all A's of a module in one matrix and all B's in another, it is a sum over blocks of
    (BᵀB') ⊙ (A A'ᵀ): (Σ ranks)² (d_out + d_in) operations a module, for hundreds of experts.
    """
    total = np.zeros((len(rows), len(columns)))
    for module in modules:
        left, right = (
            [expert.deltas.get(module) for expert in side.values()] for side in (rows, columns)
        )
        lora, sparse = (
            tuple(_where(side, kind) for side in (left, right)) for kind in (LoRADelta, SparseDelta)
        )
        for i, part in _lora_lora([left[i] for i in lora[0]], [right[j] for j in lora[1]]):
            total[np.ix_(lora[0][i], lora[1])] += part
        total[np.ix_(sparse[0], lora[1])] += _sparse_lora(left, sparse[0], right, lora[1])
        total[np.ix_(lora[0], sparse[1])] += _sparse_lora(right, sparse[1], left, lora[0]).T
        if len(sparse[0]) and len(sparse[1]):
            flat: Any = _flat([left[i] for i in sparse[0]])
            other: Any = _flat([right[j] for j in sparse[1]])
            total[np.ix_(*sparse)] += (flat @ other.T).toarray()
    return total


def _where(deltas: Sequence[Delta | None], kind: type) -> Int[np.ndarray, " some"]:
    return np.array([i for i, delta in enumerate(deltas) if isinstance(delta, kind)], np.int64)


def _lora_lora(
    left: Sequence[Any], right: Sequence[Any]
) -> Iterator[tuple[slice, Float[np.ndarray, "some column"]]]:
    """Products of all with all, a few of `left` at a time."""
    if not left or not right:
        return
    a_right, b_right, begins = _stacked(right)
    widest = max(delta.rank for delta in left)
    step = max(1, CHUNK // (len(a_right) * widest))
    for i in range(0, len(left), step):
        a, b, first = _stacked(left[i : i + step])
        both = (b.T @ b_right) * (a @ a_right.T)
        both = np.add.reduceat(both, first, axis=0)
        yield slice(i, i + step), np.add.reduceat(both, begins, axis=1)


def _stacked(
    deltas: Sequence[Any],
) -> tuple[
    Float[np.ndarray, "ranks d_in"], Float[np.ndarray, "d_out ranks"], Int[np.ndarray, " some"]
]:
    """All A's below one another, all scaled B's side by side, and where each begins."""
    a = np.concatenate([_wide(delta.a) for delta in deltas])
    b = np.concatenate([delta.scale * _wide(delta.b) for delta in deltas], axis=1)
    return a, b, np.cumsum([0] + [delta.rank for delta in deltas[:-1]])


def _sparse_lora(
    sparse: Sequence[Any],
    rows: Int[np.ndarray, " row"],
    lora: Sequence[Any],
    columns: Int[np.ndarray, " column"],
) -> Float[np.ndarray, "row column"]:
    """<S, B A> = <S Aᵀ, B>, for one S and all A and B at once."""
    found = np.zeros((len(rows), len(columns)))
    if not len(rows) or not len(columns):
        return found
    a, b, begins = _stacked([lora[j] for j in columns])
    for place, i in zip(found, rows, strict=True):
        products = ((_matrix(sparse[i]) @ a.T) * b).sum(axis=0)
        place[:] = np.add.reduceat(products, begins)
    return found


def _matrix(delta: SparseDelta) -> Any:
    from scipy.sparse import coo_array

    rows, cols, values = (part.detach().cpu() for part in delta.entries())
    return coo_array((_wide(values), (rows.numpy(), cols.numpy())), shape=delta.shape).tocsr()


def _flat(deltas: Sequence[Any]) -> Any:
    """Each as a row of all entries of the matrix."""
    from scipy.sparse import vstack

    return vstack([_matrix(delta).reshape(1, -1).tocsr() for delta in deltas]).tocsr()


def _wide(tensor: Any) -> Float[np.ndarray, "..."]:
    return tensor.detach().double().cpu().numpy()
