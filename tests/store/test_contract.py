"""Every store keeps the same promises about objects and refs."""

import hashlib
import re
from datetime import UTC, datetime, timedelta

import pytest

from library_store import (
    AmbiguousDigest,
    Digest,
    InvalidDigest,
    InvalidName,
    LogEntry,
    ObjectNotFound,
    Ref,
    RefConflict,
    RefNotFound,
)

ABSENT = Digest.of(b"never put")
SQL = Ref("sql")


# --- objects ---


@pytest.mark.parametrize("data", [b"", b"abc", bytes(3_000_000)])
def test_put_returns_the_sha256_and_get_the_bytes(store, data):
    digest = store.put(data)
    assert digest.hex == hashlib.sha256(data).hexdigest()
    assert store.get(digest) == data
    assert store.size(digest) == len(data)
    assert digest in store


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytearray(b"abc"),
        lambda: memoryview(b"abc"),
        lambda: [b"a", memoryview(b"bc")],
        lambda: iter([b"", b"ab", b"c"]),
    ],
    ids=["bytearray", "memoryview", "list", "iterator"],
)
def test_put_takes_bytes_in_any_shape(store, make):
    assert store.put(make()) == Digest.of(b"abc")
    assert store.get(Digest.of(b"abc")) == b"abc"


def test_put_is_idempotent(store):
    assert store.put(b"abc") == store.put(b"abc") == store.put([b"abc"])
    assert list(store.objects()) == [Digest.of(b"abc")]


def test_later_changes_to_what_was_put_do_not_reach_the_store(store):
    data = bytearray(b"abc")
    digest = store.put(data)
    data[0] = 0
    assert store.get(digest) == b"abc"


def test_a_source_that_fails_leaves_nothing(store):
    def source():
        yield b"half"
        raise RuntimeError("the network went away")

    with pytest.raises(RuntimeError, match="went away"):
        store.put(source())
    assert list(store.objects()) == []


def test_text_is_not_bytes(store):
    with pytest.raises(TypeError):
        store.put("abc")
    assert list(store.objects()) == []


def test_a_missing_object(store):
    for ask in (store.get, store.view, store.size, store.quarantine):
        with pytest.raises(ObjectNotFound, match=ABSENT.short):
            ask(ABSENT)
    assert ABSENT not in store


@pytest.mark.parametrize("data", [b"", b"abc", bytes(2_000_001)])
@pytest.mark.parametrize("verify", [True, False])
def test_view_gives_the_bytes(store, data, verify):
    assert store.view(store.put(data), verify=verify) == data


def test_writing_to_a_view_changes_nobody_elses_bytes(store):
    digest = store.put(b"abc")
    view = store.view(digest)
    assert not view.readonly  # what torch.frombuffer asks for
    view[0] = 0
    assert bytes(view) == b"\0bc"
    assert store.get(digest) == b"abc"
    assert store.view(digest) == b"abc"


def test_objects_come_in_order(store):
    digests = {store.put(bytes([n])) for n in range(20)}
    assert list(store.objects()) == sorted(digests)


def test_an_intact_object_is_not_quarantined(store):
    digest = store.put(b"abc")
    store.quarantine(digest)
    assert store.get(digest) == b"abc"


# --- digests by prefix ---


@pytest.mark.parametrize("length", [7, 12, 63, 64])
@pytest.mark.parametrize("lead", ["", "sha256:"])
def test_a_unique_prefix_resolves(store, lead, length):
    digest = store.put(b"abc")
    assert store.resolve(lead + digest.hex[:length]) == digest


@pytest.mark.parametrize(
    "text", ["", "abc", "ba7816", "BA7816BF", "sha256:", "../../etc", "f" * 65]
)
def test_what_is_no_prefix(store, text):
    with pytest.raises(InvalidDigest, match="7 to 64"):
        store.resolve(text)


def test_a_prefix_of_nothing(store):
    store.put(b"abc")
    with pytest.raises(ObjectNotFound, match="0000000"):
        store.resolve("0000000")


def test_an_ambiguous_prefix_lists_its_candidates(store):
    seen = {}
    for n in range(1_000_000):
        data = str(n).encode()
        other = seen.setdefault(Digest.of(data).hex[:7], data)
        if other != data:
            break
    pair = sorted([store.put(data), store.put(other)])
    with pytest.raises(AmbiguousDigest, match=pair[0].short) as error:
        store.resolve(pair[0].hex[:7])
    assert error.value.candidates == tuple(pair)
    assert store.resolve(pair[0].hex) == pair[0]


