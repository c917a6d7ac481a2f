"""Scores do not depend on how rows are batched, and are right where the answer is known."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.evaluation.score import exact_match, label_accuracy, same
from adaptlib.training.loop import TrainOptions, train
from adaptlib.training.modules import applied
from adaptlib.training.readers import read_task
from adaptlib.training.tasks import Chat, Message, Row, Task, Text
from tests.training.chats import CHATML, PLAIN, with_template


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


def talks(task: Task, split: str) -> Task:
    """The rows of a task as conversations, each after one that was answered."""
    before = (Message("user", "red blue"), Message("assistant", "red"))
    rows = tuple(
        Chat((*before, Message("user", row.input), Message("assistant", row.output)))
        for row in task.split(split)
    )
    return Task("talks", "", {"train": rows, "test": rows[:12]})


@pytest.mark.parametrize("template", [CHATML, PLAIN], ids=["ends", "newlines"])
def test_a_conversation_is_answered_where_its_template_asks(
    small, tokenizer, task, template: str
) -> None:
    """Greedy by hand from the rendered text on, up to what the template ends an answer with."""
    chatty, data = with_template(tokenizer, template), talks(task, "train")
    options = TrainOptions(epochs=8, batch_size=8, rank=8, lr=2e-2, dtype=torch.float32)
    with applied(small, train(small, chatty, data, options=options)):
        score = exact_match(small, chatty, data, batch_size=5)
        wanted = []
        for chat in data.split("test"):
            assert isinstance(chat, Chat)
            text = chatty.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in chat.messages[:-1]],
                tokenize=False,
                add_generation_prompt=True,
            )
            ids, said = chatty(text, add_special_tokens=False).input_ids, ""
            while len(said) < 6:
                with torch.no_grad():
                    likeliest = small(torch.tensor([ids])).logits[0, -1].argmax().item()
                ids.append(likeliest)
                piece = chatty.decode([likeliest])
                if piece == (chatty.eos_token if template == CHATML else "\n"):
                    break
                said += piece
            wanted.append(said.strip())
    assert list(score.predictions) == wanted
    outputs = [chat.messages[-1].content for chat in data.split("test")]  # type: ignore[union-attr]
    hits = sum(said == output for said, output in zip(wanted, outputs, strict=True))
    assert score.value == hits / 12
    assert hits > 0  # it was taught these very rows: what is learnt is what is asked for
    assert (score.n, score.cut) == (12, 0)


class Says:
    """A model that always says the same, and at every token has the same logits."""

    def __init__(self, tokenizer, text: str, likely: dict[str, float] | None = None) -> None:
        self.said = torch.tensor(tokenizer(text).input_ids)
        self.logits = torch.zeros(len(tokenizer))
        for token, logit in (likely or {}).items():
            self.logits[tokenizer(token).input_ids] = logit
        self.ends: list[int] = []

    def generate(self, *, input_ids, eos_token_id, max_new_tokens, **_options):
        self.ends = eos_token_id
        new = self.said[:max_new_tokens].expand(len(input_ids), -1)
        return torch.cat([input_ids, new], dim=1)

    def __call__(self, *, input_ids, attention_mask, logits_to_keep, use_cache):
        rows, columns = len(input_ids), len(logits_to_keep)
        return SimpleNamespace(logits=self.logits.expand(rows, columns, -1))


@pytest.mark.parametrize(
    ("template", "ends", "wanted"),
    [(CHATML, ["<eos>"], "red\nblue"), (PLAIN, ["<eos>", "\n"], "red")],
    ids=["ends", "newlines"],
)
def test_an_answer_has_lines_where_the_template_lets_it(tokenizer, template, ends, wanted) -> None:
    chatty = with_template(tokenizer, template)
    chat = Chat((Message("user", "red blue"), Message("assistant", wanted)))
    model = Says(tokenizer, "red\nblue<eos>\nmore" if template == CHATML else "red\nblue")
    score = exact_match(model, chatty, Task("t", "", {"test": (chat,)}), max_new_tokens=9)
    assert {chatty.decode([end]) for end in model.ends} == {*ends}
    assert score.value == 1.0


def test_a_label_of_a_conversation_is_its_likeliest_last_answer(tokenizer) -> None:
    """Not that with the likeliest mean over all answers, which would be the longest here, as the
    first answer is very unlikely."""
    chatty = with_template(tokenizer, CHATML)
    labels = ("maybe so", "yes")
    before = (Message("user", "hello"), Message("assistant", "QQQQ"))
    rows = tuple(
        Chat((*before, Message("user", f"{i} is"), Message("assistant", labels[i % 2])))
        for i in range(20)
    )
    model = Says(tokenizer, "", {"Q": -30.0, "yes": 2.0})
    score = label_accuracy(model, chatty, Task("t", "", {"test": rows}), batch_size=7)
    assert score.predictions == ("yes",) * 20
    assert (score.value, score.n, score.cut) == (0.5, 20, 0)


def test_a_text_has_no_score(small, tokenizer) -> None:
    texts = Task("t", "", {"test": (Text("a b"),)})
    with pytest.raises(UsageError, match="task t is of texts"):
        exact_match(small, tokenizer, texts)
    with pytest.raises(UsageError, match="task t is of texts"):
        label_accuracy(small, tokenizer, texts)


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
