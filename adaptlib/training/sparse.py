"""Sparse adapters while they are trained (arXiv:2507.07140, section 3)."""

from collections.abc import Callable, Mapping
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptlib.errors import UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.training.modules import Linear, shape_of


@final
class SparseTrainee:
    """A dense Ŵ (zero at first) and a mask M for each module; the model runs with W + Ŵ ⊙ M.

    M is all ones until the first `select`. Gradients reach kept entries only, because ∂/∂Ŵ of
    W + Ŵ ⊙ M is masked by M; Ŵ itself stays dense, so that an entry which is dropped and chosen
    again goes on from the value it had.
    """

    def __init__(self, modules: Mapping[str, Linear], *, keep_ratio: float, block: int) -> None:
        if not 0 < keep_ratio <= 1:
            raise UsageError(f"keep_ratio wants a share in (0, 1]; got {keep_ratio}")
        if block not in (1, 16):
            raise UsageError(f"block wants 1 (entries) or 16 (16x16 blocks); got {block}")
        self.modules = dict(modules)
        self.keep_ratio = keep_ratio
        self.block = block
        self.weight: dict[str, Float[Tensor, "d_out d_in"]] = {}
        self.mask: dict[str, Bool[Tensor, "rows columns"] | None] = dict.fromkeys(modules)
        for name, module in self.modules.items():
            shape = shape_of(module)
            if any(side % block for side in shape):
                raise UsageError(
                    f"{name} is {shape}, which is not in whole blocks of {block}",
                    hint="leave it out with target, or use block=1",
                )
            self.weight[name] = torch.zeros(shape, device=module.weight.device).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return list(self.weight.values())

    def logits(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor]
    ) -> Float[Tensor, "example tok vocab"]:
        """The logits of the model with W + Ŵ ⊙ M in place of every W."""
        weights = {}
        for name, module in self.modules.items():
            mask = self.mask[name]
            update = self.weight[name] if mask is None else self.weight[name] * self._entries(mask)
            if isinstance(module, Conv1D):
                update = update.T
            weights[f"{name}.weight"] = module.weight + update.to(module.weight.dtype)
        return functional_call(model, weights, kwargs={**inputs, "use_cache": False}).logits

    def select(self, loss: Callable[[], Tensor]) -> None:
        """Choose M anew: the largest connection sensitivities Ŵ ⊙ ∂L/∂Ŵ at M = 1 of each module.

        Signed, as in the paper: it is ∂L/∂M, and no absolute value is taken. With block 16 the
        scores of a block are summed and whole blocks are kept. `loss` is called once.
        """
        self.mask = dict.fromkeys(self.modules)
        names = list(self.modules)
        gradients = torch.autograd.grad(loss(), [self.weight[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            score = self.weight[name].detach() * gradient
            if self.block > 1:
                rows, columns = (side // self.block for side in score.shape)
                score = score.reshape(rows, self.block, columns, self.block).sum((1, 3))
            keep = max(1, round(self.keep_ratio * score.numel()))
            mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
            mask[score.flatten().topk(keep).indices] = True
            self.mask[name] = mask.view_as(score)

    def _entries(self, mask: Bool[Tensor, "rows columns"]) -> Bool[Tensor, "d_out d_in"]:
        if self.block == 1:
            return mask
        return mask.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)

    def deltas(self, dtype: torch.dtype) -> dict[str, Delta]:
        """The kept values, of `dtype`, on the CPU; what the mask leaves out is dropped here."""
        return {name: self._delta(name, dtype) for name in self.modules}

    def _delta(self, name: str, dtype: torch.dtype) -> SparseDelta:
        weight, mask = self.weight[name].detach().cpu(), self.mask[name]
        d_out, d_in = weight.shape
        side = self.block
        if mask is None:
            index = torch.arange(weight.numel() // side**2)
        else:
            index = mask.cpu().flatten().nonzero().squeeze(1)
        if side == 1:
            values = weight.flatten()[index]
        else:
            blocks = weight.reshape(d_out // side, side, d_in // side, side).transpose(1, 2)
            values = blocks.reshape(-1, side, side)[index]
        # the copy matters: a view would keep the whole dense Ŵ alive
        return SparseDelta(
            index.to(torch.int32), values.to(dtype, copy=True).contiguous(), (d_out, d_in), side
        )
