"""From rows to batches: token ids with a loss on the answers only, grouped by length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.training.tasks import Chat, Item, Row, Task, Text, answer
from adaptlib.training.tokens import (
    begins,
    conversations,
    eos_of,
    pad_of,
    prompt_ids,
    prompts_ids,
    tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "Batch",
    "Encoded",
    "Example",
    "batches",
    "collate",
    "encode_items",
    "encode_task",
    "eos_of",
    "pad_of",
    "prompt_ids",
]

IGNORED = -100  # what cross_entropy leaves out by default
POOL = 8  # batches whose rows are sorted by length together


@final
@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, and at each position the id again where it is to be predicted from those before
    it, `IGNORED` elsewhere. The first is never predicted; at least one is. `task` is the place of
    its task among those that are trained on."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    task: int = 0


@final
@dataclass(frozen=True, slots=True)
class Encoded:
    """A split as examples; how many of its inputs were shortened to fit (`cut`), and how many rows
    were left out because their output does not fit (`dropped`)."""

    examples: tuple[Example, ...] = ()
    cut: int = 0
    dropped: int = 0


@final
@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Right-padded examples. `labels` is the id to predict *at* that position, -100 elsewhere;
    `rows` are the examples' positions in the list that they were taken from, `tasks` what they are
    examples of."""

    input_ids: Int[Tensor, "example tok"]
    attention_mask: Int[Tensor, "example tok"]
    labels: Int[Tensor, "example tok"]
    rows: tuple[int, ...]
    tasks: Int[Tensor, " example"]


def encode_task(
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    split: str,
    *,
    max_length: int,
    drop_long: bool = False,
) -> Encoded:
    """Examples of at most `max_length` tokens, in the order of the rows of `split`; none where the
    task has no such split.

    Row: prompt, answer, eos, with the loss on answer and eos. The input is cut at its end to fit.
    Chat: the tokenizer's own template, with the loss on every turn of the assistant and what ends
    it; no eos is added. A conversation is cut at its start to fit; its last answer stays whole.
    Text: text and eos, with the loss on both. A long one becomes several examples, each beginning
    with the last token of the one before, so that every token but the first is predicted once.

    Raises UsageError where an output does not fit (with `drop_long` such rows are left out, and it
    is raised where none is left), where the instruction alone leaves no room, and where tokenizer
    and task do not go together (no eos, no chat template, one that rewrites earlier turns).
    """
    return encode_items(
        tokenizer,
        task,
        task.rows.get(split, ()),
        split,
        max_length=max_length,
        drop_long=drop_long,
    )


def encode_items(
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    items: Sequence[Item],
    split: str,
    *,
    max_length: int,
    drop_long: bool = False,
    last_only: bool = False,
) -> Encoded:
    """`encode_task` for other rows than the task's own; `split` is only what messages call them.
    With `last_only` the loss on a conversation is on its last answer alone."""
    if not items:
        return Encoded()
    if max_length < 2:
        raise UsageError(f"max_length wants 2 tokens or more; got {max_length}")
    of = f"{split}, task {task.name}"
    if task.form == "text":
        return _texts(tokenizer, [t.text for t in items if isinstance(t, Text)], of, max_length)
    if task.form == "chat":
        chats = [item for item in items if isinstance(item, Chat)]
        whole, needs = _chats(tokenizer, chats, of, last_only)
        fit = _fitting(needs, of, max_length, drop_long)
        short = [_last(tokenizer, whole[i], max_length) for i in fit]
        cut = sum(len(whole[i].ids) > max_length for i in fit)
        return Encoded(tuple(short), cut, len(items) - len(fit))
    rows = [item for item in items if isinstance(item, Row)]
    bare = len(tokens(tokenizer, [task.prompt(Row("", ""))], special=True)[0])
    if bare >= max_length:
        raise UsageError(
            f"task {task.name}: the instruction alone takes {bare} tokens; max_length is "
            f"{max_length}",
            hint="a shorter instruction, or a larger max_length",
        )
    eos = eos_of(tokenizer)
    tails = tokens(tokenizer, [answer(row.output) for row in rows], special=False)
    tails = [[*tail, eos] for tail in tails]
    fit = _fitting([bare + len(tail) for tail in tails], of, max_length, drop_long)
    texts, rooms = [rows[i].input for i in fit], [max_length - len(tails[i]) for i in fit]
    heads = prompts_ids(tokenizer, task.instruction, texts, rooms)
    examples = tuple(
        Example((*head, *tails[i]), (*[IGNORED] * len(head), *tails[i]))
        for i, (head, _) in zip(fit, heads, strict=True)
    )
    return Encoded(examples, sum(cut for _, cut in heads), len(rows) - len(fit))