# --- refs ---


def test_a_ref_moves_only_from_where_it_is(store):
    one, two = store.put(b"1"), store.put(b"2")
    store.move(SQL, one, expect=None)
    for wrong in (None, two):
        with pytest.raises(RefConflict, match="sql"):
            store.move(SQL, two, expect=wrong)
    assert store.ref(SQL) == one
    store.move(SQL, two, expect=one)
    assert store.refs() == {SQL: two}
    store.move(SQL, None, expect=two)
    assert store.refs() == {}
    with pytest.raises(RefConflict):
        store.move(SQL, None, expect=two)


def test_a_missing_ref(store):
    with pytest.raises(RefNotFound, match="team/sql:v2"):
        store.ref(Ref("team/sql", "v2"))


def test_a_ref_points_to_something(store):
    with pytest.raises(ObjectNotFound, match=str(ABSENT)):
        store.move(SQL, ABSENT, expect=None)
    assert store.refs() == {}
    assert store.log("sql") == []


def test_refs_are_sorted(store):
    digest = store.put(b"1")
    names = ["b", "a:v2", "a", "a/b/c", "c/a", "a-b"]
    for name in names:
        store.move(Ref.parse(name), digest, expect=None)
    assert list(store.refs()) == sorted(map(Ref.parse, names))


@pytest.mark.parametrize(
    ("first", "second"), [("a:b", "a/b"), ("a/b", "a:b"), ("a:b", "a/b/c:d"), ("a/b/c:d", "a:b")]
)
def test_names_that_would_share_a_path_collide(store, first, second):
    digest = store.put(b"1")
    first, second = Ref.parse(first), Ref.parse(second)
    store.move(first, digest, expect=None)
    with pytest.raises(RefConflict, match="collides"):
        store.move(second, digest, expect=None)
    with pytest.raises(RefNotFound):
        store.ref(second)
    assert store.refs() == {first: digest}
    store.move(first, None, expect=digest)
    store.move(second, digest, expect=None)
    assert store.refs() == {second: digest}


def test_the_log_has_every_move_of_every_tag(store):
    one, two = store.put(b"1"), store.put(b"2")
    v2 = Ref("sql", "v2")
    before = datetime.now(UTC)
    store.move(SQL, one, expect=None, reason="added\n\N{SNOWMAN}")
    store.move(v2, two, expect=None)
    store.move(SQL, two, expect=one)
    store.move(SQL, None, expect=two, reason="rm")
    log = store.log("sql")
    assert [(entry.ref, entry.old, entry.new, entry.reason) for entry in log] == [
        (SQL, None, one, "added\n\N{SNOWMAN}"),
        (v2, None, two, ""),
        (SQL, one, two, ""),
        (SQL, two, None, "rm"),
    ]
    assert [entry.when for entry in log] == sorted(entry.when for entry in log)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entry.when) for entry in log)
    assert timedelta(0) <= log[0].time - before < timedelta(minutes=1)


def test_a_move_to_the_same_place_is_no_move(store):
    digest = store.put(b"1")
    store.move(SQL, None, expect=None)
    store.move(SQL, digest, expect=None)
    store.move(SQL, digest, expect=digest)
    assert [entry.new for entry in store.log("sql")] == [digest]


def test_logs_of_nested_names_are_apart(store):
    digest = store.put(b"1")
    store.move(Ref("a"), digest, expect=None, reason="a")
    store.move(Ref("a/b"), digest, expect=None, reason="a/b")
    assert [entry.reason for entry in store.log("a")] == ["a"]
    assert [entry.reason for entry in store.log("a/b")] == ["a/b"]
    assert store.log("b") == []


def test_the_log_of_no_name(store):
    with pytest.raises(InvalidName):
        store.log("../sql")


def test_values_are_frozen(store):
    entry = LogEntry(SQL, "2026-01-31T12:00:00.000000Z", None, ABSENT)
    for value, field in ((SQL, "name"), (ABSENT, "hex"), (entry, "reason")):
        with pytest.raises(AttributeError):
            setattr(value, field, "x")
