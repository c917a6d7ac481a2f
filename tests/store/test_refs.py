"""Refs on disk: names, logs, and the lock that refs move under."""

import errno
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from library_store import (
    Digest,
    LocalStore,
    Ref,
    RefConflict,
    RefCorrupt,
    RefNotFound,
    StoreLocked,
    _files,
    _lock,
    _process,
)

SQL = Ref("sql")


@pytest.fixture
def one(local):
    return local.put(b"1")


def names(root: Path, top: str) -> list[str]:
    return sorted(str(path.relative_to(root / top)) for path in (root / top).rglob("*"))


# --- files ---


def test_removing_the_last_tag_removes_the_empty_directories(local, one):
    for text in ("a/b/c", "a/b/c:v2", "a/d"):
        local.move(Ref.parse(text), one, expect=None)
    local.move(Ref("a/b/c"), None, expect=one)
    assert names(local.root, "refs") == ["a", "a/b", "a/b/c", "a/b/c/v2", "a/d", "a/d/latest"]
    local.move(Ref("a/b/c", "v2"), None, expect=one)
    assert names(local.root, "refs") == ["a", "a/d", "a/d/latest"]
    local.move(Ref("a/d"), None, expect=one)
    assert names(local.root, "refs") == []


def test_a_directory_that_vanishes_is_made_again(local, one, monkeypatch):
    """Where the lock lies, another process may remove our directory while it is still empty."""
    replace = os.replace

    def race(source, target):
        monkeypatch.undo()
        Path(target).parent.rmdir()
        replace(source, target)

    monkeypatch.setattr(os, "replace", race)
    local.move(SQL, one, expect=None)
    assert local.ref(SQL) == one


def test_a_directory_that_vanishes_and_is_back_is_no_damage(local, one, monkeypatch):
    local.move(SQL, one, expect=None)
    local.move(Ref("py"), one, expect=None)
    listed = _files.list_directory

    def gone(path):
        if path.name == "sql":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return listed(path)

    monkeypatch.setattr(_files, "list_directory", gone)
    assert local.refs() == {Ref("py"): one}


def test_a_name_that_becomes_a_tag_while_it_is_listed_is_no_damage(local, one, monkeypatch):
    local.move(Ref("a/b", "c"), one, expect=None)
    listed = _files.list_directory

    def moved(path):
        if path.name == "b":
            monkeypatch.setattr(_files, "list_directory", listed)
            local.move(Ref("a/b", "c"), None, expect=one)
            local.move(Ref("a", "b"), one, expect=None)
        return listed(path)

    monkeypatch.setattr(_files, "list_directory", moved)
    assert local.refs() == {Ref("a", "b"): one}


def test_empty_directories_of_a_crash_hold_no_name(local, one):
    (local.root / "refs/a/b/c").mkdir(parents=True)
    local.move(Ref("a", "b"), one, expect=None)
    assert local.refs() == {Ref("a", "b"): one}


def test_a_collision_leaves_nothing_behind(local, one):
    local.move(Ref("a", "b"), one, expect=None)
    before = names(local.root, ".")
    for other in (Ref("a/b"), Ref("a/b/c/d")):
        with pytest.raises(RefConflict, match=r"a:b") as error:
            local.move(other, one, expect=None)
        assert error.value.hint
    assert names(local.root, ".") == before


def test_what_another_name_leaves_no_place_for_may_stay_absent(local, one):
    local.move(Ref("c", "d"), one, expect=None)
    local.move(Ref("c/d", "e"), None, expect=None)
    assert local.refs() == {Ref("c", "d"): one}


@pytest.mark.parametrize(
    "data",
    [b"", b"sha256:", b"x" * 72, b"sha256:" + b"A" * 64 + b"\n", b"\xff" * 72, b"1" * 10**6],
)
def test_a_damaged_ref_is_never_taken_for_an_absent_one(local, one, data):
    local.move(SQL, one, expect=None)
    (local.root / "refs/sql/latest").write_bytes(data)
    for read in (lambda: local.ref(SQL), local.refs, lambda: local.move(SQL, one, expect=None)):
        with pytest.raises(RefCorrupt, match="sql") as error:
            read()
        assert "log/sql.jsonl" in str(error.value.hint)


def test_a_ref_without_its_newline_is_damaged(local, one):
    local.move(SQL, one, expect=None)
    (local.root / "refs/sql/latest").write_text(str(one))
    with pytest.raises(RefCorrupt):
        local.ref(SQL)


