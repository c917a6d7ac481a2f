"""Tasks: rows of one form in splits, and an identity that is what is trained on."""

import dataclasses
import hashlib

import pytest

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.training.tasks import Chat, Message, Row, Task, Text, output_of, prompt

ROW, OTHER = Row("a", "b"), Row("a", "c")
CHAT = Chat((Message("user", "a"), Message("assistant", "b")))


def test_absent_splits_are_named(task: Task) -> None:
    only = Task("t", "do", {"train": task.rows["train"]})
    with pytest.raises(NotFoundError, match="'test'"):
        only.split("test")
    with pytest.raises(UsageError, match="no rows"):
        Task("t", "do", {"train": ()})
    with pytest.raises(UsageError, match=r"no such split.*'dev'"):
        Task("t", "do", {"dev": (ROW,)})


def test_a_task_is_of_one_form() -> None:
    assert Task("t", "do", {"test": (ROW,)}).form == "rows"
    assert Task("t", "", {"test": (CHAT,)}).form == "chat"
    assert Task("t", "", {"test": (Text("a"),)}).form == "text"
    with pytest.raises(UsageError, match="task t has rows of several forms: chat, rows"):
        Task("t", "do", {"train": (ROW,), "test": (CHAT,)})


@pytest.mark.parametrize("roles", [(), ("assistant", "user"), ("user",)])
def test_a_conversation_ends_with_the_assistant(roles: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="ends with a message of the assistant; got"):
        Chat(tuple(Message(role, "hi") for role in roles))


def test_labels_are_outputs_that_come_back(task: Task) -> None:
    few = Task("t", "do", {"train": tuple(Row(str(i), "ab"[i % 2]) for i in range(20))})
    assert few.labels == ("a", "b")
    assert task.labels == ()  # eight outputs, eight rows each
    talks = tuple(
        Chat((Message("user", str(i)), Message("assistant", "ab"[i % 2]))) for i in range(20)
    )
    assert Task("t", "", {"train": talks}).labels == ("a", "b")
    assert Task("t", "", {"train": (Text("a"),) * 20}).labels == ()


def test_the_output_is_the_last_thing_said() -> None:
    assert output_of(OTHER) == "c"
    assert output_of(Chat((*CHAT.messages, Message("user", "x"), Message("assistant", "y")))) == "y"
    with pytest.raises(UsageError, match="a text has no output"):
        output_of(Text("a"))


def test_the_digest_is_of_what_is_trained_on() -> None:
    task = Task("t", "do", {"train": (ROW, OTHER), "test": (ROW,)}, category="x", licence="y")
    assert task.digest.startswith("sha256:")
    assert len(task.digest) == 7 + 64
    same = Task("other", "do", {"test": (ROW,), "valid": (), "train": (ROW, OTHER)})
    assert same.digest == task.digest
    others = [
        dataclasses.replace(task, instruction="Do"),
        dataclasses.replace(task, rows={"train": (OTHER, ROW), "test": (ROW,)}),
        dataclasses.replace(task, rows={"train": (ROW, OTHER), "valid": (ROW,)}),
        dataclasses.replace(task, rows={"train": (ROW, Row("ac", "")), "test": (ROW,)}),
        dataclasses.replace(task, rows={"train": (ROW,), "test": (ROW,)}),
        Task("t", "do", {"train": (CHAT,)}),
        Task("t", "do", {"train": (Text("a"),)}),
    ]
    assert len({other.digest for other in [task, *others]}) == 1 + len(others)


def test_the_digest_is_the_same_next_year() -> None:
    """It is in the cards of experts, which are kept."""
    task = Task("t", "do", {"train": (Row("é", 'b"'),)})
    rows = '{"test":[],"train":[["\\u00e9","b\\""]],"valid":[]}'
    text = f'{{"form":"rows","instruction":"do","rows":{rows}}}'
    assert task.digest == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def test_the_prompt_is_the_instruction_and_the_input(task: Task) -> None:
    assert task.prompt(task.split("train")[0]) == "Say the first word.\nInput: red red\nAnswer:"
    assert prompt("Do.", "x") == "Do.\nInput: x\nAnswer:"
