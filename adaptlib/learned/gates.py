"""Gates: when is an expert wanted? One vector a module, trained after it (PHATGOOSE,
arXiv:2402.05859, section 3.2)."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

import adaptlib
from adaptlib.errors import UsageError
from adaptlib.experts.base import BaseModel, check_fit
from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.training.hooks import Hook, hooked
from adaptlib.training.loop import run_learner
from adaptlib.training.modules import Linear
from adaptlib.training.options import TrainOptions
from adaptlib.training.plan import Plan, plan
from adaptlib.training.run import Counts, Progress
from adaptlib.training.tasks import Task
from adaptlib.training.trainee import Learner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEPS = 100  # as in the paper
GATES = TrainOptions(lr=5e-3)

Update = Callable[[Float[Tensor, "tok d_in"], Float[Tensor, "tok 1"]], Float[Tensor, "tok d_out"]]


def train_gate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    expert: Expert,
    task: Task,
    *,
    steps: int = STEPS,
    options: TrainOptions = GATES,
    progress: Callable[[Progress], None] | None = None,
) -> Expert:
    """The same expert with a gate at each of its modules, trained on `task`, its own.

    The model runs with y = W x + σ(v · x) ΔW x at each module, where only the gates v move: from 0,
    where every token gets half of the update, in about `steps` steps over the first train rows, in
    several epochs where there are few. The loss is that of `train`. What the gates are for is
    another matter: routing compares them with each other (`PHATGOOSE`).

    Of `options`, `lr`, `schedule`, `warmup`, `batch_size`, `accumulate`, `clip`, `weight_decay`,
    `bf16`, `max_length`, `drop_long`, `rows` and `seed` are used. The card says under `gate` how it
    was trained. The model is as before afterwards; same inputs, same gates.

    UsageError for steps < 1 and for what `train` refuses; BaseMismatchError where the expert does
    not fit the model.
    """
    if steps < 1:
        raise UsageError(f"steps is 1 or more; got {steps}")
    base = BaseModel.of(model)
    pin = {"id": expert.base} | dict(expert.card.get("base") or {})
    check_fit(str(expert.card.get("task") or "the expert"), expert.shapes, pin, base)
    the_plan = _plan(model, tokenizer, expert, task, steps, options)
    named = dict(model.named_modules())
    modules: dict[str, Any] = {module: named[module] for module in expert.deltas}
    gates, counts = run_learner(
        the_plan,
        model,
        tokenizer,
        lambda: GateLearner(modules, expert.deltas),
        lambda learner: learner.gates(),
        progress=progress,
    )
    card = dict(expert.card) | {"gate": _about(the_plan, counts)}
    return replace(expert, gates=gates, card=card)


@final
class GateLearner(Learner):
    """A gate for each module, and hooks that add σ(v · x) ΔW x to its output."""

    def __init__(self, modules: Mapping[str, Linear], deltas: Mapping[str, Delta]) -> None:
        self.modules = dict(modules)
        self.values: dict[str, Float[Tensor, " d_in"]] = {}
        self.updates: dict[str, Update] = {}
        for name, module in self.modules.items():
            delta, weight = deltas[name], module.weight
            like = torch.empty(
                0, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32)
            )
            self.values[name] = like.new_zeros(delta.shape[1]).requires_grad_()
            self.updates[name] = _update(delta, like)

    def parameters(self) -> list[Tensor]:
        return list(self.values.values())

    def installed(self) -> AbstractContextManager[None]:
        return hooked(self.modules, self._hook)

    def _hook(self, name: str) -> Hook:
        gate, update = self.values[name], self.updates[name]

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].flatten(0, -2).to(gate.dtype)
            added = update(x, (x @ gate).sigmoid()[:, None])
            return output + added.view_as(output).to(output.dtype)

        return add

    def gates(self) -> dict[str, Tensor]:
        """What was learned, float32 on the CPU."""
        return {
            name: value.detach().to("cpu", torch.float32, copy=True)
            for name, value in self.values.items()
        }

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().to("cpu", copy=True) for name, value in self.values.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(state[name])


def _update(delta: Delta, like: Tensor) -> Update:
    """ΔW x times a share of each token, computed as `like`."""
    if isinstance(delta, LoRADelta):
        a, b = delta.a.to(like), delta.b.to(like) * delta.scale
        return lambda x, share: (share * (x @ a.T)) @ b.T
    assert isinstance(delta, SparseDelta)
    matrix = delta.matrix().to(like)
    return lambda x, share: share * torch.sparse.mm(matrix, x.T).T


def _plan(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    expert: Expert,
    task: Task,
    steps: int,
    options: TrainOptions,
) -> Plan:
    """About `steps` steps: as many epochs as that takes with all rows, each with its share of them.
    Without `valid`, as in the paper: a hundred steps have no best epoch."""
    available = len(task.rows.get("train", ()))
    available = max(1, min(available, options.rows or available))
    size = options.batch_size * options.accumulate
    epochs = math.ceil(steps / math.ceil(available / size))
    wanted = replace(
        options,
        epochs=epochs,
        rows=min(available, math.ceil(steps / epochs) * size),
        patience=None,
        best_epoch=False,
        target=tuple(expert.deltas),
        rank=1,  # of no use here, but no module may be smaller
    )
    return replace(plan(model, tokenizer, task, options=wanted, base=expert.base), valid=())


def _about(the_plan: Plan, counts: Counts) -> dict[str, Any]:
    """What a card keeps of the training of a gate."""
    options, task = the_plan.options, the_plan.tasks[0]
    used = ("epochs", "lr", "schedule", "warmup", "batch_size", "accumulate", "clip", "seed")
    return {
        "steps": counts.step,
        "rows": len(the_plan.train),
        **{name: getattr(options, name) for name in used},
        "task": {"task": task.name, "digest": task.digest},
        "train_loss": round(counts.train_loss, 4),  # over the last epoch
        "versions": {"adaptlib": adaptlib.__version__, "torch": str(torch.__version__)},
    }
