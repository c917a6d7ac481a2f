"""Reading tasks: the same rows from every format, and a clear word on what is wrong, and where."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from adaptlib.errors import CorruptError, NotFoundError, UsageError
from adaptlib.training.readers import read_task, read_tasks
from adaptlib.training.tasks import SPLITS, Chat, Message, Row, Task, Text

GOOD = '{"split": "train", "input": "a", "output": "b"}\n'
TALK = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
Records = list[dict[str, str]]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def written(folder: Path, records: Records, suffix: str) -> Path:
    """The records in a file of this format, which is what the standard library makes of them."""
    text = io.StringIO()
    if suffix == ".jsonl":
        text.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    elif suffix == ".json":
        json.dump(records, text)
    else:
        delimiter = "\t" if suffix == ".tsv" else ","
        table = csv.DictWriter(text, list(records[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(records)
    return write(folder / f"task{suffix}", text.getvalue())


# ---- formats


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
    with pytest.raises(UsageError, match="is not one itself"):
        read_task(tmp_path / "tasks.json", instruction="Hi")


# what a file of text can hold: no lone surrogates, no zero bytes
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
ROWS = st.fixed_dictionaries({"split": st.sampled_from(SPLITS), "input": CELLS, "output": CELLS})


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(records=st.lists(ROWS, min_size=1, max_size=6))
@example(records=[{"split": "test", "input": "a\u2028b\x85c\x0c", "output": "\ufeff\x1c"}])
@example(records=[{"split": "test", "input": ' "a",\tb\r\n', "output": "\r\n\n\r"}])
def test_the_same_rows_are_the_same_task_from_every_format(tmp_path: Path, records) -> None:
    wanted = Task(
        "task",
        "Do.",
        {
            split: tuple(Row(r["input"], r["output"]) for r in records if r["split"] == split)
            for split in SPLITS
        },
    )
    for suffix in (".jsonl", ".json", ".csv", ".tsv"):
        task = read_task(written(tmp_path, records, suffix), instruction="Do.")
        assert task == wanted, suffix
        assert task.digest == wanted.digest
    for suffix in (".jsonl", ".csv"):  # as Windows writes it
        path = tmp_path / f"task{suffix}"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert read_task(path, instruction="Do.") == wanted


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_columns_can_have_other_names(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, [{"id": "7", "text": "a", "label": "b"}], suffix)
    task = read_task(path, instruction="Do.", input_column="text", output_column="label")
    assert task.rows == {"train": (Row("a", "b"),)}
    with pytest.raises(CorruptError, match=r"'title', got no such column; there is id, text, lab"):
        read_task(path, instruction="Do.", input_column="title", output_column="label")


@pytest.mark.parametrize("suffix", [".jsonl", ".CSV"])
def test_splits_have_several_names(tmp_path: Path, suffix: str) -> None:
    names = ["train", "valid", "validation", "dev", "test"]
    records = [{"split": name, "input": name, "output": "x"} for name in names]
    path = written(tmp_path, records, suffix.lower()).rename(tmp_path / f"a{suffix}")
    task = read_task(path, instruction="Do.")
    assert [row.input for row in task.split("valid")] == ["valid", "validation", "dev"]  # type: ignore[union-attr]
    assert {split: len(rows) for split, rows in task.rows.items()} == {
        "train": 1,
        "valid": 3,
        "test": 1,
    }


def test_conversations_and_texts_need_no_instruction(tmp_path: Path) -> None:
    talks = read_task(write(tmp_path / "talks.jsonl", TALK + TALK))
    talk = Chat((Message("user", "a"), Message("assistant", "b")))
    assert talks == Task("talks", "", {"train": (talk, talk)})
    texts = read_task(write(tmp_path / "texts.csv", "text,split\na,dev\nb,train\n"))
    assert texts == Task("texts", "", {"train": (Text("b"),), "valid": (Text("a"),)})
    for path in (tmp_path / "talks.jsonl", tmp_path / "texts.csv"):
        with pytest.raises(UsageError, match="instruction would not be seen"):
            read_task(path, instruction="Do.")


def test_plain_text_is_a_row_a_paragraph(tmp_path: Path) -> None:
    text = "\n\nOne\nstill one.\r\n \t\r\nTwo.  \n\n\n\n  Three"
    task = read_task(write(tmp_path / "book.txt", text))
    assert task.rows == {"train": (Text("One\nstill one."), Text("Two."), Text("  Three"))}


def test_standard_input_is_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    given(GOOD.encode())
    task = read_task("-", instruction="Do.", name="piped")
    assert (task.name, task.rows) == ("piped", {"train": (Row("a", "b"),)})
    given(GOOD.encode() + b"{")
    with pytest.raises(CorruptError, match="standard input, line 2: not JSON"):
        read_task("-", instruction="Do.")
    given(b"")
    with pytest.raises(UsageError, match="standard input has no rows"):
        read_task("-", instruction="Do.")


def test_csv_counts_lines_not_rows(tmp_path: Path) -> None:
    """A field with line breaks, blank lines, and quotes of quotes."""
    text = '\ninput,output\n"a\nb","he said ""no"""\n\nc,d\n,\n'
    task = read_task(write(tmp_path / "t.csv", text), instruction="Do.")
    assert task.rows == {"train": (Row("a\nb", 'he said "no"'), Row("c", "d"), Row("", ""))}
    with pytest.raises(CorruptError, match=r"t\.csv, line 8: 1 fields; the header has 2: input"):
        read_task(write(tmp_path / "t.csv", text + "alone\n"), instruction="Do.")


