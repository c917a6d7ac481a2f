"""From texts and conversations to token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from adaptlib.errors import UsageError
from adaptlib.training.tasks import Chat, Message, prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOGETHER = 256  # conversations that are tokenised in one call; each several times over


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


def tokens(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special: bool
) -> list[list[int]]:
    """The ids of each text, all in one call, which is many times faster than one call each. If
    `special`, with the special tokens that the tokenizer adds, but for an eos at the end."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=special, verbose=False).input_ids
    eos = tokenizer.eos_token_id if special else None
    return [list(ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids) for ids in encoded]


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", instruction: str, text: str, *, room: int
) -> tuple[list[int], bool]:
    """The prompt's ids, at most `room` of them, and whether the input was cut to fit.

    The input is cut at its end, so that the instruction and "Answer:" are always whole. Special
    tokens are the tokenizer's own (a bos where it adds one), never an eos.
    """
    return prompts_ids(tokenizer, instruction, [text], [room])[0]


def prompts_ids(
    tokenizer: "PreTrainedTokenizerBase",
    instruction: str,
    texts: Sequence[str],
    rooms: Sequence[int],
) -> list[tuple[list[int], bool]]:
    """`prompt_ids` of each text with its room, tokenised together."""
    ids = tokens(tokenizer, [prompt(instruction, text) for text in texts], special=True)
    long = [i for i, some in enumerate(ids) if len(some) > rooms[i]]
    cut = set(long)
    inner = dict(zip(long, tokens(tokenizer, [texts[i] for i in long], special=False), strict=True))
    kept = {i: len(some) for i, some in inner.items()}
    while long:
        for i in long:
            if kept[i] == 0:
                raise UsageError(
                    f"the instruction alone takes {len(ids[i])} tokens; there is room for "
                    f"{max(rooms[i], 0)}",
                    hint="a shorter instruction, or a larger max_length",
                )
            # A cut inside a character decodes to U+FFFD, which takes more tokens than were cut
            # off: so what is kept shrinks at every turn, whatever the new text takes.
            kept[i] = max(0, kept[i] - (len(ids[i]) - rooms[i]))
        shorter = [str(tokenizer.decode(inner[i][: kept[i]])).rstrip("\ufffd") for i in long]
        again = tokens(tokenizer, [prompt(instruction, text) for text in shorter], special=True)
        for i, some in zip(long, again, strict=True):
            ids[i] = some
        long = [i for i in long if len(ids[i]) > rooms[i]]
    return [(some, i in cut) for i, some in enumerate(ids)]


@final
@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation's ids, up to what ends its last answer, and where each turn of the assistant
    begins and ends in them: what the model would have to generate, without what asks for it."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def conversations(
    tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Chat], *, of: str
) -> list[Conversation]:
    """Each conversation in the tokenizer's chat template. `of` names them in messages.

    A turn begins where the template's generation prompt ends, found by rendering the conversation
    once up to each turn. Raises UsageError where that does not work: the template writes an
    earlier turn differently once there are later ones.
    """
    found = []
    for start in range(0, len(chats), TOGETHER):
        rendered = [
            _rendered(tokenizer, chat, f"row {start + i} of {of}")
            for i, chat in enumerate(chats[start : start + TOGETHER], 1)
        ]
        flat = tokens(tokenizer, [text for texts in rendered for text in texts], special=False)
        at = 0
        for i, texts in enumerate(rendered, start + 1):
            found.append(_cut_out(tokenizer, flat[at : at + len(texts)], f"row {i} of {of}"))
            at += len(texts)
    return found


def _rendered(tokenizer: "PreTrainedTokenizerBase", chat: Chat, place: str) -> list[str]:
    """The conversation up to the beginning and up to the end of each turn of the assistant."""
    whole = render(tokenizer, chat.messages, ask=False)
    texts = []
    for i, message in enumerate(chat.messages):
        if message.role != "assistant":
            continue
        last = i + 1 == len(chat.messages)
        before = render(tokenizer, chat.messages[:i], ask=True)
        through = whole if last else render(tokenizer, chat.messages[: i + 1], ask=False)
        if not through.startswith(before):
            raise UsageError(
                f"{place}: the tokenizer's chat template does not begin an answer with its "
                "generation prompt, so what to learn cannot be told from what is given",
                hint="set tokenizer.chat_template to one that does",
            )
        if not whole.startswith(through):
            raise UsageError(
                f"{place}: the tokenizer's chat template rewrites earlier turns: message "
                f"{i + 1} of {len(chat.messages)} is not the same once others follow",
                hint="make each answer the end of a conversation with no earlier answer in it",
            )
        texts += [before, through]
    return texts


def _cut_out(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[list[int]], place: str
) -> Conversation:
    whole, eos, spans = ids[-1], tokenizer.eos_token_id, []
    for before, through in zip(ids[::2], ids[1::2], strict=True):
        # A token over the border, which the shorter text alone would not have, is of the answer.
        start, end = max(1, _common(before, whole)), _common(through, whole)
        ends = [i + 1 for i in range(start, end) if whole[i] == eos]
        spans.append((start, ends[-1] if ends else end))  # nobody generates past an eos
    if spans[-1][0] >= spans[-1][1]:
        raise UsageError(f"{place}: the last answer has no tokens, so there is nothing to learn")
    return Conversation(tuple(whole[: spans[-1][1]]), tuple(spans))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    if a == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))


def chat_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, room: int
) -> tuple[list[int], bool]:
    """The ids of a conversation in which it is the assistant's turn, at most `room` of them, and
    whether its start was cut off to fit."""
    ids = tokens(tokenizer, [render(tokenizer, messages, ask=True)], special=False)[0]
    if len(ids) <= room:
        return ids, False
    bos = begins(tokenizer, ids)
    if room <= bos:
        raise UsageError(
            f"a conversation takes {len(ids)} tokens; there is room for {max(room, 0)}",
            hint="a larger max_length",
        )
    return ids[:bos] + ids[len(ids) - (room - bos) :], True


def begins(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> int:
    """How many ids at the start stay when the start is cut off: 1 where it is a bos, else 0."""
    return int(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, ask: bool) -> str:
    """A conversation in the tokenizer's template; with `ask` it is the assistant's turn now.
    Raises UsageError where there is no template, or it does not take these messages."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the tokenizer has no chat template, so it cannot be given messages",
            hint="use the tokenizer of a chat model, set tokenizer.chat_template, or give rows of "
            "input and output",
        )
    plain = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # a template is a program, which may raise anything
        roles = ", ".join(message.role for message in messages[:8])
        raise UsageError(
            f"the tokenizer's chat template refused a conversation ({roles or 'no messages'}): "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
