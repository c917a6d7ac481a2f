"""What --json prints, and the schemas that say so to other programs.

The fixture `run` holds every document of every test to its schema; here each kind of document is
printed once, and each schema is shown to refuse what is not it.
"""

import ast
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adaptlib.cli import documents as kinds
from adaptlib.cli.filters import FIELDS

from adaptlib.experts import Library
from tests import tiny
from tests.cli import documents

QUICK = ("--epochs", "1", "--batch-size", "8", "--rank", "2", "--lr", "0.01")
LETTERS = "abcdefghijklmnop"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks: to say the second of two letters."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, name in enumerate(("first", "second")):
        lines = []
        for i in range(12):
            one, two = LETTERS[i % 16], LETTERS[(i * 7 + number) % 16]
            split = "train" if i < 8 else "valid" if i < 10 else "test"
            lines.append({"split": split, "input": f"{one} {two}", "output": two})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    listing = [{"name": name, "instruction": "s t"} for name in ("first", "second")]
    (folder / "tasks.json").write_text(json.dumps(listing))
    return folder


# (kind, what to run before it, the command, its exit code)
PLAIN: list[tuple[str, list[str], str, int]] = [
    ("init", [], "init other", 0),
    ("add", [], "add one --name new", 0),
    ("list", [], "list", 0),
    ("list-fields", [], "list --all-tags --fields " + ",".join(FIELDS), 0),
    ("show", [], "show poems", 0),
    ("pin", [], "pin poems", 0),
    ("unpin", ["pin poems --label best"], "unpin best", 0),
    ("rm", [], "rm sums", 0),
    ("mv", [], "mv sums other", 0),
    ("tag", [], "tag sums sums:v2", 0),
    ("pin", [], "pin sums", 0),
    ("unpin", ["pin sums --label kept"], "unpin kept", 0),
    ("log", [], "log poems", 0),
    ("diff", [], "diff poems team/sql:v1", 0),
    ("export", [], "export poems out", 0),
    ("verify", [], "verify --deep", 0),
    ("gc", ["rm sums"], "gc --grace 0 --history 0", 0),
    ("doctor", [], "doctor", 0),
    ("config", [], "config", 0),
    ("config-set", [], "config set route.top-k 2", 0),
    ("config-path", [], "config path", 0),
    ("config-env", [], "config env", 0),
    ("cluster", [], "cluster --k 2 --measure", 0),
    ("cluster-diff", ["cluster --k 2 --save tasks"], "cluster --diff tasks now", 0),
    ("cluster-duplicates", [], "cluster --duplicates", 0),
    ("merge", [], "merge poems team/sql:v1 --name both", 0),
    ("merge-plan", [], "merge poems team/sql:v1 --name both --dry-run", 0),
    ("merge-methods", [], "merge --methods", 0),
    ("schema", [], "schema", 0),
    ("completion", [], "completion bash", 0),
    ("error", [], "show poem", 3),
    ("show", ["cluster --k 2 --save tasks"], "show clusterings/tasks", 0),
    ("gc", ["rm sums", "gc --grace 0 --history 0"], "gc --restore ID", 0),
    ("verify", ["DAMAGE"], "verify", 4),
]
MODEL: list[tuple[str, list[str], str]] = [
    ("route", [], "route --prompt x --generate --max-new-tokens 2 --explain"),
    ("route", [], "route --prompt x --compare arrow,uniform --shortlist 3 --threshold 0"),
    ("show", ["route --prompt x --save mine"], "show routers/mine"),
    ("train", [], "train tasks/first.jsonl --base BASE"),
    ("train-plan", [], "train tasks/first.jsonl --base BASE --dry-run"),
    ("train-library", [], "train-library tasks --base BASE --workers 1"),
    ("train-library-plan", [], "train-library tasks --base BASE --dry-run"),
    ("train-router", [], "train-router mhr tasks --base BASE --name two --skills 2 --heads 2"),
    ("train-router", ["train tasks/first.jsonl --base BASE"], "train-router phatgoose tasks"),
    ("eval", ["train tasks/first.jsonl --base BASE"], "eval --tasks tasks"),
]


@pytest.mark.parametrize(("kind", "before", "line", "code"), PLAIN, ids=lambda v: str(v)[:50])
def test_a_document_is_what_its_schema_says(
    run: Any,
    library: Library,
    tmp_path: Path,
    kind: str,
    before: list[str],
    line: str,
    code: int,
) -> None:
    from adaptlib.experts.codec import pack, write_directory

    write_directory(pack(tiny.make_expert(9)), tmp_path / "one")
    found: dict[str, Any] = {}
    for one in before:
        if one == "DAMAGE":
            damaged = next((tmp_path / "library" / "objects").rglob("*/*/*"))
            damaged.chmod(0o644)
            damaged.write_bytes(b"nothing")
            continue
        found = run(*one.split(), "--json").document
    line = line.replace("ID", str(found.get("id")))
    _holds(run, kind, line.split(), code)


