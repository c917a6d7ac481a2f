"""route on a tiny random Llama: the JSON contract, and every way to ask."""

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from adaptlib.cli import route

from adaptlib.experts import Library
from adaptlib.routing import MHR, save_router
from tests.tiny import make_expert

PROMPT = ("route", "--prompt", "a b c d")


@pytest.mark.usefixtures("routed_library")
def test_route_says_who_answers(run: Any) -> None:
    document = run(*PROMPT, "--top-k", "2", "--json").document
    assert document.keys() == {"schema", "router", "top_k", "mix", "scope", "experts", "notes"}
    assert document["schema"] == "adaptlib.route/1"
    assert (document["router"], document["top_k"], document["mix"]) == ("arrow", 2, "outputs")
    weights = [entry["weight"] for entry in document["experts"]]
    assert all(entry.keys() == {"name", "weight"} for entry in document["experts"])
    assert {entry["name"] for entry in document["experts"]} <= {f"e{i}" for i in range(5)}
    assert weights == sorted(weights, reverse=True)
    assert sum(weights) == pytest.approx(1, abs=1e-6)
    assert all(weight > 0 for weight in weights)
    assert run(*PROMPT, "--top-k", "2", "--json").document == document  # the same every time


@pytest.mark.usefixtures("routed_library")
def test_route_explains_and_generates(run: Any, tmp_path: Path) -> None:
    words = ("--explain", "--generate", "--max-new-tokens", "3", "--json")
    document = run(*PROMPT, *words).document
    assert isinstance(document["text"], str)
    assert [token["token"].strip() for token in document["tokens"]] == ["a", "b", "c", "d"]
    assert len(document["layers"]) >= 2
    for layer in document["layers"]:
        assert sum(entry["weight"] for entry in layer["experts"]) == pytest.approx(1, abs=1e-5)
        weights = [entry["weight"] for entry in layer["experts"]]
        assert weights == sorted(weights, reverse=True)
    text = run(*PROMPT, "--explain", "--generate", "--max-new-tokens", "3")
    assert text.code == 0
    assert "Tokens, by the expert" in text.out
    assert "\x1b" not in text.out
    drawn = run(*PROMPT, "--plot", "map.svg", "--json")
    assert drawn.code == 0
    assert (tmp_path / "map.svg").read_text().startswith("<?xml")
    assert drawn.document["router"] == "arrow"
    assert run(*PROMPT, "--plot", "map.gif").code == 2


@pytest.mark.usefixtures("routed_library")
def test_an_explanation_has_its_figures(run: Any) -> None:
    document = run(*PROMPT, "--explain", "--json").document
    assert {"layers", "tokens", "agreement", "entropy", "without"} <= document.keys()
    token, layer = document["tokens"][0], document["layers"][0]
    assert token.keys() == {"token", "expert", "weight", "entropy", "experts", "layers"}
    assert layer.keys() == {"layer", "experts", "entropy", "agreement", "with_whole"}
    assert token["experts"][0] == {"name": token["expert"], "weight": token["weight"]}
    assert 0 <= document["agreement"] <= 1
    bits = document["entropy"]
    assert 0 < bits["choice"] <= bits["token"] <= bits["whole"] <= 2.33  # log2(5)
    once = run(*PROMPT, "--explain", "--router", "named:e0", "--json").document
    assert once["agreement"] == 1
    assert once["entropy"] == {"whole": 0, "token": 0, "choice": 0}


@pytest.mark.usefixtures("routed_library")
def test_without_the_top_expert_is_a_routing_of_the_others(run: Any) -> None:
    words = ("--generate", "--max-new-tokens", "3", "--json")
    document = run(*PROMPT, "--explain", *words).document
    changed = document["without"]
    top = document["experts"][0]
    assert (changed["expert"], changed["share"]) == (top["name"], top["weight"])
    others = ",".join({f"e{i}" for i in range(5)} - {top["name"]})
    alone = run(*PROMPT, "--experts", others, *words).document
    after = {entry["name"]: entry["after"] for entry in changed["shares"] if entry["after"]}
    assert after == pytest.approx({e["name"]: e["weight"] for e in alone["experts"]})
    before = {entry["name"]: entry["before"] for entry in changed["shares"]}
    assert before == {e["name"]: e["weight"] for e in document["experts"][1:]}
    gains = [entry["after"] - entry["before"] for entry in changed["shares"]]
    assert gains == sorted(gains, reverse=True)
    assert changed["text"] == alone["text"]
    assert changed["next"].keys() == {"before", "after", "kl"}
    assert changed["next"]["kl"] > 0
    text = run(*PROMPT, "--explain").out
    assert f"Without {top['name']} ({top['weight']:.1%})" in text
    assert "next token" in text


@pytest.mark.usefixtures("routed_library")
def test_without_its_only_expert_the_base_answers_alone(run: Any) -> None:
    changed = run(*PROMPT, "--router", "named:e1", "--explain", "--json").document["without"]
    assert (changed["expert"], changed["share"], changed["shares"]) == ("e1", 1.0, [])
    text = run(*PROMPT, "--experts", "e1", "--explain").out
    assert "the base answers alone" in text


