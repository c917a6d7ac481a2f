"""What merges with data look at: a few rows of each expert's task, as the model takes them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from adaptlib.errors import UsageError
from adaptlib.merging.merge import Data
from adaptlib.training.encode import IGNORED, Example, collate, encode_items
from adaptlib.training.tasks import Task
from adaptlib.training.tokens import pad_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def merge_data(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Mapping[str, Task],
    *,
    rows: int = 64,
    split: str = "train",
    batch_size: int = 8,
    max_length: int = 512,
) -> Data:
    """The data of a merge: for each expert the first `rows` rows of its task's `split`.

        data = merge_data(model, tokenizer, {"my-expert": task, ...})
        merged = adaptlib.MERGES["regmean"](experts, data=data)

    `tasks` is by name of the expert; for LoraHub it is the new task, under any name. The rows are
    encoded as in training, in their own order: the same rows give the same data. Rows whose output
    does not fit `max_length` are left out. NotFoundError where a task lacks the split.
    """
    if min(rows, batch_size) < 1:
        raise UsageError(f"rows and batch_size are 1 or more; got {rows} and {batch_size}")
    batches: dict[str, list[dict[str, torch.Tensor]]] = {}
    for name, task in tasks.items():
        items = task.split(split)[:rows]
        encoded = encode_items(tokenizer, task, items, split, max_length=max_length, drop_long=True)
        batches[name] = [
            _batch(encoded.examples[i : i + batch_size], pad_of(tokenizer))
            for i in range(0, len(encoded.examples), batch_size)
        ]
    return Data(model, batches)


def _batch(examples: tuple[Example, ...], pad: int) -> dict[str, torch.Tensor]:
    """Labels as transformers has them: at each position the token that is there."""
    batch = collate(examples, pad)
    first = batch.labels.new_full((len(examples), 1), IGNORED)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": torch.cat([first, batch.labels[:, :-1]], dim=1),
    }
