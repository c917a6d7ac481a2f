"""Conversations as ids: the loss is on what the assistant says, and on nothing else."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptlib.errors import UsageError
from adaptlib.training.encode import IGNORED, encode_items, encode_task
from adaptlib.training.tasks import Chat, Message, Task
from adaptlib.training.tokens import chat_ids, render
from tests.training.chats import CHATML, FORGETFUL, PLAIN, chat, check, merging, with_template

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


def spoken(tokenizer, template: str, talk: Chat, *, end: str) -> list[bool]:
    """Whether each character of the rendered conversation is of an answer or of its end."""
    flags: list[bool] = []
    for message in talk.messages:
        mine = message.role == "assistant"
        if template == CHATML:
            head, tail = f"<|{message.role}|>", "\n"
        else:
            head, tail = f"{message.role}:", ""
            end = "\n"
        body = message.content if template == CHATML else f" {message.content}"
        flags += [False] * len(head) + [mine] * len(body + end) + [False] * len(tail)
    assert len(flags) == len(render(tokenizer, talk.messages, ask=False))
    return flags


@pytest.mark.parametrize("template", [CHATML, PLAIN], ids=["ends", "newlines"])
@same_fixtures
@given(
    contents=st.lists(WORDS, min_size=1, max_size=3).map(
        lambda c: [x for y in c for x in (y, y[::-1])]
    )
)
def test_the_loss_is_on_what_the_assistant_says(either, template, contents) -> None:
    chatty, talk = with_template(either, template), chat(*contents)
    task = Task("t", "", {"train": (talk, chat("hi", "yes"), talk)})
    encoded = encode_task(chatty, task, "train", max_length=1000)
    assert encoded.examples[0] == encoded.examples[2]
    example = encoded.examples[0]
    check(example, 1000)

    text = render(chatty, talk.messages, ask=False)
    whole = chatty(text, add_special_tokens=False, return_offsets_mapping=True)
    flags = spoken(chatty, template, talk, end=chatty.eos_token)
    wanted = [
        i if any(flags[start:end]) else IGNORED
        for i, (start, end) in zip(whole.input_ids, whole.offset_mapping, strict=True)
    ]
    assert list(example.ids) == whole.input_ids[: len(example.ids)]
    assert set(wanted[len(example.ids) :]) <= {IGNORED}
    assert list(example.targets) == wanted[: len(example.ids)]
    if template == CHATML:  # nobody says what comes after eos
        assert example.ids[-1] == chatty.eos_token_id
        assert example.ids.count(chatty.eos_token_id) == len(contents)


def test_a_token_over_the_border_is_of_the_answer(merged) -> None:
    """Where nothing parts a question from its answer, one token can have the end of the one and
    the beginning of the other. What is asked with is what would have been predicted without it."""
    chatty = with_template(merged, "{% for m in messages %}{{ m.content }}{% endfor %}")
    task = Task("t", "", {"train": (chat("Say th", "e answer"),)})
    example = encode_task(chatty, task, "train", max_length=20).examples[0]
    assert [chatty.decode([i]) for i in example.ids] == ["Say", " the", " answer"]
    assert example.targets == (IGNORED, *example.ids[1:])


def test_many_conversations_are_encoded_as_each_alone(tokenizer) -> None:
    chatty = with_template(tokenizer, CHATML)
    talks = tuple(chat("a" * (i % 7), "b" * (i % 5), "c", str(i)) for i in range(600))
    every = encode_task(chatty, Task("t", "", {"train": talks}), "train", max_length=99).examples
    for i in (0, 255, 256, 599):
        alone = Task("t", "", {"train": (talks[i],)})
        assert encode_task(chatty, alone, "train", max_length=99).examples == (every[i],)
    assert len(every) == 600


def test_a_long_conversation_loses_its_start(merged) -> None:
    """What stays is the beginning of sequence and the end; the last answer is whole."""
    chatty = with_template(merged, "{{ bos_token }}" + CHATML)
    talk = chat("first " * 20, "early", "then", "late late late")
    task = Task("t", "", {"train": (talk, chat("a", "b"))})
    whole = encode_task(chatty, task, "train", max_length=1000).examples[0]
    last = encode_items(chatty, task, [talk], "train", max_length=1000, last_only=True).examples[0]
    late = sum(target != IGNORED for target in last.targets)
    assert 0 < late < sum(target != IGNORED for target in whole.targets)
    for max_length in range(late + 2, len(whole.ids)):
        encoded = encode_task(chatty, task, "train", max_length=max(40, max_length))
        short = encode_items(chatty, task, [talk], "train", max_length=max_length)
        assert short.cut == 1
        assert encoded.cut == (max(40, max_length) < len(whole.ids))
        example = short.examples[0]
        check(example, max_length)
        assert len(example.ids) == max_length
        assert example.ids == (merged.bos_token_id, *whole.ids[-max_length + 1 :])
        assert example.targets[2:] == whole.targets[len(whole.ids) - max_length + 2 :]
        assert example.targets[:2] == (IGNORED, IGNORED)
        assert example.targets[-late:] == whole.targets[-late:]
    with pytest.raises(UsageError, match="1 of 1 rows"):
        encode_items(chatty, task, [talk], "train", max_length=late + 1)


def test_a_conversation_to_answer_is_cut_at_its_start_too(merged) -> None:
    chatty = with_template(merged, "{{ bos_token }}" + CHATML)
    talk = [Message("user", "one two three four")]
    ids, cut = chat_ids(chatty, talk, room=100)
    assert not cut
    assert chatty.decode(ids) == "<s><|user|>one two three four</s>\n<|assistant|>"
    short, cut = chat_ids(chatty, talk, room=12)
    assert cut
    assert short == [merged.bos_token_id, *ids[-11:]]
    with pytest.raises(UsageError, match="there is room for 0"):
        chat_ids(chatty, talk, room=-3)


def test_templates_that_do_not_fit_are_named(tokenizer) -> None:
    def encode(template: str | None, *talks: Chat):
        chatty = tokenizer if template is None else with_template(tokenizer, template)
        return encode_task(chatty, Task("t", "", {"train": talks}), "train", max_length=200)

    with pytest.raises(UsageError, match="no chat template") as e:
        encode(None, chat("a", "b"))
    assert "input and output" in str(e.value.hint)
    # the same model is fine where nothing was answered before
    with pytest.raises(
        UsageError, match=r"row 2 of train, task t: .* rewrites earlier turns: mess"
    ):
        encode(FORGETFUL, chat("a", "b"), chat("a", "b", "c", "d"))
    assert len(encode(FORGETFUL, chat("a", "b")).examples) == 1
    with pytest.raises(UsageError, match=r"row 1 of train, task t: .* generation prompt"):
        encode(CHATML.replace("%}<|assistant|>", "%}<|model|>"), chat("a", "b"))
    with pytest.raises(UsageError, match=r"refused a conversation \(user, assistant\): .*no users"):
        encode("{{ raise_exception('no users') }}", chat("a", "b"))
    silent = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UsageError, match="nothing to learn"):
        encode(silent, chat("a", ""))
