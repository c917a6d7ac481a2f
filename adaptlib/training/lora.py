"""LoRA while it is trained (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptlib.errors import UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.training.hooks import Hook, hooked
from adaptlib.training.modules import Linear, shape_of
from adaptlib.training.options import TrainOptions
from adaptlib.training.trainee import Trainee


@final
class LoRATrainee(Trainee):
    """A and B for each module, added to the module's output by a hook.

    A is drawn as PEFT draws it (Kaiming uniform with a = √5: within ±1/√d_in), B is zero. The
    draw depends on `init_seed` and the module's name only, so experts trained from one seed share
    their A at the start. Clustering by parameters (arXiv:2405.11157) rests on that: B A does not
    change when A becomes R A and B becomes B R⁻¹, so factors of unrelated starts do not compare.
    """

    own = frozenset(("rank", "alpha", "rslora", "dropout"))

    def __init__(self, modules: Mapping[str, Linear], options: TrainOptions) -> None:
        rank = options.rank
        self.modules = dict(modules)
        self.check({name: shape_of(module) for name, module in modules.items()}, options)
        self.scale = options.alpha / (rank**0.5 if options.rslora else rank)
        self.dropout = options.dropout
        self.a: dict[str, Float[Tensor, "rank d_in"]] = {}
        self.b: dict[str, Float[Tensor, "d_out rank"]] = {}
        for name, module in self.modules.items():
            d_out, d_in = shape_of(module)
            seed = zlib.crc32(name.encode()) + options.init_seed
            generator = torch.Generator().manual_seed(seed)
            a = nn.init.kaiming_uniform_(torch.empty(rank, d_in), a=5**0.5, generator=generator)
            self.a[name] = a.to(module.weight.device).requires_grad_()
            self.b[name] = torch.zeros(d_out, rank, device=module.weight.device).requires_grad_()

    @classmethod
    def check(cls, shapes: Mapping[str, tuple[int, int]], options: TrainOptions) -> None:
        for name, (d_out, d_in) in shapes.items():
            if options.rank > min(d_out, d_in):
                raise UsageError(
                    f"rank {options.rank} is above what {name} can have: it is {d_out} x {d_in}",
                    hint=f"a rank of {min(d_out, d_in)} at most, or leave it out with target",
                )

    @classmethod
    def cost(cls, shapes: Sequence[tuple[int, int]], options: TrainOptions) -> tuple[int, int]:
        count = sum(options.rank * (d_out + d_in) for d_out, d_in in shapes)
        return count, 16 * count

    @torch.no_grad()
    def start_from(self, expert: Expert) -> None:
        for name, delta in expert.deltas.items():
            assert isinstance(delta, LoRADelta)  # plan.check_start
            self.a[name].copy_(delta.a)
            self.b[name].copy_(delta.b.float() * (delta.scale / self.scale))

    def parameters(self) -> list[Tensor]:
        return [*self.a.values(), *self.b.values()]

    def installed(self) -> AbstractContextManager[None]:
        return hooked(self.modules, self._hook)

    def _hook(self, name: str) -> Hook:
        a, b = self.a[name], self.b[name]

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = nn.functional.dropout(args[0], self.dropout, training=module.training)
            if x.dtype != a.dtype or output.dtype != a.dtype:  # half precision, or autocast
                update = self.scale * (x.to(a.dtype) @ a.T @ b.T)
                return output + update.to(output.dtype)
            # one pass over the output, where a product, a scaling and a sum would be three
            down = x.flatten(0, -2) @ a.T
            y = torch.addmm(output.flatten(0, -2), down, b.T, alpha=self.scale)
            return y.view_as(output)

        return add

    def deltas(self, dtype: torch.dtype) -> dict[str, Delta]:
        return {
            name: LoRADelta(
                self.a[name].detach().to("cpu", dtype, copy=True).contiguous(),
                self.b[name].detach().to("cpu", dtype, copy=True).contiguous(),
                self.scale,
            )
            for name in self.modules
        }

    def state(self) -> dict[str, Tensor]:
        parts = {"a": self.a, "b": self.b}
        return {
            f"{part}.{name}": value.detach().to("cpu", copy=True)
            for part, values in parts.items()
            for name, value in values.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for part, values in (("a", self.a), ("b", self.b)):
                for name, value in values.items():
                    value.copy_(state[f"{part}.{name}"])
