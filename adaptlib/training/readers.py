"""Reading tasks: from files, standard input, and data sets on the hub."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adaptlib.errors import CorruptError, NotFoundError, UsageError
from adaptlib.training.formats import FORMATS, Record, file_records, stdin_records
from adaptlib.training.hub import PREFIX, hub_records, parse_spec
from adaptlib.training.tasks import SPLITS, Chat, Item, Message, Row, Task, Text, plain

STDIN = "-"
LISTING = "tasks.json"  # facts on tasks; not a task
SPLIT_NAMES = {**{name: name for name in SPLITS}, "validation": "valid", "dev": "valid"}
_FORMS = {Row: "rows of input and output", Chat: "conversations", Text: "texts"}
_NO_TASKS = {"readme", "license", "licence", "notice", "changelog"}  # whatever their suffix
_HINT = 'one {"split", "input", "output"}, {"split", "messages"} or {"split", "text"} a row'


def read_task(
    source: str | Path,
    *,
    name: str | None = None,
    instruction: str | None = None,
    input_column: str = "input",
    output_column: str = "output",
    valid_share: float = 0.0,
) -> Task:
    """Read a task from a `.jsonl`, `.json`, `.csv`, `.tsv` or `.txt` file (see `formats`), from
    `hf://datasets/org/name[@rev][#config]` (the extra `datasets`) or, with `-`, from JSON lines on
    standard input.

    A row has the columns `input` and `output` (or those named here), or `messages`, a list of
    `{"role", "content"}` of which the last is the assistant's, or `text`. All rows of a task have
    the same of these; other columns are not read. `split` is `train`, `valid` (or `validation`,
    `dev`) or `test`; a row without one is a training row. Where no row is in `valid`, about
    `valid_share` of the training rows are held back for it: chosen by their content, whatever
    their order, equal rows together, one at least and never all.

    The name is the file's stem or the data set's name unless given. Instruction, category and
    licence are taken from a `tasks.json` beside the file or one folder up, where there is one: a
    list of `{"name", "instruction", "category", "license"}`; an `instruction` given here comes
    first. Rows of input and output need one.

    Raises NotFoundError (no such file or data set), CorruptError (not text, not of the format, a
    row that is not as above, with its line), UsageError (no rows, no instruction, an instruction
    for rows that are not shown it), and for data sets what `hub.hub_records` raises.
    """
    if not 0 <= valid_share < 1:
        raise UsageError(f"valid_share wants a share in [0, 1); got {valid_share}")
    source = str(source)
    rows: dict[str, list[Item]] = {split: [] for split in SPLITS}
    form = None
    for place, record in _records(source, {input_column, output_column, "messages", "text"}):
        item = _item(record, place, input_column, output_column)
        if form not in (None, type(item)):
            raise CorruptError(
                f"{place}: those before are of {_FORMS[form]}, this one is of {_FORMS[type(item)]}",
                hint="make two tasks of them",
            )
        form = type(item)
        rows[_split(record, place)].append(item)
    if form is None:
        raise UsageError(f"{_called(source)} has no rows", hint=_HINT)
    if valid_share and not rows["valid"]:
        rows["train"], rows["valid"] = _held_back(rows["train"], valid_share)
    name = name or _name(source)
    facts = {} if _elsewhere(source) else _facts(Path(source), name)
    return Task(
        name=name,
        instruction=_instruction(instruction, facts.get("instruction"), form, name, source),
        rows={split: tuple(some) for split, some in rows.items()},
        category=facts.get("category"),
        licence=facts.get("licence", facts.get("license")),
    )


def read_tasks(
    folder: str | Path,
    *,
    input_column: str = "input",
    output_column: str = "output",
    valid_share: float = 0.0,
) -> dict[str, Task]:
    """Every task file of a folder (not of those within) by name, sorted; see `read_task`. Files
    with other suffixes, hidden ones, `tasks.json` and READMEs and licences are no tasks.

    Raises NotFoundError (no such folder, no task in it), UsageError (two files of one name), and
    what `read_task` raises for any of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") or path.name == LISTING
        if hidden or path.suffix.lower() not in FORMATS or not path.is_file():
            continue
        if path.stem.lower() in _NO_TASKS:
            continue
        if path.stem in files:
            other = files[path.stem].name
            raise UsageError(
                f"{folder} has two tasks called {path.stem}: {other} and {path.name}",
                hint="rename one of them",
            )
        files[path.stem] = path
    if not files:
        raise NotFoundError(
            f"{folder} has no tasks in it", hint=f"a task is a file {', '.join(FORMATS)}"
        )
    return {
        name: read_task(
            files[name],
            input_column=input_column,
            output_column=output_column,
            valid_share=valid_share,
        )
        for name in sorted(files)
    }


def _elsewhere(source: str) -> bool:
    return source == STDIN or source.startswith(PREFIX)


