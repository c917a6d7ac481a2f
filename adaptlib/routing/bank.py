"""The fused forward: the chosen experts' updates of one module, for all tokens at once.

Everything is stacked once, when experts are attached. With the LoRA factors of all experts under
each other, A (R, d_in) and B (R, d_out), R the sum of the ranks, mixing is a weight on each of the
R coordinates between two products, whatever the ranks:

    outputs   Σ_i w_i B_i A_i x             =  ((x Aᵀ) ⊙ w) B
    factors   (Σ_i w_i B_i) (Σ_i w_i A_i) x  =  (w ⊗ Σ_i w_i A_i x) B

No tensor of (tokens, experts, d_out) is made and no A or B is built for a token. There are five
paths to the same numbers, and `path` says which one costs least:

    dense     both products with all R rows, weight 0 where not chosen: few experts
    rows      products with the chosen rows only, in place (`gathered`): CPU
    gather    the chosen experts copied out for each token: a few tokens, as in decoding
    grouped   tokens sorted by expert, one grouped product a factor: GPU, many tokens and experts
    shared    the chosen experts copied out once a sequence: where its tokens have one choice
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.routing.gathered import can_gather, dots, sums
from adaptlib.routing.router import Choice, Mix

Path = Literal["dense", "rows", "gather", "grouped"]

# How much more a multiplication costs on a path than in a plain matrix product: with rows picked
# where they lie (measured on a CPU: 2 to 3), and with rows copied first, which memory holds up.
ROWS, COPIED = 2, 40
# What the sorting, picking and adding up of one (token, expert) pair costs, in rows of products.
PAIR = 16


@final
@dataclass(frozen=True, eq=False)
class LoRAStack:
    """The LoRA experts of one module. Row j of `a` and `b` belongs to expert `owner[j]`; `b` holds
    the scale. `rows[i]` are the rows of expert i, padded to one width, and `real` is 0 where
    padded; it is None where nothing is. `slot[i]` is the place of expert i among those that have
    the module."""

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "rank d_out"]
    owner: Int[Tensor, " rank"]
    rows: Int[Tensor, "expert width"]
    real: Float[Tensor, "expert width"] | None
    slot: Int[Tensor, " expert"]
    even: bool  # one rank, so that `a` and `b` are also (experts here, rank, d)
    width: int  # the largest rank
    ranks: int  # the sum of them
    gathers: bool  # whether there are products with chosen rows of its tables

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
        slot = torch.zeros(experts, dtype=torch.long)
        first = next(iter(deltas.values()))
        ranks = sum(delta.rank for delta in deltas.values())
        owner = torch.empty(ranks, dtype=torch.long)
        # filled in place: beside the stack itself there is one factor at a time
        a = torch.empty(ranks, first.shape[1], dtype=dtype, device=device)
        b = torch.empty(ranks, first.shape[0], dtype=dtype, device=device)
        start = 0
        for place, (i, delta) in enumerate(deltas.items()):
            span = slice(start, start + delta.rank)
            rows[i, : delta.rank] = torch.arange(span.start, span.stop)
            real[i, : delta.rank] = 1
            slot[i] = place
            owner[span] = i
            a[span] = delta.a.detach()
            # scaled before rounding: scale · b in half precision would be rounded twice
            b[span] = delta.b.detach().float().T * delta.scale
            start = span.stop
        even = len({delta.rank for delta in deltas.values()}) == 1
        padded = None if bool(real.all()) else real.to(device, dtype)
        placed = (owner.to(device), rows.to(device), padded, slot.to(device))
        return cls(a, b, *placed, even, width, ranks, can_gather(a))

    def dense(
        self, x: Float[Tensor, "tok d_in"], choice: Choice, mix: Mix
    ) -> Float[Tensor, "tok d_out"]:
        """All experts for all tokens, with weight 0 where they were not chosen."""
        by_expert = x.new_zeros(len(x), len(self.rows))
        by_expert = by_expert.scatter(1, choice.index, choice.weight.to(x.dtype))
        h = x @ self.a.T
        if mix == "factors":  # which wants one rank
            weight = by_expert[:, self.owner[:: self.width]][:, :, None]
            return weighted(h.unflatten(1, (-1, self.width)), weight, mix).flatten(1) @ self.b
        return (h * by_expert[:, self.owner]) @ self.b

    def in_place(
        self, x: Float[Tensor, "tok d_in"], choice: Choice, mix: Mix
    ) -> Float[Tensor, "tok d_out"]:
        """Only the chosen experts' rows, where they lie."""
        rows = self.rows[choice.index]
        h = dots(x, self.a, rows.flatten(1)).view(rows.shape)
        return sums(weighted(h, self.weights(choice), mix).flatten(1), self.b, rows.flatten(1))

    def gather(
        self, x: Float[Tensor, "tok d_in"], choice: Choice, mix: Mix
    ) -> Float[Tensor, "tok d_out"]:
        """Only the chosen experts, copied out for each token."""
        return self.shared(x[:, None, :], choice, mix)[:, 0]

    def shared(
        self, x: Float[Tensor, "sequence tok d_in"], choice: Choice, mix: Mix
    ) -> Float[Tensor, "sequence tok d_out"]:
        """The same experts for all tokens of a sequence, copied out once for it."""
        a, b = self._copies(choice.index)
        h = torch.bmm(x, a.transpose(1, 2)).unflatten(2, (choice.index.shape[1], self.width))
        return torch.bmm(weighted(h, self.weights(choice)[:, None], mix).flatten(2), b)

    def grouped(
        self, x: Float[Tensor, "tok d_in"], choice: Choice, mix: Mix
    ) -> Float[Tensor, "tok d_out"]:
        """Tokens sorted by expert, and a product of ragged groups for each factor. Wants `even`,
        and rows of a multiple of 16 bytes."""
        k, rank = choice.index.shape[1], self.width
        held = len(self.a) // rank
        slot = self.slot[choice.index].flatten()
        order = slot.argsort(stable=True)
        token = order.div(k, rounding_mode="floor")
        ends = torch.bincount(slot, minlength=held).cumsum(0).to(torch.int32)
        weight = self.weights(choice)[:, :, 0].flatten()[order, None]
        a = self.a.unflatten(0, (held, rank)).transpose(1, 2)
        h = torch.nn.functional.grouped_mm(x[token], a, offs=ends) * weight
        if mix == "factors":
            mixed = x.new_zeros(len(x), rank).index_add_(0, token, h)
            h = mixed[token] * weight
        y = torch.nn.functional.grouped_mm(h, self.b.unflatten(0, (held, rank)), offs=ends)
        return x.new_zeros(len(x), self.b.shape[1]).index_add_(0, token, y)

    def mix(
        self, x: Float[Tensor, "tok d_in"], choice: Choice, mix: Mix
    ) -> Float[Tensor, "tok d_out"]:
        """By the path that costs least."""
        path = self.path(*choice.index.shape)
        if path == "rows":
            return self.in_place(x, choice, mix)
        if path == "dense":
            return self.dense(x, choice, mix)
        return self.gather(x, choice, mix) if path == "gather" else self.grouped(x, choice, mix)

    def path(self, tok: int, k: int) -> Path:
        """The path for `tok` tokens with `k` experts each. Costs are in rows of both products."""
        chosen, ranks = k * self.width, self.ranks
        if self.gathers:
            return "rows" if ROWS * chosen < ranks else "dense"
        costs: dict[Path, float] = {"dense": ranks * tok, "gather": COPIED * chosen * tok}
        # A product of few tokens waits for the rows from memory: all of them, or those chosen.
        if tok * chosen * 3 < ranks:
            return "gather"
        if self.even and self._aligned():
            costs["grouped"] = (chosen + PAIR * k) * tok
        return min(costs, key=costs.__getitem__)

    def _aligned(self) -> bool:
        size = self.a.element_size()
        widths = (self.a.shape[1], self.b.shape[1], self.width)
        return all(width * size % 16 == 0 for width in widths)

    def weights(self, choice: Choice) -> Float[Tensor, "row k width"]:
        """The weight of each chosen row, or of each expert's rows alike: (row, k, 1)."""
        weight = choice.weight.to(self.a.dtype)[..., None]
        return weight if self.real is None else weight * self.real[choice.index]

    def _copies(
        self, index: Int[Tensor, "row k"]
    ) -> tuple[Float[Tensor, "row n d_in"], Float[Tensor, "row n d_out"]]:
        """The rows of the experts in `index`, for each row of it under each other."""
        if not self.even:
            rows = self.rows[index].flatten(1)
            return self.a[rows], self.b[rows]
        slots = self.slot[index].flatten()
        a, b = (
            table.unflatten(0, (-1, self.width)).index_select(0, slots)
            for table in (self.a, self.b)
        )
        n = index.shape[1] * self.width
        return a.view(len(index), n, a.shape[2]), b.view(len(index), n, b.shape[2])


