"""Metrics: one float a row. A new one is a function, and a line in METRICS."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.evaluation.answers import PASSES, Record
from adaptlib.training.tasks import Item, Task, output_of

_WORDS = re.compile(r"[a-z0-9]+")


@final
@dataclass(frozen=True, slots=True)
class Metric:
    """`value` makes a float of what the pass `needs` (a name in PASSES) found of a row.

    `unfit` says why a task cannot be measured so, or None. `loss` is a metric of which less is
    better; others are shares, in [0, 1].
    """

    name: str
    needs: str
    value: Callable[[Record, Item, Task], float]
    unfit: Callable[[Task], str | None]
    loss: bool = False

    def __post_init__(self) -> None:
        assert self.needs in PASSES

    def check(self, task: Task) -> None:
        """UsageError where this does not fit the task, with those that do."""
        why = self.unfit(task)
        if why is not None:
            fit = [name for name, other in METRICS.items() if other.unfit(task) is None]
            raise UsageError(
                f"{self.name} does not fit task {task.name}: {why}",
                hint=f"--metric {','.join(fit)}",
            )


def same(prediction: str, output: str) -> bool:
    """Equal but for case and outer whitespace."""
    return prediction.strip().casefold() == output.strip().casefold()


def rouge_l(prediction: str, output: str) -> float:
    """F1 of the longest common subsequence of words (Lin, 2004), as the `rouge_score` package has
    it without a stemmer: words are runs of a-z and 0-9 in the lower-cased text."""
    said, wanted = _WORDS.findall(prediction.lower()), _WORDS.findall(output.lower())
    if not said or not wanted:
        return 0.0
    lengths = [0] * (len(wanted) + 1)  # of the subsequences of what was said so far
    for word in said:
        before = 0
        for i, other in enumerate(wanted, 1):
            here = lengths[i]
            lengths[i] = before + 1 if word == other else max(here, lengths[i - 1])
            before = here
    common = lengths[-1]
    return 2 * common / (len(said) + len(wanted))


def likeliest(record: Record, task: Task) -> str:
    """The label with the highest mean log-likelihood per token; of equals the first."""
    means: Sequence[float] = record["labels"]
    return task.labels[max(range(len(means)), key=means.__getitem__)]


def _no_outputs(task: Task) -> str | None:
    return "it is of texts, which have no output to compare with" if task.form == "text" else None


def _no_labels(task: Task) -> str | None:
    return _no_outputs(task) or (None if task.labels else "it has free answers, not labels")


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "exact_match",
            "answers",
            lambda record, row, task: float(same(record["answer"], output_of(row))),
            _no_outputs,
        ),
        Metric(
            "label_accuracy",
            "labels",
            lambda record, row, task: float(same(likeliest(record, task), output_of(row))),
            _no_labels,
        ),
        # nats a token of the answer: the mean over a row's tokens, so that every row counts alike
        Metric(
            "loss",
            "losses",
            lambda record, row, task: record["loss"] / record["tokens"],
            lambda task: None,
            loss=True,
        ),
        Metric(
            "rouge_l",
            "answers",
            lambda record, row, task: rouge_l(record["answer"], output_of(row)),
            _no_outputs,
        ),
    )
}


def metric_of(name: str) -> Metric:
    """The metric of this name; NotFoundError says which there are."""
    if name not in METRICS:
        import difflib

        close = difflib.get_close_matches(name, METRICS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise NotFoundError(
            f"no metric {name!r}{meant} There are: {', '.join(METRICS)}"
            if close
            else f"no metric {name!r}; there are: {', '.join(METRICS)}",
            hint=f"--metric {close[0] if close else 'exact_match'}",
        )
    return METRICS[name]