# ---- holding back


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    inputs=st.lists(st.integers(0, 30), min_size=2, max_size=40),
    share=st.floats(0.01, 0.9),
    seed=st.randoms(),
)
def test_rows_are_held_back_by_what_they_are(tmp_path: Path, inputs, share, seed) -> None:
    assume(len(set(inputs)) > 1)

    def split(order: list[int]) -> tuple[list[str], list[str]]:
        records = [{"input": str(i), "output": "x"} for i in order]
        path = written(tmp_path, records, ".jsonl")
        task = read_task(path, instruction="Do.", valid_share=share)
        train, valid = ([r.input for r in task.split(s)] for s in ("train", "valid"))  # type: ignore[union-attr]
        return train, valid

    train, valid = split(inputs)
    assert sorted(train + valid) == sorted(str(i) for i in inputs)
    assert not set(train) & set(valid)  # or a row would be trained on and tested
    assert abs(len(set(valid)) - share * len(set(inputs))) <= 1
    shuffled = list(inputs)
    seed.shuffle(shuffled)
    assert set(split(shuffled)[1]) == set(valid)


def test_nothing_is_held_back_where_rows_are_marked(tmp_path: Path) -> None:
    lines = GOOD + GOOD.replace('"a"', '"c"') + GOOD.replace("train", "dev")
    path = write(tmp_path / "t.jsonl", lines)
    task = read_task(path, instruction="Do.", valid_share=0.5)
    assert (len(task.split("train")), len(task.split("valid"))) == (2, 1)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match=r"valid_share wants a share in \[0, 1\)"):
            read_task(path, instruction="Do.", valid_share=share)


