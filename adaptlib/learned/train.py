"""train_router: from tasks to skills, or from tasks and experts, to a router that was trained."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

import adaptlib
from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.learned.skills import MixedSkills, Skills, TaskSkills, names_of
from adaptlib.routing.mhr import MHR
from adaptlib.routing.mope import MoPE
from adaptlib.routing.per_task import TaskRouter, blend
from adaptlib.routing.poly import Polytropon
from adaptlib.routing.router import Router
from adaptlib.training.loop import card, run_learner, train
from adaptlib.training.modules import target_modules
from adaptlib.training.options import TrainOptions
from adaptlib.training.plan import Plan, plan
from adaptlib.training.run import Progress
from adaptlib.training.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SKILLS, HEADS = 8, 8
LOGITS_LR = 0.1  # of z; the skills have the rate of the options (arXiv:2211.03831, appendix A)
ROUTER_LR = 3e-3
DEFAULTS = TrainOptions(rank=4, alpha=8.0)
FORMAT = 1  # raised where the same data and options would give other bytes than before

LEARNED = {"mhr": MHR, "mope": MoPE, "poly": Polytropon}


@final
@dataclass(frozen=True)
class Learned:
    """A router, the experts it routes between by the names that it knows them by, and what there is
    to know of its training: losses, steps, a `key` of all that decides it."""

    router: Router
    experts: Mapping[str, Expert]
    metrics: Mapping[str, float]
    steps: int
    key: str


def train_router(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[Task],
    *,
    router: str = "mhr",
    name: str = "mhr",
    skills: int = SKILLS,
    heads: int | None = None,
    experts: Mapping[str, Expert] | None = None,
    only_router: bool = False,
    scope: str = "token",
    top_k: int | None = None,
    temperature: float = 1.0,
    balance: float = 0.0,
    router_lr: float | None = None,
    options: TrainOptions = DEFAULTS,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | Callable[[str], Path] | None = None,
    checkpoint_every: float = 60.0,
) -> Learned:
    """Train a router on tasks, with new skills (LoRA experts called `NAME/skill-0`, ...) or with
    `experts`, which go on learning unless it is `only_router`.

    `poly` and `mhr` learn how much of each skill a task takes (arXiv:2202.13914, 2211.03831), the
    second with `heads` blocks of each side. `mope` learns a router that sees what enters each
    module: with `scope` "token" the experts' outputs are mixed, all or the `top_k` best, with
    "sequence" their parameters by example (SMEAR); `balance` is the weight of the loss that spreads
    rows over experts. `router_lr` is the learning rate of what routes (.1 for logits of tasks, .003
    for mope), that of `options` the skills'.

    The loop, the loss, checkpoints and `options` are those of `train`; `checkpoint` may also say
    the file for a `key`. The model is as before afterwards. UsageError where options, data and
    experts do not go together.
    """
    check_options(
        router, scope=scope, heads=heads, top_k=top_k, balance=balance, temperature=temperature
    )
    if only_router and experts is None:
        raise UsageError("a router alone is trained on experts that there are", hint="--experts")
    by_task = router != "mope"
    heads = 1 if router == "poly" else HEADS if heads is None else heads
    lr = router_lr if router_lr is not None else LOGITS_LR if by_task else ROUTER_LR
    if experts is not None:
        experts = dict(experts.items())
        rank = max(expert.rank or 1 for expert in experts.values())
        options = replace(options, target=tuple(next(iter(experts.values())).deltas), rank=rank)
    the_plan = plan(model, tokenizer, tasks, options=options, name=name)
    decided = {
        "format": FORMAT,
        "router": router,
        "skills": skills if experts is None else None,
        "experts": [expert.fingerprint for expert in (experts or {}).values()],
        "only_router": only_router,
        "heads": heads if by_task else None,
        "mope": None if by_task else [scope, top_k, temperature, balance],
        "router_lr": lr,
        "tasks": [example.task for example in the_plan.train],
    }
    the_plan = replace(the_plan, key=_key(the_plan, decided))
    common: dict[str, Any] = {
        "skills": skills,
        "experts": experts,
        "trained": not only_router,
        "speed": lr / options.lr,
    }

    def make() -> Skills:
        modules = target_modules(model, options.target)
        if by_task:
            return TaskSkills(modules, options, tasks=len(tasks), heads=heads, **common)
        mope = {"scope": scope, "top_k": top_k, "temperature": temperature, "balance": balance}
        return MixedSkills(modules, options, **mope, **common)

    def take(learner: Skills) -> tuple[list[dict[str, LoRADelta]], dict[str, torch.Tensor]]:
        found = {k: v.detach().to("cpu", copy=True) for k, v in learner.router.items()}
        return learner.experts(options.dtype), found

    (deltas, found), counts = run_learner(
        the_plan,
        model,
        tokenizer,
        make,
        take,
        progress=progress,
        checkpoint=checkpoint(the_plan.key) if callable(checkpoint) else checkpoint,
        checkpoint_every=checkpoint_every,
    )
    about = card(the_plan, counts)
    if experts is not None and only_router:
        made = experts
    else:
        about["training"] |= {key: decided[key] for key in ("router", "skills", "router_lr")}
        made = {
            called: Expert(the_plan.pin["id"], part, _of_skill(about, i))
            for i, (called, part) in enumerate(
                zip(names_of(name, len(deltas)), deltas, strict=True)
            )
        }
    routing = _router(router, made, found, [task.name for task in tasks], decided)
    return Learned(routing, made, about["metrics"], counts.step, the_plan.key)


def check_options(
    router: str,
    *,
    scope: str,
    heads: int | None,
    top_k: int | None,
    balance: float,
    temperature: float,
) -> None:
    """UsageError for what no router of this name can be trained with."""
    if router not in LEARNED:
        raise UsageError(f"router {router!r} is not one that is trained: {', '.join(LEARNED)}")
    if scope not in ("token", "sequence"):
        raise UsageError(
            f"mope chooses by token or by sequence; got scope {scope!r}", hint="--scope sequence"
        )
    only = {"scope": scope != "token", "top_k": top_k is not None, "balance": balance != 0}
    only |= {"temperature": temperature != 1}
    if router != "mope" and any(only.values()):
        first = next(key for key, given in only.items() if given)
        raise UsageError(f"router {router} has no {first}", hint="it is an option of mope")
    if heads is not None and router != "mhr":
        raise UsageError(f"router {router} has no heads", hint="it is an option of mhr")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k is 1 or more; got {top_k}")
    if not balance >= 0 or not temperature > 0:
        raise UsageError(
            f"balance is 0 or more and temperature above 0; got {balance} and {temperature}"
        )


def _key(the_plan: Plan, decided: Mapping[str, Any]) -> str:
    text = json.dumps([the_plan.key, decided], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _of_skill(about: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The card of a skill: what it was trained with; the losses are those of all together."""
    said = {"description": f"skill {i} of {about['task']}, used together with the others"}
    kept = {key: value for key, value in about.items() if key != "task"}
    return kept | said | {"tasks": about.get("tasks") or [about["task"]]}


