"""Tasks: rows of (input, output) with an instruction, and the one prompt used everywhere."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from adaptlib.errors import NotFoundError, UsageError

SPLITS = ("train", "valid", "test")
ROWS_PER_LABEL = 10  # outputs seen this often on average are labels, not free text


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One example: the model is shown `input` and is to say `output`."""

    input: str
    output: str


@final
@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is one that the tokenizer's template knows."""

    role: str
    content: str


@final
@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with a message of the assistant, all of whose turns are learnt.

    Raises UsageError where it ends with another.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        last = self.messages[-1].role if self.messages else "no message"
        if last != "assistant":
            raise UsageError(f"a conversation ends with a message of the assistant; got {last}")


@final
@dataclass(frozen=True, slots=True)
class Text:
    """A document, every token of which is learnt."""

    text: str


Item = Row | Chat | Text
FORMS: dict[type, str] = {Row: "rows", Chat: "chat", Text: "text"}


@final
@dataclass(frozen=True)
class Task:
    """Rows of one form (all `Row`, all `Chat` or all `Text`) in splits `train`, `valid`, `test`.

    `instruction` is what the model is told before each `Row`; conversations and texts are not
    shown it. `category` and `licence` are free text, None where nothing is known.

    Raises UsageError for no rows at all, another split, or rows of several forms.
    """

    name: str
    instruction: str
    rows: Mapping[str, tuple[Item, ...]]
    category: str | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.rows) - set(SPLITS))
        if unknown:
            raise UsageError(f"task {self.name}: no such split {unknown}; wanted {SPLITS}")
        rows = {split: tuple(self.rows[split]) for split in SPLITS if self.rows.get(split)}
        if not rows:
            raise UsageError(f"task {self.name} has no rows; give it one line at least")
        forms = sorted({FORMS[type(item)] for some in rows.values() for item in some})
        if len(forms) > 1:
            raise UsageError(f"task {self.name} has rows of several forms: {', '.join(forms)}")
        object.__setattr__(self, "rows", MappingProxyType(rows))

    def split(self, name: str) -> tuple[Item, ...]:
        """The rows of one split. Raises NotFoundError where it is empty."""
        if name not in self.rows:
            got = ", ".join(self.rows)
            raise NotFoundError(f"task {self.name} has no rows in split {name!r}; it has {got}")
        return self.rows[name]

    @property
    def form(self) -> str:
        """`rows`, `chat` or `text`."""
        return FORMS[type(next(iter(self.rows.values()))[0])]

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct outputs (last answers, of conversations), sorted, where the same few come
        back again and again (each ten times or more on average); () for a task with free answers
        and for texts."""
        if self.form == "text":
            return ()
        counts = Counter(output_of(item) for rows in self.rows.values() for item in rows)
        if counts.total() < ROWS_PER_LABEL * len(counts):
            return ()
        return tuple(sorted(counts))

    @property
    def digest(self) -> str:
        """`sha256:...` of what is trained on: the form, the instruction, and all rows by split and
        in order. Not of the name, nor of the file that the rows were read from."""
        rows = {split: [plain(item) for item in self.rows.get(split, ())] for split in SPLITS}
        value = {"form": self.form, "instruction": self.instruction, "rows": rows}
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def prompt(self, row: Row) -> str:
        """The text that the model sees before the answer to `row`."""
        return prompt(self.instruction, row.input)


def output_of(item: Item) -> str:
    """What the model is to say in the end. Raises UsageError for a Text, all of which is."""
    if isinstance(item, Row):
        return item.output
    if isinstance(item, Chat):
        return item.messages[-1].content
    raise UsageError("a text has no output apart from itself")


def plain(item: Item) -> list[str] | list[list[str]] | str:
    """A row as JSON."""
    if isinstance(item, Row):
        return [item.input, item.output]
    if isinstance(item, Chat):
        return [[message.role, message.content] for message in item.messages]
    return item.text


def prompt(instruction: str, text: str) -> str:
    """The prompt for one input. Everything that trains, scores or routes asks with this text."""
    return f"{instruction}\nInput: {text}\nAnswer:"


def answer(output: str) -> str:
    """What follows `prompt`; training puts the end-of-sequence token after it."""
    return f" {output}"
