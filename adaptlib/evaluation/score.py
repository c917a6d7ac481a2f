"""Scores of a model on a task: exact match, and the accuracy of the likeliest label."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.training.encode import IGNORED, Example, collate, encode_items
from adaptlib.training.tasks import Chat, Item, Message, Row, Task, answer, output_of
from adaptlib.training.tokens import chat_ids, eos_of, pad_of, prompt_ids, render, tokens

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

    Of a conversation the last answer is asked for, after all that was said before. An answer ends
    at eos, at the first newline (of a conversation, at what the chat template puts after an
    answer) or after `max_new_tokens` (default: the longest output of the task, and its end).
    `limit` takes the first rows of the split. Rows are generated in left-padded batches of about
    the same length; the result does not depend on that. `model` is anything that generates as a
    transformers causal model does: one of those, or one with experts attached. Raises UsageError
    for a task of texts, which have no output to compare with.
    """
    _check_outputs(task)
    rows = task.split(split)[:limit]
    stop = _stop(tokenizer, rows[0])
    if max_new_tokens is None:
        end = len(_ids(tokenizer, stop)) if task.form == "chat" else 1
        max_new_tokens = longest_output(tokenizer, task) + max(1, end)
    room = max_length - max_new_tokens
    encoded = [_prompt(tokenizer, task, row, room) for row in rows]
    prompts = [ids for ids, _ in encoded]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    predictions = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = _generate(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, stop)
        for i, text in zip(chosen, texts, strict=True):
            predictions[i] = text
    hits = sum(same(p, output_of(row)) for p, row in zip(predictions, rows, strict=True))
    cuts = sum(cut for _, cut in encoded)
    return Score(
        task.name, split, "exact_match", hits / len(rows), len(rows), tuple(predictions), cuts
    )


def _check_outputs(task: Task) -> None:
    if task.form == "text":
        raise UsageError(
            f"task {task.name} is of texts, which have no output to compare with",
            hint="score it by its loss, or give rows of input and output",
        )


def same(prediction: str, output: str) -> bool:
    """Equal but for case and outer whitespace."""
    return prediction.strip().casefold() == output.strip().casefold()


def longest_output(tokenizer: "PreTrainedTokenizerBase", task: Task) -> int:
    """Tokens of the longest output in any split."""
    outputs = {output_of(row) for rows in task.rows.values() for row in rows}
    if task.form == "rows":
        outputs = {answer(output) for output in outputs}
    return max(len(ids) for ids in tokens(tokenizer, sorted(outputs), special=False))


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokens(tokenizer, [text], special=False)[0]


def _prompt(
    tokenizer: "PreTrainedTokenizerBase", task: Task, row: Item, room: int
) -> tuple[list[int], bool]:
    if isinstance(row, Chat):
        return chat_ids(tokenizer, row.messages[:-1], room=room)
    assert isinstance(row, Row)
    return prompt_ids(tokenizer, task.instruction, row.input, room=room)


def _stop(tokenizer: "PreTrainedTokenizerBase", row: Item) -> str:
    """The text that ends an answer, besides eos; "" where eos alone does."""
    if not isinstance(row, Chat):
        return "\n"
    content = row.messages[-1].content.strip()
    _, found, after = render(tokenizer, row.messages, ask=False).rpartition(content)
    if not content or not found:
        return ""  # the template writes the answer in its own way
    return after.strip() or after


def _generate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: str,
) -> list[str]:
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), pad_of(tokenizer))
    mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(prompts):
        input_ids[i, width - len(ids) :] = torch.tensor(ids)
        mask[i, width - len(ids) :] = 1
    ends = _ids(tokenizer, stop)
    device = getattr(model, "device", torch.device("cpu"))
    with torch.inference_mode():
        out = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad_of(tokenizer),
            # an end of several tokens is cut out of the text below instead
            eos_token_id=[eos_of(tokenizer), *(ends if len(ends) == 1 else [])],
        )
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [(text.split(stop, 1)[0] if stop else text).strip() for text in texts]


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
    _check_outputs(task)
    labels = task.labels
    if not labels:
        raise UsageError(f"task {task.name} has free answers, not labels; use exact_match")
    rows = task.split(split)[:limit]
    asked = [_answered(row, label) for row in rows for label in labels]
    encoded = encode_items(tokenizer, task, asked, split, max_length=max_length, last_only=True)
    examples = encoded.examples
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    means = torch.empty(len(examples))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        means[chosen] = _mean_logp(model, [examples[i] for i in chosen], pad_of(tokenizer))
    best = means.view(len(rows), len(labels)).argmax(1).tolist()
    predictions = tuple(labels[i] for i in best)
    hits = sum(same(p, output_of(row)) for p, row in zip(predictions, rows, strict=True))
    return Score(
        task.name,
        split,
        "label_accuracy",
        hits / len(rows),
        len(rows),
        predictions,
        encoded.cut // len(labels),
    )


def _answered(row: Item, label: str) -> Item:
    if isinstance(row, Chat):
        return Chat((*row.messages[:-1], Message("assistant", label)))
    assert isinstance(row, Row)
    return Row(row.input, label)


def _mean_logp(model: Any, examples: list[Example], pad: int) -> Float[Tensor, " example"]:
    batch = collate(examples, pad)
    device = getattr(model, "device", torch.device("cpu"))
    answers = (batch.labels != IGNORED).any(0).nonzero().squeeze(1)
    with torch.inference_mode():
        logits = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            logits_to_keep=answers.to(device),  # a vocabulary is wide and most is prompt
            use_cache=False,
        ).logits
    labels = batch.labels[:, answers].to(logits.device)
    logp = -torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
    )
    return (logp.sum(1) / (labels != IGNORED).sum(1)).cpu()
