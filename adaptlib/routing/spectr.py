"""SpectR: route by how much of a token lies in each update's input space (arXiv:2504.03454)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.routing.router import Choice, Mix, Scope, columns_of, fingerprints
from adaptlib.routing.scoring import ScoringRouter, Weights, stack

ZERO = 1e-6  # of the largest singular value: what is smaller is the rounding of float32 factors
SMALL = 64  # rows or columns: such a matrix is decomposed whole


@dataclass(frozen=True, kw_only=True, eq=False)
class SpectralRouter(ScoringRouter):
    """A router that keeps of each ΔW its right singular vectors, A* with orthonormal rows.

    At a module, `directions` are the rows of all experts there under each other, in the order of
    `columns`, each expert's by falling singular value; `ranks` says how many are whose. `ranks`
    stay on the CPU, where they are counted with.
    """

    directions: Mapping[str, Float[Tensor, "rows d_in"]]
    ranks: Mapping[str, Int[Tensor, " here"]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.directions.keys() == self.ranks.keys() == self.columns.keys():
            raise UsageError("directions, ranks and columns name different modules")
        for module, rows in self.directions.items():
            ranks, here = self.ranks[module], len(self.columns[module])
            if len(ranks) != here or int(ranks.sum()) != len(rows):
                raise UsageError(
                    f"{module} wants ranks of {here} experts that sum to the number of its "
                    f"directions, {len(rows)}; got {ranks.tolist()}"
                )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SpectR(SpectralRouter):
    """Each token goes to the experts in whose input space most of it lies; nothing is trained.

    At a module, score_i = ‖A*_i x‖, where the rows of A*_i are the right singular vectors of ΔW_i
    without those of singular value 0: the length of x's projection on what ΔW_i can see. It does
    not depend on the size of ΔW_i, as in the authors' code (SpectR.py), and as there the `top_k`
    have `equal` weight. They sum the aligned B* and A* of the chosen, which is neither mix here:
    `outputs` sums the updates, `factors` the experts' own B and A.

    The more directions an expert has, the larger its scores. A sparse ΔW has as many as rows or
    columns, so its top `sparse_rank` are taken.
    """

    # of modules that see the same input, by the first of them; made by `place`
    stacked: Mapping[str, Float[Tensor, "all_rows width"]] = field(default_factory=dict, repr=False)
    name = "spectr"

    @classmethod
    def fit(
        cls,
        experts: Mapping[str, Expert],
        *,
        top_k: int = 4,
        sparse_rank: int = 8,
        weights: Weights = "equal",
        temperature: float = 1.0,
        mix: Mix = "outputs",
        scope: Scope = "token",
        threshold: float | None = None,
    ) -> "SpectR":
        """Take the directions from the experts' parameters. Where fewer than `top_k` experts have
        a module, all of them are chosen. `temperature` is for the weights `softmax`.

        UsageError for no experts, top_k or sparse_rank < 1, temperature <= 0, an unknown mix,
        scope or kind of weights.
        """
        held = dict(experts.items())  # each is read once: a library reads files
        columns, directions, ranks = spectra(held, sparse_rank)
        return cls(
            experts=tuple(held),
            fitted=fingerprints(held),
            columns=columns,
            mix=mix,
            scope=scope,
            threshold=threshold,
            top_k=min(top_k, len(held)),
            temperature=temperature,
            weights=weights,
            directions=directions,
            ranks=ranks,
        )

    def scores(self, module: str, x: Float[Tensor, "tok d_in"]) -> Float[Tensor, "tok here"]:
        self.columns_at(module)
        projected = x.float() @ self.directions[module].to(x.device).T
        return lengths(projected, self.ranks[module])

    def route_all(self, modules: Sequence[str], x: Float[Tensor, "tok d_in"]) -> Choice:
        stacked = self.stacked.get(modules[0])
        if stacked is None:
            return super().route_all(modules, x)
        parts = (x.float() @ stacked.T).split([len(self.directions[m]) for m in modules], dim=1)
        scores = [lengths(part, self.ranks[m]) for part, m in zip(parts, modules, strict=True)]
        return self.choose(modules[0], torch.stack(scores, dim=1))

    def place(
        self, devices: Mapping[str, torch.device], groups: Sequence[tuple[str, ...]] = ()
    ) -> "SpectR":
        placed, stacked = stack(self.directions, devices, groups)
        return replace(self, directions=placed, stacked=stacked)


def spectra(
    experts: Mapping[str, Expert], sparse_rank: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor], dict[str, Tensor]]:
    """`columns`, `directions` and `ranks` of experts that are in memory."""
    if sparse_rank < 1:
        raise UsageError(f"sparse_rank is 1 or more; got {sparse_rank}")
    columns, values = columns_of(experts), list(experts.values())
    directions, ranks = {}, {}
    for module, here in columns.items():
        parts = [right_directions(values[i].deltas[module], sparse_rank) for i in here]
        directions[module] = torch.cat(parts)
        ranks[module] = torch.tensor([len(part) for part in parts])
    return columns, directions, ranks


def lengths(
    projected: Float[Tensor, "tok rows"], ranks: Int[Tensor, " here"]
) -> Float[Tensor, "tok here"]:
    """The length of each expert's part of each row; the parts have these `ranks`."""
    sizes = ranks.tolist()
    if min(sizes) == max(sizes):
        parts = projected.unflatten(1, (len(sizes), sizes[0]))
        return torch.linalg.vector_norm(parts, dim=2)
    owner = torch.arange(len(sizes)).repeat_interleave(ranks).to(projected.device)
    total = projected.new_zeros(len(projected), len(sizes))
    return total.index_add_(1, owner, projected.square()).sqrt()