@pytest.mark.parametrize(("kind", "before", "line"), MODEL, ids=lambda v: str(v)[:50])
def test_a_document_of_a_model_is_what_its_schema_says(
    run: Any,
    routed_library: Library,
    base_model: Path,
    tasks: Path,
    kind: str,
    before: list[str],
    line: str,
) -> None:
    for one in (*before, line):
        words = [str(base_model) if word == "BASE" else word for word in one.split()]
        if words[0].startswith("train") and "phatgoose" not in words:
            words += QUICK
        if one is not line:
            assert run(*words, "--json").code == 0
    _holds(run, kind, words, 0)


def test_what_bench_says_is_what_its_schema_says(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.papers.test_table import made

    monkeypatch.setattr("adaptlib.papers.run.bench", lambda *_, **__: made({"mhr": 0.7}, 1))
    (tmp_path / "tasks").mkdir()
    _holds(run, "bench", ["bench", "papers", "--data", "tasks"], 0)


def _holds(run: Any, kind: str, words: list[str], code: int) -> None:
    """A command prints a document of this kind, which its schema takes; without any one of its
    keys, or with another one, it does not."""
    result = run(*words, "--json")
    assert result.code == code, result.err
    document = json.loads(result.out or result.err.splitlines()[-1])
    assert document["schema"] == f"adaptlib.{kind}/1"
    assert not documents.fails(kind, document)
    assert documents.fails(kind, document | {"stranger": 1})
    wanted = _required(kind)
    assert wanted
    for key in wanted & document.keys():
        less = {name: value for name, value in document.items() if name != key}
        assert documents.fails(kind, less), key
    for spoilt in _spoilt(document):
        assert documents.fails(kind, spoilt), spoilt


def _required(kind: str) -> set[str]:
    schema = documents.schemas()[kind]
    forms = [schema["$defs"][f["$ref"].split("/")[-1]] for f in schema.get("anyOf", [])] or [schema]
    return set.union(*(set(form["required"]) for form in forms))


def _spoilt(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The document with a key too many in the first entry of each of its lists of objects."""
    found = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            other = copy.deepcopy(document)
            other[key][0]["stranger"] = 1
            found.append(other)
    return found


def test_every_document_has_a_test() -> None:
    shown = {"bench", *(kind for kind, *_ in (*PLAIN, *MODEL))}
    assert shown == documents.schemas().keys()


def test_every_command_that_prints_a_document_has_a_schema() -> None:
    """Whatever is given to `out.document` is the name of a schema, and the other way round."""
    calls = [
        node
        for file in documents.FOLDER.parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "out.document"
    ]
    said = {
        part.value
        for call in calls
        for part in ast.walk(call.args[0])
        if isinstance(part, ast.Constant)
    }
    assert said | {"error"} == documents.schemas().keys()


def test_the_files_say_what_the_classes_say() -> None:
    """`python -m adaptlib.cli.documents` writes them anew."""
    assert {file.stem for file in kinds.FOLDER.glob("*.json")} == kinds.kinds().keys()
    for name in kinds.kinds():
        assert (kinds.FOLDER / f"{name}.json").read_text(encoding="utf-8") == kinds.text_of(name)


@pytest.mark.parametrize("kind", documents.schemas())
def test_a_schema_is_one(kind: str) -> None:
    schema = documents.schemas()[kind]
    documents.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == kinds.DRAFT
    assert schema["title"] == f"adaptlib.{kind}/1"
    assert schema["description"]
    assert documents.fails(kind, {})
    objects = [schema, *schema.get("$defs", {}).values()]
    closed = [o for o in objects if o.get("type") == "object"]
    assert closed
    assert all(o["additionalProperties"] is False and o["description"] for o in closed)


def test_a_document_of_another_version_is_refused() -> None:
    document = {"schema": "adaptlib.tag/2", "name": "a", "new": "b", "digest": "sha256:" + 64 * "0"}
    assert documents.fails("tag", document)
    assert not documents.fails("tag", document | {"schema": "adaptlib.tag/1"})
    assert documents.fails("tag", document | {"schema": "adaptlib.tag/1", "digest": "sha256:0"})


def test_schemas_are_printed_and_listed(run: Any) -> None:
    for name in ("list", "adaptlib.list/1"):
        assert json.loads(run("schema", name).out) == documents.schemas()["list"]
    assert run("schema", "list", "--json").out == run("schema", "list").out
    assert run("schema", "-q").out.split() == [*documents.schemas()]
    table = run("schema").out
    assert all(f"\n{name} " in table for name in documents.schemas())


def test_a_schema_that_is_not_there_gets_a_near_one(run: Any) -> None:
    error = run("schema", "lst", "--json").error
    assert error["code"] == 3
    assert "did you mean list?" in error["message"]
    assert "train-library-plan" in error["message"]


def test_schemas_are_in_what_is_installed() -> None:
    shipped = Path("pyproject.toml").read_text(encoding="utf-8")
    assert '"adaptlib.cli" = ["schemas/*.json"' in shipped


def test_errors_of_every_kind_are_one_document(run: Any, library: Library) -> None:
    wrong: list[Callable[[], Any]] = [
        lambda: run("no-such-command", "--json"),
        lambda: run("list", "--no-such-option", "--json"),
        lambda: run("show", "--json"),
        lambda: run("list", "-L", "nowhere", "--json"),
        lambda: run("mv", "poems", "sums", "--json"),
    ]
    assert [one().error["code"] for one in wrong] == [2, 2, 2, 3, 5]
