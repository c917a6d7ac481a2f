"""adaptlib eval: the contract, what is kept, and words that mean nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptlib.experts import Library
from adaptlib.routing import Arrow, save_router
from tests.tiny import state

LETTERS = "abcdefghijklmnop"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, name in enumerate(("sums", "names")):
        lines = [
            {
                "split": "train" if i < 12 else "test",
                "input": f"{LETTERS[i % 16]} {LETTERS[(i * 7 + number) % 16]}",
                "output": LETTERS[(i * 7 + number) % 16],
            }
            for i in range(20)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    listing = [{"name": name, "instruction": "s t"} for name in ("sums", "names")]
    (folder / "tasks.json").write_text(json.dumps(listing))
    return folder


@pytest.fixture
def routed(routed_library: Library, base_model: Path) -> Library:
    """The first of its experts was trained on `sums`, says its card."""
    import dataclasses

    for i, name in enumerate(sorted(routed_library.names())):
        expert = routed_library[name]
        card = dict(expert.card) | {"task": "sums" if i == 0 else f"else {i}"}
        routed_library.add(dataclasses.replace(expert, card=card), name, replace=True)
    return routed_library


def test_the_contract(run: Any, routed: Library, tasks: Path, tmp_path: Path) -> None:
    words = ("eval", "--tasks", tasks, "--router", "base,arrow,uniform,oracle,tp")
    asked = run(
        *words, "--metric", "exact_match,loss", "--json", "--html", "e.html", "--plot", "e.svg"
    )
    assert asked.code == 0, asked.err
    document = asked.document
    assert document["schema"] == "adaptlib.eval/1"
    seen = {(r["router"], r["task"], r["metric"]) for r in document["results"]}
    assert ("oracle", "names", "loss") not in seen
    assert len(seen) == 2 * (2 * 4 + 1)
    for row in document["results"]:
        assert {"router", "task", "split", "metric", "value", "n"} <= set(row)
        assert (row["split"], row["n"]) == ("test", 8)
    assert document["oracle"]["names"] is None
    assert (tmp_path / "e.html").exists()
    assert (tmp_path / "e.svg").exists()
    kept = list((tmp_path / "library" / "derived" / "evaluation").glob("*.jsonl"))
    assert kept
    before = {path: path.read_bytes() for path in kept}
    again = run(*words, "--metric", "exact_match,loss", "--json")
    assert again.document["results"] == document["results"]
    assert {path: path.read_bytes() for path in kept} == before
    shown = run(*words)
    assert shown.code == 0, shown.err
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    assert "Own first" in shown.out
    assert len(run(*words, "-q").out.splitlines()) == 5


def test_saved_routers_side_by_side(run: Any, routed: Library, tasks: Path) -> None:
    experts = {name: routed[name] for name in routed.names()}
    for k in (1, 2):
        save_router(routed, f"top{k}", Arrow.fit(experts, top_k=k))
    asked = run(
        "eval", "--tasks", tasks / "sums.jsonl", "--router", "saved:top1,arrow:top2", "--json"
    )
    assert asked.code == 0, asked.err
    assert {row["router"] for row in asked.document["results"]} == {"saved:top1", "arrow:top2"}
    one = run("eval", "--tasks", tasks / "sums.jsonl", "--router", "saved:top1")
    assert "sums" in one.out  # of one router, each task


def test_a_stopped_evaluation_says_what_is_kept(
    run: Any, routed: Library, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptlib.evaluation import cache

    inner, calls = cache.Cache.append, []

    def stop(self: Any, *given: Any) -> None:
        inner(self, *given)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cache.Cache, "append", stop)
    words = ("eval", "--tasks", tasks, "--router", "base,uniform", "--batch-size", "4")
    stopped = run(*words)
    assert stopped.code == 130
    assert "what was computed is kept" in stopped.err
    assert "the same command" in stopped.err
    monkeypatch.setattr(cache.Cache, "append", inner)
    assert run(*words).code == 0


def test_words_that_mean_nothing(run: Any, routed: Library, tasks: Path) -> None:
    before = state(routed)
    for words, code, said in (
        (("--tasks", tasks, "--metric", "exact_mach"), 2, "exact_match"),
        (("--tasks", tasks, "--split", "dev"), 2, "--split test"),
        (("--tasks", tasks, "--rows", "0"), 2, "--rows 50"),
        ((), 2, "--tasks tasks/"),
        (("--tasks", tasks, "--harness", "arc_easy"), 2, "--tasks tasks/"),
        (("--tasks", tasks / "sum.jsonl"), 3, "sums.jsonl"),
        (("--tasks", tasks, "--router", "arow"), 2, "--router arrow"),
        (("--tasks", tasks, "--router", "mhr"), 2, "train-router mhr"),
        (("--tasks", tasks, "--router", "saved:none"), 3, ""),
        (("--tasks", tasks / "names.jsonl", "--router", "oracle"), 2, "leave out oracle"),
        (("--tasks", tasks, "--metric", "label_accuracy", "--router", "base"), 2, "--metric"),
        (("--tasks", tasks, "--html", "x.txt"), 2, "x.html"),
    ):
        asked = run("eval", *words, "--json")
        assert asked.code == code, (words, asked.err)
        assert said in (asked.error["hint"] or ""), words
    assert state(routed) == before