@pytest.mark.parametrize("target", ["file", "directory", "nothing"])
def test_a_symlink_is_no_ref(local, one, tmp_path, target):
    (tmp_path / "file").write_text(f"{one}\n")
    (tmp_path / "directory").mkdir()
    (local.root / "refs/sql").mkdir()
    (local.root / "refs/sql/latest").symlink_to(tmp_path / target)
    for read in (lambda: local.ref(SQL), local.refs):
        with pytest.raises(RefCorrupt, match="sql"):
            read()


def test_a_namespace_that_is_a_symlink_is_not_written_through(local, one, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (local.root / "refs/team").symlink_to(outside)
    with pytest.raises(RefCorrupt, match="team"):
        local.move(Ref("team/sql"), one, expect=None)
    with pytest.raises(RefCorrupt, match="team"):
        local.refs()
    assert list(outside.iterdir()) == []


def test_a_log_directory_that_is_a_symlink_is_not_written_through(local, one, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (local.root / "log/team").symlink_to(outside)
    with pytest.raises(NotADirectoryError):
        local.move(Ref("team/sql"), one, expect=None)
    assert list(outside.iterdir()) == []
    assert local.refs() == {}


def test_a_name_is_no_ref(local, one):
    local.move(Ref("a/b"), one, expect=None)
    with pytest.raises(RefNotFound):
        local.ref(Ref("a", "b"))


def test_what_the_finder_leaves_is_ignored(local, one):
    local.move(SQL, one, expect=None)
    (local.root / "refs/.DS_Store").write_text("x")
    (local.root / "refs/sql/.DS_Store").write_text("x")
    assert local.refs() == {SQL: one}


# --- the log ---


def test_a_torn_last_line_is_ignored_and_then_cut_off(local, one):
    two = local.put(b"2")
    local.move(SQL, one, expect=None)
    path = local.root / "log/sql.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert len(local.log("sql")) == 1
    local.move(SQL, two, expect=one)
    assert [entry.new for entry in local.log("sql")] == [one, two]
    assert path.read_bytes().startswith(whole)


def test_a_torn_only_line(local, one):
    (local.root / "log/sql.jsonl").write_bytes(b"x" * 10_000)
    assert local.log("sql") == []
    local.move(SQL, one, expect=None)
    assert [entry.new for entry in local.log("sql")] == [one]


GOOD = {
    "when": "2026-01-31T12:00:00.000000Z",
    "ref": "sql",
    "old": None,
    "new": str(Digest.of(b"1")),
    "reason": "",
}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "[]",
        "[" * 100_000,
        json.dumps({**GOOD, "more": 1}),
        json.dumps({**GOOD, "when": "yesterday"}),
        json.dumps({**GOOD, "when": "2026-01-31T12:00:00"}),
        json.dumps({**GOOD, "when": 5}),
        json.dumps({**GOOD, "ref": "../sql"}),
        json.dumps({**GOOD, "ref": None}),
        json.dumps({**GOOD, "new": "sha256:12"}),
        json.dumps({**GOOD, "old": 7}),
        json.dumps({**GOOD, "reason": None}),
    ],
    ids=range(13),
)
def test_a_malformed_line_is_an_error_with_its_number(local, line):
    path = local.root / "log/sql.jsonl"
    good = json.dumps(GOOD)
    path.write_text(f"{good}\n{good}\n")
    assert len(local.log("sql")) == 2
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(RefCorrupt, match=r"sql\.jsonl line 2") as error:
        local.log("sql")
    assert error.value.hint


@pytest.mark.parametrize("first", [True, False])
def test_a_move_that_cannot_be_logged_does_not_happen(local, one, monkeypatch, first):
    two = local.put(b"2")
    before = None
    if not first:
        local.move(SQL, one, expect=None)
        before = one
    log = local.log("sql")
    fsync = os.fsync

    def full(fd):
        if os.get_blocking(fd) is False:  # only a log is opened with O_NONBLOCK for writing
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        local.move(SQL, two, expect=before)
    monkeypatch.undo()
    assert local.refs() == ({} if before is None else {SQL: before})
    assert local.log("sql") == log


# --- the lock ---


def lock_path(store: LocalStore) -> Path:
    return store.root / "tmp/refs.lock"


def hold(store: LocalStore, *, pid: int, machine: str | None = None, age: float = 0) -> None:
    record = {"machine": machine or _process.identity()[0], "pid": pid}
    lock_path(store).write_text(json.dumps(record))
    then = _process.clock() - age
    os.utime(lock_path(store), (then, then))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def impatient(monkeypatch):
    """Waiting takes no time, and five seconds pass at once."""
    monkeypatch.setattr(_lock, "_acquire", _with_deadline_now(_lock._acquire))


