"""What a delta is: the update ΔW of one linear module, of shape (d_out, d_in)."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor


class Delta(ABC):
    """The update of one linear module: y = W x + ΔW x. Frozen; no method builds a dense ΔW but
    `dense`."""

    kind: str

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""

    @property
    @abstractmethod
    def params(self) -> int:
        """How many numbers are kept for it."""

    @abstractmethod
    def apply(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """ΔW x for each row of `x`, in the dtype of `x`."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """ΔW itself, float32. For tests, merging and reading by hand; routing never needs it."""

    @abstractmethod
    def top_direction(self) -> Float[Tensor, " d_in"]:
        """The unit x that maximises |ΔW x|: ΔW's top right singular vector, which is Arrow's
        prototype (Ostapenko et al. 2024, section 4.2). Zeros for ΔW = 0. The sign is arbitrary
        in theory; here the entry of largest size is positive, so that it can be compared."""

    @abstractmethod
    def inner(self, other: "Delta") -> float:
        """<ΔW, ΔW'>, the sum of products of entries; `other` may be of another kind or rank."""

    @abstractmethod
    def sketch(self, *, seed: int = 0, size: int = 16) -> Float[Tensor, "size size"]:
        """A random projection of ΔW on size² numbers, float32; see projection.py. Sketches made
        with one seed and size are comparable across kinds and ranks: the inner product of two
        sketches has the mean <ΔW, ΔW'>."""

    def norm(self) -> float:
        """The Frobenius norm of ΔW."""
        return max(self.inner(self), 0.0) ** 0.5


def fix_sign(v: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """`v` or -v, whichever has its entry of largest size positive."""
    return -v if v[v.abs().argmax()] < 0 else v