def weighted(
    h: Float[Tensor, "*row k width"], weight: Float[Tensor, "*#row k #width"], mix: Mix
) -> Float[Tensor, "*row k width"]:
    """What goes from A to B, for both ways to mix."""
    h = h * weight
    return h if mix == "outputs" else h.sum(-2, keepdim=True) * weight


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
    """All experts of one module on its device: LoRA stacked in the module's dtype (on a CPU float32
    at least, since half precision has no product with chosen rows there), sparse ones as float32
    CSR matrices by expert."""

    lora: LoRAStack | None
    sparse: Mapping[int, Tensor]
    shape: tuple[int, int]
    experts: int
    mix: Mix
    blended: bool = False

    @classmethod
    def of(
        cls,
        module: str,
        deltas: Mapping[int, Delta],
        *,
        experts: int,
        mix: Mix,
        blended: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Bank":
        """`deltas` by expert index, of `experts` in all. With `blended` there is one, at 0, which
        is all of them already: of a choice only the sum of its weights counts. UsageError where
        mix="factors" cannot be: with a sparse expert, or with two ranks, at `module`."""
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
        if device.type == "cpu":
            dtype = torch.promote_types(dtype, torch.float32)
        stack = None
        if lora:
            stack = LoRAStack.of(lora, experts=experts, dtype=dtype, device=device)
        matrices = {i: _rows(delta).to(device) for i, delta in sparse.items()}
        return cls(stack, matrices, next(iter(deltas.values())).shape, experts, mix, blended)

    def __call__(self, x: Float[Tensor, "tok d_in"], choice: Choice) -> Float[Tensor, "tok d_out"]:
        """What the chosen experts add to the module's output, each token with its own; gradients
        flow to `x` and to the weights."""
        lora, choice = None, self._whole(choice)
        if self.lora is not None:
            lora = self.lora.mix(x.to(self.lora.a.dtype), choice, self.mix)
        return self._total(lora, x, choice)

    def shared(
        self, x: Float[Tensor, "sequence tok d_in"], choice: Choice
    ) -> Float[Tensor, "sequence tok d_out"]:
        """The same, with one choice for all tokens of a sequence."""
        lora, choice = None, self._whole(choice)
        if self.lora is not None:
            lora = self.lora.shared(x.to(self.lora.a.dtype), choice, self.mix).flatten(0, 1)
        if not self.sparse:
            every = choice
        else:
            every = Choice(*(part.repeat_interleave(x.shape[1], 0) for part in choice))
        return self._total(lora, x.flatten(0, 1), every).unflatten(0, x.shape[:2])

    def _whole(self, choice: Choice) -> Choice:
        if not self.blended:
            return choice
        weight = choice.weight.sum(1, keepdim=True)
        return Choice(torch.zeros_like(weight, dtype=torch.long), weight)

    def _total(self, lora: Tensor | None, x: Tensor, choice: Choice) -> Tensor:
        if not self.sparse:
            assert lora is not None  # a bank has deltas
            return lora
        added = self._sparse(x, choice)
        return added if lora is None else lora.float() + added

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
