"""`merge`: what it makes, what it says, and that a refused one leaves everything as it was."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adaptlib.cli import main  # noqa: F401 -- before the tests change the directory

from adaptlib.experts import Expert, Library
from adaptlib.experts.records import save_record
from adaptlib.merging import MERGES
from tests.tiny import make_expert, state

KEYS = {"name", "digest", "method", "parents", "weights", "options", "kind", "base", "rank"}
KEYS |= {"modules", "params", "bytes", "error", "new", "notes", "schema"}
FREE = [name for name, merge in MERGES.items() if merge.measure is None]
WITH_DATA = [name for name in MERGES if name not in FREE]


@pytest.fixture
def library(merge_library: Library) -> Library:
    return merge_library


def dense(library: Library, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """Σ w_i ΔW_i by hand."""
    return {
        module: sum(weight * library[n].deltas[module].dense() for n, weight in weights.items())
        for module in ("layers.0.proj", "layers.1.proj")
    }  # type: ignore[return-value]


def same_updates(expert: Expert, wanted: dict[str, torch.Tensor]) -> bool:
    return expert.deltas.keys() == wanted.keys() and all(
        torch.allclose(expert.deltas[m].dense(), w, atol=1e-5) for m, w in wanted.items()
    )


# -- what it makes --


def test_the_document_is_a_contract(run: Any, library: Library) -> None:
    done = run("merge", "one", "two", "--name", "both", "--json")
    assert (done.code, done.err) == (0, "")
    found = done.document
    assert found.keys() == KEYS
    assert found["schema"] == "adaptlib.merge/1"
    assert found["digest"] == library.digest("both")
    assert (found["name"], found["method"], found["kind"]) == ("both", "linear", "lora")
    assert found["parents"] == [{"name": n, "digest": library.digest(n)} for n in ("one", "two")]
    assert (found["rank"], found["modules"], found["weights"]) == (3, 2, [0.5, 0.5])
    assert found["error"] == pytest.approx(0, abs=1e-6)
    assert found["new"]
    assert same_updates(library["both"], dense(library, {"one": 0.5, "two": 0.5}))
    card = library["both"].card
    assert card["tasks"] == ["task 0", "task 1"]
    assert card["parents"] == found["parents"]


def test_weights_may_be_of_some_and_negative(run: Any, library: Library) -> None:
    words = ("--method", "cat", "--weight", "two=-0.5", "--name", "less", "--json")
    assert run("merge", "one", "two", *words).document["weights"] == [1.0, -0.5]
    assert same_updates(library["less"], dense(library, {"one": 1, "two": -0.5}))
    words = ("--weight", "one=2,two=3", "--name", "sum", "-q")
    assert run("merge", "one,two", *words).out == "sum\n"
    assert same_updates(library["sum"], dense(library, {"one": 2, "two": 3}))


@pytest.mark.parametrize("method", FREE)
def test_every_method_is_there_by_its_name(run: Any, library: Library, method: str) -> None:
    """And makes what it makes in Python."""
    hyphens = method.replace("_", "-")
    done = run("merge", "one", "two", "--method", hyphens, "--name", "both", "--json")
    assert done.code == 0, done.err
    assert done.document["method"] == method
    made = MERGES[method]({name: library[name] for name in ("one", "two")})
    assert done.document["options"] == made.card["merge"]["options"]
    assert made.deltas.keys() == library["both"].deltas.keys()
    for module, delta in made.deltas.items():
        kept = library["both"].deltas[module].dense()
        assert torch.allclose(kept, delta.dense(), atol=1e-5)


def test_options_and_forms_are_passed_on(run: Any, library: Library) -> None:
    words = ("--method", "task-arithmetic", "--set", "scale=2", "--name", "both", "--json")
    assert run("merge", "one", "two", *words).document["options"] == {"scale": 2.0}
    assert same_updates(library["both"], dense(library, {"one": 2, "two": 2}))
    found = run("merge", "one", "two", "--rank", "1", "--name", "r", "--json").document
    assert (found["rank"], found["error"] > 0.01) == (1, True)
    found = run("merge", "one", "few", "--keep-ratio", "0.2", "--name", "k", "--json").document
    assert (found["kind"], found["rank"], found["params"]) == ("sparse", None, 6)
    found = run("merge", "few", "some", "--kind", "lora", "--name", "l", "--json").document
    assert found["kind"] == "lora"
    run("merge", "one", "two", "--on", "factors", "--name", "f")
    assert library["f"].card["merge"]["kept"]["on"] == "factors"
    assert not same_updates(library["f"], dense(library, {"one": 0.5, "two": 0.5}))


def test_it_goes_by_a_name_made_of_theirs(run: Any, library: Library) -> None:
    assert run("merge", "one", "two", "-q").out == "one-two-linear\n"
    assert run("merge", "one", "two", "few", "some", "-q").out == "4-experts-linear\n"
    record = {"clusters": {"7": ["one", "two"]}, "experts": library.names()}
    save_record(library.store, "clusterings", "tasks", record)
    assert run("merge", "cluster:tasks/7", "--method", "cat", "-q").out == "tasks-7-cat\n"
    assert library["tasks-7-cat"].card["parents"] == library["one-two-linear"].card["parents"]
    assert run("merge", "cluster:tasks/8").code == 3


def test_what_people_read(run: Any, library: Library) -> None:
    done = run("merge", "one", "two", "--name", "both", "--weight", "one=0.25", "--rank", "1")
    lines = done.out.splitlines()
    assert re.fullmatch(r"Merged  both  sha256:[0-9a-f]{12}", lines[0])
    assert lines[1] == "  linear of 2 experts: 0.25 one, 0.5 two"
    assert re.fullmatch(r"  lora, rank 1, 16 parameters in 2 modules, \d+ B", lines[2])
    assert re.fullmatch(r"  \d+\.\d% of the norm is lost by keeping it so", lines[3])
    assert len(lines) == 4
    assert "Next: adaptlib show both, adaptlib route --experts both" in done.err
    assert max(map(len, lines)) < 80
    again = run("merge", "one", "two", "--name", "both", "--weight", "one=0.25", "--rank", "1")
    assert again.out.startswith("Already there  both")
    assert run("merge", "one", "two", "-q", "--name", "x").out == "x\n"


def test_show_tells_where_it_came_from(run: Any, library: Library) -> None:
    words = ("--method", "task_arithmetic", "--weight", "few=-1", "--rank", "1", "--name", "both")
    run("merge", "one", "few", *words, "--description", "of two kinds")
    lines = run("show", "both").out.splitlines()
    assert "  method   task_arithmetic, scale 0.4" in lines
    assert any(
        re.search(r"kept     .*lost by keeping it so \(rank 1 was asked for\)", x) for x in lines
    )
    short = [library.digest(n)[:19] for n in ("one", "few")]
    assert f"  parents        1  {short[0]}  one" in lines
    assert f"                -1  {short[1]}  few" in lines
    assert "  description of two kinds" in lines
    shown = run("show", "both", "--json").document["manifest"]["card"]["merge"]
    assert shown["weights"] == [1.0, -1.0]


@pytest.mark.parametrize(
    "card",
    [
        {"merge": "x", "parents": 3},
        {"merge": {"method": "m", "options": [], "weights": {}, "error": "e"}, "parents": ["a"]},
        {"merge": {"method": 1, "options": {}, "weights": ["x"], "error": 0}, "parents": []},
        {"parents": ["a", "b"]},
    ],
)
def test_show_survives_a_card_of_another_form(
    run: Any, library: Library, card: dict[str, Any]
) -> None:
    library.add(make_expert(8, **card), "odd")
    assert run("show", "odd").code == 0


def test_methods_are_listed(run: Any) -> None:
    found = run("merge", "--methods", "--json").document["methods"]
    assert [row["name"] for row in found] == list(MERGES)
    by_name = {row["name"]: row for row in found}
    assert by_name["task_arithmetic"]["options"] == {"scale": 0.4}
    assert [name for name, row in by_name.items() if row["data"]] == WITH_DATA
    assert all(row["summary"].endswith(".") for row in found)
    assert run("merge", "--methods", "-q").out.split() == list(MERGES)
    text = run("merge", "--methods").out
    assert "  --set scale=0.4\n" in text
    assert max(map(len, text.splitlines())) <= 79


# -- before it is made --


def test_a_dry_run_tells_what_would_come_and_keeps_nothing(run: Any, library: Library) -> None:
    before = state(library)
    found = run("merge", "one", "few", "--rank", "1", "--dry-run", "--json").document
    assert found["schema"] == "adaptlib.merge-plan/1"
    assert (found["kind"], found["rank"], found["modules"]) == ("lora", 1, 2)
    assert found["parents"][1] == {"name": "few", "digest": library.digest("few")}
    assert 50e6 < found["memory"] < 50e9
    assert found["tried"] == ["layers.1.proj"]
    text = run("merge", "one", "few", "--rank", "1", "--dry-run").out
    assert state(library) == before
    assert text.startswith("Would merge  one-few-linear\n  parents  2: one, few\n")
    assert re.search(r"^  error    \d+\.\d% in 1 module$", text, re.MULTILINE)
    assert re.search(r"^  memory   about \d", text, re.MULTILINE)
    real = run("merge", "one", "few", "--rank", "1", "--json").document
    assert found["params"] == real["params"]
    assert found["bytes"] == pytest.approx(real["bytes"], abs=800)  # without the header


@pytest.mark.parametrize("method", WITH_DATA)
def test_a_dry_run_needs_no_data(run: Any, library: Library, method: str) -> None:
    found = run("merge", "one", "two", "--method", method, "--dry-run", "--json").document
    assert (found["error"], found["rank"]) == (None, 3)
    assert "not known before" in run("merge", "one", "two", "--method", method, "--dry-run").out


REFUSED = {
    "nothing": ([], 2, "no experts were named"),
    "no such expert": (["one", "tow"], 3, "did you mean two"),
    "twice": (["one", "two", "one"], 2, "--weight|weight: one=2"),
    "two bases": (["one", "stranger"], 2, "for 2 base models"),
    "no such base": (["one", "two", "--base", "org/none"], 3, "org/none"),
    "method": (["one", "two", "--method", "tie"], 2, "did you mean ties"),
    "option": (["one", "two", "--method", "ties", "--set", "densty=1"], 2, "did you mean density"),
    "option's value": (["one", "two", "--method", "ties", "--set", "density=x"], 2, "a number"),
    "option twice": (["one", "two", "--set", "a=1", "--set", "a=2"], 2, "there twice"),
    "option alone": (["one", "two", "--set", "density"], 2, "KEY=VALUE"),
    "weight alone": (["one", "two", "--weight", "0.5"], 2, "NAME=NUMBER"),
    "weight of nan": (["one", "two", "--weight", "one=nan"], 2, "NAME=NUMBER"),
    "weight twice": (["one", "two", "--weight", "one=1", "--weight", "one=2"], 2, "there twice"),
    "weight of another": (["one", "two", "--weight", "tow=1"], 2, "did you mean two"),
    "rank of zero": (["one", "two", "--rank", "0"], 2, ">= 1"),
    "rank too high": (["one", "two", "--rank", "4"], 2, "above what any module can hold, 3"),
    "rank of sparse": (["one", "two", "--rank", "1", "--kind", "sparse"], 2, "a rank is of a LoRA"),
    "rank and ratio": (["one", "--rank", "1", "--keep-ratio", "0.5"], 2, "a rank is of a LoRA"),
    "ratio too high": (["one", "two", "--keep-ratio", "1.5"], 2, "<= 1"),
    "kind": (["one", "two", "--kind", "dense"], 2, "--kind is one of lora, sparse"),
    "factors of sparse": (["one", "few", "--on", "factors"], 7, "factors"),
    "a bad name": (["one", "two", "--name", "No Name"], 2, "No Name"),
    "a taken name": (["one", "two", "--name", "few"], 5, "few is taken"),
    "a kept name": (["one", "two", "--name", "routers/x"], 2, "routers/"),
    "no recipe": (["--recipe", "absent.yaml"], 3, "absent.yaml"),
    "replay of none": (["--replay", "nobody"], 3, "nobody"),
    "replay of another": (["--replay", "one"], 2, "holds no recipe"),
    "replay and more": (
        ["one", "--replay", "two", "--rank", "1"],
        2,
        "names, --rank|--rank, names",
    ),
    "no data": (["one", "two", "--method", "regmean"], 2, "--data"),
    "no rows": (["one", "two", "--method", "fisher", "--rows", "0"], 2, "--rows is 1 or more"),
    "no such data": (["one", "two", "--method", "regmean", "--data", "absent"], 3, "absent"),
}


@pytest.mark.parametrize(("words", "code", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refused_merge_leaves_everything_as_it_was(
    run: Any, library: Library, words: list[str], code: int, message: str
) -> None:
    before = state(library)
    done = run("merge", *words)
    assert done.code == code, done.err
    assert re.search(message, done.err)
    assert "Next: " in done.err or "--name" in words
    assert done.out == ""
    assert state(library) == before
    if words:
        assert run("merge", *words, "--json").error["code"] == code


def test_what_is_allowed_is_noted(run: Any, library: Library) -> None:
    for words, note in (
        (("one", "uno"), "one and uno are one expert, which so counts 2 times"),
        (("one",), "one expert is merged with nothing"),
        (("one", "apart"), "no module is adapted by all of them"),
        (("one", "two", "--weight", "one=0,two=0"), "all weights are zero"),
        (("zero", "--name", "z"), "every update in it is zero"),
    ):
        done = run("merge", *words)
        assert done.code == 0, done.err
        assert f"Note: {note}" in done.err or note in done.err
        name = run("merge", *words, "--json").document["name"]
        library.remove(name)


def test_documented_results_of_odd_merges(run: Any, library: Library) -> None:
    run("merge", "one", "uno", "--name", "twins")
    assert same_updates(library["twins"], dense(library, {"one": 1}))
    run("merge", "one", "two", "--method", "cat", "--weight", "one=1,two=-1", "--name", "apart2")
    assert same_updates(library["apart2"], dense(library, {"one": 1, "two": -1}))
    run("merge", "one", "apart", "--method", "cat", "--name", "union")
    assert library["union"].deltas.keys() == {"layers.0.proj", "layers.1.proj", "other.proj"}
    assert torch.allclose(
        library["union"].deltas["other.proj"].dense(), library["apart"].deltas["other.proj"].dense()
    )


def test_a_taken_name_is_moved_when_asked(run: Any, library: Library) -> None:
    assert run("merge", "one", "two", "--name", "few", "--replace").code == 0
    assert library["few"].kind == "lora"
    assert run("merge", "one", "two", "--name", "few").code == 0  # it is the same now
    assert run("merge", "one", "two", "--name", "few", "--rank", "1").code == 5
    assert run("merge", "one", "two", "--name", "few:v2", "--rank", "1").code == 0


def test_a_taken_name_is_known_before_anything_is_merged(
    run: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it was merged")

    monkeypatch.setattr("adaptlib.merging.make.make", fail)
    assert run("merge", "one", "two", "--name", "few").code == 5


def test_words_are_read_before_torch_is(tmp_path: Path, library: Library) -> None:
    cases = [
        REFUSED[key][0]
        for key in (
            "nothing",
            "no such expert",
            "twice",
            "two bases",
            "weight alone",
            "rank too high",
        )
    ]
    (tmp_path / "bad.yaml").write_text("experts: [one]\nrank: x\n")
    cases += [["--recipe", str(tmp_path / "bad.yaml")], ["--replay", "one"]]
    code = (
        "import json, sys\nfrom adaptlib.cli.main import invoke\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    assert invoke(['merge', *words, '-L', sys.argv[2]]), words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(cases), str(tmp_path / "library")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("routed_library")
def test_a_merged_expert_is_routed_to(run: Any) -> None:
    assert run("merge", "e0", "e1", "--name", "both").code == 0
    found = run("route", "--prompt", "a b", "--router", "named:both", "--json").document
    assert [one["name"] for one in found["experts"]] == ["both"]