def _router(
    router: str,
    experts: Mapping[str, Expert],
    found: Mapping[str, torch.Tensor],
    tasks: Sequence[str],
    decided: Mapping[str, Any],
) -> Router:
    if router == "mhr":
        return MHR.fit(experts, logits=found, tasks=tasks)
    if router == "poly":
        return Polytropon.fit(experts, logits=found, tasks=tasks)
    scope, top_k, temperature, _ = decided["mope"]
    tables: dict[str, dict[str, torch.Tensor]] = {"rows": {}, "bias": {}}
    for name, value in found.items():
        kind, _, module = name.partition(".")
        tables[kind][module] = value
    return MoPE.fit(
        experts,
        rows=tables["rows"],
        bias=tables["bias"],
        top_k=top_k,
        temperature=temperature,
        mix="outputs" if scope == "token" else "factors",
        scope="token" if scope == "token" else "sequence",
    )


def average(router: TaskRouter, skills: Mapping[str, Expert]) -> Expert:
    """The skills as one expert, A and B averaged with equal weights: what MHR-μ begins with
    (arXiv:2211.03831, section 3.2)."""
    alike = router.answering(None)
    held = {name: skills[name] for name in router.experts}
    first = next(iter(held.values()))
    deltas = {
        module: blend(
            module,
            [held[router.experts[i]].deltas[module] for i in columns],
            alike.weights(module),
        )
        for module, columns in router.columns.items()
    }
    parents = [{"name": name} for name in held]
    said = {"description": f"{len(held)} skills, averaged", "parents": parents}
    kept = {key: first.card[key] for key in ("base", "tasks", "licence") if key in first.card}
    return Expert(first.base, deltas, kept | said | {"adaptlib": adaptlib.__version__})


def adapt(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    router: TaskRouter,
    skills: Mapping[str, Expert],
    *,
    mode: str = "mu",
    name: str | None = None,
    router_lr: float = LOGITS_LR,
    options: TrainOptions = DEFAULTS,
    progress: Callable[[Progress], None] | None = None,
) -> Learned | Expert:
    """A new task for skills that there are (arXiv:2211.03831, section 3.2): `z` trains its logits
    and nothing else, `full` the skills with them, and `mu` averages the skills to one expert and
    trains that on. The first two give a router of the one task, the last an expert."""
    if mode == "mu":
        start = average(router, skills)
        rank = start.rank or options.rank
        wanted = replace(options, rank=rank, alpha=2.0 * rank, target=tuple(start.deltas))
        return train(
            model, tokenizer, task, options=wanted, name=name, start=start, progress=progress
        )
    if mode not in ("z", "full"):
        raise UsageError(f"mode is z, full or mu; got {mode!r}", hint="--mode mu")
    return train_router(
        model,
        tokenizer,
        [task],
        router=router.name,
        name=name or task.name,
        heads=next(iter(router.logits.values())).shape[1] if router.name == "mhr" else None,
        experts={one: skills[one] for one in router.experts},
        only_router=mode == "z",
        router_lr=router_lr,
        options=options,
        progress=progress,
    )