def _fitting(needs: Sequence[int], of: str, max_length: int, drop_long: bool) -> list[int]:
    """The positions of the rows that fit; each needs so many tokens at least."""
    fit = [i for i, need in enumerate(needs) if need <= max_length]
    if len(fit) == len(needs) or (drop_long and fit):
        return fit
    first = next(i for i, need in enumerate(needs) if need > max_length)
    larger = f"--max-length {max(needs)} fits them all"
    raise UsageError(
        f"{len(needs) - len(fit)} of {len(needs)} rows of {of}, have an output that does not fit "
        f"max_length {max_length}; the first is row {first + 1}, which takes {needs[first]} tokens "
        "without its input",
        hint=f"{larger}; without them none is left"
        if not fit
        else f"{larger}, or --drop-long leaves them out",
    )


def _chats(
    tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Chat], of: str, last_only: bool
) -> tuple[list[Example], list[int]]:
    """Conversations of whatever length, and how many tokens each takes at least: the last answer,
    the bos, and one more to predict the first of the answer from."""
    examples, needs = [], []
    for chat in conversations(tokenizer, chats, of=of):
        targets = [IGNORED] * len(chat.ids)
        for start, end in chat.spans[-1:] if last_only else chat.spans:
            targets[start:end] = chat.ids[start:end]
        examples.append(Example(chat.ids, tuple(targets)))
        last, bos = chat.spans[-1][0], begins(tokenizer, chat.ids)
        needs.append(len(chat.ids) - last + min(last, bos + 1))
    return examples, needs


def _last(tokenizer: "PreTrainedTokenizerBase", example: Example, room: int) -> Example:
    """The end of an example, and its bos."""
    if len(example.ids) <= room:
        return example
    bos = begins(tokenizer, example.ids)
    start = len(example.ids) - (room - bos)
    ids = example.ids[:bos] + example.ids[start:]
    # what would have led to the first token after the cut is gone
    return Example(ids, (*[IGNORED] * (bos + 1), *example.targets[start + 1 :]))


def _texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], of: str, max_length: int
) -> Encoded:
    eos, examples = eos_of(tokenizer), []
    for number, inner in enumerate(tokens(tokenizer, texts, special=True), 1):
        ids = (*inner, eos)
        if len(ids) < 2:
            raise UsageError(f"row {number} of {of}: the tokenizer makes no tokens of this text")
        for start in range(0, len(ids) - 1, max_length - 1):
            window = ids[start : start + max_length]
            examples.append(Example(window, (IGNORED, *window[1:])))
    return Encoded(tuple(examples))


def collate(examples: Sequence[Example], pad: int, rows: Sequence[int] | None = None) -> Batch:
    """One right-padded batch; each position is labelled with the token after it. `rows` as in
    `Batch`, by default 0, 1, ..."""
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORED)
    for i, example in enumerate(examples):
        n = len(example.ids)
        ids[i, :n] = torch.tensor(example.ids)
        mask[i, :n] = 1
        labels[i, : n - 1] = torch.tensor(example.targets[1:])
    places = tuple(range(len(examples)) if rows is None else rows)
    return Batch(ids, mask, labels, places, torch.tensor([example.task for example in examples]))


def batches(
    examples: Sequence[Example], *, size: int, pad: int, seed: int | None = None
) -> Iterator[Batch]:
    """Every example once, in batches of up to `size` of about the same length.

    With a seed the order is random but the same each time: shuffled, sorted by length within
    pools of eight batches, the batches shuffled again. Without one, sorted by length.
    """
    lengths = np.array([len(example.ids) for example in examples])
    if seed is None:
        order, pool = np.arange(len(examples)), len(examples)
        generator = None
    else:
        generator = np.random.default_rng(seed)
        order, pool = generator.permutation(len(examples)), POOL * size
    groups = []
    for i in range(0, len(order), pool):
        part = order[i : i + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        groups += [part[j : j + size].tolist() for j in range(0, len(part), size)]
    for i in range(len(groups)) if generator is None else generator.permutation(len(groups)):
        yield collate([examples[j] for j in groups[i]], pad, groups[i])