@pytest.mark.parametrize("words", [(), ("--generate", "--max-new-tokens", "3")])
@pytest.mark.usefixtures("routed_library")
def test_the_picture_fits_80_columns(
    run: Any, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    compare = ("--compare", "arrow,uniform,named:e0")
    for environment in ({}, {"FORCE_COLOR": "1"}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for more in ((), compare):
            text = run(*PROMPT, "--explain", *words, *more).out
            assert ("\x1b" in text) == bool(environment)
            lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
            assert [line for line in lines if len(line) > 80] == []


@pytest.mark.usefixtures("routed_library")
def test_routers_side_by_side(run: Any) -> None:
    words = (*PROMPT, "--compare", "arrow,uniform", "--compare", "named:e1")
    document = run(*words, "--json").document
    alone = run(*PROMPT, "--json").document
    share = {entry["name"]: entry["weight"] for entry in alone["experts"]}
    assert document["router"] == "arrow"  # the first is the one that is asked
    assert {e["name"]: e["weight"] for e in document["experts"]} == pytest.approx(share)
    rows = {row["router"]: row for row in document["compare"]}
    assert list(rows) == ["arrow", "uniform", "named:e1"]
    for row in rows.values():
        assert row.keys() == {
            *("router", "top_k", "experts", "overlap", "entropy", "seconds", "fit_seconds")
        }
        assert row["seconds"] > 0
    assert rows["arrow"]["experts"] == document["experts"]
    assert rows["arrow"]["overlap"] == pytest.approx(1)
    assert rows["named:e1"]["overlap"] == pytest.approx(share.get("e1", 0.0))
    assert rows["named:e1"]["entropy"] == 0
    assert rows["uniform"]["top_k"] == 5
    table = run(*words).out
    assert table.split()[:7] == ["ROUTER", "TOP", "OVERLAP", "BITS", "TIME", "MOST", "WEIGHT"]
    assert run(*words, "-q").out.splitlines()[-1] == "named:e1 e1"
    first = run(*PROMPT, "--router", "uniform", "--compare", "arrow,uniform", "--json").document
    assert [row["router"] for row in first["compare"]] == ["uniform", "arrow"]
    assert first["router"] == "uniform"


@pytest.mark.usefixtures("routed_library")
def test_routers_side_by_side_answer_each(run: Any) -> None:
    words = ("--generate", "--max-new-tokens", "3", "--json")
    document = run(*PROMPT, "--compare", "uniform,named:e0", *words).document
    for row in document["compare"]:
        alone = run(*PROMPT, "--router", row["router"], *words).document
        assert row["text"] == alone["text"]
    assert document["text"] == document["compare"][0]["text"]
    noted = run(*PROMPT, "--compare", "arrow,uniform", "--top-k", "2", "--json").document
    assert noted["notes"] == ["router uniform has no --top-k; it is not used"]
    assert [row["top_k"] for row in noted["compare"]] == [2, 5]


@pytest.mark.usefixtures("routed_library")
def test_a_router_that_needs_more_says_what(run: Any) -> None:
    result = run(*PROMPT, "--router", "cm", "--json")
    assert result.code == 2
    assert result.error["message"] == "router cm needs samples"
    assert run(*PROMPT, "--router", "named").code == 2
    kept = run(*PROMPT, "--router", "arrow:e0", "--json")
    assert (kept.code, kept.error["hint"]) == (3, "adaptlib route --save e0 keeps one")


def test_what_cannot_be_compared(run: Any, routed_library: Library) -> None:
    assert run(*PROMPT, "--compare", "arrow,nothing").code == 2
    assert run(*PROMPT, "--compare", ",").code == 2
    result = run(*PROMPT, "--compare", "arrow,named:e4", "--experts", "e0,e1", "--json")
    assert result.code == 2
    assert "named:e4 is none of --experts e0,e1" in result.error["message"]
    routed_library.tag("e0", "sums")  # an expert goes by the name that it is asked by
    document = run(*PROMPT, "--compare", "named:sums,uniform", "--json").document
    assert document["experts"][0]["name"] == "sums"


@pytest.mark.usefixtures("routed_library")
def test_a_page_of_the_routing(run: Any, tmp_path: Path) -> None:
    result = run(*PROMPT, "--html", "why.html", "--compare", "arrow,uniform", "--json")
    assert result.code == 0
    assert result.err == "Wrote why.html\n"
    assert "tokens" not in result.document
    text = (tmp_path / "why.html").read_text(encoding="utf-8")
    held = re.search(r'<script id="data" type="application/json">(.*?)</script>', text)
    assert held is not None
    data = json.loads(held[1])
    assert {token["token"].strip() for token in data["tokens"]} == {*"abcd"}
    assert len(data["choices"]) == len(data["layers"]) == 2
    assert {i for _, members in data["map"]["clusters"] for i in members} == set(range(5))
    assert all(len(at) == 2 for at in data["map"]["positions"])
    assert "Routers side by side" in text
    assert "Without the top expert" in text
    assert run(*PROMPT, "--html", "one.html", "--router", "named:e1").code == 0
    assert run(*PROMPT, "--html", "why.svg", "--json").error["message"].startswith("a report is")
    assert run(*PROMPT, "--html", "no/such/why.html").code == 3


@pytest.mark.usefixtures("routed_library")
def test_every_router(run: Any) -> None:
    uniform = run(*PROMPT, "--router", "uniform", "--json").document
    assert uniform["router"] == "uniform"
    assert len({entry["weight"] for entry in uniform["experts"] if entry["name"] != "e3"}) == 1
    named = run(*PROMPT, "--router", "named:e1", "--json").document
    assert named["router"] == "named"
    assert named["experts"][0] == {"name": "e1", "weight": 1.0}
    assert sum(entry["weight"] for entry in named["experts"]) == 1.0
    some = run(*PROMPT, "--experts", "e0,e1", "--experts", "e2", "--json").document
    assert {entry["name"] for entry in some["experts"]} == {"e0", "e1", "e2"}
    assert run(*PROMPT, "--experts", "e0 e1", "-q").out.split()[0] in ("e0", "e1")
    factors = ("--mix", "factors", "--json")
    assert run(*PROMPT, "--experts", "e0", *factors).document["mix"] == "factors"
    assert run(*PROMPT, "--experts", "e0,e1", *factors).code in (2, 7)  # of two ranks


@pytest.mark.usefixtures("routed_library")
def test_more_experts_than_there_are_is_all_of_them(run: Any) -> None:
    result = run(*PROMPT, "--top-k", "99", "--json")
    assert result.code == 0
    assert result.document["top_k"] == 5
    assert "--top-k 99 is more than there are" in result.document["notes"][0]
    assert result.err == ""
    assert "--top-k 99 is more than there are" in run(*PROMPT, "--top-k", "99").err


@pytest.mark.usefixtures("routed_library")
def test_the_prompt_comes_from_stdin_too(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a b c d"))
    piped = run("route", "--prompt", "-", "--json").document
    assert piped == run(*PROMPT, "--json").document
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert run("route", "--prompt", "-").code == 2


@pytest.mark.usefixtures("routed_library")
def test_a_prompt_over_the_context_is_refused(run: Any) -> None:
    result = run("route", "--prompt", "a " * 32, "--json")
    assert result.code == 2
    assert "the prompt has 32 tokens" in result.error["message"]
    full = run("route", "--prompt", "a " * 31, "--generate", "--json")
    assert full.code == 0  # one more fits
    assert isinstance(full.document["text"], str)


def test_experts_for_two_models_do_not_mix(run: Any, routed_library: Library) -> None:
    routed_library.add(make_expert(), "stranger")
    result = run(*PROMPT, "--json")
    assert result.code == 2
    assert "2 base models" in result.error["message"]
    assert run(*PROMPT, "--experts", "e0,e1").code == 0


def test_an_expert_that_does_not_fit_the_model_is_refused_again(
    run: Any, routed_library: Library, base_model: Path
) -> None:
    routed_library.add(make_expert(), "stranger")
    result = run(*PROMPT, "--experts", "stranger", "--model", base_model, "--json")
    assert result.code == 7
    assert "stranger matches no module" in result.error["message"]


def test_a_model_of_another_name_is_a_warning(
    run: Any, routed_library: Library, base_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "copy").symlink_to(base_model)
    result = run(*PROMPT, "--model", tmp_path / "copy", "--json")
    assert result.code == 0
    if result.err:
        assert result.err.startswith("Warning: ")


@pytest.mark.parametrize("line", route.EXAMPLES)
def test_every_example_works(
    run: Any, routed_library: Library, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    if piped := re.match(r'echo "(.*)" \| ', line):
        monkeypatch.setattr("sys.stdin", io.StringIO(piped[1]))
        line = line[piped.end() :]
    routed_library.tag("e0", "sums")
    run("cluster", "--k", "2", "--save", "tasks")
    if "mhr:skills" in line:
        skills = {name: routed_library[name] for name in routed_library.names()}
        skills = {name: expert for name, expert in skills.items() if expert.kind == "lora"}
        logits: dict[str, torch.Tensor] = {}
        for module in {m for expert in skills.values() for m in expert.deltas}:
            count = sum(module in expert.deltas for expert in skills.values())
            logits[module] = torch.randn(1, 2, count)
        save_router(routed_library, "skills", MHR.fit(skills, logits=logits, tasks=["sums"]))
    result = run(*shlex.split(line)[1:])
    assert result.code == 0, result.err


@pytest.mark.usefixtures("routed_library")
def test_an_option_that_a_router_lacks_is_said_and_not_dropped_in_silence(run: Any) -> None:
    words = ("--router", "uniform", "--top-k", "2", "--json")
    document = run(*PROMPT, *words).document
    assert document["notes"] == ["router uniform has no --top-k; it is not used"]
    assert document["top_k"] == 5
    assert run(*PROMPT, "--router", "uniform", "--json").document["notes"] == []
    assert "has no --temperature" in run(*PROMPT, "--router", "named:e0", "--temperature", "2").err
