"""Full fine-tuning of the linear modules: the reference that adapters are measured against."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from adaptlib.experts.delta import Delta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.training.modules import Linear, shape_of
from adaptlib.training.options import TrainOptions
from adaptlib.training.trainee import Trainee


@final
class FullTrainee(Trainee):
    """The weights of the target modules themselves; ΔW is what they have moved by.

    Biases, norms and embeddings stay: an expert has no place for them. Load the model in float32;
    a weight in half precision cannot take small steps.
    """

    def __init__(self, modules: Mapping[str, Linear], options: TrainOptions) -> None:
        self.modules = dict(modules)
        self.original: dict[str, Tensor] = {}

    @classmethod
    def check(cls, shapes: Mapping[str, tuple[int, int]], options: TrainOptions) -> None:
        """Any linear module will do."""

    @classmethod
    def cost(cls, shapes: Sequence[tuple[int, int]], options: TrainOptions) -> tuple[int, int]:
        count = sum(d_out * d_in for d_out, d_in in shapes)
        return count, 20 * count  # W as it was, too

    def parameters(self) -> list[Tensor]:
        return [module.weight for module in self.modules.values()]

    @contextmanager
    def installed(self) -> Iterator[None]:
        grads = {name: module.weight.grad for name, module in self.modules.items()}
        self.original = {name: m.weight.detach().clone() for name, m in self.modules.items()}
        try:
            for module in self.modules.values():
                module.weight.grad = None
                module.weight.requires_grad_()
            yield
        finally:
            for name, module in self.modules.items():
                module.weight.data.copy_(self.original[name])
                module.weight.grad = grads[name]

    def deltas(self, dtype: torch.dtype) -> dict[str, Delta]:
        return {name: self._delta(name, dtype) for name in self.modules}

    def _delta(self, name: str, dtype: torch.dtype) -> SparseDelta:
        module = self.modules[name]
        moved: Float[Tensor, "rows columns"] = (
            module.weight.detach().float() - self.original[name].float()
        )
        dense = moved.T if isinstance(module, Conv1D) else moved
        values = dense.to("cpu", dtype).flatten().contiguous()
        return SparseDelta(
            torch.arange(values.numel(), dtype=torch.int32), values, shape_of(module)
        )

    def state(self) -> dict[str, Tensor]:
        return {n: m.weight.detach().to("cpu", copy=True) for n, m in self.modules.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, module in self.modules.items():
            module.weight.data.copy_(state[name])
