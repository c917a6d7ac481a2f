"""Evaluate routers on tasks: what is known is taken from the cache, the rest is computed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import numpy as np

from adaptlib.errors import UsageError
from adaptlib.evaluation.answers import PASSES, Asked, Limits, Records
from adaptlib.evaluation.cache import Cache, subject_digest
from adaptlib.evaluation.metrics import Metric, likeliest, metric_of
from adaptlib.evaluation.statistics import interval
from adaptlib.experts.expert import Expert
from adaptlib.routing.attach import attach
from adaptlib.routing.per_task import TaskRouter
from adaptlib.routing.router import Router
from adaptlib.training.tasks import Item, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@final
@dataclass(frozen=True, eq=False)
class Subject:
    """Who is evaluated: experts and the router that chooses among them, or the model as it is
    (no router). `label` is what results call it."""

    label: str
    experts: Mapping[str, Expert] = field(default_factory=dict)
    router: Router | None = None

    def answering(self, task: str) -> "Subject":
        """The same for one task, where the router learned something for each (Polytropon, MHR);
        of a task that it did not learn, every skill counts alike."""
        if not isinstance(self.router, TaskRouter):
            return self
        known = task if task in self.router.tasks else None
        if known == self.router.task:
            return self
        return Subject(self.label, self.experts, self.router.answering(known))

    @cached_property
    def digest(self) -> str:
        """Who this is, whatever it is called. UsageError where the router is not of the experts."""
        return subject_digest(self.experts, self.router)


@final
@dataclass(frozen=True, eq=False)
class Result:
    """One metric of one subject on one task. `values` are those of the rows, in their order;
    `value` is their mean, within `low` and `high` (95%, over rows). `said` are the answers or
    labels, empty for losses. `cut` inputs were shortened to fit; `computed` rows were not known
    before."""

    subject: str
    task: str
    split: str
    metric: str
    values: tuple[float, ...]
    low: float
    high: float
    said: tuple[str, ...] = ()
    category: str | None = None
    cut: int = 0
    computed: int = 0

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def value(self) -> float:
        return sum(self.values) / len(self.values)

    def document(self) -> dict[str, Any]:
        """As `adaptlib eval --json` has it."""
        return {
            "router": self.subject,
            "task": self.task,
            "split": self.split,
            "metric": self.metric,
            "value": self.value,
            "n": self.n,
            "low": self.low,
            "high": self.high,
            "category": self.category,
            "cut": self.cut,
        }


# Called with (subject, task, pass, rows that are known, rows) at the start of each and after each
# batch.
Progress = Callable[[str, str, str, int, int], None]


def evaluate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    subject: Subject,
    task: Task,
    *,
    metric: str = "exact_match",
    split: str = "test",
    rows: int | None = None,
    limits: Limits = Limits(),  # noqa: B008 -- it is frozen
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Result:
    """One metric of one subject on one task.

        router = Arrow.fit(experts)
        evaluate(model, tokenizer, Subject("arrow", experts, router), task, metric="rouge_l")

    `rows` takes the first rows of the split. With a `cache` nothing is computed twice, and what was
    computed before an interruption is kept. UsageError where the metric does not fit the task or
    the router not the experts, NotFoundError for a metric or split that is not there.
    """
    (result,) = evaluate_all(
        model,
        tokenizer,
        [(subject, task)],
        metrics=[metric],
        split=split,
        rows=rows,
        limits=limits,
        cache=cache,
        progress=progress,
    )
    return result


def evaluate_all(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Iterable[tuple[Subject, Task]],
    *,
    metrics: Sequence[str] = ("exact_match",),
    split: str = "test",
    rows: int | None = None,
    limits: Limits = Limits(),  # noqa: B008 -- it is frozen
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """`evaluate` of many, one after the other. Metrics that are made from the same answers share
    them. Experts are put on the model where there is something to compute, and stay on it for the
    tasks that follow of the same subject."""
    chosen = [metric_of(name) for name in metrics]
    if rows is not None and rows < 1:
        raise UsageError(f"rows is 1 or more; got {rows}", hint="--rows 100")
    if limits.batch_size < 1:
        raise UsageError(f"batch_size is 1 or more; got {limits.batch_size}")
    with ExitStack() as stack:
        on = _Runner(model, tokenizer, stack)
        for subject, task in pairs:
            for metric in chosen:
                metric.check(task)
            asked = Asked(task, split, tuple(range(len(task.split(split)[:rows]))))
            found: dict[str, tuple[Records, int]] = {}
            for needs in dict.fromkeys(metric.needs for metric in chosen):
                found[needs] = _records(
                    on, subject.answering(task.name), asked, needs, limits, cache, progress
                )
            for metric in chosen:
                yield _result(metric, subject.label, asked, *found[metric.needs])


@final
class _Runner:
    """The model with the experts of the last subject that had something to compute."""

    def __init__(self, model: Any, tokenizer: Any, stack: ExitStack) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stack = stack
        self.subject: Subject | None = None
        self.runs: Any = None

    def of(self, subject: Subject) -> Any:
        if subject is self.subject:
            return self.runs
        self.stack.close()
        self.subject = None
        self.runs = self.model
        if subject.router is not None:
            self.runs = self.stack.enter_context(
                attach(self.model, subject.experts, subject.router, tokenizer=self.tokenizer)
            )
        self.subject = subject
        return self.runs


def _records(
    on: _Runner,
    subject: Subject,
    asked: Asked,
    needs: str,
    limits: Limits,
    cache: Cache | None,
    progress: Progress | None,
) -> tuple[Records, int]:
    """What a pass finds of every row, and how many of them were not known before."""
    digest = subject.digest  # it checks the router, so also without a cache
    key = cache.key(digest, asked, needs, limits) if cache else ""
    found = (
        {p: r for p, r in cache.read(key, needs).items() if p < len(asked.places)} if cache else {}
    )
    left = tuple(place for place in asked.places if place not in found)
    label, name, total = subject.label, asked.task.name, len(asked.places)
    if progress is not None:
        progress(label, name, needs, total - len(left), total)
    if left:
        some = Asked(asked.task, asked.split, left)
        for records in PASSES[needs](on.of(subject), on.tokenizer, some, limits):
            if cache is not None:
                cache.append(key, records)
            found.update(records)
            if progress is not None:
                progress(label, name, needs, len(found), total)
    return found, len(left)


def _result(metric: Metric, label: str, asked: Asked, records: Records, computed: int) -> Result:
    task, rows = asked.task, asked.rows
    ordered = [records[place] for place in asked.places]
    values = [metric.value(r, row, task) for r, row in zip(ordered, rows, strict=True)]
    _, low, high = interval([np.array(values)])
    return Result(
        label,
        task.name,
        asked.split,
        metric.name,
        tuple(values),
        low,
        high,
        said=_said(metric.needs, ordered, task),
        category=task.category,
        cut=sum(bool(record["cut"]) for record in ordered),
        computed=computed,
    )


def _said(needs: str, records: Sequence[Mapping[str, Any]], task: Task) -> tuple[str, ...]:
    if needs == "answers":
        return tuple(record["answer"] for record in records)
    if needs == "labels":
        return tuple(likeliest(record, task) for record in records)
    return ()


def oracles(
    experts: Mapping[str, Mapping[str, Any]], tasks: Iterable[str]
) -> dict[str, str | None]:
    """For each task the expert that was trained on it, by the cards of the experts: the one with
    the best score on its test rows, else the first by name; None where there is none."""
    found: dict[str, str | None] = {}
    for task in tasks:
        own = [name for name in sorted(experts) if experts[name].get("task") == task]
        found[task] = max(own, key=lambda name: _score(experts[name]), default=None)
    return found


def _score(card: Mapping[str, Any]) -> tuple[float, float]:
    """Larger for a better expert. A card that came from elsewhere may say anything."""
    metrics = card.get("metrics")
    known = metrics if isinstance(metrics, Mapping) else {}

    def number(name: str, sign: float = 1.0) -> float:
        value = known.get(name)
        return sign * value if isinstance(value, int | float) else float("-inf")

    return number("test_exact_match"), number("valid_loss", -1.0)
