"""Hostile recipes and tasks: the files that commands take beside adapters."""

import json
from pathlib import Path

import pytest

from adaptlib.errors import AdaptlibError
from adaptlib.training.readers import read_task
from tests.hostile.conftest import Run
from tests.hostile.watch import MARK

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{new}: &{new}\n  <<: [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
RECIPES: dict[str, str | bytes] = {
    "python-object": f"experts: !!python/object/apply:os.system ['echo {MARK}']",
    "python-module": f"experts: !!python/module:{MARK}",
    "python-name": f"experts: [!!python/name:{MARK}.x]",
    "python-new": f"experts: !!python/object/new:{MARK}.X {{}}",
    "tag-of-its-own": "experts: !evil [a]",
    "laughs": LAUGHS + "experts: *i\n",
    "laughs-in-options": LAUGHS + "experts: [a]\noptions: {x: *i}\n",
    "merges": MERGES + "experts: [a]\n",
    "itself": "experts: &a [*a]",
    "nested": "experts: " + "[" * 50_000,
    "key-twice": "experts: [a]\nexperts: [b]",
    "number-of-5000-digits": "experts: [a]\nrank: " + "9" * 5000,
    "number-to-base-60": "experts: [a]\nrank: 1" + ":59" * 5000,
    "float-to-base-60": "experts: [a]\nkeep_ratio: 1" + ":59" * 5000 + ".5",
    "no-number": "experts: [a]\nkeep_ratio: .nan",
    "infinite": "experts: [a]\nweights: {a: .inf}",
    "no-date": "experts: [2001-99-99]",
    "escapes": b'experts: "\x1b[2J"',
    "escapes-spelled": 'experts: [a]\nmethod: "\\e]0;evil\\a"',
    "escapes-in-names": 'experts: ["\\e[2J"]',
    "path": "experts: ['../../../etc/passwd']",
    "digest-a-path": "experts: [{name: a, digest: ../../../etc/passwd}]",
    "not-utf-8": b"experts: [\xff\xfe]",
    "large": "experts: [" + "a, " * 100_000 + "a]",
    "nothing": "",
    "zero-bytes": bytes(1000),
}

TASKS: dict[str, tuple[str, bytes]] = {
    "nested-line": ("a.jsonl", b'{"input": ' + b"[" * 100_000 + b"\n"),
    "nested-document": ("a.json", b"[" * 100_000),
    "number-of-5000-digits": ("a.jsonl", b'{"input": ' + b"9" * 5000 + b', "output": "a"}'),
    "lists": ("a.jsonl", b'{"input": [], "output": {}}'),
    "half-a-pair": ("a.jsonl", b'{"input": "\\ud800", "output": "a"}'),
    "not-utf-8": ("a.jsonl", b'{"input": "\xff", "output": "a"}'),
    "utf-16": ("a.jsonl", '{"input": "a", "output": "b"}'.encode("utf-16")),
    "zero-byte": ("a.jsonl", b'{"input": "a\0", "output": "b"}'),
    "roles-wrong": ("a.jsonl", b'{"messages": [{"role": 5, "content": {}}]}'),
    "messages-a-number": ("a.jsonl", b'{"messages": 5}'),
    "split-wrong": ("a.jsonl", b'{"split": "../x", "input": "a", "output": "b"}'),
    "csv-quote-without-end": ("a.csv", b'input,output\n"' + b"a" * 200_000),
    "csv-many-columns": ("a.csv", b"," * 100_000 + b"\n"),
    "a-pickle": ("a.jsonl", b"\x80\x04\x8c\x02os\x94\x8c\x06system\x93."),
    "a-pickle-by-name": ("a.pkl", b"\x80\x04N."),
    "code": ("a.py", f"import {MARK}".encode()),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused(name: str, watched: Run, tmp_path: Path) -> None:
    from adaptlib.experts import Library

    Library.open(tmp_path / "library", create=True)
    text = RECIPES[name]
    (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    words = ("merge", "--recipe", tmp_path / "r.yaml", "--name", "x", "-L", tmp_path / "library")
    outcome = watched(*words, write=[tmp_path / "library"])
    assert outcome.code in (2, 3), (outcome.code, outcome.err[-1000:])
    assert outcome.deeds == []
    assert "Traceback" not in outcome.err
    assert all(line.isprintable() for line in outcome.err.split("\n"))
    assert len(outcome.err) < 700, outcome.err[:1500]
    assert outcome.seconds < 3
    assert outcome.peak < 256


@pytest.mark.parametrize("name", TASKS)
def test_a_hostile_task_is_refused(name: str, tmp_path: Path) -> None:
    file, data = TASKS[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(AdaptlibError) as caught:
        read_task(tmp_path / file, instruction="Say it.")
    assert caught.value.exit_code in (2, 3, 4)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 1000


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"name": 5}]', "5", "[[[]]]", '{"a": NaN}'])
def test_hostile_facts_about_tasks_are_refused_or_left_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    try:
        assert read_task(tmp_path / "a.jsonl", instruction="Say it.").instruction == "Say it."
    except AdaptlibError as error:
        assert error.exit_code == 4  # noqa: PT017


@pytest.mark.parametrize(
    "chosen",
    ["cluster:", "cluster:../../x/0", "cluster:\x1b[2J/0", "cluster:" + "a/" * 5000, "a\0b"],
)
def test_a_hostile_selection_is_refused(chosen: str, watched: Run, tmp_path: Path) -> None:
    from adaptlib.experts import Library

    Library.open(tmp_path / "library", create=True)
    outcome = watched("merge", chosen, "--name", "x", "-L", tmp_path / "library")
    assert outcome.code in (2, 3), outcome.err[-1000:]
    assert outcome.deeds == []
    assert all(line.isprintable() for line in outcome.err.split("\n"))
    assert len(outcome.err) < 700, outcome.err[:1500]
