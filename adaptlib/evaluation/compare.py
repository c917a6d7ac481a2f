"""compare: routers on tasks, as one document of plain data that tables, figures and pages show."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from adaptlib.errors import UsageError
from adaptlib.evaluation.answers import Limits, prompts
from adaptlib.evaluation.cache import Cache
from adaptlib.evaluation.evaluate import LIMITS, Result, Subject, evaluate
from adaptlib.evaluation.metrics import METRICS, metric_of
from adaptlib.evaluation.quality import measure
from adaptlib.evaluation.statistics import interval, paired
from adaptlib.experts.expert import Expert
from adaptlib.routing.named import Named
from adaptlib.routing.per_task import TaskRouter
from adaptlib.training.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORACLE = "oracle"
PROMPTS = 16  # of each task, that routers are asked about


@final
@dataclass(frozen=True, slots=True)
class Step:
    """Where a comparison is: the pair that runs, of how many, and its rows."""

    number: int
    of: int
    router: str
    task: str
    done: int
    rows: int


def compare(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    *,
    experts: Mapping[str, Expert],
    own: Mapping[str, str],
    metrics: Sequence[str] = ("exact_match",),
    split: str = "test",
    rows: int | None = None,
    limits: Limits = LIMITS,
    cache: Cache | None = None,
    progress: Callable[[Step], None] | None = None,
) -> dict[str, Any]:
    """Score every subject on every task by every metric, and compare them.

    `own` names for each task the expert of `experts` that was trained on it: what an oracle would
    choose, and what shares and regrets are measured against. Gives the document of
    `adaptlib.eval/1`: `results`, `routers`, `comparisons`, `quality`, `oracle`, `notes`. With a
    cache an interruption loses one batch at most. UsageError where a metric fits none of the tasks.
    """
    fit = {name: [t for t in tasks if metric_of(name).unfit(t) is None] for name in metrics}
    notes = []
    for name, fitting in fit.items():
        if not fitting:
            metric_of(name).check(tasks[0])
        if len(fitting) < len(tasks):
            left = [task.name for task in tasks if task not in fitting]
            notes.append(f"{name} does not fit {', '.join(left[:3])}; left out there")
    every = list(subjects)
    if own and all(subject.label != ORACLE for subject in subjects):
        every.append(Subject(ORACLE, experts, own=own))
    pairs = [
        (subject, task, name)
        for subject in every
        for name in metrics
        for task in fit[name]
        if subject.answers(task)
    ]
    found: list[Result] = []
    for number, (subject, task, name) in enumerate(pairs, 1):
        count = len(task.split(split)[:rows])

        def tell(done: int, at: tuple[Any, ...] = (number, subject, task, count)) -> None:
            if progress is not None:
                progress(Step(at[0], len(pairs), at[1].label, at[2].name, done, at[3]))

        found.append(
            evaluate(
                model,
                tokenizer,
                subject,
                task,
                metric=name,
                split=split,
                rows=rows,
                limits=limits,
                cache=cache,
                progress=tell,
            )
        )
    unknown = [task.name for task in tasks if task.name not in own]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        notes.append(
            f"no expert was trained on {', '.join(unknown[:3])}{more}, so there is no oracle: left "
            "out of oracle shares and regrets"
        )
    quality = {
        subject.label: _quality(model, tokenizer, subject, tasks, own, split, limits)
        for subject in subjects
        if subject.router is not None and not isinstance(subject.router, Named | TaskRouter)
    }
    shown = [subject.label for subject in subjects]
    return {
        "results": [_line(result, tasks) for result in found if result.router in shown],
        "routers": [row for name in metrics for row in _routers(shown, found, name, own, quality)],
        "comparisons": [row for name in metrics for row in _comparisons(shown, found, name)],
        "quality": quality,
        "oracle": {task.name: own.get(task.name) for task in tasks},
        "notes": notes,
    }


def _line(result: Result, tasks: Sequence[Task]) -> dict[str, Any]:
    _, low, high = interval([np.array(result.values)])
    task = next(task for task in tasks if task.name == result.task)
    return {
        "router": result.router,
        "task": result.task,
        "split": result.split,
        "metric": result.metric,
        "value": result.value,
        "n": result.n,
        "low": low,
        "high": high,
        "category": task.category,
        "cut": result.cut,
    }


def _of(found: Sequence[Result], label: str, metric: str) -> dict[str, np.ndarray]:
    return {
        result.task: np.array(result.values)
        for result in found
        if result.router == label and result.metric == metric
    }


def _routers(
    shown: Sequence[str],
    found: Sequence[Result],
    metric: str,
    own: Mapping[str, str],
    quality: Mapping[str, Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """A row a router: its mean over the tasks, and what part of the oracle's that is."""
    best = _of(found, ORACLE, metric)
    sign = -1 if METRICS[metric].loss else 1
    for label in shown:
        values = _of(found, label, metric)
        if not values:
            continue
        mean, low, high = interval(list(values.values()))
        known = [task for task in values if task in best and task in own]
        share = regret = None
        if known:
            mine = float(np.mean([values[task].mean() for task in known]))
            theirs = float(np.mean([best[task].mean() for task in known]))
            regret = sign * (theirs - mine)
            share = mine / theirs if theirs > 0 and not METRICS[metric].loss else None
        about = quality.get(label, {})
        yield {
            "router": label, "metric": metric, "tasks": len(values),
            "value": mean, "low": low, "high": high,
            "oracle_share": share, "regret": regret,
            **{key: about.get(key) for key in ("agreement", "entropy", "used", "seconds", "cost")},
        }  # fmt: skip


