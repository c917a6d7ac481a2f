"""adaptlib train-router: skills, mixtures, gates and new tasks from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptlib.experts import Library
from adaptlib.papers.units import HELD_IN, HELD_OUT
from tests.tiny import state

QUICK = ("--epochs", "1", "--batch-size", "8", "--rank", "2", "--lr", "0.01")
LETTERS = "abcdefghijklmnop"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_tasks(folder: Path, *names: str, rows: int = 12) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        lines = []
        for i in range(rows + 4):
            first, second = LETTERS[i % 16], LETTERS[(i * 7 + number) % 16]
            split = "train" if i < rows else "valid" if i < rows + 2 else "test"
            lines.append({"split": split, "input": f"{first} {second}", "output": second})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    listing = [{"name": name, "instruction": "s t"} for name in names]
    (folder / "tasks.json").write_text(json.dumps(listing))
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks", "first", "second")


@pytest.fixture
def empty(tmp_path: Path) -> Library:
    return Library.open(tmp_path / "library", create=True)


def learn(run: Any, router: str, tasks: Path, base: Path, *more: str) -> Any:
    return run("train-router", router, tasks, "--base", base, "--skills", "3", *QUICK, *more)


def test_skills_and_their_routing_are_kept_and_answer_by_task(
    run: Any, tasks: Path, base_model: Path, empty: Library
) -> None:
    made = learn(run, "mhr", tasks, base_model, "--heads", "2", "--name", "two", "--json")
    assert made.code == 0, made.err
    document = made.document
    assert document["schema"] == "adaptlib.train-router/1"
    assert [entry["name"] for entry in document["experts"]] == [f"two/skill-{i}" for i in range(3)]
    assert {"train_loss", "valid_loss"} <= set(document["metrics"])

    ask = ("route", "--prompt", "a b", "--json")
    by_task = run(*ask, "--router", "mhr:two", "--task", "second")
    assert by_task.code == 0, by_task.err
    weights = {e["name"]: e["weight"] for e in by_task.document["experts"]}
    assert set(weights) == {entry["name"] for entry in document["experts"]}
    assert sum(weights.values()) == pytest.approx(1)
    alike = run(*ask, "--router", "saved:two").document["experts"]
    assert [e["weight"] for e in alike] == pytest.approx([1 / 3] * 3)
    assert run(*ask, "--router", "mhr:two", "--task", "secnd").code == 3
    wrong = run(*ask, "--router", "poly:two")
    assert (wrong.code, "mhr:two" in wrong.error["hint"]) == (2, True)
    assert run(*ask, "--router", "mhr").error["hint"].startswith("--router mhr:NAME, after")
    assert run(*ask, "--router", "arrow", "--task", "second").code == 2

    before = state(empty)
    taken = learn(run, "mhr", tasks, base_model, "--name", "two")
    assert (taken.code, "taken" in taken.err) == (5, True)
    assert state(empty) == before


def test_a_new_task_for_old_skills(
    run: Any, tasks: Path, base_model: Path, empty: Library, tmp_path: Path
) -> None:
    assert learn(run, "poly", tasks, base_model, "--name", "two").code == 0
    new = write_tasks(tmp_path / "more", "third") / "third.jsonl"
    words = ("train-router", "poly", new, "--base", base_model, *QUICK, "--from", "two")
    z = run(*words, "--mode", "z", "--name", "two-third", "--json")
    assert z.code == 0, z.err
    assert [e["new"] for e in z.document["experts"]] == [False] * 3
    mu = run(*words, "--mode", "mu", "--name", "third", "--json")
    assert mu.code == 0, mu.err
    assert [e["name"] for e in mu.document["experts"]] == ["third"]
    assert empty["third"].rank == 2
    assert run(*words, "--mode", "nu", "--name", "x").code == 2
    other = ("train-router", "mhr", new, "--base", base_model, "--from", "two", "--name", "x")
    assert run(*other).code == 2
    asked = run("route", "--prompt", "a b", "--router", "poly:two-third", "--task", "third")
    assert asked.code == 0, asked.err


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_a_mixture_routes(
    run: Any, tasks: Path, base_model: Path, empty: Library, scope: str
) -> None:
    words = ("--scope", scope, "--balance", "0.1", "--name", "mix")
    made = learn(run, "mope", tasks, base_model, *words)
    assert made.code == 0, made.err
    assert "Trained  mope:mix" in made.out
    assert run("route", "--prompt", "a b", "--router", "mope:mix").code == 0


def test_gates_move_names_to_experts_that_have_one(
    run: Any, tasks: Path, base_model: Path, empty: Library
) -> None:
    for name in ("first", "second"):
        trained = run("train", tasks / f"{name}.jsonl", "--base", base_model, *QUICK, "--no-eval")
        assert trained.code == 0, trained.err
    refused = run("route", "--prompt", "a b", "--router", "phatgoose", "--json")
    assert (refused.code, "train-router phatgoose" in refused.error["hint"]) == (2, True)
    before = {name: empty.digest(name) for name in empty.names()}
    made = run("train-router", "phatgoose", tasks, "--base", base_model, "--steps", "3", "--json")
    assert made.code == 0, made.err
    assert {e["name"] for e in made.document["experts"]} == set(before)
    assert all(empty.digest(name) != digest for name, digest in before.items())
    asked = run("route", "--prompt", "a b", "--router", "phatgoose", "--json")
    assert asked.code == 0, asked.err


def test_words_that_mean_nothing(run: Any, tasks: Path, empty: Library) -> None:
    wrong = run("train-router", "mhrr", tasks, "--name", "x", "--json")
    assert (wrong.code, wrong.error["hint"]) == (2, "adaptlib train-router mhr TASKS")
    assert "did you mean mhr?" in wrong.error["message"]
    assert run("train-router", "mhr", tasks).code == 2
    assert run("train-router", "mhr", tasks, "--name", "routers/x").code == 2
    assert run("train-router", "mope", tasks, "--name", "x", "--from", "y").code == 2
    assert run("bench", "papres", "--data", tasks).code == 2
    assert run("bench", "papers", "--data", tasks, "--only", "arow").code == 2
    missing = run("bench", "papers", "--data", tasks, "--json")
    assert (missing.code, HELD_IN[0] in missing.error["message"]) == (3, True)
    assert not set(HELD_IN) & set(HELD_OUT)
