"""Turning rows into ids: the loss is where it belongs, nothing is lost without a word, and doing
it for all rows at once changes nothing."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from adaptlib.errors import UsageError
from adaptlib.training.encode import (
    IGNORED,
    Example,
    batches,
    collate,
    encode_items,
    encode_task,
    prompt_ids,
)
from adaptlib.training.tasks import Row, Task, Text, answer, prompt
from tests.tiny import make_tokenizer
from tests.training.chats import CHATML, chat, check, merging, with_template

WORDS = st.text("abc the is\n.é\U0001f600", max_size=24)
same_fixtures = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def merged():
    return merging()


@pytest.fixture(params=["bytes", "merged"])
def either(request: pytest.FixtureRequest, tokenizer, merged):
    return tokenizer if request.param == "bytes" else merged


# ---- rows


def test_the_loss_is_on_the_answer_and_eos_only(tokenizer, task: Task) -> None:
    examples = encode_task(tokenizer, task, "train", max_length=200).examples
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


def one_by_one(tokenizer, task: Task, max_length: int) -> tuple[list[Example], int, int]:
    """Row after row, cutting the input as long as it does not fit."""
    eos, examples, cuts, dropped = tokenizer.eos_token_id, [], 0, 0

    def encode(text: str) -> list[int]:
        ids = list(tokenizer(prompt(task.instruction, text)).input_ids)
        return ids[:-1] if ids[-1] == eos else ids

    for row in task.rows["train"]:
        tail = [*tokenizer(answer(row.output), add_special_tokens=False).input_ids, eos]
        room = max_length - len(tail)
        if len(encode("")) > room:
            dropped += 1
            continue
        ids = encode(row.input)
        inner = tokenizer(row.input, add_special_tokens=False).input_ids
        cuts, kept = cuts + (len(ids) > room), len(inner)
        while len(ids) > room:
            kept = max(0, kept - (len(ids) - room))
            ids = encode(tokenizer.decode(inner[:kept]).rstrip("\ufffd"))
        examples.append(Example((*ids, *tail), (*[IGNORED] * len(ids), *tail)))
    return examples, cuts, dropped


@same_fixtures
@given(
    rows=st.lists(st.builds(Row, WORDS, WORDS), min_size=1, max_size=6),
    max_length=st.integers(36, 80),
)
def test_rows_encoded_together_are_rows_encoded_alone(either, rows, max_length) -> None:
    task = Task("t", "Say it.", {"train": tuple(rows)})
    examples, cuts, dropped = one_by_one(either, task, max_length)
    assume(examples)
    encoded = encode_task(either, task, "train", max_length=max_length, drop_long=True)
    assert list(encoded.examples) == examples
    assert (encoded.cut, encoded.dropped) == (cuts, dropped)
    for example in encoded.examples:
        check(example, max_length)


def test_many_rows_take_few_calls_of_the_tokenizer(tokenizer) -> None:
    class Counting:
        calls = 0

        def __getattr__(self, name: str):
            return getattr(tokenizer, name)

        def __call__(self, *args, **options):
            Counting.calls += 1
            return tokenizer(*args, **options)

    rows = tuple(Row(f"{i} " * (i % 40), "yes") for i in range(300))
    encoded = encode_items(
        Counting(),  # type: ignore[arg-type]
        Task("t", "Do.", {"train": rows}),
        rows,
        "train",
        max_length=64,
    )
    assert encoded.cut > 100
    assert Counting.calls < 12  # one call a row takes ten times as long


def test_an_absent_split_is_empty(tokenizer, task: Task) -> None:
    only = Task("t", "do", {"train": task.rows["train"]})
    encoded = encode_task(tokenizer, only, "valid", max_length=64)
    assert (encoded.examples, encoded.cut, encoded.dropped) == ((), 0, 0)


def test_a_long_input_is_cut_counted_and_still_asks(tokenizer) -> None:
    rows = (Row("short", "yes"), Row("long " * 60, "no"))
    encoded = encode_task(tokenizer, Task("t", "Is it?", {"train": rows}), "train", max_length=64)
    assert (encoded.cut, encoded.dropped) == (1, 0)
    assert len(encoded.examples[1].ids) <= 64
    text = tokenizer.decode(encoded.examples[1].ids[:-1])
    assert text.startswith("Is it?\nInput: long long")
    assert text.endswith("\nAnswer: no")


@pytest.mark.parametrize("length", [2, 30, 150])
def test_an_instruction_that_leaves_no_room_is_named(tokenizer, length: int) -> None:
    task = Task("t", "Is it? " * 20, {"train": (Row("a", "b"),)})
    with pytest.raises(UsageError, match=r"task t: the instruction alone takes 156 tokens"):
        encode_task(tokenizer, task, "train", max_length=length, drop_long=True)
    with pytest.raises(UsageError, match="instruction alone takes 156 tokens; there is room for"):
        prompt_ids(tokenizer, task.instruction, "a", room=length)
    with pytest.raises(UsageError, match="2 tokens or more; got 1"):
        encode_task(tokenizer, task, "train", max_length=1)


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


# ---- outputs that do not fit


def long_rows() -> Task:
    outputs = ("ok", "no " * 40, "ok", "no " * 50)
    return Task("t", "Do.", {"train": tuple(Row("in", output) for output in outputs)})


def long_chats() -> Task:
    answers = ("ok", "no " * 40, "ok", "no " * 50)
    return Task("t", "", {"train": tuple(chat("hi", text) for text in answers)})


@pytest.mark.parametrize("make", [long_rows, long_chats])
def test_a_long_output_is_an_error_that_says_what_would_fit(tokenizer, make) -> None:
    chatty = with_template(tokenizer, CHATML)
    task = make()
    with pytest.raises(
        UsageError, match=r"2 of 4 rows of train, task t, .* the first is row 2,"
    ) as e:
        encode_task(chatty, task, "train", max_length=60)
    assert e.value.hint is not None
    assert e.value.hint.endswith("or --drop-long leaves them out")
    enough = int(e.value.hint.split()[1])
    every = encode_task(chatty, task, "train", max_length=enough)
    assert (len(every.examples), every.dropped) == (4, 0)
    with pytest.raises(UsageError, match="1 of 4 rows"):
        encode_task(chatty, task, "train", max_length=enough - 1)

    fewer = encode_task(chatty, task, "train", max_length=60, drop_long=True)
    assert (len(fewer.examples), fewer.dropped) == (2, 2)
    assert len({example.ids for example in fewer.examples}) == 1  # the two that say ok


@pytest.mark.parametrize("make", [long_rows, long_chats])
def test_a_task_without_an_output_that_fits_is_an_error(tokenizer, make) -> None:
    chatty = with_template(tokenizer, CHATML)
    with pytest.raises(UsageError, match=r"4 of 4 rows of train") as e:
        encode_task(
            chatty, make(), "train", max_length=22 if make is long_rows else 3, drop_long=True
        )
    assert "none is left" in str(e.value.hint)


# ---- texts


@same_fixtures
@given(
    texts=st.lists(WORDS.filter(lambda text: text != ""), min_size=1, max_size=4),
    max_length=st.integers(2, 40),
)
def test_every_token_of_a_text_is_predicted_once(either, texts, max_length) -> None:
    task = Task("t", "", {"train": tuple(Text(text) for text in texts)})
    encoded = encode_task(either, task, "train", max_length=max_length)
    assert (encoded.cut, encoded.dropped) == (0, 0)
    left = list(encoded.examples)
    for text in texts:
        whole = list(either(text).input_ids)
        if whole[-1] != either.eos_token_id:
            whole.append(either.eos_token_id)
        predicted = []
        while len(predicted) < len(whole) - 1:
            example = left.pop(0)
            check(example, max_length)
            assert example.targets[1:] == example.ids[1:]
            assert example.ids[0] == ([whole[0], *predicted])[-1]  # it goes on where that ended
            predicted += example.ids[1:]
        assert predicted == whole[1:]
    assert left == []


def test_a_text_without_tokens_is_an_error() -> None:
    task = Task("t", "", {"train": (Text("a b"), Text("  "))})
    with pytest.raises(UsageError, match=r"row 2 of train, task t: .* no tokens"):
        encode_task(make_tokenizer(), task, "train", max_length=8)


# ---- batches


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=60),
    size=st.integers(1, 9),
    seed=st.none() | st.integers(0, 5),
)
def test_batches_have_every_example_once(lengths, size, seed) -> None:
    examples = [Example((3,) * n, (IGNORED, *[3] * (n - 1))) for n in lengths]
    rows = []
    for batch in batches(examples, size=size, pad=1, seed=seed):
        assert 1 <= len(batch.rows) <= size
        assert len(batch.rows) == len(batch.input_ids)
        widths = [len(examples[row].ids) for row in batch.rows]
        assert batch.attention_mask.sum(1).tolist() == widths  # each at the row that is named
        assert batch.input_ids.shape[1] == max(widths)
        rows += batch.rows
    assert sorted(rows) == list(range(len(examples)))


def test_batches_depend_on_the_seed_alone_and_are_of_like_length(tokenizer) -> None:
    rows = tuple(Row("x" * (i % 60), "y") for i in range(240))
    task = Task("t", "do", {"train": rows})
    examples = encode_task(tokenizer, task, "train", max_length=200).examples

    def ids(seed: int) -> list[torch.Tensor]:
        return [batch.input_ids for batch in batches(examples, size=8, pad=1, seed=seed)]

    again = zip(ids(1), ids(1), strict=True)
    assert all(torch.equal(a, b) for a, b in again)
    assert any(a.shape != b.shape for a, b in zip(ids(1), ids(2), strict=True))
    padding = sum((b == 1).sum().item() for b in ids(1)) / sum(b.numel() for b in ids(1))
    assert padding < 0.1  # unsorted it is 0.3 here


def test_a_batch_is_padded_right_and_labels_are_the_next_tokens() -> None:
    batch = collate([Example((5, 6, 7), (IGNORED, IGNORED, 7)), Example((8, 9), (IGNORED, 9))], 1)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORED, 7, IGNORED], [9, IGNORED, IGNORED]]
    assert batch.rows == (0, 1)
