"""Collection removes what nothing needs, later rather than sooner, and nothing when in doubt."""

import os
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from library_store import (
    Digest,
    GcAborted,
    GcResult,
    LocalStore,
    ObjectNotFound,
    Ref,
    _collect,
    _files,
)

SQL = Ref("sql")
NOW = timedelta(0)


def place(store: LocalStore, digest: Digest) -> Path:
    return store.root / "objects/sha256" / digest.hex[:2] / digest.hex


def age(store: LocalStore, digest: Digest, seconds: float) -> None:
    then = datetime.now(UTC).timestamp() - seconds
    os.utime(place(store, digest), (then, then))


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file under `root`, with its time and bytes."""
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in root.rglob("*")
        if path.is_file()
    }


# --- what stays and what goes ---


def test_what_a_ref_reaches_stays_and_the_rest_goes(store, children, parent, later):
    blob, low = store.put(b"blob"), store.put(b"low")
    middle = store.put(parent(low))
    top = store.put(parent(blob, middle))
    store.move(SQL, top, expect=None)
    junk = store.put(b"junk!")
    result = store.gc(children, now=later)
    assert result == GcResult(result.id, (junk,), 5, 4)
    assert list(store.objects()) == sorted([blob, low, middle, top])
    assert store.verify(children).ok


def test_restore_puts_back(store, children, later):
    store.move(SQL, store.put(b"kept"), expect=None)
    junk = {store.put(bytes([n])) for n in range(5)}
    result = store.gc(children, now=later)
    assert set(result.removed) == junk
    assert result.id is not None
    assert store.restore(result.id) == 5
    assert junk <= set(store.objects())
    with pytest.raises(ObjectNotFound):
        store.restore(result.id)
    assert store.verify(children).ok


def test_what_was_restored_is_as_young_as_if_just_put(local, children):
    local.move(SQL, local.put(b"kept"), expect=None)
    junk = local.put(b"junk")
    age(local, junk, 100_000)
    result = local.gc(children)
    assert result.removed == (junk,)
    local.restore(result.id)
    assert local.gc(children).removed == ()


@pytest.mark.parametrize("gc_id", ["", "..", "../objects", "20260101T000000Z-00000000", "x/y"])
def test_restore_of_no_trash(store, gc_id):
    with pytest.raises(ObjectNotFound, match="no trash"):
        store.restore(gc_id)


def test_nothing_to_do_has_no_id(store, children, later):
    store.move(SQL, store.put(b"kept"), expect=None)
    assert store.gc(children, now=later) == GcResult(None, (), 0, 1)


def test_a_dry_run_says_the_same_and_does_nothing(store, children, later):
    store.move(SQL, store.put(b"kept"), expect=None)
    junk = store.put(b"junk!")
    dry = store.gc(children, now=later, dry_run=True)
    assert dry == GcResult(None, (junk,), 5, 1)
    assert junk in store
    wet = store.gc(children, now=later)
    assert (wet.removed, wet.bytes, wet.kept) == (dry.removed, dry.bytes, dry.kept)


def test_a_dry_run_changes_no_file(local, children, later):
    local.move(SQL, local.put(b"kept"), expect=None)
    local.put(b"junk")
    old = local.root / "tmp/old"
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    before = tree(local.root)
    local.gc(children, now=later, dry_run=True)
    assert tree(local.root) == before


def test_young_objects_stay(store, children):
    store.move(SQL, store.put(b"kept"), expect=None)
    junk = store.put(b"junk")
    assert store.gc(children).removed == ()
    assert store.gc(children, grace=NOW).removed == (junk,)


def test_a_young_object_protects_its_old_children(local, children, parent):
    local.move(SQL, local.put(b"kept"), expect=None)
    blob, junk = local.put(b"blob"), local.put(b"junk")
    young = local.put(parent(blob))
    for digest in (blob, junk):
        age(local, digest, 100_000)
    assert local.gc(children).removed == (junk,)
    assert young in local
    assert blob in local


def test_putting_again_makes_young(local, children):
    local.move(SQL, local.put(b"kept"), expect=None)
    for data in (b"junk", [b"junk"]):
        age(local, local.put(b"junk"), 100_000)
        digest = local.put(data)
        assert local.gc(children).removed == ()
        assert digest in local


def test_where_a_ref_was_within_two_weeks_stays(local, children, parent):
    blob = local.put(b"blob")
    old, new = local.put(parent(blob)), local.put(b"new")
    local.move(SQL, old, expect=None)
    local.move(SQL, new, expect=old)
    for digest in (blob, old, new):
        age(local, digest, 20 * 86_400)
    soon, later = (datetime.now(UTC) + timedelta(days=n) for n in (13, 15))
    assert local.gc(children).removed == local.gc(children, grace=NOW).removed == ()
    assert local.gc(children, grace=NOW, now=soon, dry_run=True).removed == ()
    assert set(local.gc(children, grace=NOW, now=later, dry_run=True).removed) == {old, blob}
    assert local.gc(children, grace=timedelta(days=16), now=later).removed == ()
    assert set(local.gc(children, grace=NOW, history=NOW).removed) == {old, blob}


def test_the_history_is_never_shorter_than_the_grace_period(local, children):
    old = local.put(b"old")
    local.move(SQL, old, expect=None)
    local.move(SQL, local.put(b"new"), expect=old)
    age(local, old, 100_000)
    assert local.gc(children, history=NOW).removed == ()
    assert local.gc(children, history=NOW, grace=NOW).removed == (old,)


def test_a_removed_ref_is_remembered_for_two_weeks(local, children):
    old = local.put(b"old")
    local.move(SQL, old, expect=None)
    local.move(SQL, None, expect=old)
    local.move(Ref("py"), local.put(b"kept"), expect=None)
    age(local, old, 100_000)
    assert local.gc(children, grace=NOW).removed == ()
    assert local.gc(children, grace=NOW, history=NOW).removed == (old,)
    # The log still tells of it, and that it is gone aborts nothing.
    assert local.gc(children).removed == ()


def test_parents_go_before_what_they_refer_to(store, children, parent, later):
    store.move(SQL, store.put(b"kept"), expect=None)
    chain = [store.put(b"bottom")]
    for _ in range(10):
        chain.append(store.put(parent(chain[-1], chain[0])))
    assert store.gc(children, now=later).removed == tuple(reversed(chain))


def test_big_objects_are_leaves_unless_a_ref_points_to_them(
    store, children, parent, later, monkeypatch
):
    monkeypatch.setattr(_collect, "PARENT_LIMIT", 200)
    asked = []

    def ask(digest, data):
        asked.append(len(data))
        return children(digest, data)

    many = [store.put(bytes([n])) for n in range(10)]
    top = store.put(parent(*many, store.put(bytes(1000))))
    store.move(SQL, top, expect=None)
    assert store.gc(ask, now=later).removed == ()
    assert 1000 not in asked
    assert max(asked) == store.size(top) > 200


def test_leaves_are_never_read_and_stay_with_what_refers_to_them(store, children, parent, later):
    """A manifest says which of its children is a blob. One that another object refers to as more
    than that is followed all the same."""
    low, blob = store.put(b"low"), store.put(b"blob" * 100)
    middle = store.put(parent(low, blob))
    top = store.put(parent(middle))
    liar = store.put(parent(middle, salt="says that it is a leaf"))
    for ref, digest in {"top": top, "liar": liar}.items():
        store.move(Ref(ref), digest, expect=None)
    gone = store.put(parent(store.put(b"junk" * 100)))
    said = {liar: {middle: 1}, middle: {blob: 400}, gone: {Digest.of(b"junk" * 100): 400}}
    asked = []

    def ask(digest, data):
        asked.append(digest)
        return children(digest, data)

    result = store.gc(ask, sizes=lambda digest, data: said.get(digest, {}), now=later)
    assert result.removed == (gone, Digest.of(b"junk" * 100))
    assert set(asked) == {top, liar, middle, low, gone}
    assert store.verify(children).ok


def test_a_leaf_that_is_gone_aborts(store, children, parent, later):
    lost = Digest.of(b"lost")
    store.move(SQL, store.put(parent(lost)), expect=None)
    with pytest.raises(GcAborted, match=lost.short):
        store.gc(children, sizes=lambda *_: {lost: 4}, now=later)


# --- closed when in doubt ---


def test_no_ref_at_all_is_suspicious(store, children, later):
    junk = store.put(b"junk")
    with pytest.raises(GcAborted, match="no ref") as error:
        store.gc(children, now=later)
    assert error.value.hint
    assert junk in store
    assert store.gc(children, now=later, allow_empty=True).removed == (junk,)
    assert store.gc(children, now=later).removed == ()


def test_objects_from_the_future(store, children):
    store.move(SQL, store.put(b"kept"), expect=None)
    past = datetime.now(UTC)
    store.gc(children, now=past - timedelta(minutes=4))
    with pytest.raises(GcAborted, match="future"):
        store.gc(children, now=past - timedelta(minutes=6), grace=NOW)


def test_a_missing_child_aborts(store, children, parent, later):
    store.move(SQL, store.put(parent(Digest.of(b"lost"))), expect=None)
    junk = store.put(b"junk")
    with pytest.raises(GcAborted, match=Digest.of(b"lost").short):
        store.gc(children, now=later)
    assert junk in store


def test_a_manifest_that_cannot_be_understood_aborts(store, children, later):
    store.move(SQL, store.put(b"parent\nnonsense"), expect=None)
    junk = store.put(b"junk")
    with pytest.raises(GcAborted, match="nonsense"):
        store.gc(children, now=later)
    assert junk in store


def bad_ref(root: Path) -> None:
    (root / "refs/sql/latest").write_text("sha256:123\n")


def directory_for_ref(root: Path) -> None:
    (root / "refs/py").symlink_to(root / "refs/sql")


def foreign_ref(root: Path) -> None:
    (root / "refs/sql/LATEST2").write_text("x")


def bad_log(root: Path) -> None:
    log = root / "log/sql.jsonl"
    log.write_bytes(b"{}\n" + log.read_bytes())


def directory_for_log(root: Path) -> None:
    (root / "log/sql.jsonl").unlink()
    (root / "log/sql.jsonl").mkdir()


def symlink_in_log(root: Path) -> None:
    (root / "log/team").symlink_to(root / "refs")


def lost_log_directory(root: Path) -> None:
    (root / "log").rename(root / "gone")


def lost_refs(root: Path) -> None:
    (root / "refs").rename(root / "gone")


def lost_objects(root: Path) -> None:
    (root / "objects/sha256").rename(root / "gone")


def kept(root: Path) -> Path:
    digest = Digest.parse((root / "refs/sql/latest").read_text().strip())
    return place(LocalStore(root), digest)


def lost_root(root: Path) -> None:
    kept(root).unlink()


def corrupt_root(root: Path) -> None:
    kept(root).chmod(0o644)
    kept(root).write_bytes(b"x")


def directory_for_root(root: Path) -> None:
    path = kept(root)
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        bad_ref,
        directory_for_ref,
        foreign_ref,
        bad_log,
        directory_for_log,
        symlink_in_log,
        lost_log_directory,
        lost_refs,
        lost_objects,
        lost_root,
        corrupt_root,
        directory_for_root,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_whatever_cannot_be_read_aborts_and_nothing_is_touched(local, children, later, spoil):
    local.move(SQL, local.put(b"kept"), expect=None)
    local.put(b"junk")
    spoil(local.root)
    before = tree(local.root)
    with pytest.raises(GcAborted, match="nothing was removed"):
        local.gc(children, now=later)
    assert tree(local.root) == before


def test_a_directory_that_the_disk_refuses_aborts(local, children, later, monkeypatch):
    local.move(SQL, local.put(b"kept"), expect=None)
    junk = local.put(b"junk")

    def refuse(path):
        if path.name == junk.hex[:2]:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    listed = _files.list_directory
    monkeypatch.setattr(_files, "list_directory", refuse)
    with pytest.raises(GcAborted, match="Permission denied"):
        local.gc(children, now=later)
    assert junk in local


# --- the trash and other leftovers ---


def test_the_trash_is_kept_for_seven_days(store, children, later):
    store.move(SQL, store.put(b"kept"), expect=None)
    junk = store.put(b"junk")
    first = store.gc(children, now=later).id
    store.gc(children, now=later + timedelta(days=6, hours=23))
    assert first is not None
    assert store.restore(first) == 1
    second = store.gc(children, now=later).id
    assert second is not None
    store.gc(children, now=later + timedelta(days=7, hours=1))
    with pytest.raises(ObjectNotFound):
        store.restore(second)
    assert junk not in store


def test_the_trash_is_readable_by_hand(local, children, later):
    local.move(SQL, local.put(b"kept"), expect=None)
    junk = local.put(b"junk")
    result = local.gc(children, now=later)
    assert (local.root / "trash" / result.id / junk.hex).read_bytes() == b"junk"


def test_restore_leaves_alone_what_was_put_since(local, children, later):
    local.move(SQL, local.put(b"kept"), expect=None)
    junk = local.put(b"junk")
    result = local.gc(children, now=later)
    local.put(b"junk")
    assert local.restore(result.id) == 1
    assert local.get(junk) == b"junk"
    assert list((local.root / "trash").iterdir()) == []


def test_unfinished_writes_are_removed_after_a_day(local, children):
    local.move(SQL, local.put(b"kept"), expect=None)
    old, new = local.root / "tmp/1-old", local.root / "tmp/1-new"
    for path, seconds in ((old, 90_000), (new, 80_000)):
        path.write_bytes(b"half")
        then = datetime.now(UTC).timestamp() - seconds
        os.utime(path, (then, then))
    local.gc(children)
    assert not old.exists()
    assert new.exists()


# --- while others are at work ---


def test_a_ref_that_moves_between_look_and_sweep_is_seen(store, children, later, monkeypatch):
    store.move(SQL, store.put(b"kept"), expect=None)
    late, junk = store.put(b"late"), store.put(b"junk")

    def somebody_first():
        monkeypatch.undo()
        store.move(Ref("late"), late, expect=None)
        return store._exclusive()

    monkeypatch.setattr(store, "_exclusive", somebody_first)
    assert store.gc(children, now=later).removed == (junk,)


def test_a_ref_that_moves_during_the_sweep_undoes_it(store, children, later, monkeypatch):
    store.move(SQL, store.put(b"kept"), expect=None)
    junk, more = store.put(b"junk"), store.put(b"more")
    sweep = store._sweep

    def race(victims, gc_id):
        store.move(SQL, junk, expect=Digest.of(b"kept"))
        return sweep(victims, gc_id)

    lies = nullcontext(SimpleNamespace(confirm=lambda: None))
    monkeypatch.setattr(store, "_exclusive", lambda: lies)
    monkeypatch.setattr(store, "_sweep", race)
    with pytest.raises(GcAborted, match="moved during the sweep"):
        store.gc(children, now=later)
    assert store.get(store.ref(SQL)) == b"junk"
    assert more in store


def test_a_move_to_an_object_that_is_swept_meanwhile_fails(local, children, later, monkeypatch):
    kept, junk = local.put(b"kept"), local.put(b"junk")
    local.move(SQL, kept, expect=None)
    lies = nullcontext(SimpleNamespace(confirm=lambda: None))
    write = local._refs.write

    def race(self, ref, digest):
        monkeypatch.undo()
        monkeypatch.setattr(local, "_exclusive", lambda: lies)
        local.gc(children, now=later)
        write(ref, digest)

    monkeypatch.setattr(local, "_exclusive", lambda: lies)
    monkeypatch.setattr(type(local._refs), "write", race)
    with pytest.raises(ObjectNotFound, match=junk.hex):
        local.move(SQL, junk, expect=kept)
    assert local.ref(SQL) == kept
    assert len(local.log("sql")) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_object_that_is_put_during_the_sweep_survives(
    local, children, parent, later, monkeypatch, when
):
    local.move(SQL, local.put(b"kept"), expect=None)
    blob = local.put(b"blob")
    top = local.put(parent(blob))
    for digest in (blob, top):
        age(local, digest, 1000)
    replace = _files.replace

    def race(source, target):
        if source.name == top.hex:
            monkeypatch.setattr(_files, "replace", replace)
            if when == "before":
                local.put(parent(blob))
            replace(source, target)
            if when == "after":
                local.put(parent(blob))
        else:
            replace(source, target)

    monkeypatch.setattr(_files, "replace", race)
    local.gc(children, now=later)
    assert local.get(top) == parent(blob)


def test_a_parent_that_was_put_again_saves_its_children(
    local, children, parent, later, monkeypatch
):
    local.move(SQL, local.put(b"kept"), expect=None)
    blob = local.put(b"blob")
    top = local.put(parent(blob))
    for digest in (blob, top):
        age(local, digest, 1000)
    purge = local._purge

    def race(now):
        local.put(parent(blob))
        purge(now)

    monkeypatch.setattr(local, "_purge", race)
    assert local.gc(children, now=later).removed == ()
    assert local.get(blob) == b"blob"
