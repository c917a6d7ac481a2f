"""Digests and refs are values that are safe as paths."""

import contextlib
import re
import string
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import library_store
from library_store import Digest, InvalidDigest, InvalidName, LogEntry, Ref, StoreError, errors
from library_store.records import decode_log, encode_entry

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
WORDS = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
ROUGH = st.text(alphabet=string.ascii_letters + string.digits + "/:._-\\ \0\n~", max_size=40)


@st.composite
def refs(draw: st.DrawFn) -> Ref:
    """Valid refs, mostly of legal words; the few illegal ones are drawn again."""
    name = "/".join(draw(st.lists(WORDS, min_size=1, max_size=8)))
    tag = draw(st.just("latest") | WORDS)
    try:
        return Ref(name, tag)
    except InvalidName:
        return Ref("fallback", "tag")


# --- digests ---


def test_a_digest_is_written_one_way():
    digest = Digest.of(b"abc")
    assert digest == Digest(ABC) == Digest.parse(f"sha256:{ABC}")
    assert str(digest) == f"sha256:{ABC}"
    assert digest.short == ABC[:12]
    assert Digest("0" * 64) < digest < Digest("f" * 64)
    assert len({digest, Digest(ABC)}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        ABC,
        f"sha256-{ABC}",
        f"SHA256:{ABC}",
        f"sha256:{ABC.upper()}",
        f"sha256:{ABC}\n",
        f" sha256:{ABC}",
        f"sha256:{ABC}0",
        f"sha256:{ABC[1:]}",
        f"sha256:{'../' * 21}a",
        "sha256:" + "\N{ARABIC-INDIC DIGIT ONE}" * 64,
        f"md5:{ABC}",
    ],
)
def test_what_is_no_digest(text):
    with pytest.raises(InvalidDigest, match="sha256:<64"):
        Digest.parse(text)


@pytest.mark.parametrize("text", ["", ABC.upper(), ABC + "\n", "../../etc/passwd", None, b"a" * 64])
def test_what_is_no_hex(text):
    with pytest.raises(InvalidDigest, match="64"):
        Digest(text)


@given(st.text() | ROUGH)
def test_no_text_becomes_a_digest_that_is_not_hex(text):
    try:
        digest = Digest.parse(text)
    except InvalidDigest:
        return
    assert re.fullmatch("[0-9a-f]{64}", digest.hex)


# --- refs ---


def test_latest_goes_without_saying():
    assert str(Ref("sql")) == str(Ref.parse("sql:latest")) == "sql"
    assert str(Ref("team/sql", "v2")) == "team/sql:v2"
    assert Ref.parse("team/sql:v2") == Ref("team/sql", "v2")
    assert Ref("team/sql", "v2").parts == ("team", "sql", "v2")
    assert Ref("a") < Ref("a", "z") < Ref("b", "a")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        (":", "empty"),
        ("sql:", "tag '' is empty"),
        (":v2", "name '' is empty"),
        ("a//b", "'a//b': empty part"),
        ("/a", "'/a': empty part"),
        ("a/", "'a/': empty part"),
        ("..", "'..'"),
        ("../a", "part '..' of name '../a'"),
        ("a/../b", "part '..'"),
        ("a..b", "'a..b' has '..'"),
        ("a.", "ends in a dot"),
        (".a", "'.a'"),
        ("-a", "'-a'"),
        ("SQL", "name 'SQL'"),
        ("team/Sql", "part 'Sql' of name 'team/Sql'"),
        ("a b", "'a b'"),
        ("a\n", r"'a\\n'"),
        ("a\0", r"'a\\x00'"),
        ("a\\b", "not a ref"),
        ("c:/x", "not a ref"),
        ("a:b:c", "tag 'b:c'"),
        ("é", "'é'"),
        ("\N{ARABIC-INDIC DIGIT ONE}", "not a ref"),
        ("x" * 65, "1 to 64"),
        ("a/" * 8 + "a", "9 parts"),
        ("/".join(["x" * 60] * 4), "248|251|250|long"),
        ("con", "Windows"),
        ("team/nul.txt", "part 'nul.txt'"),
        ("a:com1", "tag 'com1'"),
        ("a.lock", "lock"),
        ("a:b.tmp", "tmp"),
        ("a.jsonl/b", "jsonl"),
        ("sha256", "digest"),
        (f"sha256:{ABC}", "digest"),
    ],
)
def test_what_is_no_ref(text, part):
    with pytest.raises(InvalidName, match=part) as error:
        Ref.parse(text)
    assert "name[:tag]" in str(error.value.hint)


def test_a_ref_is_made_of_text():
    with pytest.raises(InvalidName, match="NoneType"):
        Ref(None)  # pyright: ignore[reportArgumentType]


@given(refs())
def test_a_ref_survives_being_written(ref):
    assert Ref.parse(str(ref)) == ref


@given(st.text() | ROUGH)
@example("../../etc/passwd")
@example("c:/windows")
@example("\\\\server\\share")
def test_no_text_becomes_a_path_outside_the_store(text):
    try:
        ref = Ref.parse(text)
    except InvalidName:
        return
    root = Path("/library/refs")
    path = root.joinpath(*ref.parts)
    assert Path(*path.parts).resolve() == path  # no `..`, no empty part
    assert path.is_relative_to(root)
    assert len(path.parts) == len(root.parts) + len(ref.parts)
    for part in ref.parts:
        assert part == part.lower() == PurePosixPath(part).name == PureWindowsPath(part).name
    assert Ref.parse(str(ref)) == ref


# --- log lines ---


@given(refs(), st.text(), st.none() | st.binary().map(Digest.of))
def test_a_log_entry_survives_being_written(ref, reason, old):
    entry = LogEntry(ref, "2026-01-31T12:00:00.000000Z", old, Digest.of(b""), reason)
    line = encode_entry(entry)
    assert line.count(b"\n") == 1
    assert decode_log(line + line[:-1], source="log") == [entry]


@given(st.binary())
def test_no_bytes_break_the_log_reader(data):
    with contextlib.suppress(errors.RefCorrupt):
        decode_log(data + b"\n", source="log")


# --- errors ---


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = re.findall(r"^[├└]── (\w+)", errors.__doc__ or "", flags=re.MULTILINE)
    defined = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, StoreError) and value is not StoreError
    ]
    assert sorted(drawn) == sorted(defined)
    assert set(defined) <= set(library_store.__all__)


def test_every_error_may_carry_a_hint():
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, StoreError):
            assert value("what").hint is None
            assert (str(value("what", hint="next")), value("what", hint="next").hint) == (
                "what",
                "next",
            )