def _with_deadline_now(acquire):
    return lambda lock, machine, *, deadline: acquire(lock, machine, deadline=deadline - 4.999)


def test_a_lock_leaves_nothing(local, one):
    local.move(SQL, one, expect=None)
    assert names(local.root, "tmp") == []
    with pytest.raises(RefConflict):
        local.move(SQL, one, expect=None)
    assert names(local.root, "tmp") == []


@pytest.mark.parametrize("age", [0, 599])
def test_a_lock_of_a_live_process_is_respected(local, one, impatient, age):
    hold(local, pid=os.getpid(), age=age)
    with pytest.raises(StoreLocked, match=rf"held by process {os.getpid()} on") as error:
        local.move(SQL, one, expect=None)
    assert "refs.lock" in str(error.value.hint)
    assert local.refs() == {}


def test_a_lock_of_another_machine_is_respected_for_a_minute(local, one, impatient):
    hold(local, pid=1, machine="elsewhere", age=50)
    with pytest.raises(StoreLocked, match="process 1 on elsewhere"):
        local.move(SQL, one, expect=None)
    hold(local, pid=1, machine="elsewhere", age=61)
    local.move(SQL, one, expect=None)


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"machine": "x"}', "x" * 5000])
def test_a_lock_that_says_nothing_is_respected_for_a_minute(local, one, impatient, text):
    lock_path(local).write_text(text)
    with pytest.raises(StoreLocked, match="unknown process"):
        local.move(SQL, one, expect=None)
    os.utime(lock_path(local), (0, 0))
    local.move(SQL, one, expect=None)


def test_a_lock_of_a_dead_process_is_taken_over_at_once(local, one, impatient):
    hold(local, pid=dead_pid())
    local.move(SQL, one, expect=None)
    assert local.ref(SQL) == one
    assert not lock_path(local).exists()


def test_a_lock_that_is_far_too_old_is_taken_over(local, one, impatient):
    """Its pid belongs to another process by now."""
    hold(local, pid=os.getpid(), age=601)
    local.move(SQL, one, expect=None)


def test_only_one_waiter_may_take_a_stale_lock_away(local, monkeypatch):
    hold(local, pid=1, age=0)
    path = lock_path(local)
    seen = _lock._files.status(path)
    assert seen is not None
    assert _lock._take_away(path, seen)
    assert not path.exists()
    path.write_text("the new lock of the faster one")
    assert not _lock._take_away(path, seen)  # the slower one, which saw the same stale lock
    # And in a later minute, as after a crash: still not a lock that is not the stale one.
    clock = _process.clock
    monkeypatch.setattr(_process, "clock", lambda: clock() + 61)
    _lock._take_away(path, seen)
    assert path.read_text() == "the new lock of the faster one"


def test_who_lost_the_lock_does_not_write(local, one, monkeypatch):
    need = local._need

    def taken_over(ref, digest):
        lock_path(local).unlink()
        hold(local, pid=os.getpid(), machine="elsewhere")
        need(ref, digest)

    monkeypatch.setattr(local, "_need", taken_over)
    with pytest.raises(StoreLocked, match="taken over"):
        local.move(SQL, one, expect=None)
    assert local.refs() == {}
    assert json.loads(lock_path(local).read_text())["machine"] == "elsewhere"  # not ours to remove


INCREMENT = """
import sys
from itertools import pairwise
from library_store import LocalStore, Ref, RefConflict
store, ref = LocalStore.open(sys.argv[1]), Ref("counter")
for _ in range(3):
    while True:
        old = store.ref(ref)
        new = store.put(b"%d" % (int(store.get(old)) + 1))
        try:
            store.move(ref, new, expect=old)
            break
        except RefConflict:
            pass
"""


def test_eight_processes_lose_no_update_though_the_lock_is_stale_at_first(local):
    local.move(Ref("counter"), local.put(b"0"), expect=None)
    hold(local, pid=dead_pid())
    environment = {**os.environ, "PYTHONPATH": str(Path(_lock.__file__).parents[1])}
    command = [sys.executable, "-S", "-c", INCREMENT, str(local.root)]
    running = [subprocess.Popen(command, env=environment) for _ in range(8)]
    assert [process.wait() for process in running] == [0] * 8
    assert local.get(local.ref(Ref("counter"))) == b"24"
    log = local.log("counter")
    assert len(log) == 25
    assert all(before.new == after.old for before, after in pairwise(log))
    assert not lock_path(local).exists()
