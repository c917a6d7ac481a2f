"""Tasks from the Hugging Face hub, without it: a data set is rows by split, or an error of ours."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from adaptlib.errors import CorruptError, NotFoundError, RefusedError, RemoteError, UsageError
from adaptlib.training.readers import read_task
from adaptlib.training.tasks import Chat, Message, Row, Task


class Columns:
    """As much of datasets.Dataset as is used."""

    def __init__(self, rows: list[dict[str, Any]], names: dict[str, list[str]] | None = None):
        self.rows = rows
        self.column_names = list(rows[0])
        labels = names or {}
        self.features = {
            name: types.SimpleNamespace(**({"names": labels[name]} if name in labels else {}))
            for name in self.column_names
        }

    def select_columns(self, names: list[str]) -> list[dict[str, Any]]:
        return [{name: row[name] for name in names} for row in self.rows]


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[dict[str, Any]]:
    """Let the hub give this, or raise it; the calls that it gets."""
    calls = []

    def load_dataset(path: str, *, name: str | None = None, revision: str | None = None) -> Any:
        calls.append({"path": path, "name": name, "revision": revision})
        if isinstance(answer, Exception):
            raise answer
        return answer

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    fake.are_progress_bars_disabled = lambda: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


def test_a_data_set_is_read_with_its_own_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": i, "text": f"t{i}", "label": i % 2, "split": "what?"} for i in range(4)]
    names = {"label": ["no", "yes"]}
    parts = {"train": Columns(rows, names), "validation": Columns(rows[:1], names)}
    calls = hub(monkeypatch, {**parts, "unsupervised": Columns(rows, names)})
    with pytest.warns(UserWarning, match="left out the splits unsupervised"):
        task = read_task(
            "hf://datasets/org/films@main#small",
            instruction="Good?",
            input_column="text",
            output_column="label",
        )
    assert calls == [{"path": "org/films", "name": "small", "revision": "main"}]
    assert task.name == "films-small"
    train = tuple(Row(f"t{i}", ("no", "yes")[i % 2]) for i in range(4))
    assert task.rows == {"train": train, "valid": train[:1]}

    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    hub(monkeypatch, {"test": Columns([talk])})
    talks = read_task("hf://datasets/org/talks")
    assert talks == Task(
        "talks", "", {"test": (Chat((Message("user", "a"), Message("assistant", "b"))),)}
    )
    hub(monkeypatch, {"train": Columns([{"question": "a", "n": 3}])})
    with pytest.raises(CorruptError, match="'input', got no such column; there is question, n"):
        read_task("hf://datasets/org/talks", instruction="Do.")
    hub(monkeypatch, {"train_sft": Columns(rows)})
    with pytest.raises(NotFoundError, match=r"none of the splits .*; it has train_sft"):
        read_task("hf://datasets/org/talks")


class DatasetNotFoundError(FileNotFoundError):
    """By this name, in every version of datasets."""


@pytest.mark.parametrize(
    ("raised", "error", "says"),
    [
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist"), NotFoundError, "is not on the hub"),
        (ConnectionError("Couldn't reach 'a/b'"), RemoteError, "ConnectionError: Couldn't reach"),
        (RuntimeError("Dataset scripts are no longer supported"), RefusedError, "run code"),
        (ValueError("BuilderConfig 'x' not found. Available: ['y']"), NotFoundError, "'y'"),
        (ValueError("Config name is missing.\nPick one: ['y']"), UsageError, "Pick one: .'y'"),
        (OSError("disk full"), RemoteError, "disk full"),
    ],
)
def test_what_the_hub_refuses_is_said(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, error: type[Exception], says: str
) -> None:
    hub(monkeypatch, raised)
    with pytest.raises(error, match=says) as caught:
        read_task("hf://datasets/a/b", instruction="Do.")
    assert "hf://datasets/a/b" in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "hf://org/name",
        "hf://datasets/name",
        "hf://datasets/../name",
        "hf://datasets/org/name@a/b",
        "hf://datasets/org/name@..",
        "hf://datasets/org/name#",
        "hf://datasets/org/name/file.csv",
        "hf://datasets/org/na..me",
    ],
)
def test_a_name_that_is_no_data_set_is_refused(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    calls = hub(monkeypatch, {})
    with pytest.raises(UsageError, match="is not a data set on the hub; want hf://datasets/org"):
        read_task(spec, instruction="Do.")
    assert calls == []


def test_a_folder_is_not_taken_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets.load_dataset reads ./org/name where it is there."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    calls = hub(monkeypatch, {})
    with pytest.raises(UsageError, match="would read the local org/name"):
        read_task("hf://datasets/org/name", instruction="Do.")
    assert calls == []


def test_without_the_package_the_hint_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python takes for an absent one
    with pytest.raises(UsageError, match="package datasets") as caught:
        read_task("hf://datasets/org/name")
    assert caught.value.hint == "pip install 'adaptlib[datasets]'"


def test_the_package_itself_reads_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real one, told to read from here what it would from the hub."""
    datasets = pytest.importorskip("datasets")
    load_dataset = datasets.load_dataset
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "train.csv").write_text("input,output\na,b\nc,d\n")
    (folder / "validation.csv").write_text("input,output\ne,f\n")

    def local(path: str, **options: Any) -> Any:
        assert path == "org/name"
        return load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    task = read_task("hf://datasets/org/name", instruction="Do.")
    rows = {"train": (Row("a", "b"), Row("c", "d")), "valid": (Row("e", "f"),)}
    assert task == Task("name", "Do.", rows)
    assert task.digest == Task("other", "Do.", rows).digest
    assert capfd.readouterr().err == ""  # progress is for terminals
    assert not datasets.are_progress_bars_disabled()  # and as it was
    with pytest.raises(NotFoundError, match=r"no such configuration: .*'other'"):
        read_task("hf://datasets/org/name#other", instruction="Do.")
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(RefusedError, match="wants to run code"):
        read_task("hf://datasets/org/name", instruction="Do.")


def test_the_package_itself_says_when_it_is_offline() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(RemoteError, match="hf://datasets/org/absent cannot be read") as caught:
        read_task("hf://datasets/org/absent", instruction="Do.")
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)
