"""list: conditions, order, columns, and forms for people and for programs."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from adaptlib.cli import filters
from adaptlib.cli.filters import FIELDS, choose, matches, parse_filter, parse_sort
from hypothesis import given
from hypothesis import strategies as st

from adaptlib.errors import UsageError
from adaptlib.experts import Expert, Library
from adaptlib.experts.records import save_record
from tests import tiny

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
PLAIN_FIELDS = ("name", "digest", "kind", "base", "task", "rank", "modules", "params", "bytes")


# --- what a filter means --------------------------------------------------------------------

TEXTS = st.text("abAB-_/.% é", max_size=6)
COUNTS = st.integers(0, 40)
ROWS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["sql", "sql:v1", "team/sql", "poems", "poems:old"]),
        "kind": st.sampled_from(["lora", "sparse"]),
        "base": TEXTS,
        "task": st.none() | TEXTS,
        "description": st.none() | TEXTS,
        "rank": st.none() | COUNTS,
        "modules": COUNTS,
        "params": COUNTS,
        "bytes": COUNTS,
        "digest": st.text("0123456789abcdef", min_size=64, max_size=64).map("sha256:".__add__),
        "added": st.none() | st.integers(0, 90).map(lambda days: NOW - timedelta(days=days)),
        "cluster": st.lists(st.sampled_from(["a:0", "a:1", "b:0"]), max_size=2).map(tuple),
    }
).map(lambda row: row | {"tag": row["name"].partition(":")[2] or "latest"})
ORDER: dict[str, Callable[[Any, Any], bool]] = {
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
}


def holds(row: filters.Row, text: str) -> bool:
    return matches(row, parse_filter(text), now=NOW)


@given(
    ROWS,
    st.sampled_from(["rank", "modules", "params", "bytes"]),
    st.sampled_from(sorted(ORDER)),
    COUNTS,
)
def test_a_number_is_compared_as_python_does(row: Any, field: str, operator: str, n: int) -> None:
    has = row[field] is not None
    assert holds(row, f"{field}{operator}{n}") == (has and ORDER[operator](row[field], n))
    assert holds(row, f"{field} = {n}") == (row[field] == n)
    assert holds(row, f"{field}!={n}") == (row[field] != n)
    assert holds(row, f"{field}=") == (not has)


@given(ROWS, st.sampled_from(["base", "task", "description", "kind"]), TEXTS.filter(str.strip))
def test_text_is_equal_or_contained_whatever_its_case(row: Any, field: str, text: str) -> None:
    text, value = text.strip(), row[field]
    assert holds(row, f"{field}={text}") == (value is not None and value.lower() == text.lower())
    assert holds(row, f"{field}!={text}") != holds(row, f"{field}={text}")
    assert holds(row, f"{field}~{text}") == (value is not None and text.lower() in value.lower())


@given(ROWS, TEXTS, TEXTS)
def test_a_star_stands_for_anything(row: Any, head: str, tail: str) -> None:
    head, tail = head.strip(), tail.strip()
    value = row["base"].lower()
    obvious = (
        value.startswith(head.lower())
        and value.endswith(tail.lower())
        and len(value) >= len(head) + len(tail)
    )
    assert holds(row, f"base={head}*{tail}") == obvious


@given(ROWS, st.sampled_from(sorted(ORDER)), st.integers(0, 12), st.sampled_from("dw"))
def test_an_age_is_how_long_ago(row: Any, operator: str, n: int, unit: str) -> None:
    days = n * (7 if unit == "w" else 1)
    has = row["added"] is not None
    age = NOW - row["added"] if has else timedelta()
    assert holds(row, f"added{operator}{n}{unit}") == (
        has and ORDER[operator](age, timedelta(days=days))
    )


@given(
    st.lists(ROWS, max_size=8),
    st.lists(
        st.sampled_from([("rank", True), ("bytes", False), ("name", True), ("added", False)]),
        max_size=3,
        unique_by=lambda key: key[0],
    ),
    st.none() | st.integers(0, 9),
)
def test_sorting_is_stable_and_puts_what_has_no_value_last(
    rows: list[Any], keys: list[tuple[str, bool]], limit: int | None
) -> None:
    words = [f"{field}:desc" if falling else field for field, falling in keys]
    chosen = choose(rows, (), parse_sort(words), None, now=NOW)
    expected = list(rows)
    for field, falling in reversed(keys):
        have = [row for row in expected if row[field] is not None]
        have.sort(key=lambda row: row[field], reverse=falling)
        expected = have + [row for row in expected if row[field] is None]
    assert chosen == expected
    assert choose(rows, (), parse_sort(words), limit, now=NOW) == expected[:limit]


@given(
    st.lists(ROWS, max_size=8),
    st.lists(
        st.sampled_from(["rank>=9", "kind=lora", "task!=", "bytes<20", "added>9d", "cluster=a:0"]),
        max_size=4,
    ),
)
def test_all_filters_must_hold(rows: list[Any], texts: list[str]) -> None:
    chosen = choose(rows, [parse_filter(text) for text in texts], now=NOW)
    assert chosen == [row for row in rows if all(holds(row, text) for text in texts)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("bytes>10MB", 10_000_000), ("size>1.5GB", 1_500_000_000), ("bytes<2KiB", 2048),
        ("bytes = 7 b", 7), ("bytes>=3k", 3000), ("params>1.5M", 1_500_000), ("rank==16", 16),
        ("params>2b", 2_000_000_000), ("added>90m", 5400), ("added<2h", 7200),
        ("added>=30d", 2_592_000), ("added<=1y", 31_536_000), ("digest=SHA256:AB", "ab"),
        ("TASK~ Sea ", "sea"), ("task=", None), ("rank!=", None), ("task=a=b", "a=b"),
    ],
)  # fmt: skip
def test_values_have_units(text: str, value: Any) -> None:
    assert parse_filter(text).value == value


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("rnak>=16", "no field 'rnak'; did you mean rank?", "fields: name, tag"),
        ("nothinglikeit=1", "no field 'nothinglikeit'", "fields: name, tag"),
        ("rank", "not FIELD OPERATOR VALUE", "operators: = != > >= < <= ~"),
        ("", "not FIELD OPERATOR VALUE", "fields:"),
        (">=16", "not FIELD OPERATOR VALUE", "fields:"),
        ("name>3", "name is not compared with >", "operators of name: = != ~"),
        ("rank~3", "rank is not compared with ~", "operators of rank: = != > >= < <="),
        ("added=3d", "added is not compared with =", "older than 30 days"),
        ("rank>=many", "'many' is not a number", "such as 16 or 1.5M"),
        ("rank>=-1", "'-1' is not a number", "such as"),
        ("rank>=nan", "'nan' is not a number", "such as"),
        ("bytes>3q", "'3q' is not a size", "500kB"),
        ("added>3", "'3' is not an age", "30d"),
        ("added>3x", "'3x' is not an age", "30d"),
        ("digest=xyz", "'xyz' is not the first digits of a digest", "first digits"),
        ("rank>=", "has no value", "a number"),
        ("task~", "has no value", "text"),
    ],
)
def test_a_bad_filter_says_what_there_is(text: str, says: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_filter(text)
    assert says in str(caught.value)
    assert repr(text) in str(caught.value) or not text
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_a_name_is_each_of_its_tags_unless_one_is_said() -> None:
    rows = [
        {"name": "sql", "tag": "latest"},
        {"name": "sql:v1", "tag": "v1"},
        {"name": "team/sql:v1", "tag": "v1"},
    ]

    def names(text: str) -> list[Any]:
        return [row["name"] for row in rows if holds(row, text)]

    assert names("name=sql") == ["sql", "sql:v1"]
    assert names("name=SQL:latest") == ["sql"]
    assert names("name=*sql:v1") == ["sql:v1", "team/sql:v1"]
    assert names("name=team/*") == ["team/sql:v1"]
    assert names("name!=sql") == ["team/sql:v1"]
    assert names("tag=v1") == ["sql:v1", "team/sql:v1"]


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Library:
    """Six experts of two ranks, two kinds and two bases."""
    library = Library.open(tmp_path / "library", create=True)
    for i in range(4):
        base = "org/one" if i < 2 else "org/two"
        task = "poems of the Sea" if i % 2 else None
        deltas: dict[str, Any] = {"layers.0.proj": tiny.lora(i, rank=2 + 2 * (i % 2))}
        library.add(Expert(base, deltas, {"task": task}), f"e{i}")
    library.add(tiny.make_expert(9, kind="sparse", base="org/one"), "few")
    library.add(tiny.make_expert(8), "team/sql:v1")
    library.tag("e1", "team/sql:v2")
    return library


def names(result: Any) -> list[str]:
    assert (result.code, result.err) == (0, "")
    return result.out.split()


def test_filters_choose_names_for_other_commands(run: Any, many: Library) -> None:
    assert names(run("list", "-q", "--filter", "rank>=4")) == ["e1", "e3", "team/sql:v2"]
    found = names(run("ls", "-q", "--filter", "rank>=4", "--filter", "base=ORG/o*"))
    assert found == ["e1", "team/sql:v2"]
    assert names(run("list", "-q", "--filter", "rank=")) == ["few"]
    assert names(
        run("list", "-q", "--filter", "task~sea", "--sort", "name:desc", "--limit", 1)
    ) == ["team/sql:v2"]
    digest = many.digest("e0")[7:16]
    assert names(run("list", "-q", "--filter", f"digest={digest}")) == ["e0"]
    removed = run("rm", *names(run("list", "-q", "--filter", "base=org/two")))
    assert removed.code == 0
    assert "e2" not in many.names()


def test_every_tag_is_listed_for_who_asks(run: Any, many: Library) -> None:
    many.tag("e0", "e0:old")
    shown = run("list", "--all-tags", "--filter", "name=e0", "--fields", "name,tag", "--plain")
    assert shown.out == "name\ttag\ne0\tlatest\ne0:old\told\n"
    assert names(run("list", "-a", "-q", "--filter", "tag=v1")) == ["team/sql:v1"]
    assert "team/sql:v1" not in names(run("list", "-q"))


def test_json_has_its_keys_or_those_that_are_asked_for(run: Any, many: Library) -> None:
    document = run("list", "--json").document
    assert document["schema"] == "adaptlib.list/1"
    assert [tuple(one) for one in document["experts"]] == [PLAIN_FIELDS] * 6
    document = run(
        "list", "--json", "--fields", "size, added", "--fields=tag", "--limit=1"
    ).document
    assert document["schema"] == "adaptlib.list-fields/1"
    [one] = document["experts"]
    assert list(one) == ["bytes", "added", "tag"]
    assert abs(datetime.fromisoformat(one["added"]) - datetime.now(UTC)) < timedelta(minutes=5)


def test_plain_is_one_line_for_each_with_the_bytes_of_each_value(run: Any, tmp_path: Path) -> None:
    library = Library.open(tmp_path / "library", create=True)
    library.add(tiny.make_expert(0, task="a\tb\nc\\d", description="é" * 90), "odd")
    library.add(tiny.make_expert(1), "none")
    result = run("list", "--plain", "--fields", "name,task,description,rank,digest")
    lines = result.out.split("\n")
    assert lines[0] == "name\ttask\tdescription\trank\tdigest"
    assert lines[1] == f"none\t\t\t2\t{library.digest('none')}"
    assert lines[2] == f"odd\ta\\tb\\nc\\\\d\t{'é' * 90}\t2\t{library.digest('odd')}"
    assert lines[3:] == [""]
    assert run("list", "--plain").out.split("\n")[0].split("\t") == list(PLAIN_FIELDS)
    both = run("list", "--plain", "--json")
    assert both.code == 2
    assert "two forms" in both.err


def test_nothing_is_cut_for_who_asks(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    library = Library.open(tmp_path / "library", create=True)
    name, base = "n" * 60, "org/" + "b" * 90
    library.add(tiny.make_expert(0, base=base), name)
    monkeypatch.setenv("COLUMNS", "80")
    cut = run("list").out
    assert "KIND" in cut
    assert "RANK" in cut
    assert "SIZE" in cut
    assert name not in cut
    assert base not in cut
    assert max(map(len, cut.splitlines())) <= 80
    whole = run("list", "--no-truncate").out
    assert all(text in whole for text in (name, base, library.digest(name)))


def test_ages_come_from_the_log_of_the_name(run: Any, many: Library, tmp_path: Path) -> None:
    log = tmp_path / "library" / "log" / "e2.jsonl"
    then = (datetime.now(UTC) - timedelta(days=40)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    entry = json.loads(log.read_text()) | {"when": then}
    log.write_text(json.dumps(entry) + "\n")
    assert names(run("list", "-q", "--filter", "added>30d")) == ["e2"]
    assert names(run("list", "-q", "--filter", "added<2h", "--filter", "name=e*")) == [
        "e0",
        "e1",
        "e3",
    ]
    assert names(run("list", "-q", "--sort", "added", "--limit", 1)) == ["e2"]
    assert "40 days ago" in run("list", "--fields", "name,added").out
    log.unlink()
    assert names(run("list", "-q", "--filter", "added>30d")) == []
    assert names(run("list", "-q", "--sort", "added:desc"))[-1] == "e2"


def test_logs_are_read_only_for_who_asks(run: Any, many: Library, monkeypatch: Any) -> None:
    from library_store import LocalStore

    def fail(*_: object) -> None:
        raise AssertionError("a log was read")

    monkeypatch.setattr(LocalStore, "log", fail)
    assert run("list", "--filter", "rank>=2", "--sort", "bytes", "--json").code == 0
    assert run("list", "--sort", "added").code == 1


def test_clusters_are_fields(run: Any, many: Library) -> None:
    def save(name: str, clusters: dict[str, list[str]]) -> None:
        held = {one: many.digest(one) for group in clusters.values() for one in group}
        made = {"schema": "adaptlib.clustering/1", "method": "mbc", "k": 2, "features": "sketches"}
        document = {**made, "clusters": clusters, "experts": held}
        save_record(many.store, "clusterings", name, document)

    none = run("list", "--filter", "cluster=0")
    assert none.code == 2
    assert "no clustering is saved" in none.err
    save("mine", {"0": ["e0", "e1"], "1": ["few"]})
    many.rename("e0", "renamed")
    assert names(run("list", "-q", "--filter", "cluster=0")) == ["e1", "renamed", "team/sql:v2"]
    assert names(run("list", "-q", "--filter", "cluster=mine:1")) == ["few"]
    assert names(run("list", "-q", "--filter", "cluster=")) == ["e2", "e3"]
    save("other", {"0": ["e2"]})
    unclear = run("list", "--filter", "cluster=0")
    assert unclear.code == 2
    assert "mine or other" in unclear.err
    assert names(run("list", "-q", "--filter", "cluster=other:0")) == ["e2"]
    absent = run("list", "--filter", "cluster=othr:0")
    assert absent.code == 2
    assert "there are: mine, other" in absent.err
    found = run("list", "--json", "--fields", "name,cluster", "--filter", "name=few").document
    assert found["experts"] == [{"name": "few", "cluster": ["mine:1"]}]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--filter", "rnak>1"], "did you mean rank?"),
        (["--sort", "siez"], "did you mean size?"),
        (["--sort", "size:down"], "'down' is not a direction"),
        (["--fields", "name,digst"], "did you mean digest?"),
        (["--limit", "-1"], "--limit"),
    ],
)
def test_bad_words_are_usage(run: Any, library: Library, words: list[str], says: str) -> None:
    result = run("list", *words)
    assert (result.code, result.out) == (2, "")
    assert says in result.err


def test_none_is_said(run: Any, library: Library) -> None:
    result = run("list", "--filter", "rank>99")
    assert (result.code, result.out) == (0, "")
    assert "None of 4 experts" in result.err
    assert run("list", "--filter", "rank>99", "--json").document["experts"] == []
    assert "2 experts of 4" in run("list", "--limit", 2).err


def test_the_words_of_filters_are_for_completion() -> None:
    assert set(FIELDS.values()) == set(filters.OPERATORS)
    assert all(field in filters.GRAMMAR for field in FIELDS)


# --- other tables for programs -----------------------------------------------------------------


def table(result: Any, code: int = 0) -> list[dict[str, str]]:
    assert (result.code, result.err) == (code, "")
    heading, *lines = (line.split("\t") for line in result.out.splitlines())
    return [dict(zip(heading, line, strict=True)) for line in lines]


def test_tables_say_what_the_documents_say(run: Any, library: Library, tmp_path: Path) -> None:
    library.tag("poems", "poems:v1")
    moves = run("log", "poems", "--json").document["entries"]
    shown = table(run("log", "poems", "--plain"))
    assert shown == [{key: move[key] or "" for key in shown[0]} for move in moves]
    modules = run("diff", "poems", "team/sql:v1", "--json").document["modules"]
    shown = table(run("diff", "poems", "team/sql:v1", "--plain"))
    assert [float(one["cosine"]) for one in shown] == [one["cosine"] for one in modules]
    library.pin("poems", "kept")
    digest = library.digest("poems")
    assert table(run("pin", "--plain")) == [{"label": "kept", "digest": digest}]
    assert table(run("pin", "sums", "--label", "s", "--plain"))[0]["label"] == "s"
    assert table(run("verify", "--plain")) == []
    damaged = next((tmp_path / "library" / "objects").rglob("*/*/*"))
    damaged.chmod(0o644)
    damaged.write_bytes(b"nothing")
    problems = run("verify", "--json").document["problems"]
    shown = table(run("verify", "--plain"), code=4)
    assert [(one["kind"], one["digest"]) for one in shown] == [
        (one["kind"], one["digest"] or "") for one in problems
    ]


def test_clusters_as_tables(run: Any, library: Library) -> None:
    options = ("--k", "2", "--seed", "1", "--save", "mine")
    clusters = run("cluster", *options, "--json").document["clusters"]
    shown = table(run("cluster", "--k", "2", "--seed", "1", "--plain"))
    assert shown == [
        {"name": name, "cluster": label} for label, names in clusters.items() for name in names
    ]
    assert table(run("cluster", "--duplicates", "--plain"))[:2] == [
        {"group": "1", "name": "best"},
        {"group": "1", "name": "poems"},
    ]
    assert table(run("cluster", "--diff", "mine", "now", "--plain")) == []
    assert table(run("cluster", "--assign", "mine", "--plain")) == []


@pytest.mark.parametrize(
    "line", ["log poems", "diff poems sums", "verify", "pin", "cluster", "doctor", "config", "list"]
)
def test_two_forms_at_once_are_usage(run: Any, library: Library, line: str) -> None:
    result = run(*line.split(), "--plain", "--json")
    assert (result.code, result.out) == (2, "")
    assert "two forms" in result.err
