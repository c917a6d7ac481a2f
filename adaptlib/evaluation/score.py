"""Scores of a model, whatever is on it, on one task: what `evaluate` does, without a router."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from adaptlib.errors import UsageError
from adaptlib.evaluation.answers import Limits, check_outputs, longest_output
from adaptlib.evaluation.evaluate import Subject, evaluate
from adaptlib.evaluation.metrics import same
from adaptlib.training.tasks import Task

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
    """The share of rows whose greedy answer is the output, but for case and outer whitespace.

    Of a conversation the last answer is asked for, after all that was said before. An answer ends
    at eos, at the first newline (of a conversation, at what the chat template puts after an
    answer) or after `max_new_tokens` (default: the longest output of the task, and its end).
    `limit` takes the first rows of the split. Rows are generated in left-padded batches of about
    the same length; the result does not depend on that. `model` is anything that generates as a
    transformers causal model does: one of those, or one with experts attached. Raises UsageError
    for a task of texts, which have no output to compare with.
    """
    limits = Limits(batch_size, max_length, max_new_tokens)
    return _score(model, tokenizer, task, "exact_match", split, limit, limits)


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
    check_outputs(task)
    if not task.labels:
        raise UsageError(f"task {task.name} has free answers, not labels; use exact_match")
    limits = Limits(batch_size, max_length)
    return _score(model, tokenizer, task, "label_accuracy", split, limit, limits)


def _score(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    metric: str,
    split: str,
    rows: int | None,
    limits: Limits,
) -> Score:
    check_outputs(task)
    subject = Subject("model")
    found = evaluate(
        model, tokenizer, subject, task, metric=metric, split=split, rows=rows, limits=limits
    )
    return Score(task.name, split, metric, found.value, found.n, found.said, found.cut)
