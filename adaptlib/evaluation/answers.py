"""What a metric is computed from: answers, likelihoods of labels, losses; row by row, in batches.

Each pass gives the rows of a batch as soon as they are known, so that whoever keeps them loses one
batch at most. A record is plain JSON. Rows go in batches of about the same length, the longest
first: what does not fit into memory fails at once, and not after an hour.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.training.encode import IGNORED, Batch, Example, collate, encode_items
from adaptlib.training.tasks import Chat, Item, Message, Row, Task, answer, output_of
from adaptlib.training.tokens import chat_ids, eos_of, pad_of, prompts_ids, render, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGITS = 1 << 28  # numbers of logits at once, 1 GB in float32

Record = Mapping[str, Any]
Records = dict[int, Record]  # by the place of the row in its split


@final
@dataclass(frozen=True, slots=True)
class Asked:
    """Rows of a task: those at `places` in `split`."""

    task: Task
    split: str
    places: tuple[int, ...]

    @property
    def rows(self) -> list[Item]:
        every = self.task.split(self.split)
        return [every[place] for place in self.places]


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """`max_length` is of prompt and answer, in tokens; `max_new_tokens` of an answer (None: the
    longest output of the task, and its end). They change numbers; `batch_size` does not."""

    batch_size: int = 32
    max_length: int = 512
    max_new_tokens: int | None = None


Pass = Callable[[Any, "PreTrainedTokenizerBase", Asked, Limits], Iterator[Records]]


def answers(
    model: Any, tokenizer: "PreTrainedTokenizerBase", asked: Asked, limits: Limits
) -> Iterator[Records]:
    """Greedy answers, `{"answer": text, "cut": whether the input was shortened}`.

    Of a conversation the last answer is asked for, after all that was said before. An answer ends
    at eos, at the first newline (of a conversation, at what the chat template puts after an
    answer) or after `max_new_tokens`. Prompts are padded on the left. UsageError for a task of
    texts, which have no output to compare with.
    """
    task, rows = asked.task, asked.rows
    check_outputs(task)
    stop = _stop(tokenizer, task.split(asked.split)[0])
    most = longest_answer(tokenizer, task, limits, stop)
    encoded = _prompts(tokenizer, task, rows, limits.max_length - most)
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i][0]), reverse=True)
    for start in range(0, len(order), limits.batch_size):
        chosen = order[start : start + limits.batch_size]
        texts = _generate(model, tokenizer, [encoded[i][0] for i in chosen], most, stop)
        yield {
            asked.places[i]: {"answer": text, "cut": encoded[i][1]}
            for i, text in zip(chosen, texts, strict=True)
        }


def labels(
    model: Any, tokenizer: "PreTrainedTokenizerBase", asked: Asked, limits: Limits
) -> Iterator[Records]:
    """The mean log-likelihood per token (eos counted) of each of the task's labels, in nats and in
    the labels' order: `{"labels": [...], "cut": ...}`. UsageError for a task without labels."""
    task, rows = asked.task, asked.rows
    check_outputs(task)
    known = task.labels
    if not known:
        raise UsageError(
            f"task {task.name} has free answers, not labels; use exact_match",
            hint="--metric exact_match",
        )
    every = [_answered(row, label) for row in rows for label in known]
    encoded, cut = _encode(tokenizer, asked, every, limits)
    groups = [encoded[i : i + len(known)] for i in range(0, len(encoded), len(known))]
    for done in _scored(model, tokenizer, groups, limits.batch_size):
        yield {
            asked.places[i]: {"labels": [total / n for total, n in parts], "cut": cut[i]}
            for i, parts in done.items()
        }


def losses(
    model: Any, tokenizer: "PreTrainedTokenizerBase", asked: Asked, limits: Limits
) -> Iterator[Records]:
    """The negative log-likelihood of each row's answer and its end (of a conversation, of the last
    one; of a text, of all but its first token): `{"loss": nats, "tokens": count, "cut": ...}`."""
    if asked.task.form == "text":  # a long one is several examples
        groups = [list(_encode(tokenizer, asked, [row], limits)[0]) for row in asked.rows]
        cut = [False] * len(groups)
    else:
        encoded, cut = _encode(tokenizer, asked, asked.rows, limits)
        groups = [[example] for example in encoded]
    for done in _scored(model, tokenizer, groups, limits.batch_size):
        yield {
            asked.places[i]: {
                "loss": -sum(total for total, _ in parts),
                "tokens": sum(n for _, n in parts),
                "cut": cut[i],
            }
            for i, parts in done.items()
        }


PASSES: dict[str, Pass] = {"answers": answers, "labels": labels, "losses": losses}


def check_outputs(task: Task) -> None:
    """UsageError for a task whose rows have no answers."""
    if task.form == "text":
        raise UsageError(
            f"task {task.name} is of texts, which have no output to compare with",
            hint="score it by its loss, or give rows of input and output",
        )


# -- asking ----------------------------------------------------------------------------------------


def prompts(
    tokenizer: "PreTrainedTokenizerBase", task: Task, rows: Sequence[Item], limits: Limits
) -> list[list[int]]:
    """The token ids that `answers` asks with. UsageError for a task of texts."""
    check_outputs(task)
    most = longest_answer(tokenizer, task, limits, _stop(tokenizer, rows[0]))
    return [ids for ids, _ in _prompts(tokenizer, task, rows, limits.max_length - most)]


