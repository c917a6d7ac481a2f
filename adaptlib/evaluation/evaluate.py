"""evaluate: one metric of one subject on one task, computing only what is not kept already."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from adaptlib.evaluation.answers import PASSES, Asked, Limits, Records
from adaptlib.evaluation.cache import Cache, subject_digest
from adaptlib.evaluation.metrics import metric_of
from adaptlib.experts.expert import Expert
from adaptlib.routing.attach import attach
from adaptlib.routing.named import Named
from adaptlib.routing.per_task import TaskRouter
from adaptlib.routing.router import Router
from adaptlib.training.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIMITS = Limits()


@final
@dataclass(frozen=True, eq=False)
class Subject:
    """What is evaluated: the base (no router), experts with a router, or, with `own`, for each task
    the expert that it names: an oracle that is told the task."""

    label: str
    experts: Mapping[str, Expert] = field(default_factory=dict)
    router: Router | None = None
    own: Mapping[str, str] | None = None

    def answers(self, task: Task) -> bool:
        """Whether it can be asked about this task: an oracle that knows no expert for it cannot."""
        return self.own is None or task.name in self.own

    def for_task(self, task: Task) -> tuple[Mapping[str, Expert], Router | None]:
        """(experts, router) for this task. One that was learned by task answers with that of this
        one, where it learned it."""
        if self.own is not None:
            one = {self.own[task.name]: self.experts[self.own[task.name]]}
            return one, Named.fit(one, expert=next(iter(one)))
        if isinstance(self.router, TaskRouter):
            known = task.name in self.router.tasks
            return self.experts, self.router.answering(task.name if known else self.router.task)
        return self.experts, self.router


@final
@dataclass(frozen=True, slots=True)
class Result:
    """`value` is the mean of `values`, one a row; `cut` counts inputs that were shortened to fit;
    `computed` the rows that were not kept from before."""

    router: str
    task: str
    split: str
    metric: str
    value: float
    values: tuple[float, ...]
    cut: int
    computed: int

    @property
    def n(self) -> int:
        return len(self.values)


def evaluate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    subject: Subject,
    task: Task,
    *,
    metric: str = "exact_match",
    split: str = "test",
    rows: int | None = None,
    limits: Limits = LIMITS,
    cache: Cache | None = None,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Score the first `rows` rows of a split. With a `cache` rows that are in it are read, and each
    batch is kept as soon as it is computed. `progress` is told of how many rows are done.

    UsageError for a metric that does not fit the task or a router that was made for other experts,
    NotFoundError for an empty split.
    """
    measured = metric_of(metric)
    measured.check(task)
    items = task.split(split)[:rows]
    wanted = Asked(task, split, tuple(range(len(items))))
    experts, router = subject.for_task(task)
    digest = subject_digest(experts, router)
    found: Records = {}
    key = ""
    if cache is not None:
        key = cache.key(digest, wanted, measured.needs, limits)
        found = {p: r for p, r in cache.read(key, measured.needs).items() if p < len(items)}
    missing = tuple(place for place in wanted.places if place not in found)
    if progress is not None:
        progress(len(found))
    if missing:
        with _running(model, tokenizer, experts, router) as on:
            asked = Asked(task, split, missing)
            for records in PASSES[measured.needs](on, tokenizer, asked, limits):
                if cache is not None:
                    cache.append(key, records)
                found |= records
                if progress is not None:
                    progress(len(found))
    values = [measured.value(found[i], item, task) for i, item in enumerate(items)]
    return Result(
        subject.label,
        task.name,
        split,
        metric,
        sum(values) / len(values),
        tuple(values),
        sum(bool(found[i]["cut"]) for i in wanted.places),
        len(missing),
    )


@contextmanager
def _running(
    model: Any, tokenizer: Any, experts: Mapping[str, Expert], router: Router | None
) -> Iterator[Any]:
    if router is None:
        yield model
        return
    with attach(model, experts, router, tokenizer=tokenizer) as routed:
        yield routed
