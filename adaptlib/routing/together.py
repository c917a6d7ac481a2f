"""The fused forward of modules that see the same input, such as q, k and v: one product each.

Their A factors lie under each other in one table, and so do their B factors where they are of one
width; each module's own stack (see `bank`) is a part of these, so nothing is there twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptlib.routing.bank import Bank, LoRAStack, weighted
from adaptlib.routing.gathered import dots, sums
from adaptlib.routing.router import Choice, Mix


@final
@dataclass(frozen=True, eq=False)
class Together:
    """`modules` that see the same input and have the same LoRA experts. `rows` are each module's
    rows of the common table, (module · expert, width); `first` is the row at which each begins."""

    modules: tuple[str, ...]
    stacks: tuple[LoRAStack, ...]
    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "rank d_out"] | None  # None where their widths differ
    rows: Int[Tensor, "slot width"]
    real: Float[Tensor, "slot width"] | None  # None where all are
    offset: Int[Tensor, "module 1"]
    first: tuple[int, ...]
    mix: Mix

    def __call__(
        self, x: Float[Tensor, "tok d_in"], choice: Choice
    ) -> tuple[Float[Tensor, "tok _"], ...]:
        """What the chosen experts add at each module, for a choice of (tok, module, k)."""
        x = x.to(self.a.dtype)
        path = self.stacks[0].path(choice.index.shape[0], choice.index.shape[2])
        if path == "rows":
            return self._in_place(x, choice)
        if path == "gather" and self.blocks:
            return self._gather(x, choice)
        parts = (Choice(index, w) for index, w in zip(*(t.unbind(1) for t in choice), strict=True))
        return tuple(s.mix(x, part, self.mix) for s, part in zip(self.stacks, parts, strict=True))

    @property
    def blocks(self) -> bool:
        """Whether each slot is a block of as many rows, one after the other."""
        return self.real is None

    def _in_place(
        self, x: Float[Tensor, "tok d_in"], choice: Choice
    ) -> tuple[Float[Tensor, "tok _"], ...]:
        tok, modules, k = choice.index.shape
        slots = choice.index + self.offset
        rows = self.rows[slots]  # (tok, module, k, width)
        n = k * rows.shape[3]
        weight = choice.weight.to(x.dtype)[..., None]
        if self.real is not None:
            weight = weight * self.real[slots]
        h = weighted(
            dots(x, self.a, rows.view(tok, modules * n)).view(rows.shape), weight, self.mix
        )
        if self.b is not None:
            y = sums(h.view(tok * modules, n), self.b, rows.view(tok * modules, n))
            return y.view(tok, modules, self.b.shape[1]).unbind(1)
        return tuple(
            sums(h[:, m].flatten(1), stack.b, rows[:, m].flatten(1) - self.first[m])
            for m, stack in enumerate(self.stacks)
        )

    def _gather(
        self, x: Float[Tensor, "tok d_in"], choice: Choice
    ) -> tuple[Float[Tensor, "tok _"], ...]:
        tok, modules, k = choice.index.shape
        width = self.rows.shape[1]
        slots = (choice.index + self.offset).flatten()
        a = self.a.unflatten(0, (-1, width)).index_select(0, slots).view(tok, -1, x.shape[1])
        h = torch.bmm(a, x[:, :, None]).view(tok, modules, k, width)
        h = weighted(h, choice.weight.to(x.dtype)[..., None], self.mix)
        if self.b is not None:
            b = self.b.unflatten(0, (-1, width)).index_select(0, slots)
            y = torch.bmm(h.view(-1, 1, k * width), b.view(tok * modules, k * width, -1))
            return y.view(tok, modules, -1).unbind(1)
        found: list[Tensor] = []
        for m, stack in enumerate(self.stacks):
            b = stack.b.unflatten(0, (-1, width)).index_select(0, choice.index[:, m].flatten())
            b = b.view(tok, k * width, -1)
            found.append(torch.bmm(h[:, m].reshape(tok, 1, k * width), b)[:, 0])
        return tuple(found)


def join(banks: Mapping[str, Bank], modules: Sequence[str]) -> tuple[Together, dict[str, Bank]]:
    """The banks of `modules` with their tables laid together, and what runs them together."""
    stacks = [bank.lora for bank in (banks[m] for m in modules) if bank.lora is not None]
    a = torch.cat([stack.a for stack in stacks])
    same = len({stack.b.shape[1] for stack in stacks}) == 1
    b = torch.cat([stack.b for stack in stacks]) if same else None
    sizes = [len(stack.a) for stack in stacks]
    parts_b = b.split(sizes) if b is not None else [stack.b for stack in stacks]
    stacks = [
        replace(stack, a=part_a, b=part_b)
        for stack, part_a, part_b in zip(stacks, a.split(sizes), parts_b, strict=True)
    ]
    first = [sum(sizes[:m]) for m in range(len(sizes))]
    width = max(stack.width for stack in stacks)
    experts = len(stacks[0].rows)
    rows = torch.zeros(len(stacks), experts, width, dtype=torch.long, device=a.device)
    real = torch.zeros(len(stacks), experts, width, dtype=a.dtype, device=a.device)
    for m, stack in enumerate(stacks):
        rows[m, :, : stack.width] = stack.rows + first[m]
        real[m, :, : stack.width] = 1 if stack.real is None else stack.real
    joined = Together(
        tuple(modules),
        tuple(stacks),
        a,
        b,
        rows.flatten(0, 1),
        None if bool(real.all()) else real.flatten(0, 1),
        torch.arange(len(stacks), device=a.device)[:, None] * experts,
        tuple(first),
        banks[modules[0]].mix,
    )
    return joined, {m: replace(banks[m], lora=s) for m, s in zip(modules, stacks, strict=True)}
