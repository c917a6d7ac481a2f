"""The data of a merge: the first rows of each task, with labels as transformers has them."""

import pytest
import torch

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.evaluation import merge_data
from adaptlib.merging import MERGES
from adaptlib.training.tasks import Row, Task
from tests.merging.on_data import llama, make
from tests.tiny import make_tokenizer


def task(name: str, letters: str) -> Task:
    rows = tuple(Row(f"{a} {b}", a) for a in letters for b in letters)
    return Task(name, "x y", {"train": rows, "test": rows[:2]})


TASKS = {"one": task("first", "abc"), "two": task("other", "defg")}


def test_it_is_the_first_rows_as_they_are_trained_on() -> None:
    tokenizer = make_tokenizer()
    data = merge_data("the model", tokenizer, TASKS, rows=5, batch_size=2)
    assert data.model == "the model"
    assert {name: [len(b["input_ids"]) for b in some] for name, some in data.batches.items()} == {
        "one": [2, 2, 1],
        "two": [2, 2, 1],
    }
    seen = []
    for batch in data.batches["one"]:
        rows = zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        for ids, mask, labels in rows:
            there = labels != -100
            assert torch.equal(labels[there], ids[there])  # not shifted: the model does that
            assert bool(mask[there].all())
            seen.append(tokenizer.decode(ids[there]).split())
            assert "x y" in tokenizer.decode(ids)
    assert seen == [["a", "</s>"]] * 3 + [["b", "</s>"]] * 2


def test_its_loss_is_that_of_the_model() -> None:
    """What transformers makes of these labels is the loss of answers alone."""
    torch.manual_seed(0)
    model = llama().eval()
    model.resize_token_embeddings(32)
    batch = merge_data(model, make_tokenizer(), TASKS, rows=3).batches["one"][0]
    with torch.no_grad():
        found = model(**batch)
    logp = found.logits.log_softmax(-1)
    terms = [
        -logp[i, t - 1, batch["input_ids"][i, t]]
        for i, t in (batch["labels"] != -100).nonzero().tolist()
    ]
    torch.testing.assert_close(found.loss, torch.stack(terms).mean())


@pytest.mark.parametrize("method", ["fisher", "lorahub", "regmean"])
def test_merges_take_it(method: str) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    model.resize_token_embeddings(32)
    experts = {"one": make(model, 1), "two": make(model, 2)}
    data = merge_data(model, make_tokenizer(), TASKS, rows=4)
    again = merge_data(model, make_tokenizer(), TASKS, rows=4)
    merged = MERGES[method](experts, data=data)
    assert merged.fingerprint == MERGES[method](experts, data=again).fingerprint


def test_what_it_cannot_give() -> None:
    with pytest.raises(NotFoundError, match="no rows in split 'valid'"):
        merge_data(None, make_tokenizer(), TASKS, split="valid")
    with pytest.raises(UsageError, match="rows and batch_size are 1 or more; got 0 and 8"):
        merge_data(None, make_tokenizer(), TASKS, rows=0)
