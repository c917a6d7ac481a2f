"""LoRADelta: ΔW = scale · B A (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.delta import Delta, fix_sign
from adaptlib.experts.projection import sketch_lora


@final
@dataclass(frozen=True, slots=True, eq=False)
class LoRADelta(Delta):
    """ΔW = scale · b @ a, with `a` (rank, d_in) and `b` (d_out, rank).

    `scale` already holds alpha/r, or alpha/√r for rsLoRA; nothing else is applied.
    """

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    scale: float = 1.0
    kind = "lora"

    def __post_init__(self) -> None:
        sides = (*self.a.shape, *self.b.shape)
        if len(sides) != 4 or self.a.ndim != 2 or 0 in sides or sides[0] != sides[3]:
            raise UsageError(
                f"LoRADelta wants a (rank, d_in) and b (d_out, rank) of one rank, 1 or more; "
                f"got a {tuple(self.a.shape)} and b {tuple(self.b.shape)}"
            )

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def params(self) -> int:
        return self.a.numel() + self.b.numel()

    def apply(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        a, b = self.a.to(x), self.b.to(x)
        return (x @ a.T @ b.T) * self.scale

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.scale * (self.b.float() @ self.a.float())

    def top_direction(self) -> Float[Tensor, " d_in"]:
        """Exact. With Aᵀ = Q R, ΔWᵀΔW = scale² Q (R BᵀB Rᵀ) Qᵀ, so an eigenproblem of size rank
        is enough and ΔW is never formed."""
        q, r = torch.linalg.qr(self.a.double().T)  # (d_in, rank), (rank, rank)
        b = self.b.double()
        values, vectors = torch.linalg.eigh(r @ (b.T @ b) @ r.T)  # ascending
        if values[-1] <= 0 or self.scale == 0:
            return torch.zeros(self.shape[1], device=self.a.device)
        return fix_sign((q @ vectors[:, -1]).float())

    def inner(self, other: Delta) -> float:
        if self.shape != other.shape:
            raise UsageError(
                f"inner wants two deltas of one shape; got {self.shape}, {other.shape}"
            )
        if isinstance(other, LoRADelta):
            a, b = self.a.double(), self.b.double()
            return (
                self.scale
                * other.scale
                * ((b.T @ other.b.double()) * (a @ other.a.double().T)).sum().item()
            )
        return other.inner(self)

    def sketch(self, *, seed: int = 0, size: int = 16) -> Float[Tensor, "size size"]:
        a, b = (t.detach().float().cpu().numpy() for t in (self.a, self.b))
        found = sketch_lora(a, b, self.scale, seed=seed, size=size**2)
        return torch.from_numpy(found).reshape(size, size).to(self.a.device)
