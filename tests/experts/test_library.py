"""The library: a mapping that keeps what it was given, or says why not and changes nothing."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from adaptlib.errors import (
    ConflictError,
    NotFoundError,
    UsageError,
)
from adaptlib.experts import Library
from adaptlib.experts.codec import pack, write_directory
from adaptlib.experts.records import save_record
from library_store import AmbiguousDigest, Digest
from tests.tiny import make_expert, same_expert, state

GONE = "sha256:" + "0" * 64


def test_it_is_a_mapping(library: Library) -> None:
    experts = {f"e{i}": make_expert(i, kind=("lora", "sparse")[i % 2]) for i in range(4)}
    for name, expert in experts.items():
        library.add(expert, name)
    assert isinstance(library, Mapping)
    assert list(library) == sorted(experts)
    assert len(library) == 4
    assert set(library.keys()) == set(experts)
    assert all(same_expert(library[name], expert) for name, expert in experts.items())
    assert all(same_expert(value, experts[name]) for name, value in library.items())
    assert "e0" in library
    assert "other" not in library
    assert 5 not in library
    assert library.get("other") is None
    with pytest.raises(KeyError, match=r"^no expert named 'other'"):
        library["other"]


def test_adding_twice_changes_nothing(library: Library) -> None:
    first = library.add(make_expert(), "one")
    before = state(library)
    second = library.add(make_expert(), "one")
    assert (first.new, second.new) == (True, False)
    assert first.digest == second.digest == library.digest("one")
    assert state(library) == before


def test_the_digest_is_of_the_content_and_not_of_the_name(library: Library) -> None:
    one = library.add(make_expert(), "one")
    assert library.add(make_expert(), "team/other:v2").digest == one.digest
    assert library.add(make_expert(task="t"), "card").digest != one.digest
    assert library.add(make_expert(1), "weights").digest != one.digest
    assert len(list(library.store.objects())) == 2 + 1 + 2  # one blob serves two cards


def test_names_tags_and_digests_find_the_same(library: Library) -> None:
    digest = library.add(make_expert(), "team/sql:v1").digest
    bare = digest.removeprefix("sha256:")
    for name in ("team/sql", "team/sql:v1", digest, bare, bare[:7], digest[:15]):
        assert library.digest(name) == digest
        assert name in library
    assert list(library) == ["team/sql:v1"]
    latest = library.add(make_expert(1), "team/sql").digest
    assert list(library) == ["team/sql"]
    assert library.digest("team/sql") == latest
    assert library.tags() == {"team/sql": latest, "team/sql:v1": digest}
    for absent in (bare[:6], "team", "team/sql:v9", "sha256:", GONE, "UPPER", "", "../x"):
        assert absent not in library
        with pytest.raises(NotFoundError):
            library.digest(absent)


def test_a_digest_of_what_is_no_expert_finds_nothing(library: Library) -> None:
    added = library.add(make_expert(), "one")
    save_record(library.store, "clusterings", "c", {"experts": {"one": added.digest}})
    others = {str(d) for d in library.store.objects()} - {added.digest}
    assert len(others) == 2
    for digest in others:
        assert digest not in library
        with pytest.raises(NotFoundError):
            library.digest(digest)


def test_an_ambiguous_prefix_is_a_usage_error(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = "0" * 7
    found = tuple(Digest(prefix + str(i) * 57) for i in range(2))

    def resolve(_: str) -> Digest:  # two objects that share seven digits cannot be made here
        raise AmbiguousDigest("two start so", candidates=found)

    monkeypatch.setattr(library.store, "resolve", resolve)
    with pytest.raises(UsageError, match="two start so"):
        library.digest(prefix)


def test_did_you_mean(library: Library) -> None:
    with pytest.raises(NotFoundError) as caught:
        library["poem"]
    assert "empty" in str(caught.value.hint)
    library.add(make_expert(), "poems")
    library.add(make_expert(1), "sums")
    with pytest.raises(NotFoundError, match=r"no expert named 'poem'; did you mean poems\?"):
        library["poem"]


def test_a_taken_name_is_a_conflict_and_nothing_changes(library: Library) -> None:
    library.add(make_expert(), "one")
    before = state(library)
    with pytest.raises(ConflictError, match="the name one is taken") as caught:
        library.add(make_expert(1), "one")
    assert "--replace" in str(caught.value.hint)
    assert state(library) == before
    replaced = library.add(make_expert(1), "one", replace=True)
    assert replaced.new
    assert same_expert(library["one"], make_expert(1))
    assert [entry.reason for entry in library.log("one")] == ["add", "add"]


def test_rename_moves_all_tags_and_keeps_the_digest(library: Library) -> None:
    a = library.add(make_expert(0), "sql").digest
    b = library.add(make_expert(1), "sql:v1").digest
    library.add(make_expert(2), "poems:v7")
    assert library.rename("sql", "text-to-sql") == a
    assert library.tags() == {
        "poems:v7": library.digest("poems"),
        "text-to-sql": a,
        "text-to-sql:v1": b,
    }
    assert library.rename("text-to-sql:v1", "old") == b
    assert library.digest("old") == b
    assert "text-to-sql:v1" not in library
    assert "mv to text-to-sql" in library.log("sql")[-1].reason
    before = state(library)
    with pytest.raises(ConflictError):
        library.rename("text-to-sql", "old")
    with pytest.raises(NotFoundError):
        library.rename("absent", "new")
    assert state(library) == before


def test_rename_of_several_tags_does_not_mix_with_another_name(library: Library) -> None:
    library.add(make_expert(0), "a")
    library.add(make_expert(1), "a:v1")
    library.add(make_expert(2), "b:v9")
    before = state(library)
    with pytest.raises(ConflictError, match="b:v9 is taken"):
        library.rename("a", "b")
    assert state(library) == before


def test_remove_takes_a_tag_or_a_whole_name_and_keeps_the_history(library: Library) -> None:
    a = library.add(make_expert(0), "sql").digest
    b = library.add(make_expert(1), "sql:v1").digest
    library.tag("sql", "sql:v2")
    assert library.remove("sql:v1") == b
    assert set(library.tags()) == {"sql", "sql:v2"}
    assert library.remove("sql") == a
    assert dict(library) == {}
    assert [str(e.new) if e.new else None for e in library.log("sql")] == [
        a,
        b,
        a,
        None,
        None,
        None,
    ]
    assert library.digest(a) == a  # still there, by digest, until gc
    for name, error in (("sql", NotFoundError), (a, UsageError), (a[7:20], UsageError)):
        with pytest.raises(error):
            library.remove(name)


def test_tag(library: Library) -> None:
    a, b = (library.add(make_expert(i), f"e{i}").digest for i in range(2))
    assert library.tag("e0", "e0:v1") == a
    assert library.tag(b[:20], "best") == b
    library.tag("e0", "e0:v1")  # again is no error
    before = state(library)
    with pytest.raises(ConflictError, match="best is taken"):
        library.tag("e0", "best")
    assert state(library) == before
    library.tag("e0", "best", replace=True)
    assert library.digest("best") == a
    assert library.log("best")[-1].reason == "tag of e0"


def test_the_log_says_who_moved_what(library: Library) -> None:
    digest = library.add(make_expert(), "one").digest
    library.remove("one")
    first, last = library.log("one")
    assert (first.old, str(first.new), first.reason) == (None, digest, "add")
    assert (str(last.old), last.new, last.reason) == (digest, None, "rm")
    assert first.time <= last.time
    assert library.log("never") == []


def test_add_takes_directories_and_names_them(library: Library, tmp_path: Path) -> None:
    write_directory(pack(make_expert()), tmp_path / "My Expert")
    added = library.add(tmp_path / "My Expert", task="t", description="d")
    assert added.name == "my-expert"
    card = library["my-expert"].card
    assert (card["task"], card["description"]) == ("t", "d")
    assert library.add(str(tmp_path / "My Expert"), "x").name == "x"
