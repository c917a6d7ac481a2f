"""The fused forward: the chosen experts' updates of one module, for all tokens at once.

Everything is stacked once, when experts are attached. With the LoRA factors of all experts under
each other, A (R, d_in) and B (R, d_out), R the sum of the ranks, mixing is a weight on each of the
R coordinates between two products, whatever the ranks:

    outputs   Σ_i w_i B_i A_i x             =  ((x Aᵀ) ⊙ w) B
    factors   (Σ_i w_i B_i) (Σ_i w_i A_i) x  =  (w ⊗ Σ_i w_i A_i x) B

No tensor of (tokens, experts, d_out) is made and no A or B is built for a token. That is `dense`;
two other paths touch only the chosen experts: `gather` for a few tokens, as in decoding, and
`grouped` for many tokens among many experts on a CPU, where a loop costs less than the products.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.routing.router import Choice, Mix

# What a CPU core multiplies in the time that one more expert takes in a loop (measured, 30 us).
LOOP = 1 << 19


@final
@dataclass(frozen=True, eq=False)
class LoRAStack:
    """The LoRA experts of one module. Row j of `a` and `b` belongs to expert `owner[j]`; `b` holds
    the scale. `spans[i]` is where expert i begins and ends; `rows[i]` are its rows padded to one
    width, and `real` is 0 where padded."""

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "rank d_out"]
    owner: Int[Tensor, " rank"]
    spans: Mapping[int, slice]
    rows: Int[Tensor, "expert width"]
    real: Float[Tensor, "expert width"]

    @classmethod
    def of(
        cls,
        deltas: Mapping[int, LoRADelta],
        *,
        experts: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "LoRAStack":
        width = max(delta.rank for delta in deltas.values())
        rows = torch.zeros(experts, width, dtype=torch.long)
        real = torch.zeros(experts, width)
        owner: list[int] = []
        spans: dict[int, slice] = {}
        for i, delta in deltas.items():
            spans[i] = slice(len(owner), len(owner) + delta.rank)
            rows[i, : delta.rank] = torch.arange(delta.rank) + len(owner)
            real[i, : delta.rank] = 1
            owner += [i] * delta.rank
        a = [delta.a.detach().to(device, dtype) for delta in deltas.values()]
        # scaled before rounding: scale · b in half precision would be rounded twice
        b = [(delta.b.detach().float().T * delta.scale) for delta in deltas.values()]
        return cls(
            torch.cat(a),
            torch.cat([part.to(device, dtype) for part in b]),
            torch.tensor(owner, device=device),
            spans,
            rows.to(device),
            real.to(device, dtype),
        )

    def dense(
        self, x: Float[Tensor, "tok d_in"], choice: Choice, mix: Mix
    ) -> Float[Tensor, "tok d_out"]:
        """All experts for all tokens, with weight 0 where they were not chosen."""
        by_expert = x.new_zeros(len(x), len(self.rows))
        by_expert = by_expert.scatter(1, choice.index, choice.weight.to(x.dtype))
        weight = by_expert[:, self.owner]
        return _weighted(x @ self.a.T, weight, mix, self.rows.shape[1]) @ self.b

    def gather(
        self, x: Float[Tensor, "tok d_in"], choice: Choice, mix: Mix
    ) -> Float[Tensor, "tok d_out"]:
        """Only the chosen experts, their rows copied out for each token."""
        rows = self.rows[choice.index].flatten(1)  # (tok, k · width)
        weight = choice.weight.to(x.dtype)[:, :, None] * self.real[choice.index]
        h = torch.bmm(self.a[rows], x[:, :, None]).squeeze(2)
        h = _weighted(h, weight.flatten(1), mix, self.rows.shape[1])
        return torch.bmm(h[:, None, :], self.b[rows]).squeeze(1)

    def grouped(
        self, x: Float[Tensor, "tok d_in"], choice: Choice, mix: Mix
    ) -> Float[Tensor, "tok d_out"]:
        """Expert by expert, each for its own tokens."""
        groups = [
            (tok, weight.to(x.dtype), self.a[self.spans[i]], self.b[self.spans[i]])
            for i, tok, weight in _groups(choice, len(self.rows))
            if i in self.spans
        ]
        y = x.new_zeros(len(x), self.b.shape[1])
        if mix == "outputs":
            for tok, weight, a, b in groups:
                y.index_add_(0, tok, (x.index_select(0, tok) @ a.T * weight) @ b)
            return y
        h = x.new_zeros(len(x), self.rows.shape[1])
        for tok, weight, a, _ in groups:
            h.index_add_(0, tok, x.index_select(0, tok) @ a.T * weight)
        for tok, weight, _, b in groups:
            y.index_add_(0, tok, (h.index_select(0, tok) * weight) @ b)
        return y

    def mix(
        self, x: Float[Tensor, "tok d_in"], choice: Choice, mix: Mix
    ) -> Float[Tensor, "tok d_out"]:
        """By the path that costs least."""
        tok, k = choice.index.shape
        (ranks, d_in), d_out = self.a.shape, self.b.shape[1]
        chosen = k * self.rows.shape[1]
        if tok * chosen * 3 < ranks:  # copying a row costs about three times using it in place
            return self.gather(x, choice, mix)
        # Picking a token out for an expert and adding its result costs about 16 ranks.
        saved = tok * (ranks - chosen - 16 * k) * (d_in + d_out)
        if x.device.type == "cpu" and saved > len(self.spans) * LOOP:
            return self.grouped(x, choice, mix)
        return self.dense(x, choice, mix)


def _weighted(
    h: Float[Tensor, "tok rows"], weight: Float[Tensor, "tok rows"], mix: Mix, rank: int
) -> Float[Tensor, "tok rows"]:
    h = h * weight
    if mix == "outputs":
        return h
    blocks = h.unflatten(1, (h.shape[1] // rank, rank))
    return blocks.sum(1).repeat(1, blocks.shape[1]) * weight


def _groups(
    choice: Choice, experts: int
) -> Iterator[tuple[int, Int[Tensor, " some"], Float[Tensor, "some 1"]]]:
    """(expert, its tokens, their weights) for each expert that some token chose."""
    chosen = choice.index.flatten()
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=experts).tolist()
    tokens = order.div(choice.index.shape[1], rounding_mode="floor").split(counts)
    weights = choice.weight.flatten()[order][:, None].split(counts)
    for i, (tok, weight) in enumerate(zip(tokens, weights, strict=True)):
        if len(tok):
            yield i, tok, weight


@final
@dataclass(frozen=True, eq=False)
class Bank:
    """All experts of one module on its device: LoRA stacked in the module's dtype, sparse ones as
    float32 CSR matrices by expert."""

    lora: LoRAStack | None
    sparse: Mapping[int, Tensor]
    shape: tuple[int, int]
    experts: int
    mix: Mix

    @classmethod
    def of(
        cls,
        module: str,
        deltas: Mapping[int, Delta],
        *,
        experts: int,
        mix: Mix,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Bank":
        """`deltas` by expert index, of `experts` in all. UsageError where mix="factors" cannot be:
        with a sparse expert, or with two ranks, at `module`."""
        lora = {i: d for i, d in deltas.items() if isinstance(d, LoRADelta)}
        sparse = {i: d for i, d in deltas.items() if isinstance(d, SparseDelta)}
        ranks = sorted({delta.rank for delta in lora.values()})
        if mix == "factors" and (sparse or len(ranks) > 1):
            found = f"ranks {', '.join(map(str, ranks))}" if lora else "no LoRA"
            if sparse:
                found += f" and {len(sparse)} sparse experts"
            raise UsageError(
                f'mix="factors" wants LoRA of one rank at each module; {module} has {found}',
                hint='use mix="outputs", which takes any experts',
            )
        stack = None
        if lora:
            stack = LoRAStack.of(lora, experts=experts, dtype=dtype, device=device)
        matrices = {i: _rows(delta).to(device) for i, delta in sparse.items()}
        return cls(stack, matrices, next(iter(deltas.values())).shape, experts, mix)

    def __call__(self, x: Float[Tensor, "tok d_in"], choice: Choice) -> Float[Tensor, "tok d_out"]:
        """What the chosen experts add to the module's output; gradients flow to `x` and to the
        weights."""
        total = None
        if self.lora is not None:
            inputs = x.to(self.lora.a.dtype)
            total = self.lora.mix(inputs, choice, self.mix)
        if self.sparse:
            added = self._sparse(x, choice)
            total = added if total is None else total.float() + added
        assert total is not None  # a bank has deltas
        return total

    def _sparse(self, x: Float[Tensor, "tok d_in"], choice: Choice) -> Float[Tensor, "tok d_out"]:
        y = x.new_zeros(len(x), self.shape[0], dtype=torch.float32)
        for i, tok, weight in _groups(choice, self.experts):
            if i in self.sparse:
                part = (self.sparse[i] @ x.index_select(0, tok).float().T).T
                y.index_add_(0, tok, part * weight.float())
        return y


def _rows(delta: SparseDelta) -> Tensor:
    """ΔW by rows with 32-bit positions: 4 to 15 times as fast as the COO matrix on a CPU."""
    coo = delta.matrix().detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        csr = coo.to_sparse_csr()
        return torch.sparse_csr_tensor(
            csr.crow_indices().int(),
            csr.col_indices().int(),
            csr.values(),
            csr.shape,
            check_invariants=False,
        )