def longest_answer(
    tokenizer: "PreTrainedTokenizerBase", task: Task, limits: Limits, stop: str
) -> int:
    """How many tokens an answer may take."""
    if limits.max_new_tokens is not None:
        return limits.max_new_tokens
    end = len(_ids(tokenizer, stop)) if task.form == "chat" else 1
    return longest_output(tokenizer, task) + max(1, end)


def longest_output(tokenizer: "PreTrainedTokenizerBase", task: Task) -> int:
    """Tokens of the longest output in any split."""
    outputs = {output_of(row) for rows in task.rows.values() for row in rows}
    if task.form == "rows":
        outputs = {answer(output) for output in outputs}
    return max(len(ids) for ids in tokens(tokenizer, sorted(outputs), special=False))


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokens(tokenizer, [text], special=False)[0]


def _prompts(
    tokenizer: "PreTrainedTokenizerBase", task: Task, rows: Sequence[Item], room: int
) -> list[tuple[list[int], bool]]:
    """The ids of each row's prompt, and whether it was cut to fit."""
    if task.form == "chat":
        chats = [row for row in rows if isinstance(row, Chat)]
        return [chat_ids(tokenizer, chat.messages[:-1], room=room) for chat in chats]
    inputs = [row.input for row in rows if isinstance(row, Row)]
    return prompts_ids(tokenizer, task.instruction, inputs, [room] * len(inputs))


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
    device = _device(model)
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


def _device(model: Any) -> torch.device:
    return getattr(model, "device", torch.device("cpu"))


# -- scoring ---------------------------------------------------------------------------------------


def _answered(row: Item, label: str) -> Item:
    if isinstance(row, Chat):
        return Chat((*row.messages[:-1], Message("assistant", label)))
    assert isinstance(row, Row)
    return Row(row.input, label)


def _encode(
    tokenizer: "PreTrainedTokenizerBase", asked: Asked, items: Sequence[Item], limits: Limits
) -> tuple[tuple[Example, ...], list[bool]]:
    """Examples, and which of the rows were cut to fit; `items` has as many of each row."""

    def encode(some: Sequence[Item]) -> tuple[tuple[Example, ...], int]:
        found = encode_items(
            tokenizer,
            asked.task,
            some,
            asked.split,
            max_length=limits.max_length,
            last_only=True,
        )
        return found.examples, found.cut

    examples, cut = encode(items)
    if not cut:
        return examples, [False] * len(asked.places)
    each = len(items) // len(asked.places)
    cuts = [encode(items[i : i + each])[1] > 0 for i in range(0, len(items), each)]
    return examples, cuts


def _scored(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    groups: Sequence[Sequence[Example]],
    batch_size: int,
) -> Iterator[dict[int, list[tuple[float, int]]]]:
    """For each group the log-likelihood of each of its examples and of how many tokens it is; a
    group is given with the batch that has the last of it."""
    flat = [(i, j) for i, group in enumerate(groups) for j in range(len(group))]
    flat.sort(key=lambda at: len(groups[at[0]][at[1]].ids), reverse=True)
    found: list[dict[int, tuple[float, int]]] = [{} for _ in groups]
    for start in range(0, len(flat), batch_size):
        chosen = flat[start : start + batch_size]
        batch = collate([groups[i][j] for i, j in chosen], pad_of(tokenizer))
        for (i, j), value, n in zip(chosen, *_logp(model, tokenizer, batch), strict=True):
            found[i][j] = (value, n)
        ended = dict.fromkeys(i for i, _ in chosen if len(found[i]) == len(groups[i]))
        yield {i: [found[i][j] for j in range(len(groups[i]))] for i in ended}


def _logp(
    model: Any, tokenizer: "PreTrainedTokenizerBase", batch: Batch
) -> tuple[list[float], list[int]]:
    """The log-likelihood of each example's answer, and how many tokens it has."""
    asked = batch.labels != IGNORED
    wide = int(asked.any(0).sum()) * len(tokenizer)
    most = max(1, LOGITS // wide)
    # The prompt ends with the token that the first of the answer is predicted from. A router that
    # chooses once for a prompt is not to see the answer that it is scored on.
    prompt = (asked.cumsum(1) <= 1) & batch.attention_mask.bool()
    sums = [
        _sums(model, batch.input_ids[rows], batch.attention_mask[rows], batch.labels[rows], seen)
        for i in range(0, len(asked), most)
        for rows, seen in [(slice(i, i + most), prompt[i : i + most])]
    ]
    return torch.cat(sums).tolist(), asked.sum(1).tolist()


def _sums(
    model: Any,
    input_ids: Int[Tensor, "example tok"],
    mask: Int[Tensor, "example tok"],
    labels: Int[Tensor, "example tok"],
    prompt: Tensor,
) -> Float[Tensor, " example"]:
    device = _device(model)
    answers = (labels != IGNORED).any(0).nonzero().squeeze(1)
    reading = getattr(model, "reading", None)
    with torch.inference_mode(), reading(prompt) if reading else nullcontext():
        logits = model(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            logits_to_keep=answers.to(device),  # a vocabulary is wide and most is prompt
            use_cache=False,
        ).logits
    wanted = labels[:, answers].to(logits.device)
    logp = -torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED
    )
    return logp.sum(1).cpu()