def right_directions(delta: Delta, sparse_rank: int) -> Float[Tensor, "rank d_in"]:
    """The right singular vectors of ΔW as rows, float32, by falling singular value, without those
    of singular value 0: all of a LoRA's, the top `sparse_rank` of a sparse ΔW."""
    if isinstance(delta, LoRADelta):
        # With Aᵀ = Q R and B = P S, ΔW = scale · P (S Rᵀ) Qᵀ: a decomposition of size rank.
        q, r = torch.linalg.qr(delta.a.detach().cpu().double().T)
        s = torch.linalg.qr(delta.b.detach().cpu().double()).R
        _, values, vt = torch.linalg.svd(delta.scale * (s @ r.T), full_matrices=False)
        rows = vt @ q.T
    else:
        assert isinstance(delta, SparseDelta)
        values, rows = _top_of_sparse(delta, sparse_rank)
    return rows[values > ZERO * values.amax()].float() if len(values) else rows.float()


def _top_of_sparse(delta: SparseDelta, k: int) -> tuple[Tensor, Tensor]:
    """The top `k` singular values and right singular vectors: from the dense matrix where that is
    small, or where about all are wanted; else by Lanczos from a fixed start (ARPACK), which of a
    singular value that occurs several times may miss one and take the next smaller."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import ArpackError, svds

    rows, cols, values = (t.detach().cpu() for t in delta.entries())
    if not bool(values.any()):
        return torch.zeros(0), torch.zeros(0, delta.shape[1])
    side = min(delta.shape)
    if side <= max(SMALL, 4 * k):
        _, sizes, vt = torch.linalg.svd(delta.dense().cpu().double(), full_matrices=False)
        return sizes[:k], vt[:k]
    matrix = coo_matrix(
        (values.double().numpy(), (rows.numpy(), cols.numpy())), shape=delta.shape
    ).tocsr()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(side, generator=generator, dtype=torch.float64)
    try:
        found: Any = svds(matrix, k=k, v0=start.numpy(), tol=0)
        sizes, vt = torch.from_numpy(found[1].copy()), torch.from_numpy(found[2].copy())
    except ArpackError:
        sizes, vt = _by_blocks(matrix, k)
    order = sizes.argsort(descending=True)
    return sizes[order], vt[order]


def _by_blocks(matrix: Any, k: int) -> tuple[Tensor, Tensor]:
    """Where ARPACK gives up, as on a matrix of few distinct singular values: powers of ΔWᵀΔW on a
    few more columns than wanted. It converges as fast as the values beyond these fall off."""
    import numpy as np

    basis = np.random.default_rng(0).standard_normal((matrix.shape[1], k + 8))
    for _ in range(60):
        basis = np.linalg.qr(matrix.T @ (matrix @ np.linalg.qr(basis)[0]))[0]
    _, sizes, vt = np.linalg.svd(matrix @ basis, full_matrices=False)
    return torch.from_numpy(sizes[:k]), torch.from_numpy((vt @ basis.T)[:k])
