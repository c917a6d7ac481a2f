"""`merge` from a recipe, again, and with data."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from adaptlib.cli import main  # noqa: F401 -- before the tests change the directory

from adaptlib.experts import Expert, Library
from adaptlib.experts.records import save_record
from adaptlib.merging import MERGES
from tests.tiny import lora, state

WITH_DATA = [name for name, merge in MERGES.items() if merge.measure is not None]


@pytest.fixture
def library(merge_library: Library) -> Library:
    return merge_library


def test_a_recipe_is_written_and_makes_the_same(run: Any, library: Library) -> None:
    words = ("--method", "ties", "--weight", "two=2", "--set", "density=0.5", "--rank", "2")
    first = run("merge", "one", "two", *words, "--name", "both", "--save-recipe", "r.yaml")
    assert "wrote r.yaml" in first.err
    library.rename("one", "other")
    again = run("merge", "--recipe", "r.yaml", "--name", "again", "--json").document
    assert again["digest"] == library.digest("both")
    changed = run("merge", "--recipe", "r.yaml", "--rank", "1", "--name", "c", "--json").document
    assert (changed["rank"], changed["options"]["density"]) == (1, 0.5)
    more = run("merge", "--recipe", "r.yaml", "--weight", "one=3", "--name", "d", "--json").document
    assert more["weights"] == [3.0, 2.0]


def test_a_recipe_by_hand(run: Any, library: Library, tmp_path: Path) -> None:
    record = {"clusters": {"0": ["two", "few"]}, "experts": library.names()}
    save_record(library.store, "clusterings", "mine", record)
    (tmp_path / "r.yaml").write_text(
        "method: task-arithmetic\nexperts:\n- one\n- cluster:mine/0\nweights: {few: -1}\n"
        "options: {scale: 1}\nkind: sparse\nname: by-hand\ndescription: mine\n"
    )
    found = run("merge", "--recipe", "r.yaml", "--json").document
    assert (found["name"], found["kind"]) == ("by-hand", "sparse")
    assert found["weights"] == [1.0, 1.0, -1.0]
    assert library["by-hand"].card["description"] == "mine"


def test_a_replay_gives_the_same_digest(run: Any, library: Library) -> None:
    run("merge", "one", "two", "some", "--method", "svd", "--name", "both")
    before = state(library)
    library.rename("one", "other")
    library.rename("other", "one")
    done = run("merge", "--replay", "both", "--json")
    assert done.code == 0
    assert done.document["digest"] == library.digest("both")
    assert (done.document["name"], done.document["new"]) == ("both", False)
    assert state(library)["objects"] == before["objects"]
    assert state(library)["tags"] == before["tags"]
    assert run("merge", "--replay", "both", "--name", "twin", "-q").out == "twin\n"
    assert library.digest("twin") == library.digest("both")
    assert run("merge", "--replay", "both", "--name", "one").code == 5
    run("merge", "--replay", "both", "--save-recipe", "r.yaml")
    assert run("merge", "--recipe", "r.yaml", "--name", "third", "-q").code == 0
    assert library.digest("third") == library.digest("both")


def test_a_replay_without_a_parent_names_it(run: Any, library: Library) -> None:
    run("merge", "one", "two", "--name", "both")
    library.remove("two")
    assert run("merge", "--replay", "both").code == 0  # gc has not been here
    gone = library.manifest("both").card["parents"][1]["digest"]
    library.gc(grace=timedelta(0), history=timedelta(0))
    done = run("merge", "--replay", "both")
    assert done.code == 3
    assert f"two as it was, {gone[:19]}, is gone" in done.err
    assert "gc --restore" in done.err


def test_a_replay_that_comes_out_otherwise_says_so(
    run: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("merge", "one", "two", "--name", "both")
    before = state(library)
    monkeypatch.setitem(MERGES, "linear", MERGES["cat"])  # as if a later version did otherwise
    done = run("merge", "--replay", "both", "--name", "twin", "--json")
    assert done.code == 1
    assert "made again it is sha256:" in done.error["message"]
    assert state(library) == before


@pytest.fixture
def tasks(tmp_path: Path, base_model: Path) -> Path:
    """Two experts for the tiny base model in the library, and a task file for each."""
    library = Library.open(tmp_path / "library", create=True)
    folder = tmp_path / "tasks"
    folder.mkdir()
    listing = []
    for i, name in enumerate(("left", "right")):
        deltas: dict[str, Any] = {
            f"model.layers.{layer}.self_attn.q_proj": lora(10 * i + layer, d_out=16, d_in=16)
            for layer in (0, 1)
        }
        library.add(Expert(str(base_model), deltas, {"task": f"{name}_task"}), name)
        rows = [{"input": "a b " + "cdef"[j % 4], "output": "xyz"[j % 3]} for j in range(12)]
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{name}_task.jsonl").write_text(text)
        listing.append({"name": f"{name}_task", "instruction": f"Go {name}."})
    (folder / "tasks.json").write_text(json.dumps(listing))
    return folder


@pytest.mark.parametrize("method", WITH_DATA)
def test_a_merge_with_data_is_replayed_with_it(run: Any, tasks: Path, method: str) -> None:
    words = ("left", "right", "--method", method, "--name", "both", "--data", tasks, "--rows", 4)
    done = run("merge", *words, "--json")
    assert done.code == 0, done.err
    library = Library.open(tasks.parent / "library")
    assert library["both"].card["merge"]["data"]["rows"] == 4
    before = state(library)
    assert run("merge", "--replay", "both").code == 2
    again = run("merge", "--replay", "both", "--data", tasks, "--json")
    assert again.code == 0, again.err
    assert again.document["digest"] == done.document["digest"]
    path = tasks / "left_task.jsonl"
    path.write_text(path.read_text().replace('"a b c"', '"a b f"'))
    other = run("merge", "--replay", "both", "--data", tasks)
    assert other.code == 2
    assert "holds other rows" in other.err
    assert state(library) == before


def test_lorahub_takes_one_new_task(run: Any, tasks: Path) -> None:
    file = tasks / "left_task.jsonl"
    words = ("--method", "lorahub", "--data", file, "--rows", 4, "--set", "budget=3", "--json")
    found = run("merge", "left", "right", *words)
    assert found.code == 0, found.err
    absent = run("merge", "left", "right", "--method", "regmean", "--data", tasks.parent)
    assert absent.code == 3
    assert "left_task" in absent.err
