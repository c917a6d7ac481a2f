"""Products with a few chosen rows of a table for each token, at the cost of those rows alone.

    dots   h[t, j] = x[t] · table[rows[t, j]]          each token with its own rows
    sums   y[t]    = Σ_j h[t, j] table[rows[t, j]]     and back

Neither copies a row: on a CPU the first is a sampled product (of x and the table only the wanted
entries) and the second an embedding bag, and both stay within a few times of reading x, the rows
and y once. Each is the other's gradient, so autograd costs the same; tables get no gradient.
"""

import warnings
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def can_gather(table: Tensor) -> bool:
    """Whether these products are there for the table's device and dtype."""
    _mute()
    return table.device.type == "cpu" and table.dtype in (torch.float32, torch.float64)


@cache
def _mute() -> None:
    """torch says once a process that sparse CSR is in beta; this is that once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        none = torch.zeros(1, dtype=torch.long)
        torch.sparse_csr_tensor(none, none[:0], none[:0].float(), (0, 0), check_invariants=False)


def dots(
    x: Float[Tensor, "tok width"], table: Float[Tensor, "row width"], rows: Int[Tensor, "tok n"]
) -> Float[Tensor, "tok n"]:
    """h[t, j] = x[t] · table[rows[t, j]]."""
    if not x.requires_grad:  # a Function of one's own costs as much as the product of one token
        return _dots(x, table, rows)
    return _Dots.apply(x, table, rows)  # pyright: ignore[reportReturnType]


def sums(
    h: Float[Tensor, "tok n"], table: Float[Tensor, "row width"], rows: Int[Tensor, "tok n"]
) -> Float[Tensor, "tok width"]:
    """y[t] = Σ_j h[t, j] table[rows[t, j]]."""
    if not h.requires_grad:
        return _sums(h, table, rows)
    return _Sums.apply(h, table, rows)  # pyright: ignore[reportReturnType]


def _dots(x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    tok, n = rows.shape
    if tok == 1:  # a copy costs less than to describe what is wanted of the product
        return x @ table.index_select(0, rows[0]).T
    if n > len(table):  # a sampled product wants no more than the whole of it
        return torch.bmm(table[rows], x[:, :, None])[:, :, 0]
    wanted = torch.sparse_csr_tensor(
        torch.arange(0, tok * n + 1, n),
        rows.reshape(-1),
        x.new_zeros(tok * n),
        (tok, len(table)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(wanted, x, table.T, beta=0.0).values().view(tok, n)


def _sums(h: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    starts = torch.arange(0, rows.numel(), rows.shape[1] or 1)
    # torch.nn.functional's takes as long to check as one token's product takes
    return torch.embedding_bag(table, rows.reshape(-1), starts, False, 0, False, h.reshape(-1))[0]


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(table, rows)
        return _dots(x, table, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        table, rows = ctx.saved_tensors
        return sums(grads[0], table, rows), None, None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(table, rows)
        return _sums(h, table, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        table, rows = ctx.saved_tensors
        return dots(grads[0], table, rows), None, None
