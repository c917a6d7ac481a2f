"""Which experts a command is about, when the library holds more than one base model or name."""

from pathlib import Path
from typing import Any

import pytest

from adaptlib.experts import Expert, Library
from tests.tiny import make_expert

PROMPT = ("route", "--prompt", "a b c d")


@pytest.fixture
def two_bases(routed_library: Library) -> Library:
    """The five experts, and one of a base model that is not on this machine."""
    routed_library.add(make_expert(base="org/absent"), "stranger")
    return routed_library


def names(document: Any) -> list[str]:
    return sorted(entry["name"] for entry in document["experts"])


def test_one_expert_by_name_asks_nothing_of_the_others(run: Any, two_bases: Library) -> None:
    two_bases.tag("e0", "e0:v1")
    for which in ("e0", "e0:v1", two_bases.digest("e0")[7:20]):
        document = run(*PROMPT, "--router", f"named:{which}", "--json").document
        assert document["experts"] == [{"name": which, "weight": pytest.approx(1)}]


def test_two_bases_are_told_apart(run: Any, two_bases: Library, base_model: Path) -> None:
    for command in (PROMPT, ("cluster",)):
        mixed = run(*command)
        assert mixed.code == 2
        assert "for 2 base models" in mixed.err
        assert "--base" in mixed.err
    assert run(*PROMPT, "--base", str(base_model), "--json").code == 0
    assert run("cluster", "--base", str(base_model), "--k", "2", "--json").code == 0
    absent = run(*PROMPT, "--base", "org/other")
    assert absent.code == 3
    assert "org/absent" in absent.err


def test_pins_of_two_revisions_are_an_error(run: Any, routed_library: Library) -> None:
    base = "org/absent"
    for name, revision in (("old", "a" * 40), ("new", "b" * 40), ("any", None)):
        card = {"base": {"id": base, "revision": revision, "digest": None}, "task": name}
        routed_library.add(Expert(base, make_expert().deltas, card), name)
    result = run(*PROMPT, "--base", base)
    assert result.code == 2
    assert "several revisions of org/absent" in result.err


def test_an_expert_by_two_names_is_there_once(run: Any, routed_library: Library) -> None:
    routed_library.tag("e0", "again")
    document = run(*PROMPT, "--experts", "e0,again,e1", "--top-k", "9", "--json").document
    assert set(names(document)) <= {"e0", "e1"}


@pytest.mark.usefixtures("routed_library")
def test_a_saved_clustering_is_shown_and_removed(run: Any) -> None:
    run("cluster", "--k", "2", "--save", "mine")
    shown = run("show", "clusterings/mine")
    assert shown.code == 0
    assert "method mbc, k 2" in shown.out
    assert run("show", "clusterings/mine", "--json").document["record"]["k"] == 2
    assert run("rm", "clusterings/mine").code == 0
    assert run("show", "clusterings/mine").code == 3
    assert run("rm", "clusterings/mine").code == 3


def test_of_several_sources_all_are_kept_or_none(run: Any, tmp_path: Path) -> None:
    from adaptlib.experts.codec import pack, write_directory

    run("init")
    for i, name in enumerate(("one", "two")):
        write_directory(pack(make_expert(i)), tmp_path / name)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    assert run("add", "one", "bad", "two").code == 4
    assert run("list", "-q").out == ""
    assert run("add", "one", "two").code == 0
    assert run("list", "-q").out.split() == ["one", "two"]
    (tmp_path / "deep").mkdir()
    (tmp_path / "one").rename(tmp_path / "deep" / "two")
    clash = run("add", "two", "deep/two", "--replace")
    assert clash.code == 5
    assert "would both be named two" in clash.err


@pytest.mark.usefixtures("routed_library")
def test_what_steers_a_terminal_is_not_passed_on(run: Any) -> None:
    result = run("route", "--prompt", "a \033[31mb\033]0;PWN\007", "--explain")
    assert result.code == 0
    assert "\033]" not in result.out
    assert "\033[31m" not in result.out
