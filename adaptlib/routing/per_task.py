"""Routing that is learned for each task: skills, and how much of each a task takes."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.lora import LoRADelta
from adaptlib.routing.router import Choice, Router


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskRouter(Router):
    """Every token of a task gets the same mixture of skills, which are LoRA experts: A and B are
    averaged one by one, each with the task's weights at that module.

    `logits` is z, one number for each task, head and skill there; the weights are
    α_i = σ(z_i) / Σ_j σ(z_j). With several heads the input of A and the output of B fall into as
    many blocks of one size, and each has weights of its own. `task` is the one that is answered;
    without one every skill counts alike.
    """

    tasks: tuple[str, ...]
    logits: Mapping[str, Float[Tensor, "task head here"]] = field(repr=False)
    task: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix != "factors" or self.scope != "token" or self.threshold is not None:
            raise UsageError(
                f"router {self.name} mixes factors, the same for every token; got mix "
                f"{self.mix!r}, scope {self.scope!r}, threshold {self.threshold}"
            )
        if self.logits.keys() != self.columns.keys():
            raise UsageError("logits and columns name different modules")
        for module, z in self.logits.items():
            tasks, here = len(self.tasks), len(self.columns[module])
            if z.ndim != 3 or tuple(z.shape[::2]) != (tasks, here):
                raise UsageError(
                    f"{module} wants logits ({tasks} tasks, heads, {here} skills); got "
                    f"{tuple(z.shape)}"
                )
        if self.task is not None and self.task not in self.tasks:
            close = difflib.get_close_matches(self.task, self.tasks, n=1)
            raise NotFoundError(
                f"router {self.name} learned no task {self.task!r}; it learned "
                f"{', '.join(self.tasks[:8])}{', ...' if len(self.tasks) > 8 else ''}",
                hint=f"--task {close[0] if close else next(iter(self.tasks), 'TASK')}, or no task: "
                "every skill then counts alike",
            )

    def answering(self, task: str | None) -> "TaskRouter":
        """The same router for another of its tasks. NotFoundError where it learned no such task."""
        return replace(self, task=task)

    def weights(self, module: str) -> Float[Tensor, "head here"]:
        """α of the task at `module`: rows sum to 1."""
        z = self.logits[module]
        if self.task is None:
            return torch.full_like(z[0], 1 / z.shape[2])
        return shares(z[self.tasks.index(self.task)])

    def route(self, module: str, x: Float[Tensor, "tok d_in"]) -> Choice:
        """Each skill with the mean of its weights over the heads, largest first. What is added is
        `blended`, which these sum up."""
        columns = torch.tensor(self.columns_at(module), device=x.device)
        mean, order = self.weights(module).float().mean(0).to(x.device).sort(descending=True)
        return Choice(columns[order].expand(len(x), -1), mean.expand(len(x), -1))

    def blended(self, module: str, deltas: Sequence[Delta]) -> LoRADelta:
        return blend(module, deltas, self.weights(module))


def shares(z: Float[Tensor, "*row skill"]) -> Float[Tensor, "*row skill"]:
    """α_i = σ(z_i) / Σ_j σ(z_j) (arXiv:2211.03831, section 2.2)."""
    gates = z.sigmoid()
    return gates / gates.sum(-1, keepdim=True)


def blend(module: str, deltas: Sequence[Delta], weights: Float[Tensor, "head skill"]) -> LoRADelta:
    """A = Σ_i α_i A_i and B = Σ_i α_i B_i, block by block: head k has the k-th block of A's columns
    and of B's rows. Where ranks differ, the smaller are filled up with zeros; scales go into B.

    UsageError for sparse updates, and for sides that do not fall into as many blocks.
    """
    heads = len(weights)
    loras = [delta for delta in deltas if isinstance(delta, LoRADelta)]
    if len(loras) < len(deltas):
        raise UsageError(
            f"skills are LoRA, since their factors are averaged; {module} has sparse ones"
        )
    d_out, d_in = loras[0].shape
    check_heads(module, (d_out, d_in), heads)
    rank = max(delta.rank for delta in loras)
    weights = weights.float().cpu()
    a, b = torch.zeros(rank, d_in), torch.zeros(d_out, rank)
    for delta, alpha in zip(loras, weights.T, strict=True):
        a[: delta.rank] += delta.a.detach().float().cpu() * alpha.repeat_interleave(d_in // heads)
        scaled = delta.b.detach().float().cpu() * delta.scale
        b[:, : delta.rank] += scaled * alpha.repeat_interleave(d_out // heads)[:, None]
    return LoRADelta(a, b)


def check_heads(module: str, shape: tuple[int, int], heads: int) -> None:
    """UsageError where the sides of a module do not fall into `heads` blocks of one size."""
    if heads < 1 or shape[0] % heads or shape[1] % heads:
        raise UsageError(
            f"{heads} heads do not cut {module}, {shape[0]} x {shape[1]}, into equal blocks",
            hint="--heads 4, or another number that divides both sides",
        )
