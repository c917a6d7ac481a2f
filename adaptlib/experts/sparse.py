"""SparseDelta: a few entries, or a few 16x16 blocks, of ΔW (arXiv:2507.07140, section 3)."""

from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.delta import Delta, fix_sign
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.projection import sketch_sparse

CHUNK = 1 << 18  # entries handled at once where an intermediate is (entries, rank or size)


@final
@dataclass(frozen=True, slots=True, eq=False)
class SparseDelta(Delta):
    """`values` at flat sorted positions `index` of a matrix of `shape` (d_out, d_in).

    block 1: `index` counts entries row by row, `values` is (n,).
    block 16: `index` counts 16x16 blocks row by row in the grid of (d_out/16, d_in/16) blocks,
    `values` is (n, 16, 16). Positions rise strictly.
    """

    index: Int[Tensor, " n"]
    values: Float[Tensor, " n *block"]
    # field(), or Delta's property would be taken for a default
    shape: tuple[int, int] = field()  # pyright: ignore[reportIncompatibleMethodOverride]
    block: int = 1
    kind = "sparse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        if self.block not in (1, 16):
            raise UsageError(f"SparseDelta wants block 1 or 16; got {self.block}")
        if any(side <= 0 or side % self.block for side in self.shape):
            raise UsageError(
                f"SparseDelta of block {self.block} wants a shape in whole blocks; got {self.shape}"
            )
        if self.index.is_floating_point() or self.index.is_complex():
            raise UsageError(f"SparseDelta wants whole numbers as index; got {self.index.dtype}")
        n = self.index.numel()
        wanted = (n,) if self.block == 1 else (n, self.block, self.block)
        if self.index.ndim != 1 or tuple(self.values.shape) != wanted:
            raise UsageError(
                f"SparseDelta wants index (n,) and values {wanted}; "
                f"got {tuple(self.index.shape)} and {tuple(self.values.shape)}"
            )
        size = self.shape[0] * self.shape[1] // self.block**2
        if n and (self.index[0] < 0 or self.index[-1] >= size):
            raise UsageError(f"SparseDelta has a position outside 0..{size - 1}")
        if n > 1 and not bool((self.index[1:] > self.index[:-1]).all()):
            raise UsageError("SparseDelta wants positions that rise strictly")

    @property
    def params(self) -> int:
        return self.values.numel()

    def entries(self) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Float[Tensor, " m"]]:
        """(row, column, value) of each kept entry; sorted by position for block 1."""
        if self.block == 1:
            index = self.index.long()
            return index // self.shape[1], index % self.shape[1], self.values
        across = self.shape[1] // self.block
        index = self.index.long()
        inside = torch.arange(self.block, device=index.device)
        rows = (index // across * self.block)[:, None, None] + inside[None, :, None]
        cols = (index % across * self.block)[:, None, None] + inside[None, None, :]
        rows, cols = torch.broadcast_tensors(rows, cols)
        return rows.reshape(-1), cols.reshape(-1), self.values.reshape(-1)

    def matrix(self) -> Tensor:
        """ΔW as a coalesced sparse COO matrix, float32."""
        rows, cols, values = self.entries()
        order = torch.argsort(rows * self.shape[1] + cols)
        indices = torch.stack([rows, cols])[:, order]
        return torch.sparse_coo_tensor(
            indices, values.float()[order], self.shape, is_coalesced=True, check_invariants=False
        )

    def apply(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        wide = torch.promote_types(x.dtype, torch.float32)  # sparse.mm knows no half precision
        flat = x.reshape(-1, x.shape[-1]).to(wide)
        y = torch.sparse.mm(self.matrix().to(x.device, wide), flat.T).T
        return y.to(x.dtype).reshape(*x.shape[:-1], self.shape[0])

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        rows, cols, values = self.entries()
        dense = torch.zeros(self.shape, dtype=torch.float32, device=self.values.device)
        dense[rows, cols] = values.float()
        return dense

    def top_direction(self) -> Float[Tensor, " d_in"]:
        """By Lanczos (scipy.sparse.linalg.svds, ARPACK) from a fixed start; from the dense matrix
        where it is too small for Lanczos."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.linalg import ArpackError, svds

        rows, cols, values = (t.cpu() for t in self.entries())
        if not bool(values.any()):
            return torch.zeros(self.shape[1], device=self.values.device)
        if min(self.shape) <= 32:
            v = torch.linalg.svd(self.dense().double().cpu(), full_matrices=False).Vh[0]
        else:
            matrix = coo_matrix(
                (values.double().numpy(), (rows.numpy(), cols.numpy())), shape=self.shape
            ).tocsr()
            start = torch.randn(
                min(self.shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
            try:
                vt: Any = svds(matrix, k=1, v0=start.numpy(), tol=0)[2]
                v = torch.from_numpy(vt[0].copy())
            except ArpackError:
                v = torch.from_numpy(_few_values(matrix))
        return fix_sign((v / v.norm()).float()).to(self.values.device)

    def inner(self, other: Delta) -> float:
        if self.shape != other.shape:
            raise UsageError(
                f"inner wants two deltas of one shape; got {self.shape}, {other.shape}"
            )
        rows, cols, values = self.entries()
        if isinstance(other, LoRADelta):
            total, a, b = 0.0, other.a.double(), other.b.double()
            for i in range(0, len(values), CHUNK):
                r, c = rows[i : i + CHUNK], cols[i : i + CHUNK]
                picked = (b[r] * a[:, c].T).sum(1)
                total += (picked @ values[i : i + CHUNK].double()).item()
            return other.scale * total
        assert isinstance(other, SparseDelta)
        other_rows, other_cols, other_values = other.entries()
        mine = rows * self.shape[1] + cols
        theirs, order = (other_rows * self.shape[1] + other_cols).sort()
        if not len(mine) or not len(theirs):
            return 0.0
        place = torch.searchsorted(theirs, mine).clamp(max=len(theirs) - 1)
        shared = theirs[place] == mine
        products = values.double() * other_values.double()[order][place]
        return products[shared].sum().item()

    def sketch(self, *, seed: int = 0, size: int = 16) -> Float[Tensor, "size size"]:
        index, values = self.index.cpu().numpy(), self.values.detach().float().cpu().numpy()
        found = sketch_sparse(index, values, self.shape, seed=seed, size=size**2)
        return torch.from_numpy(found).reshape(size, size).to(self.values.device)


def _few_values(matrix: Any) -> Any:
    """The top right singular vector where ARPACK gives up: a matrix of few distinct singular
    values, such as entries of one size (the first steps of Adam). Lanczos without restarts then
    ends by itself after as many steps as there are values."""
    import numpy as np

    v = np.random.default_rng(0).standard_normal(matrix.shape[1])
    basis = np.empty((0, matrix.shape[1]))
    for _ in range(min(128, matrix.shape[1])):
        basis = np.vstack([basis, v / np.linalg.norm(v)])
        image = matrix.T @ (matrix @ basis[-1])
        v = image - basis.T @ (basis @ image)
        v -= basis.T @ (basis @ v)  # once more: once is not enough
        if np.linalg.norm(v) <= 1e-10 * np.linalg.norm(image):
            break
    images = matrix @ basis.T
    return basis.T @ np.linalg.eigh(images.T @ images)[1][:, -1]
