"""Reading tasks, and turning rows into ids with a loss on the answer only."""

import json
from pathlib import Path

import pytest
import torch

from adaptlib.errors import CorruptError, NotFoundError, UsageError
from adaptlib.training.encode import IGNORED, batches, encode_rows, prompt_ids
from adaptlib.training.tasks import Row, Task, answer, prompt, read_task

GOOD = '{"split": "train", "input": "a", "output": "b"}\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_task_reads_back_with_the_facts_beside_it(tmp_path: Path) -> None:
    facts = [{"name": "upper", "instruction": "Shout.", "category": "char", "license": "MIT"}]
    (tmp_path / "tasks.json").write_text(json.dumps(facts))
    (tmp_path / "tasks").mkdir()
    lines = GOOD + '\n{"input": "x", "output": "y"}\n{"split": "test", "input": "", "output": "z"}'
    task = read_task(write(tmp_path / "tasks" / "upper.jsonl", lines))
    assert (task.name, task.instruction) == ("upper", "Shout.")
    assert (task.category, task.licence) == ("char", "MIT")
    assert task.rows == {"train": (Row("a", "b"), Row("x", "y")), "test": (Row("", "z"),)}
    assert read_task(tmp_path / "tasks" / "upper.jsonl", instruction="Hi").instruction == "Hi"


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", UsageError, "has no rows"),
        ("\n \n", UsageError, "has no rows"),
        (GOOD + '{"split": "train", "input": "a"}', CorruptError, "line 2: .*'output'.*no such"),
        (GOOD + '{"input": "a", "output": 3}', CorruptError, "line 2: .*'output', got int"),
        ('{"split": "dev", "input": "a", "output": "b"}', CorruptError, "line 1: .*'dev'"),
        (GOOD + GOOD + "{", CorruptError, "line 3: not JSON"),
        ("[1]", CorruptError, "line 1: wanted an object, got list"),
        (GOOD, UsageError, "no instruction"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line(
    tmp_path: Path, text: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        read_task(write(tmp_path / "t.jsonl", text))


def test_bytes_that_are_not_text_are_corrupt(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(GOOD.encode() + b'{"input": "\xff"}\n')
    with pytest.raises(CorruptError, match="line 2: not JSON"):
        read_task(tmp_path / "t.jsonl", instruction="x")


def test_absent_files_and_splits_are_named(tmp_path: Path, task: Task) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.jsonl"):
        read_task(tmp_path / "nothing.jsonl")
    only = Task("t", "do", {"train": task.rows["train"]})
    with pytest.raises(NotFoundError, match="'test'"):
        only.split("test")
    with pytest.raises(UsageError, match="no rows"):
        Task("t", "do", {"train": ()})


def test_labels_are_outputs_that_come_back(task: Task) -> None:
    few = Task("t", "do", {"train": tuple(Row(str(i), "ab"[i % 2]) for i in range(20))})
    assert few.labels == ("a", "b")
    assert task.labels == ()  # eight outputs, eight rows each


def test_the_loss_is_on_the_answer_and_eos_only(tokenizer, task: Task) -> None:
    examples, cut = encode_rows(tokenizer, task, task.rows["train"], max_length=200)
    assert cut == 0
    seen = {}
    for batch in batches(examples, size=7, pad=1, seed=3):
        for ids, mask, labels in zip(
            batch.input_ids, batch.attention_mask, batch.labels, strict=True
        ):
            real = ids[mask.bool()]
            answered = labels[labels != IGNORED]
            at = (labels != IGNORED).nonzero().squeeze(1)
            assert torch.equal(ids[at + 1], answered)  # a label is the token that comes next
            assert at[-1] + 1 == len(real) - 1
            assert answered[-1] == tokenizer.eos_token_id
            text = tokenizer.decode(real[:-1])
            tail = tokenizer.decode(answered[:-1])
            assert text.endswith("\nAnswer:" + tail)
            seen[text] = seen.get(text, 0) + 1
    wanted = [prompt(task.instruction, r.input) + answer(r.output) for r in task.rows["train"]]
    assert seen == dict.fromkeys(wanted, 1)  # each row once


def test_batches_depend_on_the_seed_alone_and_are_of_like_length(tokenizer) -> None:
    rows = tuple(Row("x" * (i % 60), "y") for i in range(240))
    examples, _ = encode_rows(tokenizer, Task("t", "do", {"train": rows}), rows, max_length=200)

    def ids(seed: int) -> list[torch.Tensor]:
        return [batch.input_ids for batch in batches(examples, size=8, pad=1, seed=seed)]

    again = zip(ids(1), ids(1), strict=True)
    assert all(torch.equal(a, b) for a, b in again)
    assert any(a.shape != b.shape for a, b in zip(ids(1), ids(2), strict=True))
    padding = sum((b == 1).sum().item() for b in ids(1)) / sum(b.numel() for b in ids(1))
    assert padding < 0.1  # unsorted it is 0.3 here


def test_a_long_input_is_cut_counted_and_still_asks(tokenizer) -> None:
    rows = (Row("short", "yes"), Row("long " * 60, "no"))
    task = Task("t", "Is it?", {"train": rows})
    examples, cut = encode_rows(tokenizer, task, rows, max_length=64)
    assert cut == 1
    assert len(examples[1].ids) <= 64
    text = tokenizer.decode(examples[1].ids[:-1])
    assert text.startswith("Is it?\nInput: long long")
    assert text.endswith("\nAnswer: no")
    with pytest.raises(UsageError, match="instruction alone"):
        encode_rows(tokenizer, Task("t", "Is it? " * 20, {"train": rows}), rows, max_length=64)


@pytest.mark.parametrize(
    "text", ["é" * 200, "\U0001f600" * 90, "plain words " * 30], ids=["two", "four", "one"]
)
@pytest.mark.parametrize("room", range(40, 48))
def test_a_cut_inside_a_character_ends(tokenizer, text: str, room: int) -> None:
    """Half a character decodes to U+FFFD, which takes more tokens than were cut off."""
    ids, cut = prompt_ids(tokenizer, "Do.", text, room=room)
    assert cut
    assert room - 8 < len(ids) <= room
    assert tokenizer.decode(ids).endswith("\nAnswer:")
