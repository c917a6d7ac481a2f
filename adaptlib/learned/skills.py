"""Skills: several LoRA experts of one shape that are trained together, or stay as they are, with a
router that is trained on them."""

import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from adaptlib.errors import BaseMismatchError, UsageError
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.routing.mope import MoPE
from adaptlib.routing.per_task import check_heads, shares
from adaptlib.training.encode import IGNORED, Batch
from adaptlib.training.hooks import Hook, hooked
from adaptlib.training.modules import Linear, shape_of
from adaptlib.training.options import TrainOptions
from adaptlib.training.trainee import Learner

START = 1e-3  # logits and router rows begin within ± this, as in Polytropon's code


class Skills(Learner):
    """A and B of S skills at each module, and a subclass's router over them.

    `a` is drawn for each skill as for one LoRA expert, `b` is zero, so that the model begins as it
    is. With `experts` these are the skills instead, and `trained` says whether they move on; where
    ranks differ the smaller are filled up with zeros. `speed` is the router's learning rate over
    the skills' (two-speed training, arXiv:2211.03831, appendix A).
    """

    def __init__(
        self,
        modules: Mapping[str, Linear],
        options: TrainOptions,
        *,
        skills: int,
        experts: Mapping[str, Expert] | None = None,
        trained: bool = True,
        speed: float = 1.0,
    ) -> None:
        if skills < 1:
            raise UsageError(f"skills is 1 or more; got {skills}", hint="--skills 8")
        self.modules = dict(modules)
        self.speed, self.trained = speed, trained
        self.scale = options.alpha / (options.rank**0.5 if options.rslora else options.rank)
        self.a: dict[str, Float[Tensor, "skill rank d_in"]] = {}
        self.b: dict[str, Float[Tensor, "skill d_out rank"]] = {}
        if experts is not None:
            self.scale = 1.0
            self._take_up(experts)
        else:
            self._draw(skills, options)
        for values in (*self.a.values(), *self.b.values()):
            values.requires_grad_(trained)

    def _draw(self, skills: int, options: TrainOptions) -> None:
        for name, module in self.modules.items():
            (d_out, d_in), like = shape_of(module), module.weight
            parts = []
            for skill in range(skills):
                seed = zlib.crc32(f"{name} {skill}".encode()) + options.init_seed
                generator = torch.Generator().manual_seed(seed)
                a = torch.empty(options.rank, d_in)
                parts.append(nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator))
            self.a[name] = torch.stack(parts).to(like.device)
            self.b[name] = torch.zeros(skills, d_out, options.rank, device=like.device)

    def _take_up(self, experts: Mapping[str, Expert]) -> None:
        for name, module in self.modules.items():
            deltas = []
            for expert, value in experts.items():
                delta = value.deltas.get(name)
                if not isinstance(delta, LoRADelta):
                    what = "lacks it" if delta is None else "has a sparse update there"
                    raise UsageError(
                        f"a router is trained on LoRA experts of the same modules; {expert} "
                        f"{what}: {name}",
                        hint="--experts, those of one recipe",
                    )
                if delta.shape != shape_of(module):
                    raise BaseMismatchError(
                        f"{name} is {shape_of(module)} in this model and {delta.shape} in {expert}"
                    )
                deltas.append(delta)
            rank = max(delta.rank for delta in deltas)
            (d_out, d_in), device = shape_of(module), module.weight.device
            self.a[name] = torch.zeros(len(deltas), rank, d_in, device=device)
            self.b[name] = torch.zeros(len(deltas), d_out, rank, device=device)
            for i, delta in enumerate(deltas):
                self.a[name][i, : delta.rank] = delta.a.detach().float()
                self.b[name][i, :, : delta.rank] = delta.b.detach().float() * delta.scale

    @property
    @abstractmethod
    def router(self) -> dict[str, Tensor]:
        """The router's own parameters, by name."""

    @abstractmethod
    def update(
        self, name: str, x: Float[Tensor, "example tok d_in"]
    ) -> Float[Tensor, "example tok d_out"]:
        """What is added to the output of a module."""

    def parameters(self) -> list[Tensor]:
        return [*self._skills(), *self.router.values()]

    def groups(self) -> list[dict[str, object]]:
        groups = [{"params": self._skills(), "speed": 1.0}] if self.trained else []
        return [*groups, {"params": list(self.router.values()), "speed": self.speed}]

    def _skills(self) -> list[Tensor]:
        return [*self.a.values(), *self.b.values()] if self.trained else []

    def installed(self) -> AbstractContextManager[None]:
        return hooked(self.modules, self._hook)

    def _hook(self, name: str) -> Hook:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].unflatten(0, (len(self.batch.rows), -1)) if args[0].ndim == 2 else args[0]
            return output + self.update(name, x.float()).view_as(output).to(output.dtype)

        return add

    def reads(self, batch: Batch) -> None:
        self.batch = batch

    def experts(self, dtype: torch.dtype) -> list[dict[str, LoRADelta]]:
        """The skills as updates, in order."""
        count = len(next(iter(self.a.values())))
        return [
            {
                name: LoRADelta(
                    self.a[name][i].detach().to("cpu", dtype, copy=True),
                    self.b[name][i].detach().to("cpu", dtype, copy=True),
                    self.scale,
                )
                for name in self.modules
            }
            for i in range(count)
        ]

    def state(self) -> dict[str, Tensor]:
        parts = {"a": self.a, "b": self.b} if self.trained else {}
        parts |= {"router": self.router}
        return {
            f"{part}.{name}": value.detach().to("cpu", copy=True)
            for part, values in parts.items()
            for name, value in values.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        parts = {"a": self.a, "b": self.b} if self.trained else {}
        parts |= {"router": self.router}
        with torch.no_grad():
            for part, values in parts.items():
                for name, value in values.items():
                    value.copy_(state[f"{part}.{name}"])


@final
class TaskSkills(Skills):
    """Polytropon and MHR (arXiv:2211.03831, sections 2.2 and 3): logits z of (task, head, skill) at
    each module; the factors of a task's skills are averaged head by head, for each example with
    the weights of its own task."""

    def __init__(
        self,
        modules: Mapping[str, Linear],
        options: TrainOptions,
        *,
        tasks: int,
        heads: int,
        skills: int,
        experts: Mapping[str, Expert] | None = None,
        trained: bool = True,
        speed: float = 1.0,
    ) -> None:
        super().__init__(
            modules, options, skills=skills, experts=experts, trained=trained, speed=speed
        )
        self.logits: dict[str, Float[Tensor, "task head skill"]] = {}
        for name, module in self.modules.items():
            check_heads(name, shape_of(module), heads)
            generator = torch.Generator().manual_seed(
                zlib.crc32(f"{name} logits".encode()) + options.init_seed
            )
            z = torch.empty(tasks, heads, len(self.a[name]))
            z.uniform_(-START, START, generator=generator)
            self.logits[name] = z.to(module.weight.device).requires_grad_()

    @property
    def router(self) -> dict[str, Tensor]:
        return self.logits

    def reads(self, batch: Batch) -> None:
        super().reads(batch)
        # tasks are few and examples many: each task's skills are mixed once
        self.present, self.place = batch.tasks.unique(return_inverse=True)

    def update(
        self, name: str, x: Float[Tensor, "example tok d_in"]
    ) -> Float[Tensor, "example tok d_out"]:
        weights = shares(self.logits[name][self.present.to(x.device)])
        a, b = self.mixed(name, weights)
        place = self.place.to(x.device)
        down = torch.bmm(x, a[place].transpose(1, 2))
        return self.scale * torch.bmm(down, b[place].transpose(1, 2))

    def mixed(
        self, name: str, weights: Float[Tensor, "task head skill"]
    ) -> tuple[Float[Tensor, "task rank d_in"], Float[Tensor, "task d_out rank"]]:
        """A and B of each task, block by block."""
        a, b, heads = self.a[name], self.b[name], weights.shape[1]
        a = torch.einsum("ths,srhi->trhi", weights, a.unflatten(2, (heads, -1)))
        b = torch.einsum("ths,shor->thor", weights, b.unflatten(1, (heads, -1)))
        return a.flatten(2), b.flatten(1, 2)


@final
class MixedSkills(Skills):
    """MoPE: a router that sees what enters the module, by token or by example (see `routing.MoPE`,
    whose scores and choices these are). `balance` is the weight of the load-balancing loss of
    arXiv:2101.03961, section 2.2, S Σ_i f_i P_i, summed over the modules: f_i is the share of rows
    whose largest weight is expert i's, P_i the mean of its weight over all experts' softmax."""

    def __init__(
        self,
        modules: Mapping[str, Linear],
        options: TrainOptions,
        *,
        skills: int,
        experts: Mapping[str, Expert] | None = None,
        trained: bool = True,
        speed: float = 1.0,
        scope: str = "token",
        top_k: int | None = None,
        temperature: float = 1.0,
        balance: float = 0.0,
    ) -> None:
        super().__init__(
            modules, options, skills=skills, experts=experts, trained=trained, speed=speed
        )
        self.balance, self.losses = balance, list[Tensor]()
        rows: dict[str, Tensor] = {}
        bias: dict[str, Tensor] = {}
        count = len(next(iter(self.a.values())))
        for name, module in self.modules.items():
            generator = torch.Generator().manual_seed(
                zlib.crc32(f"{name} router".encode()) + options.init_seed
            )
            start = torch.empty(count, shape_of(module)[1])
            nn.init.normal_(start, std=0.02, generator=generator)
            rows[name] = start.to(module.weight.device).requires_grad_()
            bias[name] = torch.zeros(count, device=module.weight.device).requires_grad_()
        self.choosing = MoPE(
            experts=tuple(str(i) for i in range(count)),
            columns={name: tuple(range(count)) for name in self.modules},
            mix="outputs" if scope == "token" else "factors",
            scope="token" if scope == "token" else "sequence",
            top_k=count if top_k is None else min(top_k, count),
            temperature=temperature,
            rows=rows,
            bias=bias,
        )

    @property
    def router(self) -> dict[str, Tensor]:
        named = {f"rows.{name}": value for name, value in self.choosing.rows.items()}
        return named | {f"bias.{name}": value for name, value in self.choosing.bias.items()}

    def reads(self, batch: Batch) -> None:
        super().reads(batch)
        self.prompt, self.losses = prompts_of(batch), []

    def update(
        self, name: str, x: Float[Tensor, "example tok d_in"]
    ) -> Float[Tensor, "example tok d_out"]:
        router = self.choosing
        if router.scope == "token":
            scores = router.scores(name, x.flatten(0, 1))
            if self.balance:
                real = self.batch.attention_mask.flatten().bool()
                self.losses.append(imbalance(scores[real] / router.temperature))
            added = self._outputs(name, x.flatten(0, 1), self._weights(name, scores))
            return added.unflatten(0, x.shape[:2])
        scores = router.pooled(name, x, self.prompt.to(x.device))
        if self.balance:
            self.losses.append(imbalance(scores / router.temperature))
        weights = self._weights(name, scores)
        a = torch.einsum("es,sri->eri", weights, self.a[name])
        b = torch.einsum("es,sor->eor", weights, self.b[name])
        return self.scale * torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))

    def _weights(self, name: str, scores: Float[Tensor, "row skill"]) -> Float[Tensor, "row skill"]:
        choice = self.choosing.choose(name, scores)
        return torch.zeros_like(scores).scatter(1, choice.index, choice.weight)

    def _outputs(
        self, name: str, x: Float[Tensor, "tok d_in"], weights: Float[Tensor, "tok skill"]
    ) -> Float[Tensor, "tok d_out"]:
        """Σ_i w_i B_i A_i x in two products, as `routing.bank` has it."""
        a, b = self.a[name], self.b[name]
        down = x @ a.flatten(0, 1).T * weights.repeat_interleave(a.shape[1], 1)
        return self.scale * (down @ b.transpose(1, 2).flatten(0, 1))

    def extra(self) -> Tensor | None:
        return self.balance * torch.stack(self.losses).sum() if self.losses else None


def prompts_of(batch: Batch) -> Bool[Tensor, "example tok"]:
    """The tokens before the first that is to be predicted: what a choice for a whole example sees.
    Of a text, all of which is, that is its first token."""
    answers: Int[Tensor, "example tok"] = (batch.labels != IGNORED).long().cumsum(1)
    prompt = (answers == 0) & batch.attention_mask.bool()
    prompt[:, 1:] = prompt[:, :-1].clone()  # the last of the prompt predicts: it is still prompt
    prompt[:, 0] = True
    return prompt & batch.attention_mask.bool()


def imbalance(logits: Float[Tensor, "row skill"]) -> Float[Tensor, ""]:
    """S Σ_i f_i P_i: 1 where rows are spread evenly, S where one expert gets all."""
    chances = logits.softmax(1)
    first = torch.bincount(chances.argmax(1), minlength=logits.shape[1]) / len(logits)
    return logits.shape[1] * (first * chances.mean(0)).sum()


def names_of(name: str, count: int) -> Sequence[str]:
    """What the skills of a router are called in a library."""
    width = len(str(count - 1))
    return tuple(f"{name}/skill-{i:0{width}}" for i in range(count))
