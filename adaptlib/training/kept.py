"""The kept entries of one module: what a sparse adapter costs once its mask is fixed."""

import warnings
from itertools import pairwise
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptlib.training.modules import Linear, shape_of

SIDE = 16
CHUNK = 1 << 24  # entries of a gradient, or of gathered activations, made at once


@final
class Kept:
    """`values` at the sorted positions `index` of one module (as in SparseDelta), trained.

    The values are added to the module's own weight in place (`write`), whose entries are kept to
    put them back (`restore`): so a forward is the module's own product and nothing else, and no
    second weight exists. Backward makes the gradient of the kept entries only, module by module.
    """

    def __init__(self, module: Linear, index: Int[Tensor, " n"], block: int) -> None:
        self.module = module
        self.index = index
        self.block = block
        self.shape = shape_of(module)
        self.values: Tensor = torch.zeros(0)
        self.pattern = pattern(index, self.shape) if block == 1 else None
        weight, places = self._at()
        self._original = weight[places]

    def _at(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A view of the module's weight, and the places in it that `values` has values for."""
        d_in = self.shape[1]
        weight = self.module.weight.data
        if isinstance(self.module, Conv1D):
            weight = weight.T
        elif self.block == 1:
            return weight.view(-1), (self.index,)
        if self.block == 1:
            return weight, (self.index // d_in, self.index % d_in)
        grid = weight.unflatten(1, (-1, SIDE)).unflatten(0, (-1, SIDE)).transpose(1, 2)
        across = d_in // SIDE
        return grid, (self.index // across, self.index % across)

    def pick(self, matrix: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " n *block"]:
        """The kept entries of a matrix, as `values` holds them."""
        if self.block == 1:
            return matrix.flatten()[self.index]
        d_out, d_in = matrix.shape
        blocks = matrix.reshape(d_out // SIDE, SIDE, d_in // SIDE, SIDE).transpose(1, 2)
        return blocks.reshape(-1, SIDE, SIDE)[self.index]

    @torch.no_grad()
    def write(self) -> None:
        """Put W + ΔW into the module's weight, at the kept entries."""
        weight, places = self._at()
        weight[places] = (self._original.float() + self.values).to(weight.dtype)

    @torch.no_grad()
    def restore(self) -> None:
        """Put W back, bit for bit."""
        weight, places = self._at()
        weight[places] = self._original

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return _Product.apply(x, self.values, self)


class _Product(torch.autograd.Function):
    """x (W + ΔW)ᵀ + bias, with W + ΔW already in the module, and gradients for x and the values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, kept: Kept) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kept = kept
        module = kept.module
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        return nn.functional.linear(x, weight, module.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (g,), (x,), kept = gradients, ctx.saved_tensors, ctx.kept
        to_x = to_values = None
        if ctx.needs_input_grad[0]:
            weight = kept.module.weight.to(g.dtype)
            to_x = (g @ (weight.T if isinstance(kept.module, Conv1D) else weight)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            out, into = g.flatten(0, -2), x.flatten(0, -2).to(g.dtype)
            if kept.block == 1:
                to_values = entries(out, into, kept.index, kept.pattern)
            else:
                to_values = blocks(out, into, kept.index)
            to_values = to_values.to(kept.values.dtype)
        return to_x, to_values, None


def pattern(index: Int[Tensor, " n"], shape: tuple[int, int]) -> Tensor | None:
    """Where a sampled product is to be taken, by rows; None where there is none to be had."""
    if index.device.type != "cpu" or not torch.backends.mkl.is_available():
        return None
    d_out, d_in = shape
    edges = torch.searchsorted(index, torch.arange(d_out + 1) * d_in)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(
            edges.int(),
            (index % d_in).int(),
            torch.zeros(len(index)),
            shape,
            check_invariants=False,
        )


def entries(
    g: Float[Tensor, "tok d_out"],
    x: Float[Tensor, "tok d_in"],
    index: Int[Tensor, " n"],
    where: Tensor | None = None,
) -> Float[Tensor, " n"]:
    """(gᵀ x) at `index`; `where` is the `pattern` of it.

    On CPUs with MKL a sampled product, n dot products of length tok: at a keep ratio of .1 two to
    three times as fast as the dense product and a gather, at .02 three to eight times. Elsewhere
    the dense product, a few rows at a time where it is large.
    """
    d_out, d_in = g.shape[1], x.shape[1]
    if where is not None and x.dtype == torch.float32:
        return torch.sparse.sampled_addmm(where, g.T.contiguous(), x, beta=0.0).values()
    rows = max(1, CHUNK // d_in)
    if d_out <= rows:
        return (g.T @ x).flatten()[index]
    parts = torch.searchsorted(
        index, torch.arange(0, d_out + rows, rows, device=index.device) * d_in
    ).tolist()
    return torch.cat(
        [
            (g[:, i * rows : (i + 1) * rows].T @ x).flatten()[index[a:b] - i * rows * d_in]
            for i, (a, b) in enumerate(pairwise(parts))
        ]
    )


def blocks(
    g: Float[Tensor, "tok d_out"], x: Float[Tensor, "tok d_in"], index: Int[Tensor, " n"]
) -> Float[Tensor, "n 16 16"]:
    """The 16x16 blocks of gᵀ x at `index`: a small product for each."""
    tok, across = len(g), x.shape[1] // SIDE
    left = g.view(tok, -1, SIDE).permute(1, 2, 0)
    right = x.view(tok, -1, SIDE).transpose(0, 1)
    step = max(1, CHUNK // (2 * SIDE * max(1, tok)))
    return torch.cat(
        [torch.bmm(left[part // across], right[part % across]) for part in index.split(step)]
    )
