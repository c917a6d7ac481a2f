"""Learner and Trainee: the part of a model that learns, and how the model runs with it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Expert
from adaptlib.training.encode import Batch
from adaptlib.training.modules import Linear
from adaptlib.training.options import TrainOptions

Loss = Callable[[], Tensor]


class Learner(ABC):
    """What is trained on a model that is frozen itself: an update (`Trainee`), or a router.

    The loop calls `installed` around everything, `begin` once before the first step, `reads` before
    each forward, `stepped` after each step of the optimizer and `settle` after each epoch.
    """

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """What the optimizer moves."""

    def groups(self) -> list[dict[str, Any]]:
        """The same in groups, in the same order, each with a `speed`: its learning rate over the
        one that was asked for."""
        return [{"params": self.parameters(), "speed": 1.0}]

    @abstractmethod
    def installed(self) -> AbstractContextManager[None]:
        """Inside, the model's own forward includes the update; outside, the model is as before."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that `load` needs to go on from here: copies, on the CPU."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up a `state`; `parameters` may be others afterwards."""

    # Most have nothing to do at these moments.

    def reads(self, batch: Batch) -> None:  # noqa: B027
        """Told of each batch before the model reads it, also of those for validation."""

    def extra(self) -> Tensor | None:
        """What is to be added to the loss of the batch that was just read, in training."""
        return None

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


class Trainee(Learner):
    """The trainable update of some linear modules of one model, which becomes one expert.

    A new kind of training is a subclass in its own file and a line in `plan.KINDS`. `own` names
    the options that are of no use to other kinds.
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
    def deltas(self, dtype: torch.dtype) -> dict[str, Delta]:
        """What was learned, as plain values of `dtype` on the CPU."""

    def start_from(self, expert: Expert) -> None:
        """Begin with what `expert` has learned; `plan.check_start` was content with it."""
        raise NotImplementedError