# ---- what is wrong, and where


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", UsageError, "has no rows"),
        ("\n \n", UsageError, "has no rows"),
        (GOOD + '{"split": "train", "input": "a"}', CorruptError, "line 2: .*'output'.*no such"),
        (GOOD + '{"input": "a", "output": 3}', CorruptError, "line 2: .*'output', got int"),
        ('{"split": "eval", "input": "a", "output": "b"}', CorruptError, "line 1: .*'eval'"),
        ('{"split": null, "input": "a", "output": "b"}', CorruptError, "line 1: .*None"),
        (GOOD + GOOD + "{", CorruptError, "line 3: not JSON"),
        ("[1]", CorruptError, "line 1: wanted an object, got list"),
        ("[" * 100_000, CorruptError, "line 1: "),
        (GOOD, UsageError, "no instruction"),
        (GOOD + '{"input": "\\ud800", "output": ""}', CorruptError, "line 2: .*lone surrogate"),
        (GOOD + TALK, CorruptError, "line 2: those before are of rows of input and output, this"),
        (TALK + '{"text": "a"}', CorruptError, "line 2: .*conversations, this one is of texts"),
        ('{"text": " "}', CorruptError, "line 1: the text is empty"),
        ('{"text": 3}', CorruptError, "line 1: wanted text in column 'text', got int"),
        ('{"title": "a", "body": "b"}', CorruptError, "'input', got no such col.*title, body"),
        ('{"messages": "hi"}', CorruptError, "line 1: wanted a list of messages, got str"),
        ('{"messages": []}', CorruptError, "line 1: .*ends with .*assistant; got no message"),
        (TALK.replace("assistant", "user"), CorruptError, "line 1: .*assistant; got user"),
        (TALK.replace('"b"', "null"), CorruptError, "message 2: .*'content', got NoneType"),
        (TALK.replace('"role": "user", ', ""), CorruptError, "message 1: .*'role', got no such"),
        (TALK.replace('"b"', '"b", "tool_calls": [1]'), CorruptError, "message 2 calls tools"),
        ('{"messages": [1]}', CorruptError, "message 1: wanted an object, got int"),
    ],
)
def test_wrong_lines_are_refused_with_their_number(
    tmp_path: Path, text: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        read_task(write(tmp_path / "t.jsonl", text))


@pytest.mark.parametrize(
    ("name", "text", "error", "says"),
    [
        ("t.json", "", UsageError, "has no rows"),
        ("t.json", "[]", UsageError, "has no rows"),
        ("t.json", GOOD + GOOD, CorruptError, "not JSON"),
        ("t.json", '{"input": "a"}', CorruptError, "wanted a list of objects, got dict"),
        ("t.json", f"[{GOOD}, 3]", CorruptError, "item 2: wanted an object, got int"),
        ("t.csv", "", UsageError, "has no rows"),
        ("t.csv", "input,output\n", UsageError, "has no rows"),
        ("t.csv", "a,b\n", UsageError, "has no rows"),
        ("t.csv", "question,answer\n1,2\n", CorruptError, "line 2: .*there is question, answer"),
        ("t.csv", "input,output,input\n1,2,3\n", CorruptError, "line 1: .* has input twice"),
        ("t.csv", "input,output\na,b,c\n", CorruptError, "line 2: 3 fields; the header has 2"),
        ("t.csv", 'input,output\na,b\n"a,b\n', CorruptError, "line 3: not CSV"),
        ("t.tsv", 'input\toutput\n"a" b\tc\n', CorruptError, "line 2: not TSV"),
        ("t.csv", "input,output,split\na,b,\n", CorruptError, "line 2: wanted split"),
        ("t.txt", "\n \n", UsageError, "has no rows"),
        ("t.csv", f"input,output\na,{'b' * 200_000}\n", CorruptError, "line 2: .*field limit"),
        ("t.jsonl", b"\x1f\x8b\x08\x00\n", CorruptError, "line 1: a zero byte; this is no text"),
        ("t.csv", "input,output\n".encode("utf-16"), CorruptError, "UTF-16; wanted UTF-8"),
        ("t.jsonl", GOOD.encode() + b'{"\xff"}', CorruptError, "line 2: not UTF-8 .byte 0xff"),
        ("t.csv", b"\xef\xbb\xbfinput,output\na,\xe9\n", CorruptError, "line 2: .*byte 0xe9"),
        ("t.txt", b"caf\xe9", CorruptError, "line 1: not UTF-8"),
        ("t.parquet", "x", UsageError, "the suffix '.parquet'; a task wants one of .csv, .json"),
        ("t", GOOD, UsageError, "the suffix ''"),
    ],
)
def test_wrong_files_are_refused(
    tmp_path: Path, name: str, text: str | bytes, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        read_task(write(tmp_path / name, text), instruction="Do.")


def test_absent_files_and_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.jsonl"):
        read_task(tmp_path / "nothing.jsonl")
    with pytest.raises(UsageError, match="is a directory, not a task"):
        read_task(tmp_path)
    write(tmp_path / "tasks.json", "{")
    with pytest.raises(CorruptError, match=r"tasks\.json: not JSON"):
        read_task(write(tmp_path / "t.jsonl", GOOD))
    write(tmp_path / "tasks.json", '[{"name": "t", "instruction": 3}]')
    with pytest.raises(CorruptError, match="instruction that is no text, but int"):
        read_task(tmp_path / "t.jsonl")


# ---- folders


def test_a_folder_of_tasks(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no tasks in it"):
        read_tasks(tmp_path)
    with pytest.raises(NotFoundError, match="there is no folder"):
        read_tasks(tmp_path / "absent")
    facts = [{"name": name, "instruction": f"Do {name}."} for name in "abc"]
    write(tmp_path / "tasks.json", json.dumps(facts))
    write(tmp_path / "b.jsonl", GOOD)
    write(tmp_path / "a.csv", "input,output\n1,2\n3,4\n")
    for name in (".hidden.jsonl", "README.txt", "LICENSE.txt", "notes.md", "a.csv.bak"):
        write(tmp_path / name, "not a task")
    (tmp_path / "folder.jsonl").mkdir()
    tasks = read_tasks(str(tmp_path), valid_share=0.5)
    assert list(tasks) == ["a", "b"]
    assert [task.name for task in tasks.values()] == ["a", "b"]
    assert tasks["a"].instruction == "Do a."
    assert set(tasks["a"].rows) == {"train", "valid"}
    write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(UsageError, match=r"two tasks called a: a\.csv and a\.jsonl"):
        read_tasks(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    write(tmp_path / "c.txt", b"\xff")
    with pytest.raises(CorruptError, match=r"c\.txt, line 1: not UTF-8"):
        read_tasks(tmp_path)
