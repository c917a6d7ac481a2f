"""Sparse adapters while they are trained (arXiv:2507.07140, section 3)."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptlib.errors import UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.training.kept import Kept
from adaptlib.training.masks import SELECTIONS, Candidates, kept, top
from adaptlib.training.modules import Linear, shape_of
from adaptlib.training.options import TrainOptions
from adaptlib.training.trainee import Loss, Trainee


@final
class SparseTrainee(Trainee):
    """First a dense Ŵ and a mask M for each module (the model runs with W + Ŵ ⊙ M), while masks
    are chosen; then only the kept entries.

    M is all ones until the first choice. Gradients reach kept entries only, because ∂/∂Ŵ of
    W + Ŵ ⊙ M is masked by M; Ŵ itself stays dense in the first epoch, so that an entry which is
    dropped and chosen again goes on from the value it had. After that epoch (before the first step
    where masks are chosen at the start) Ŵ and the optimizer's moments shrink to the kept
    entries: same values, same moments, so the same steps as with a mask.
    """

    own = frozenset(("keep_ratio", "block", "selection", "reselect_every"))

    def __init__(self, modules: Mapping[str, Linear], options: TrainOptions) -> None:
        self.modules = dict(modules)
        self.options = options
        self.check({name: shape_of(module) for name, module in modules.items()}, options)
        self.selection = SELECTIONS[options.selection]
        self.weight: dict[str, Float[Tensor, "d_out d_in"]] = {}
        self.mask: dict[str, Bool[Tensor, "rows columns"] | None] = dict.fromkeys(self.modules)
        self.kept: dict[str, Kept] = {}
        if self.selection.when == "epoch":
            self.weight = {name: _zeros(module) for name, module in self.modules.items()}

    @classmethod
    def check(cls, shapes: Mapping[str, tuple[int, int]], options: TrainOptions) -> None:
        if options.selection not in SELECTIONS:
            raise UsageError(
                f"no selection {options.selection!r}; there are: {', '.join(SELECTIONS)}"
            )
        for name, shape in shapes.items():
            if any(side % options.block for side in shape):
                raise UsageError(
                    f"{name} is {shape}, which is not in whole blocks of {options.block}",
                    hint="leave it out with target, or use block 1",
                )

    @classmethod
    def cost(cls, shapes: Sequence[tuple[int, int]], options: TrainOptions) -> tuple[int, int]:
        dense = sum(d_out * d_in for d_out, d_in in shapes)
        block = options.block**2
        count = sum(
            kept(d_out * d_in // block, options.keep_ratio) * block for d_out, d_in in shapes
        )
        size = 28 * count  # positions, and W at the kept entries, too
        if SELECTIONS[options.selection].when == "epoch":
            size = max(size, 25 * dense)  # W + Ŵ ⊙ M and its gradient, and the mask
        return count, size

    def parameters(self) -> list[Tensor]:
        if self.kept:
            return [kept_.values for kept_ in self.kept.values()]
        return list(self.weight.values())

    @contextmanager
    def installed(self) -> Iterator[None]:
        had = {name: vars(module).get("forward") for name, module in self.modules.items()}
        try:
            for name, module in self.modules.items():
                vars(module)["forward"] = self._forward(name, module)
            yield
        finally:
            for kept_ in self.kept.values():
                kept_.restore()
            for name, module in self.modules.items():
                del vars(module)["forward"]
                if had[name] is not None:
                    vars(module)["forward"] = had[name]

    def _forward(self, name: str, module: Linear):
        def forward(x: Tensor) -> Tensor:
            if self.kept:
                return self.kept[name](x)
            weight = module.weight
            if self.weight:
                update, mask = self.weight[name], self.mask[name]
                update = update if mask is None else update * self._entries(mask)
                update = update.T if isinstance(module, Conv1D) else update
                weight = weight + update.to(weight.dtype)
            weight = weight.T if isinstance(module, Conv1D) else weight
            return nn.functional.linear(x, weight, module.bias)

        return forward

    def begin(self, losses: Iterable[Loss]) -> None:
        if self.selection.when == "epoch":
            return
        self.weight = {name: _zeros(module) for name, module in self.modules.items()}
        if self.selection.gradient:
            for loss in losses:
                loss().backward()
        gradients = {name: weight.grad for name, weight in self.weight.items()}
        self._choose(gradients)
        self._shrink()

    def stepped(self, step: int, epoch: int, loss: Loss) -> None:
        if self.kept:
            for kept_ in self.kept.values():
                kept_.write()
        elif epoch == 0 and step % self.options.reselect_every == 0:
            self.select(loss)

    def select(self, loss: Loss) -> None:
        """Choose M anew by the selection's score, with gradients taken at M = 1. `loss` is called
        once, or not at all where the score needs no gradient."""
        self.mask = dict.fromkeys(self.modules)
        gradients: dict[str, Tensor | None] = dict.fromkeys(self.modules)
        if self.selection.gradient:
            found = torch.autograd.grad(loss(), list(self.weight.values()))
            gradients = dict(zip(self.weight, found, strict=True))
        self._choose(gradients)

    @torch.no_grad()
    def _choose(self, gradients: Mapping[str, Tensor | None]) -> None:
        options = self.options
        for name, update in self.weight.items():
            module = self.modules[name]
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            gradient = gradients[name]
            seed = zlib.crc32(name.encode()) + options.init_seed
            places = kept(update.numel() // options.block**2, options.keep_ratio)
            of = Candidates(
                weight.detach().float(),
                update.detach(),
                torch.zeros_like(update) if gradient is None else gradient,
                places * options.block**2,
                torch.Generator().manual_seed(seed),
            )
            score = self.selection.score(of)
            self.mask[name] = top(score, ratio=options.keep_ratio, block=options.block)

    def settle(self, optimizer: torch.optim.AdamW, epoch: int) -> torch.optim.AdamW:
        """After the first epoch: drop what the masks leave out, in values and in the moments."""
        if self.kept:
            return optimizer
        moments = {name: optimizer.state[weight] for name, weight in self.weight.items()}
        settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        self._shrink()
        smaller = torch.optim.AdamW(self.groups())
        smaller.param_groups[0].update(settings)
        for name, kept_ in self.kept.items():
            smaller.state[kept_.values] = {
                key: kept_.pick(value) if value.ndim else value
                for key, value in moments[name].items()
            }
        return smaller

    def young(self, epoch: int) -> bool:
        """The first epoch ends right after the last choice of masks."""
        return epoch == 0 and self.selection.when == "epoch"

    @torch.no_grad()
    def _shrink(self) -> None:
        for name in self.modules:
            mask = self.mask[name]
            weight = self.weight.pop(name).detach()
            index = torch.arange(weight.numel() // self.options.block**2, device=weight.device)
            if mask is not None:
                index = mask.flatten().nonzero().squeeze(1)
            kept_ = Kept(self.modules[name], index, self.options.block)
            kept_.values = kept_.pick(weight).requires_grad_()
            kept_.write()
            self.kept[name] = kept_
        self.mask = dict.fromkeys(self.modules)

    def _entries(self, mask: Bool[Tensor, "rows columns"]) -> Bool[Tensor, "d_out d_in"]:
        if self.options.block == 1:
            return mask
        return mask.repeat_interleave(16, 0).repeat_interleave(16, 1)

    def deltas(self, dtype: torch.dtype) -> dict[str, Delta]:
        """The kept values; `settle` or `begin` has come before."""
        return {
            name: SparseDelta(
                kept_.index.to("cpu", torch.int32),
                kept_.values.detach().to("cpu", dtype, copy=True).contiguous(),
                shape_of(self.modules[name]),
                self.options.block,
            )
            for name, kept_ in self.kept.items()
        }

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name in self.modules:
            if self.kept:
                state[f"index.{name}"] = self.kept[name].index
                state[f"values.{name}"] = self.kept[name].values
                continue
            state[f"weight.{name}"] = self.weight[name]
            mask = self.mask[name]
            if mask is not None:
                state[f"mask.{name}"] = mask
        return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for kept_ in self.kept.values():
            kept_.restore()
        self.kept = {}
        for name, module in self.modules.items():
            device = module.weight.device
            if f"index.{name}" in state:
                kept_ = Kept(module, state[f"index.{name}"].to(device), self.options.block)
                kept_.values = state[f"values.{name}"].to(device, copy=True).requires_grad_()
                kept_.write()
                self.kept[name] = kept_
                continue
            self.weight[name] = state[f"weight.{name}"].to(device, copy=True).requires_grad_()
            mask = state.get(f"mask.{name}")
            self.mask[name] = None if mask is None else mask.to(device)
        if self.kept:
            self.weight = {}


def _zeros(module: Linear) -> Tensor:
    return torch.zeros(shape_of(module), device=module.weight.device).requires_grad_()
