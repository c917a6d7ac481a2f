"""A listing says what reading every ref says, whatever it was told of an earlier look."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library_store import LocalStore, Ref, RefCorrupt, _files, _listing, _process

REFS = [Ref(name, tag) for name in ("a", "b/c", "b/d", "e") for tag in ("latest", "v1", "v2")]


def truth(store: LocalStore) -> dict[tuple[str, str], str]:
    return {(ref.name, ref.tag): digest.hex for ref, digest in store.refs().items()}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read."""
    found: list[Path] = []
    read = _files.read

    def counted(path: Path, **options: int) -> bytes:
        found.append(path)
        return read(path, **options)

    monkeypatch.setattr(_files, "read", counted)
    return found


@pytest.fixture
def full(local: LocalStore) -> LocalStore:
    for number, ref in enumerate(REFS):
        local.move(ref, local.put(bytes([number])), expect=None)
    return local


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time pass that makes what was written settled."""
    later = time.time() + 60
    monkeypatch.setattr(_process, "clock", lambda: later)


def test_what_did_not_change_is_not_read_again(full, reads, monkeypatch):
    settle(monkeypatch)
    listed, seen = full.listing()
    assert listed == truth(full)
    assert len(reads) == 2 * len(REFS)
    reads.clear()
    kept = json.loads(json.dumps(seen))
    again, same = full.listing(kept)
    assert again == listed
    assert same is kept  # nothing new to keep
    assert reads == []


def test_only_what_changed_is_read(full, reads, monkeypatch):
    settle(monkeypatch)
    _, seen = full.listing()
    ref = REFS[4]
    new = full.put(b"new")
    full.move(ref, new, expect=full.ref(ref))
    reads.clear()
    listed, now = full.listing(seen)
    assert reads == [full.root / "refs" / ref.name / ref.tag]
    assert listed[ref.name, ref.tag] == new.hex
    assert now is not seen
    assert listed == truth(full)


def test_what_changed_a_moment_ago_is_never_taken_from_the_last_look(full, reads):
    """Two writes within one tick of the file system's clock look the same."""
    _, seen = full.listing()
    assert seen == {}
    reads.clear()
    full.listing(seen)
    assert len(reads) == len(REFS)


def test_a_ref_that_was_written_in_place_with_its_time_put_back(full, monkeypatch):
    settle(monkeypatch)
    _, seen = full.listing()
    ref = REFS[0]
    path = full.root / "refs" / ref.name / ref.tag
    before = path.stat()
    new = full.put(b"by hand")
    path.write_text(f"{new}\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    listed, _ = full.listing(seen)  # the time of the inode tells it
    assert listed == truth(full)
    assert listed[ref.name, ref.tag] == new.hex


@pytest.mark.parametrize("told", [{}, {"": [[1, 2, 3, 4], ["gone"], {}]}], ids=["empty", "wrong"])
def test_what_is_told_wrong_is_looked_at_anew(full, told):
    assert full.listing(told)[0] == truth(full)


def test_a_ref_that_cannot_be_read_is_not_left_out(full, monkeypatch):
    settle(monkeypatch)
    _, seen = full.listing()
    (full.root / "refs" / "e" / "v1").write_text("sha256:nonsense\n")
    for told in (None, seen):
        with pytest.raises(RefCorrupt):
            full.listing(told)


def test_what_is_no_ref_is_passed_over_or_refused_as_refs_does(full):
    (full.root / "refs" / ".DS_Store").write_bytes(b"")
    (full.root / "refs" / "e" / "UPPER").write_bytes(b"")
    assert full.listing()[0] == truth(full)
    (full.root / "refs" / "link").symlink_to("/")
    with pytest.raises(RefCorrupt):
        full.listing()


def test_a_directory_that_vanishes_during_the_look(full, monkeypatch):
    stamp = _listing._files.stamp

    def vanishing(path):
        if path.endswith("/e/v1"):
            raise FileNotFoundError(path)
        return stamp(path)

    monkeypatch.setattr(_files, "stamp", vanishing)
    assert full.listing()[0] == truth(full)


MOVES = st.lists(
    st.tuples(st.sampled_from(REFS), st.none() | st.integers(0, 3), st.booleans()), max_size=12
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(moves=MOVES)
def test_listing_is_refs_after_any_moves(tmp_path_factory, moves):
    """The clock goes a minute ahead of the files, so that all is settled and what is told counts;
    inodes may be used again and times be equal to the tick."""
    store = LocalStore.create(tmp_path_factory.mktemp("store") / "library")
    digests = [store.put(bytes([n])) for n in range(4)]
    seen = None
    with pytest.MonkeyPatch.context() as patch:
        for ref, new, look in moves:
            old = store.refs().get(ref)
            store.move(ref, None if new is None else digests[new], expect=old)
            if look:
                listed, seen = store.listing(seen)
                assert listed == truth(store)
        later = time.time() + 60
        patch.setattr(_process, "clock", lambda: later)
        listed, seen = store.listing(seen)
        assert listed == truth(store)
        assert store.listing(seen)[1] is seen
