"""Scores of a model on a task: exact match, and the accuracy of the likeliest label."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from adaptlib.evaluation.answers import Asked, Limits, Records, answers, labels, longest_output
from adaptlib.evaluation.metrics import likeliest, same
from adaptlib.training.tasks import Task, output_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Score", "exact_match", "label_accuracy", "longest_output", "same"]


@final
@dataclass(frozen=True, slots=True)
class Score:
    """`value` in [0, 1] over `n` rows. `predictions` are in the order of the rows; `cut` is how
    many inputs were shortened to fit."""

    task: str
    split: str
    metric: str
    value: float
    n: int
    predictions: tuple[str, ...] = ()
    cut: int = 0


def exact_match(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    *,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    max_length: int = 512,
) -> Score:
    """The share of rows whose greedy answer is the output, but for case and outer whitespace; see
    `answers.answers` for how an answer is found.

    `limit` takes the first rows of the split. `model` is anything that generates as a transformers
    causal model does: one of those, or one with experts attached. `evaluate` does the same with a
    cache. Raises UsageError for a task of texts, which have no output to compare with.
    """
    asked = _asked(task, split, limit)
    limits = Limits(batch_size, max_length, max_new_tokens)
    found = _all(answers(model, tokenizer, asked, limits))
    said = tuple(found[place]["answer"] for place in asked.places)
    return _score(asked, "exact_match", said, found)


def label_accuracy(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    *,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 64,
    max_length: int = 512,
) -> Score:
    """The share of rows whose output is the label with the highest mean log-likelihood per token
    (its eos counted). Raises UsageError for a task without labels (see `Task.labels`)."""
    asked = _asked(task, split, limit)
    found = _all(labels(model, tokenizer, asked, Limits(batch_size, max_length)))
    said = tuple(likeliest(found[place], task) for place in asked.places)
    return _score(asked, "label_accuracy", said, found)


def _asked(task: Task, split: str, limit: int | None) -> Asked:
    return Asked(task, split, tuple(range(len(task.split(split)[:limit]))))


def _all(batches: Any) -> Records:
    found: Records = {}
    for records in batches:
        found |= records
    return found


def _score(asked: Asked, metric: str, said: tuple[str, ...], found: Records) -> Score:
    hits = sum(same(p, output_of(row)) for p, row in zip(said, asked.rows, strict=True))
    cut = sum(bool(record["cut"]) for record in found.values())
    return Score(asked.task.name, asked.split, metric, hits / len(said), len(said), said, cut)
