"""From rows to batches: token ids with a loss on the answer only, grouped by length."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.training.tasks import Row, Task, answer, prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # what cross_entropy leaves out by default
POOL = 8  # batches whose rows are sorted by length together


@final
@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of prompt + answer + eos; the answer starts at `start`."""

    ids: tuple[int, ...]
    start: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Right-padded examples. `labels` is the id to predict *at* that position, -100 elsewhere."""

    input_ids: Int[Tensor, "example tok"]
    attention_mask: Int[Tensor, "example tok"]
    labels: Int[Tensor, "example tok"]


def eos_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that ends an answer. Raises UsageError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the tokenizer has no eos token, so an answer could never end",
            hint="set tokenizer.eos_token before training",
        )
    return _one_id(tokenizer.eos_token_id)


def pad_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id to pad with; eos where there is no pad token, as the mask hides it anyhow."""
    pad = tokenizer.pad_token_id
    return eos_of(tokenizer) if pad is None else _one_id(pad)


def _one_id(value: object) -> int:
    if not isinstance(value, int):  # transformers' type allows for lists and names
        raise UsageError(f"the tokenizer's special token has no single id: {value!r}")
    return value


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", instruction: str, text: str, *, room: int
) -> tuple[list[int], bool]:
    """The prompt's ids, at most `room` of them, and whether the input was cut to fit.

    The input is cut at its end, so that the instruction and "Answer:" are always whole. Special
    tokens are the tokenizer's own (a bos where it adds one), never an eos.
    """
    eos = tokenizer.eos_token_id

    def encode(some: str) -> list[int]:
        ids = list(tokenizer(prompt(instruction, some)).input_ids)
        return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids

    ids = encode(text)
    if len(ids) <= room:
        return ids, False
    inner = tokenizer(text, add_special_tokens=False).input_ids
    kept = len(inner)
    while len(ids) > room:
        if kept == 0:
            raise UsageError(
                f"the instruction alone takes {len(ids)} tokens; there is room for {room}",
                hint="a shorter instruction, or a larger max_length",
            )
        # A cut inside a character decodes to U+FFFD, which takes more tokens than were cut off: so
        # what is kept shrinks at every turn, whatever the new text takes.
        kept = max(0, kept - (len(ids) - room))
        ids = encode(str(tokenizer.decode(inner[:kept])).rstrip("\ufffd"))
    return ids, True


def encode_rows(
    tokenizer: "PreTrainedTokenizerBase", task: Task, rows: tuple[Row, ...], *, max_length: int
) -> tuple[list[Example], int]:
    """Examples of at most `max_length` tokens, and how many inputs were cut for that."""
    eos, examples, cuts = eos_of(tokenizer), [], 0
    for row in rows:
        tail = [*tokenizer(answer(row.output), add_special_tokens=False).input_ids, eos]
        room = max_length - len(tail)
        head, cut = prompt_ids(tokenizer, task.instruction, row.input, room=room)
        examples.append(Example(tuple(head + tail), len(head)))
        cuts += cut
    return examples, cuts


def collate(examples: list[Example], pad: int) -> Batch:
    """One right-padded batch; each position is labelled with the token after it."""
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORED)
    for i, example in enumerate(examples):
        n = len(example.ids)
        ids[i, :n] = torch.tensor(example.ids)
        mask[i, :n] = 1
        labels[i, example.start - 1 : n - 1] = torch.tensor(example.ids[example.start :])
    return Batch(ids, mask, labels)


def batches(
    examples: list[Example], *, size: int, pad: int, seed: int | None = None
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
        groups += [part[j : j + size] for j in range(0, len(part), size)]
    for i in range(len(groups)) if generator is None else generator.permutation(len(groups)):
        yield collate([examples[j] for j in groups[i]], pad)
