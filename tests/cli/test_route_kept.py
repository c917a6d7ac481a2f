"""route: scopes, thresholds, samples, and routers that are kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from adaptlib.experts import Expert, Library

PROMPT = ("route", "--prompt", "a b c d")


def shares(document: dict[str, Any]) -> dict[str, float]:
    return {entry["name"]: entry["weight"] for entry in document["experts"]}


@pytest.mark.usefixtures("routed_library")
def test_a_scope(run: Any) -> None:
    token, sequence, prompt = (
        run(*PROMPT, "--top-k", "2", "--scope", scope, "--json").document
        for scope in ("token", "sequence", "prompt")
    )
    assert [d["scope"] for d in (token, sequence, prompt)] == ["token", "sequence", "prompt"]
    assert shares(token) != shares(sequence) != shares(prompt)
    assert len(shares(prompt)) == 2
    assert run(*PROMPT, "--json").document["scope"] == "token"
    wrong = run(*PROMPT, "--scope", "word")
    assert wrong.code == 2
    assert "--scope is one of token, sequence, prompt; got 'word'" in wrong.err
    none = run(*PROMPT, "--router", "uniform", "--scope", "prompt")
    assert "router uniform has no --scope; it is not used" in none.err


@pytest.mark.usefixtures("routed_library")
def test_below_the_threshold_the_base_answers(run: Any) -> None:
    words = ("--generate", "--max-new-tokens", "3", "--json")
    low = run(*PROMPT, "--threshold", "0.0", *words).document
    high = run(*PROMPT, "--threshold", "2", *words).document
    assert (low["threshold"], high["threshold"]) == (0, 2)
    assert 0 < low["confidence"] == high["confidence"] <= 1
    assert shares(low) == shares(run(*PROMPT, *words).document)
    assert high["experts"] == []
    text = run(*PROMPT, "--threshold", "2")
    assert text.code == 0
    assert "no expert is chosen; the base answers alone" in text.out
    assert "threshold 2" in text.out
    for more in ("--explain", "--compare=uniform", "--plot=a.svg", "--html=a.html"):
        assert run(*PROMPT, "--threshold", "2", more).code == 0


@pytest.mark.usefixtures("routed_library")
def test_a_threshold_is_found_from_prompts(run: Any, tmp_path: Path) -> None:
    lines = [" ".join("abcdefghij"[i % 7 : i % 7 + 2 + i % 3]) for i in range(20)]
    (tmp_path / "own.txt").write_text("\n".join(lines) + "\n\n")
    done = run(*PROMPT, "--calibrate", "own.txt", "--save", "sure", "--json").document
    assert done["threshold"] > 0
    assert done["notes"] == [
        f"arrow: 95% of 20 prompts reach the threshold {done['threshold']:.4g}"
    ]
    again = run(*PROMPT, "--router", "saved:sure", "--json").document
    assert again["threshold"] == done["threshold"]
    assert again["experts"] == done["experts"]
    (tmp_path / "none.txt").write_text("\n")
    for words, code, said in (
        (("--calibrate", "none.txt"), 2, "holds no prompt"),
        (("--calibrate", "no.txt"), 3, "no file no.txt"),
        (("--calibrate", "own.txt", "--threshold", "1"), 2, "--calibrate finds the threshold"),
        (("--calibrate", "own.txt", "--router", "uniform"), 2, "router uniform has no measure"),
    ):
        failed = run(*PROMPT, *words)
        assert failed.code == code
        assert said in failed.err


def test_a_router_is_kept_with_its_experts(run: Any, routed_library: Library) -> None:
    made = run(*PROMPT, "--top-k", "2", "--temperature", "0.5", "--save", "two", "--json").document
    assert run("mv", "e0", "other").code == 0
    kept = run(*PROMPT, "--router", "saved:two", "--json").document
    assert kept["experts"] == made["experts"]
    assert kept["router"] == "arrow"
    noted = run(*PROMPT, "--router", "saved:two", "--top-k", "1", "--explain")
    assert noted.code == 0
    assert "saved:two keeps its own top-k; --top-k is not used" in noted.err
    shown = run("show", "routers/two")
    assert "routers/two: router arrow, mix outputs, scope token, temp" in shown.out
    assert "e0" in shown.out
    assert run("verify", "--deep").code == 0
    for words, code, said in (
        (("--router", "saved:none"), 3, "no routers named 'none'; there are: two"),
        (("--compare", "saved:two,arrow"), 2, "it is asked alone"),
        (("--router", "saved:two", "--experts", "e1"), 2, "saved:two knows its own experts"),
        (("--save", "NOT A NAME"), 2, "NOT A NAME"),
    ):
        failed = run(*PROMPT, *words)
        assert failed.code == code, failed.err
        assert said in failed.err
    assert run("rm", "routers/two").code == 0
    assert run(*PROMPT, "--router", "saved:two").code == 3
    assert len(routed_library) == 5


@pytest.fixture
def with_tasks(routed_library: Library, tmp_path: Path) -> Path:
    """A folder with a task file for e0, by its card, and e1, by its name."""
    expert = routed_library["e0"]
    card = dict(expert.card) | {"task": "letters"}
    routed_library.add(Expert(expert.base, dict(expert.deltas), card), "e0", replace=True)
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, letters in (("letters", "abcd"), ("e1", "ghij")):
        rows = [{"input": " ".join(letters[i % 4 :]), "output": "x"} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    listing = [{"name": name, "instruction": "Say."} for name in ("letters", "e1")]
    (folder / "tasks.json").write_text(json.dumps(listing))
    return folder


def test_samples_say_what_an_expert_is_for(run: Any, with_tasks: Path) -> None:
    words = ("--experts", "e0,e1", "--samples", str(with_tasks), "--top-k", "1", "--json")
    for router in ("loraretriever", "tp", "lorauter"):
        for text, wanted in (("a b c", "e0"), ("h i j", "e1")):
            said = ("route", "--instruction", "Say.", "--prompt", text, "--router", router)
            result = run(*said, *words)
            assert result.code == 0, result.err
            document = result.document
            assert list(shares(document)) == [wanted]
    document = run(*PROMPT, "--router", "cm", *words).document
    assert set(shares(document)) <= {"e0", "e1"}
    lacking = run(*PROMPT, "--router", "cm", "--experts", "e0,e1")
    assert lacking.code == 2
    assert "router cm needs samples" in lacking.err
    for folder, code, said in (
        ("no", 3, "no folder no with samples"),
        (".", 3, "is called like the task"),
    ):
        failed = run(*PROMPT, "--router", "tp", "--samples", folder)
        assert failed.code == code
        assert said in failed.err


def test_a_shortlist_is_routed_among(run: Any, routed_library: Library) -> None:
    whole = run(*PROMPT, "--top-k", "2", "--json").document
    every = run(*PROMPT, "--top-k", "2", "--shortlist", "9", "--json").document
    assert every["experts"] == whole["experts"]
    listed = {entry["name"]: entry["weight"] for entry in every["shortlist"]}
    assert list(listed) == sorted(listed, key=lambda name: -listed[name])
    assert sum(listed.values()) == pytest.approx(1)
    few = run(*PROMPT, "--top-k", "2", "--shortlist", "2", "--json").document
    assert {entry["name"] for entry in few["shortlist"]} == set(list(listed)[:2])
    assert set(shares(few)) == set(list(listed)[:2])
    assert routed_library.path is not None
    assert list((routed_library.path / "derived" / "prototypes").rglob("*.safetensors"))
    last = list(listed)[-1]
    both = run(*PROMPT, "--shortlist", "1", "--compare", f"arrow,named:{last}", "--json").document
    assert both["compare"][1]["experts"] == [{"name": last, "weight": 1.0}]
    for words, said in (
        (("--shortlist", "0"), "--shortlist is 1 or more; got 0"),
        (("--shortlist", "2", "--router", "saved:x"), "leave out --shortlist"),
    ):
        failed = run(*PROMPT, *words)
        assert failed.code == 2
        assert said in failed.err
    run("rm", *listed)
    done = run("gc", "--grace", "0", "--history", "0", "--allow-empty", "--json").document
    assert done["prototypes"] == 5
