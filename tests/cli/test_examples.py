"""The examples in the help of commands that need a model: merge, eval and train-router.

Those of cluster, route, train and train-library are run beside their other tests, those of commands
that need no model in test_output.py. `bench` takes hours.
"""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from adaptlib.cli import eval as eval_
from adaptlib.cli import merge, train_router

from adaptlib.experts import Library
from adaptlib.experts.records import save_record

LETTERS = "abcdefghijklmnop"
QUICK = ("--epochs", "1", "--batch-size", "8", "--rank", "2", "--rows", "8", "--lr", "0.01")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def named(routed_library: Library, tmp_path: Path) -> Library:
    """The names, tasks and files that the examples speak of."""
    for i, task in enumerate(("sums", "names", "else", "other", "more")):
        expert = routed_library[f"e{i}"]
        card = {**expert.card, "task": task}
        routed_library.add(dataclasses.replace(expert, card=card), f"e{i}", replace=True)
    for old, name in (("e0", "sql"), ("e0", "sums"), ("e1", "poems")):
        routed_library.tag(old, name)
    group = {name: routed_library.digest(name) for name in ("e0", "e1", "e2")}
    record = {"schema": "adaptlib.clustering/1", "method": "mbc", "k": 1, "seed": 0}
    record |= {"features": "factors", "why": "", "silhouette": None, "options": {}}
    record |= {"clusters": {"3": [*group]}, "outliers": [], "labels": {}, "experts": group}
    save_record(routed_library.store, "clusterings", "tasks", record)
    (tmp_path / "merge.yaml").write_text("method: ties\nexperts: [sql, poems]\nname: from-file\n")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, name in enumerate(("sums", "names")):
        lines = []
        for i in range(12):
            one, two = LETTERS[i % 16], LETTERS[(i * 7 + number) % 16]
            split = "train" if i < 8 else "test"
            lines.append({"split": split, "input": f"{one} {two}", "output": two})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    tasks = ("sums", "names", "new-task")
    listing = json.dumps([{"name": name, "instruction": "s t"} for name in tasks])
    for file in (folder / "tasks.json", tmp_path / "tasks.json"):
        file.write_text(listing)
    for name in ("sums.jsonl", "new-task.jsonl"):
        (tmp_path / name).write_text((folder / "sums.jsonl").read_text())
    return routed_library


def words(line: str) -> list[str]:
    found = shlex.split(line)
    assert found[0] == "adaptlib"
    return found[1:]


@pytest.mark.parametrize("line", merge.EXAMPLES)
def test_examples_of_merge(run: Any, named: Library, line: str) -> None:
    if "--replay" in line:
        assert run(*words(merge.EXAMPLES[0])).code == 0
    result = run(*words(line))
    assert result.code == 0, result.err
    assert result.out


@pytest.mark.parametrize("line", [one for one in eval_.EXAMPLES if "--harness" not in one])
def test_examples_of_eval(run: Any, named: Library, line: str) -> None:
    result = run(*words(line))
    assert result.code == 0, result.err
    assert result.out


@pytest.mark.parametrize("line", train_router.EXAMPLES)
def test_examples_of_train_router(run: Any, named: Library, line: str) -> None:
    few = ["--steps", "2"] if "phatgoose" in line else [*QUICK]
    if "--from" in line:
        first = run(*words(train_router.EXAMPLES[0]), *QUICK, "--skills", "2", "--heads", "2")
        assert first.code == 0, first.err
    elif "phatgoose" not in line:
        few += ["--skills", "2", *(["--heads", "2"] if "mhr" in line else [])]
    result = run(*words(line), *few)
    assert result.code == 0, result.err
    assert result.out