def _comparisons(
    shown: Sequence[str], found: Sequence[Result], metric: str
) -> Iterator[dict[str, Any]]:
    """Each router against the best one, on the tasks that both were asked about."""
    sign = -1 if METRICS[metric].loss else 1
    values = {label: held for label in shown if (held := _of(found, label, metric))}
    rivals = [label for label in values if label != ORACLE]
    if len(rivals) < 2:
        return
    best = max(rivals, key=lambda name: sign * np.mean([v.mean() for v in values[name].values()]))
    for label in values:
        if label == best:
            continue
        tasks = [task for task in values[label] if task in values[best]]
        one = paired([values[label][t] for t in tasks], [values[best][t] for t in tasks])
        better, worse = (one.more, one.less) if sign > 0 else (one.less, one.more)
        yield {
            "a": label, "b": best, "metric": metric, "tasks": len(tasks),
            "difference": one.difference, "low": one.low, "high": one.high, "p": one.p,
            "better": better, "equal": one.equal, "worse": worse,
        }  # fmt: skip


def _quality(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    subject: Subject,
    tasks: Sequence[Task],
    own: Mapping[str, str],
    split: str,
    limits: Limits,
) -> dict[str, Any]:
    assert subject.router is not None
    ids: list[list[int]] = []
    right: list[str | None] = []
    for task in tasks:
        if task.form == "text":
            continue
        asked = prompts(tokenizer, task, task.split(split)[:PROMPTS], limits)
        ids += asked
        right += [own.get(task.name)] * len(asked)
    if not ids:
        raise UsageError("routers are asked about prompts; these tasks are of texts and have none")
    found = measure(model, tokenizer, subject.experts, subject.router, ids, own=right, repeats=1)
    return found.document()


def own_experts(experts: Mapping[str, Expert], tasks: Sequence[Task]) -> dict[str, str]:
    """For each task the expert whose card says that it was trained on it; of several the one with
    the best `metrics` there, else the first by name."""

    def rank(name: str) -> tuple[float, float]:
        metrics = experts[name].card.get("metrics") or {}
        match, loss = metrics.get("test_exact_match"), metrics.get("valid_loss")
        return (
            -float(match) if isinstance(match, int | float) else 0.0,
            float(loss) if isinstance(loss, int | float) else float("inf"),
        )

    found = {}
    for task in tasks:
        fitting = sorted(n for n, expert in experts.items() if expert.card.get("task") == task.name)
        if fitting:
            found[task.name] = min(fitting, key=rank)
    return found
