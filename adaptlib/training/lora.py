"""LoRA while it is trained (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

import zlib
from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptlib.experts.delta import Delta
from adaptlib.experts.lora import LoRADelta
from adaptlib.training.modules import Linear, shape_of


@final
class LoRATrainee:
    """A and B for each module, added to the module's output by hooks that live for one forward.

    A is drawn as PEFT draws it (Kaiming uniform with a = √5: within ±1/√d_in), B is zero. The
    draw depends on the seed and the module's name only, so experts trained from one seed share
    their A at the start. Clustering by parameters (arXiv:2405.11157) rests on that: B A does not
    change when A becomes R A and B becomes B R⁻¹, so factors of unrelated starts do not compare.
    """

    def __init__(
        self,
        modules: Mapping[str, Linear],
        *,
        rank: int,
        alpha: float,
        dropout: float,
        seed: int,
    ) -> None:
        self.modules = dict(modules)
        self.scale = alpha / rank
        self.dropout = dropout
        self.a: dict[str, Float[Tensor, "rank d_in"]] = {}
        self.b: dict[str, Float[Tensor, "d_out rank"]] = {}
        for name, module in self.modules.items():
            d_out, d_in = shape_of(module)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            a = nn.init.kaiming_uniform_(torch.empty(rank, d_in), a=5**0.5, generator=generator)
            self.a[name] = a.to(module.weight.device).requires_grad_()
            self.b[name] = torch.zeros(d_out, rank, device=module.weight.device).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [*self.a.values(), *self.b.values()]

    def logits(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor]
    ) -> Float[Tensor, "example tok vocab"]:
        """The logits of the model with every ΔW = scale · B A in place."""
        hooks = [
            module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()
        ]
        try:
            return model(**inputs, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str):
        a, b = self.a[name], self.b[name]

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = nn.functional.dropout(args[0], self.dropout, training=module.training)
            x = x.to(a.dtype)
            return output + (self.scale * (x @ a.T @ b.T)).to(output.dtype)

        return add

    def deltas(self, dtype: torch.dtype) -> dict[str, Delta]:
        """What was learned, as plain values of `dtype` on the CPU."""
        return {
            name: LoRADelta(
                self.a[name].detach().to("cpu", dtype, copy=True).contiguous(),
                self.b[name].detach().to("cpu", dtype, copy=True).contiguous(),
                self.scale,
            )
            for name in self.modules
        }