def _records(source: str, columns: set[str]) -> Iterator[Record]:
    if source == STDIN:
        return stdin_records()
    if source.startswith(PREFIX):
        return hub_records(source, splits=SPLIT_NAMES, columns=columns)
    if Path(source).name == LISTING:
        raise UsageError(f"{source} says what is known of tasks; it is not one itself")
    return file_records(Path(source))


def _called(source: str) -> str:
    return "standard input" if source == STDIN else source


def _name(source: str) -> str:
    if source == STDIN:
        return "stdin"
    if source.startswith(PREFIX):
        repo, _, config = parse_spec(source)
        name = repo.partition("/")[2]
        return f"{name}-{config}" if config else name
    return Path(source).stem


def _split(record: Mapping[str, Any], place: str) -> str:
    split = record.get("split", "train")
    if not isinstance(split, str) or split not in SPLIT_NAMES:
        raise CorruptError(f"{place}: wanted split {', '.join(SPLIT_NAMES)}; got {split!r}")
    return SPLIT_NAMES[split]


def _item(record: Mapping[str, Any], place: str, given: str, wanted: str) -> Item:
    """The row in a record; `given` and `wanted` are its columns where it is a Row."""
    if not (given in record and wanted in record):
        if "messages" in record:
            return _chat(record["messages"], place)
        if "text" in record and given not in record and wanted not in record:
            text = _string(record["text"], place, "column 'text'")
            if not text.strip():
                raise CorruptError(f"{place}: the text is empty")
            return Text(text)
    for column in (given, wanted):
        if column not in record:
            known = ", ".join(name for name in record if name != "split") or "none"
            raise CorruptError(
                f"{place}: wanted text in column {column!r}, got no such column; there is {known}",
                hint="say which columns: --input-column, --output-column; or give messages or text",
            )
    return Row(
        _string(record[given], place, f"column {given!r}"),
        _string(record[wanted], place, f"column {wanted!r}"),
    )


def _chat(messages: Any, place: str) -> Chat:
    if not isinstance(messages, list):
        got = type(messages).__name__
        raise CorruptError(f"{place}: wanted a list of messages, got {got}")
    turns = []
    for number, message in enumerate(messages, 1):
        where = f"{place}: message {number}"
        if not isinstance(message, dict):
            raise CorruptError(f"{where}: wanted an object, got {type(message).__name__}")
        if message.get("tool_calls"):
            raise CorruptError(f"{where} calls tools, which is not supported")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                got = type(message[key]).__name__ if key in message else "no such key"
                raise CorruptError(f"{where}: wanted text in {key!r}, got {got}")
        turns.append(
            Message(
                _string(message["role"], where, "'role'"),
                _string(message["content"], where, "'content'"),
            )
        )
    try:
        return Chat(tuple(turns))
    except UsageError as error:
        raise CorruptError(f"{place}: {error}") from error


def _string(value: Any, place: str, what: str) -> str:
    if not isinstance(value, str):
        raise CorruptError(f"{place}: wanted text in {what}, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell it, no tokenizer takes it
        raise CorruptError(f"{place}: {what} has half a character (a lone surrogate)") from error
    return value


def _held_back(rows: list[Item], share: float) -> tuple[list[Item], list[Item]]:
    """(kept, held back). By hash, so neither order nor a few more rows change much."""

    keys = [hashlib.sha256(json.dumps(plain(item)).encode()).digest() for item in rows]
    ordered = sorted(set(keys))
    count = min(max(1, round(share * len(ordered))), len(ordered) - 1)
    held = set(ordered[: max(count, 0)])
    kept = [item for item, k in zip(rows, keys, strict=True) if k not in held]
    return kept, [item for item, k in zip(rows, keys, strict=True) if k in held]


def _instruction(given: str | None, known: Any, form: type, name: str, source: str) -> str:
    if form is not Row:
        if given:
            raise UsageError(
                f"task {name} is of {_FORMS[form]}, which are trained on as they are; the "
                "instruction would not be seen",
                hint="leave it out"
                if form is Text
                else "leave it out, or put it into the messages, in one with the role system",
            )
        return known if isinstance(known, str) else ""
    instruction = given or known
    if not instruction:
        near = "" if _elsewhere(source) else f" and no {LISTING} near {source} has it"
        raise UsageError(
            f"task {name} has no instruction: none was given{near}",
            hint="give one that says what to do with the input: --instruction TEXT",
        )
    if not isinstance(instruction, str):
        got = type(instruction).__name__
        raise CorruptError(f"task {name}: {LISTING} has an instruction that is no text, but {got}")
    return instruction


def _facts(path: Path, name: str) -> dict[str, Any]:
    for folder in (path.parent, path.parent.parent):
        listing = folder / LISTING
        if not listing.is_file():
            continue
        try:
            entries = json.loads(listing.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{listing}: not JSON ({error})") from error
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("name") == name:
                return entry
    return {}
