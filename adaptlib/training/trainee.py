"""Trainee: the part of a model that learns, and how the model runs with it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor

from adaptlib.experts.delta import Delta
from adaptlib.training.modules import Linear
from adaptlib.training.options import TrainOptions

Loss = Callable[[], Tensor]


class Trainee(ABC):
    """The trainable update of some linear modules of one model.

    A new kind of training is a subclass in its own file and a line in `plan.KINDS`. The loop calls
    `installed` around everything, `begin` once before the first step, `stepped` after each step
    of the optimizer and `settle` after each epoch. `own` names the options that are of no use to
    other kinds.
    """

    own: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __init__(self, modules: Mapping[str, Linear], options: TrainOptions) -> None:
        """Raises what `check` raises."""

    @classmethod
    @abstractmethod
    def check(cls, shapes: Mapping[str, tuple[int, int]], options: TrainOptions) -> None:
        """UsageError where modules of these shapes (d_out, d_in) cannot be trained so."""

    @classmethod
    @abstractmethod
    def cost(cls, shapes: Sequence[tuple[int, int]], options: TrainOptions) -> tuple[int, int]:
        """(parameters that are trained to the end, bytes at the peak for all that is kept of
        them: values, gradients, two moments, and what else there is), for such modules."""

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """What the optimizer moves."""

    @abstractmethod
    def installed(self) -> AbstractContextManager[None]:
        """Inside, the model's own forward includes the update; outside, the model is as before."""

    @abstractmethod
    def deltas(self, dtype: torch.dtype) -> dict[str, Delta]:
        """What was learned, as plain values of `dtype` on the CPU."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that `load` needs to go on from here: copies, on the CPU."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up a `state`; `parameters` may be others afterwards."""

    # Most kinds have nothing to do at these moments.

    def begin(self, losses: Iterable[Loss]) -> None:  # noqa: B027
        """Called once, before the first step, with the losses of a few batches. Call one at a
        time."""

    def stepped(self, step: int, epoch: int, loss: Loss) -> None:  # noqa: B027
        """Called after step number `step`, in epoch `epoch` from 0; `loss` is of its batch."""

    def settle(self, optimizer: torch.optim.AdamW, epoch: int) -> torch.optim.AdamW:
        """Called after epoch `epoch`; the optimizer to go on with."""
        return optimizer

    def young(self, epoch: int) -> bool:
        """Whether what there is at the end of epoch `epoch` was hardly trained as it is now, and is
        no candidate for the best one."""
        return False
