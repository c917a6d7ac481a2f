"""One unit of `bench papers`, in a process of its own: train into the library, or score."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

from adaptlib.experts.expert import Expert
from adaptlib.papers.units import GATES, Budget, Unit

CLUSTERS = 6  # of MBC: 26 tasks are too few for the paper's 10
SAMPLES = 20  # prompts of each expert's task that routers see


@final
@dataclass(frozen=True)
class Bench:
    """What a unit works with: where everything is, and which tasks play which role."""

    out: Path
    data: Path
    base: str
    held_in: tuple[str, ...]
    held_out: tuple[str, ...]
    budget: Budget
    library: Path | None = None

    @cached_property
    def kept(self) -> Any:
        """The library of all that is trained."""
        from adaptlib.experts.library import Library

        path = self.library or self.out / "library"
        return Library.open(path, create=not path.exists())

    @cached_property
    def model(self) -> tuple[Any, Any]:
        from adaptlib.experts.base import load

        return load(self.base)

    def task(self, name: str) -> Any:
        from adaptlib.training import read_task

        return read_task(self.data / f"{name}.jsonl")

    def have(self, name: str) -> bool:
        from adaptlib.errors import NotFoundError

        try:
            self.kept.digest(name)
        except NotFoundError:
            return False
        return True

    def options(self, seed: int, **changed: Any) -> Any:
        from adaptlib.training import TrainOptions

        budget = self.budget
        return TrainOptions(seed=seed, rows=budget.rows, epochs=budget.epochs, **changed)


def run(bench: Bench, unit: Unit) -> dict[str, Any]:
    """Do one unit and return what is kept of it."""
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    found = {"train": _train, "score": _score, "adapt": _adapt}[unit.kind](bench, unit)
    return found | {"unit": unit.name, "seconds": round(time.perf_counter() - began, 1)}


def tag(name: str) -> str:
    """A task's name as a part of an expert's."""
    return name.replace("_", "-")


# -- training -------------------------------------------------------------------------------------


def _train(bench: Bench, unit: Unit) -> dict[str, Any]:
    from adaptlib.learned.gates import train_gate
    from adaptlib.learned.train import train_router
    from adaptlib.training import train

    model, tokenizer = bench.model
    seed, at = unit.seed, f"s{unit.seed}"
    steps = 0

    def keep(name: str, tasks: Sequence[str], **options: Any) -> None:
        nonlocal steps
        if bench.have(name):
            return
        kind = options.pop("kind", "lora")
        expert = train(
            model,
            tokenizer,
            [bench.task(task) for task in tasks],
            kind=kind,
            name=name if len(tasks) > 1 else None,
            options=bench.options(seed, **options),
        )
        steps += expert.card["training"]["steps"]
        bench.kept.add(expert, name)

    if unit.what == "private":
        for task in bench.held_in:
            keep(f"{at}/private/{tag(task)}", [task])
    elif unit.what == "sparse":
        for task in bench.held_in:
            keep(f"{at}/sparse/{tag(task)}", [task], kind="sparse")
    elif unit.what == "joint":
        keep(f"{at}/joint", bench.held_in)
    elif unit.what == "mbc":
        for label, tasks in clusters(bench, seed).items():
            keep(f"{at}/mbc/{label}", tasks)
    elif unit.what == GATES:
        for task in bench.held_in:
            if bench.have(f"{at}/gated/{tag(task)}"):
                continue
            expert = bench.kept[f"{at}/private/{tag(task)}"]
            gated = train_gate(model, tokenizer, expert, bench.task(task))
            steps += gated.card["gate"]["steps"]
            bench.kept.add(gated, f"{at}/gated/{tag(task)}")
    else:
        from adaptlib.routing import save_router

        router, _, scope = unit.what.partition("_")
        learned = train_router(
            model,
            tokenizer,
            [bench.task(task) for task in bench.held_in],
            router=router,
            name=f"{at}/{tag(unit.what)}",
            scope="sequence" if scope == "example" else "token",
            options=bench.options(seed, rank=4, alpha=8.0),
        )
        steps = learned.steps
        for name, expert in learned.experts.items():
            bench.kept.add(expert, name, replace=True)
        save_router(bench.kept, f"{at}/{tag(unit.what)}", learned.router)
    return {"steps": steps}


def clusters(bench: Bench, seed: int) -> dict[str, list[str]]:
    """The tasks whose private experts MBC puts together (arXiv:2405.11157, section 3)."""
    from adaptlib.clustering import mbc

    private = {task: bench.kept[f"s{seed}/private/{tag(task)}"] for task in bench.held_in}
    return mbc(private, k=min(CLUSTERS, len(private)), seed=seed)


# -- systems --------------------------------------------------------------------------------------


def system(
    bench: Bench, what: str, seed: int
) -> tuple[dict[str, Expert], Any, Mapping[str, str] | None]:
    """(experts, router, the expert of each task where the task names it). Router None: the base,
    or one expert, by the third."""
    from adaptlib import routing as r
    from adaptlib.merging import MERGES

    at = f"s{seed}"
    if what == "base":
        return {}, None, None
    if what == "joint":
        one = bench.kept[f"{at}/joint"]
        return {"joint": one}, None, dict.fromkeys((*bench.held_in, *bench.held_out), "joint")
    family, _, rest = what.partition("_")
    if what in ("poly", "mhr", "mope_token", "mope_example"):
        router, held = r.load_router(bench.kept, f"{at}/{tag(what)}")
        return dict(held), router, None
    if family == "mbc":
        groups = clusters(bench, seed)
        own = {task: label for label, tasks in groups.items() for task in tasks}
        experts = {label: bench.kept[f"{at}/mbc/{label}"] for label in groups}
    else:
        kind = "gated" if what == "phatgoose" else "sparse" if family == "sparse" else "private"
        own = {task: tag(task) for task in bench.held_in}
        experts = {name: bench.kept[f"{at}/{kind}/{name}"] for name in own.values()}
    if family not in ("mbc", "sparse"):
        rest = what
    if rest == "oracle":
        return experts, None, own
    if rest.startswith("merge"):
        method = {"merge_linear": "linear", "merge_ties": "ties", "merge": "uniform_sparse"}[rest]
        options: dict[str, Any] = {}
        if method == "linear":  # the mean, since a sum of so many leaves the rails
            options["weights"] = dict.fromkeys(experts, 1 / len(experts))
        merged = MERGES[method](experts, **options)
        every = dict.fromkeys((*bench.held_in, *bench.held_out), "merged")
        return {"merged": merged}, None, every
    return experts, _router(bench, rest, experts, own), None


def _router(bench: Bench, name: str, experts: Mapping[str, Expert], own: Mapping[str, str]) -> Any:
    from adaptlib import routing as r

    model, tokenizer = bench.model
    if name == "arrow_prompt1":
        return r.Arrow.fit(experts, top_k=1, scope="prompt")
    given: dict[str, Any] = {}
    if name in ("cm", "tp", "arrow_tuned"):
        given["samples"] = {
            expert: [task.prompt(row) for row in task.split("train")[:SAMPLES]]
            for task, expert in ((bench.task(task), expert) for task, expert in own.items())
        }
    if name in ("cm", "arrow_tuned"):
        given |= {"model": model, "tokenizer": tokenizer}
    return r.ROUTERS[name].fit(experts, **given)


# -- scoring --------------------------------------------------------------------------------------


def _score(bench: Bench, unit: Unit) -> dict[str, Any]:
    from adaptlib.routing.per_task import TaskRouter
    from adaptlib.routing.router import Router

    experts, router, own = system(bench, unit.what, unit.seed)
    tasks = [*bench.held_in, *bench.held_out]
    hits: dict[str, str] = {}
    for name in tasks:
        one: Router | None = router
        if isinstance(router, TaskRouter):
            one = router.answering(name if name in router.tasks else None)
        if own is not None and name not in own:
            continue  # the oracle knows no expert for it
        hits[name] = answers(bench, experts, one, None if own is None else own[name], name)
    return {"hits": hits, **_quality(bench, unit, experts, router)}


def answers(
    bench: Bench, experts: Mapping[str, Expert], router: Any, one: str | None, name: str
) -> str:
    """Which of the first test rows are answered exactly: a 1 or 0 for each."""
    from adaptlib.evaluation.score import exact_match, same
    from adaptlib.routing import Named, attach
    from adaptlib.training.tasks import output_of

    (model, tokenizer), task = bench.model, bench.task(name)
    rows = bench.budget.score_rows

    def ask(on: Any) -> str:
        score = exact_match(on, tokenizer, task, limit=rows, batch_size=50)
        pairs = zip(score.predictions, task.split("test")[:rows], strict=True)
        return "".join(str(int(same(said, output_of(row)))) for said, row in pairs)

    if one is not None:
        experts = {one: experts[one]}
        router = Named.fit(experts, expert=one)
    if router is None:
        return ask(model)
    with attach(model, experts, router, tokenizer=tokenizer) as routed:
        return ask(routed)


def _quality(
    bench: Bench, unit: Unit, experts: Mapping[str, Expert], router: Any
) -> dict[str, Any]:
    """Whom a router chooses on held-in prompts: agreement, entropy, experts used."""
    from adaptlib.evaluation import quality
    from adaptlib.routing.per_task import TaskRouter

    if router is None or isinstance(router, TaskRouter):
        return {}
    model, tokenizer = bench.model
    prompts, own = [], []
    labels = {}
    if unit.what.startswith("mbc"):
        labels = {t: g for g, tasks in clusters(bench, unit.seed).items() for t in tasks}
    elif not unit.what.startswith("mope"):
        labels = {task: tag(task) for task in bench.held_in}
    for name in bench.held_in:
        task = bench.task(name)
        for row in task.split("test")[:8]:
            prompts.append(task.prompt(row))
            own.append(labels.get(name))
    found = quality.measure(model, tokenizer, experts, router, prompts, own=own)
    keys = ("agreement", "entropy", "token_entropy", "used", "above", "varied", "cost")
    return {"quality": {key: getattr(found, key) for key in keys}}


# -- a new task from a few examples ---------------------------------------------------------------


def _adapt(bench: Bench, unit: Unit) -> dict[str, Any]:
    hits = {}
    for name in bench.held_out:
        experts, router, one = _adapted(bench, unit, name)
        hits[name] = answers(bench, experts, router, one, name)
    return {"hits": hits}


def _adapted(bench: Bench, unit: Unit, name: str) -> tuple[Mapping[str, Expert], Any, str | None]:
    from adaptlib.learned.train import adapt
    from adaptlib.routing import load_router
    from adaptlib.routing.per_task import TaskRouter
    from adaptlib.training import train

    (model, tokenizer), seed, at = bench.model, unit.seed, f"s{unit.seed}"
    task = few(bench, name, seed)
    options = replace(bench.options(seed), rows=None, epochs=bench.budget.shot_epochs)
    if unit.what in ("lora", "joint_tuned"):
        start = bench.kept[f"{at}/joint"] if unit.what == "joint_tuned" else None
        expert = train(model, tokenizer, task, options=options, start=start)
        return {"new": expert}, None, "new"
    if unit.what == "lorahub":
        return {"new": _lorahub(bench, at, task)}, None, "new"
    family, _, mode = unit.what.partition("_")
    router, held = load_router(bench.kept, f"{at}/{family}")
    options = replace(options, rank=4, alpha=8.0)
    assert isinstance(router, TaskRouter)
    made = adapt(model, tokenizer, task, router, held, mode=mode, name="new", options=options)
    if isinstance(made, Expert):
        return {"new": made}, None, "new"
    assert isinstance(made.router, TaskRouter)
    return made.experts, made.router.answering(name), None


def few(bench: Bench, name: str, seed: int) -> Any:
    """The task with `shots` train rows of this seed's own, and none to validate on."""
    import random

    from adaptlib.training import Task

    task = bench.task(name)
    rows = list(task.split("train"))
    chosen = random.Random(seed).sample(rows, min(bench.budget.shots, len(rows)))
    return Task(task.name, task.instruction, {"train": tuple(chosen)}, category=task.category)


def _lorahub(bench: Bench, at: str, task: Any) -> Expert:
    from adaptlib.evaluation import merge_data
    from adaptlib.merging import MERGES

    model, tokenizer = bench.model
    experts = {tag(name): bench.kept[f"{at}/private/{tag(name)}"] for name in bench.held_in}
    data = merge_data(model, tokenizer, {"new": task})
    return MERGES["lorahub"](experts, data=data)
