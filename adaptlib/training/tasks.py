"""Tasks: rows of (input, output) with an instruction, and the one prompt used everywhere."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

from adaptlib.errors import CorruptError, NotFoundError, UsageError

SPLITS = ("train", "valid", "test")
ROWS_PER_LABEL = 10  # outputs seen this often on average are labels, not free text


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One example."""

    input: str
    output: str


@final
@dataclass(frozen=True)
class Task:
    """A dataset of (input, output) with one instruction, in the splits `train`, `valid`, `test`.

    `category` and `licence` are free text, None where nothing is known.
    """

    name: str
    instruction: str
    rows: Mapping[str, tuple[Row, ...]]
    category: str | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.rows) - set(SPLITS))
        if unknown:
            raise UsageError(f"task {self.name}: no such split {unknown}; wanted {SPLITS}")
        rows = {split: tuple(self.rows[split]) for split in SPLITS if self.rows.get(split)}
        if not rows:
            raise UsageError(f"task {self.name} has no rows; give it one line at least")
        object.__setattr__(self, "rows", MappingProxyType(rows))

    def split(self, name: str) -> tuple[Row, ...]:
        """The rows of one split. Raises NotFoundError where it is empty."""
        if name not in self.rows:
            got = ", ".join(self.rows)
            raise NotFoundError(f"task {self.name} has no rows in split {name!r}; it has {got}")
        return self.rows[name]

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct outputs, sorted, where the same few come back again and again (each ten
        times or more on average); () for a task with free answers."""
        counts = Counter(row.output for rows in self.rows.values() for row in rows)
        if counts.total() < ROWS_PER_LABEL * len(counts):
            return ()
        return tuple(sorted(counts))

    def prompt(self, row: Row) -> str:
        """The text that the model sees before the answer to `row`."""
        return prompt(self.instruction, row.input)


def prompt(instruction: str, text: str) -> str:
    """The prompt for one input. Everything that trains, scores or routes asks with this text."""
    return f"{instruction}\nInput: {text}\nAnswer:"


def answer(output: str) -> str:
    """What follows `prompt`; training puts the end-of-sequence token after it."""
    return f" {output}"


def read_task(path: Path, *, name: str | None = None, instruction: str | None = None) -> Task:
    """Read a JSONL task: one `{"split", "input", "output"}` a line.

    The split is `train`, `valid` or `test`; a line without one is a training row. The name is the
    file's stem unless given. Instruction, category and licence are taken from a `tasks.json`
    beside the file or one folder up, where there is one: a list of `{"name", "instruction",
    "category", "license"}`; an `instruction` given here comes first.

    Raises NotFoundError (no such file), CorruptError (a line that is not such an object, with its
    number) and UsageError (no rows, no instruction).
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"there is no task file {path}")
    name = name or path.stem
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                split, row = _row(line, f"{path}, line {number}")
                rows[split].append(row)
    if not any(rows.values()):
        raise UsageError(
            f"{path} has no rows", hint='one {"split", "input", "output"} object a line'
        )
    facts = _facts(path, name)
    instruction = instruction or facts.get("instruction")
    if not instruction:
        raise UsageError(
            f"task {name} has no instruction: none was given and no tasks.json near {path} has it",
            hint="give one that says what to do with the input",
        )
    return Task(
        name=name,
        instruction=instruction,
        rows={split: tuple(some) for split, some in rows.items()},
        category=facts.get("category"),
        licence=facts.get("licence", facts.get("license")),
    )


def _row(line: bytes, place: str) -> tuple[str, Row]:
    try:
        value = json.loads(line)
    except ValueError as error:  # bad JSON, or bytes that are not UTF-8
        raise CorruptError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{place}: wanted an object, got {type(value).__name__}")
    for column in ("input", "output"):
        if not isinstance(value.get(column), str):
            got = type(value[column]).__name__ if column in value else "no such column"
            raise CorruptError(f"{place}: wanted text in column {column!r}, got {got}")
    split = value.get("split", "train")
    if split not in SPLITS:
        raise CorruptError(f"{place}: wanted split {', '.join(SPLITS)}; got {split!r}")
    return split, Row(value["input"], value["output"])


def _facts(path: Path, name: str) -> dict[str, Any]:
    for folder in (path.parent, path.parent.parent):
        listing = folder / "tasks.json"
        if not listing.is_file():
            continue
        try:
            entries = json.loads(listing.read_bytes())
        except ValueError as error:
            raise CorruptError(f"{listing}: not JSON ({error})") from error
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("name") == name:
                return entry
    return {}
