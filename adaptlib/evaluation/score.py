"""Scores of a model on a task: exact match, and the accuracy of the likeliest label."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.training.encode import (
    IGNORED,
    Example,
    collate,
    encode_rows,
    eos_of,
    pad_of,
    prompt_ids,
)
from adaptlib.training.tasks import Row, Task, answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    An answer ends at eos, at the first newline or after `max_new_tokens` (default: the longest
    output of the task and one token more). `limit` takes the first rows of the split. Rows are
    generated in left-padded batches of about the same length; the result does not depend on that.
    `model` is anything that generates as a transformers causal model does: one of those, or one
    with experts attached.
    """
    rows = task.split(split)[:limit]
    if max_new_tokens is None:
        max_new_tokens = 1 + longest_output(tokenizer, task)
    room = max_length - max_new_tokens
    encoded = [prompt_ids(tokenizer, task.instruction, row.input, room=room) for row in rows]
    prompts = [ids for ids, _ in encoded]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    predictions = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = _generate(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens)
        for i, text in zip(chosen, texts, strict=True):
            predictions[i] = text
    hits = sum(same(p, row.output) for p, row in zip(predictions, rows, strict=True))
    cuts = sum(cut for _, cut in encoded)
    return Score(
        task.name, split, "exact_match", hits / len(rows), len(rows), tuple(predictions), cuts
    )


def same(prediction: str, output: str) -> bool:
    """Equal but for case and outer whitespace."""
    return prediction.strip().casefold() == output.strip().casefold()


def longest_output(tokenizer: "PreTrainedTokenizerBase", task: Task) -> int:
    """Tokens of the longest output in any split."""
    outputs = {answer(row.output) for rows in task.rows.values() for row in rows}
    encoded = tokenizer(sorted(outputs), add_special_tokens=False).input_ids
    return max(len(ids) for ids in encoded)


def _generate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    max_new_tokens: int,
) -> list[str]:
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), pad_of(tokenizer))
    mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(prompts):
        input_ids[i, width - len(ids) :] = torch.tensor(ids)
        mask[i, width - len(ids) :] = 1
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    device = getattr(model, "device", torch.device("cpu"))
    with torch.inference_mode():
        out = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad_of(tokenizer),
            # a newline of several tokens is cut out of the text below instead
            eos_token_id=[eos_of(tokenizer), *(newline if len(newline) == 1 else [])],
        )
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.split("\n", 1)[0].strip() for text in texts]


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
    labels = task.labels
    if not labels:
        raise UsageError(f"task {task.name} has free answers, not labels; use exact_match")
    rows = task.split(split)[:limit]
    asked = tuple(Row(row.input, label) for row in rows for label in labels)
    examples, cuts = encode_rows(tokenizer, task, asked, max_length=max_length)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    means = torch.empty(len(examples))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        means[chosen] = _mean_logp(model, [examples[i] for i in chosen], pad_of(tokenizer))
    best = means.view(len(rows), len(labels)).argmax(1).tolist()
    predictions = tuple(labels[i] for i in best)
    hits = sum(same(p, row.output) for p, row in zip(predictions, rows, strict=True))
    return Score(
        task.name,
        split,
        "label_accuracy",
        hits / len(rows),
        len(rows),
        predictions,
        cuts // len(labels),
    )


def _mean_logp(model: Any, examples: list[Example], pad: int) -> Float[Tensor, " example"]:
    batch = collate(examples, pad)
    device = getattr(model, "device", torch.device("cpu"))
    with torch.inference_mode():
        logits = model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
        ).logits
    labels = batch.labels.to(logits.device)
    logp = -torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
    )
    return (logp.sum(1) / (labels != IGNORED).sum(1)).cpu()
