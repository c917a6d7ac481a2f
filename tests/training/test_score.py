"""Scores do not depend on how rows are batched, and are right where the answer is known."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.evaluation.score import exact_match, label_accuracy, same
from adaptlib.training.loop import TrainOptions, train
from adaptlib.training.modules import applied
from adaptlib.training.tasks import Row, Task, read_task


def one_at_a_time(model, tokenizer, task: Task, tokens: int) -> list[str]:
    """Greedy, without a cache, without padding: the likeliest token again and again."""
    texts = []
    for row in task.rows["test"]:
        ids = tokenizer(task.prompt(row)).input_ids
        new: list[int] = []
        while len(new) < tokens:
            with torch.no_grad():
                likeliest = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
            if likeliest == tokenizer.eos_token_id:
                break
            new.append(likeliest)
        text = tokenizer.decode(new, skip_special_tokens=True)
        texts.append(text.split("\n")[0].strip())
    return texts


@pytest.fixture
def trained(model, tokenizer, task):
    options = TrainOptions(epochs=3, batch_size=8, rank=4, lr=2e-2, dtype=torch.float32)
    with applied(model, train(model, tokenizer, task, options=options)):
        yield model


def test_batched_generation_is_one_at_a_time(trained, tokenizer, task) -> None:
    score = exact_match(trained, tokenizer, task, batch_size=5)
    alone = one_at_a_time(trained, tokenizer, task, tokens=7)
    assert list(score.predictions) == alone
    assert len(set(alone)) > 1
    hits = sum(p == r.output for p, r in zip(alone, task.rows["test"], strict=True))
    assert score.value == hits / 12
    assert (score.n, score.metric, score.split) == (12, "exact_match", "test")
    few = exact_match(trained, tokenizer, task, limit=3)
    assert (few.n, few.predictions) == (3, score.predictions[:3])


def test_case_and_outer_space_do_not_count() -> None:
    assert same(" Red\t", "red ")
    assert not same("red red", "red")


def test_a_split_that_is_not_there_is_named(small, tokenizer, task) -> None:
    only = Task("t", "do", {"train": task.rows["train"]})
    with pytest.raises(NotFoundError, match="'test'"):
        exact_match(small, tokenizer, only)


def test_label_accuracy_is_the_likeliest_label_by_hand(small, tokenizer) -> None:
    rows = tuple(Row(f"{i} is", ("yes", "no", "maybe so")[i % 3]) for i in range(30))
    task = Task("t", "Well?", {"test": rows})
    score = label_accuracy(small, tokenizer, task, batch_size=7)
    wanted = []
    for row in rows:
        means = {}
        for label in ("maybe so", "no", "yes"):
            head = tokenizer(task.prompt(row)).input_ids
            tail = [*tokenizer(f" {label}").input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                logp = small(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            means[label] = sum(logp[len(head) - 1 + i, t].item() for i, t in enumerate(tail))
            means[label] /= len(tail)
        wanted.append(max(means, key=lambda label: means[label]))
    assert list(score.predictions) == wanted
    with pytest.raises(UsageError, match="free answers"):
        label_accuracy(small, tokenizer, Task("t", "do", {"test": (Row("a", "b"),)}))


@pytest.mark.skipif(
    "ADAPTLIB_DATA" not in os.environ, reason="ADAPTLIB_DATA names no folder with tasks and models"
)
def test_a_real_model_learns_a_real_task(tmp_path: Path) -> None:
    import tarfile

    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    data = Path(os.environ["ADAPTLIB_DATA"])
    with tarfile.open(data / "tasks.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    task = read_task(
        tmp_path / "tasks" / "name_gender.jsonl", instruction="Is the first name female or male?"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(data / "tokenizer" / "tokenizer.json"),
        eos_token="<|endoftext|>",
        pad_token="<pad>",
    )
    model = AutoModelForCausalLM.from_pretrained(data / "lm" / "base4m", dtype=torch.float32)
    task = dataclasses.replace(task, rows={**task.rows, "train": task.rows["train"][:480]})
    before = exact_match(model, tokenizer, task, limit=50)
    with applied(model, train(model, tokenizer, task, options=TrainOptions(epochs=3))):
        after = exact_match(model, tokenizer, task, limit=50)
    assert before.value < 0.2
    assert after.value > 0.6
