"""Whichever system call fails, an operation happens or does not, and says so."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library_store import LocalStore, Ref, StoreError, _files

SQL = Ref("team/sql")
CALLS = {
    "open",
    "fstat",
    "lstat",
    "scandir",
    "read",
    "readv",
    "pread",
    "write",
    "fsync",
    "ftruncate",
    "link",
    "rename",
    "replace",
    "unlink",
    "utime",
    "mkdir",
    "rmdir",
}


class Faulty:
    """The module `os`, but the n-th call that touches the disk fails."""

    def __init__(self, nth: int, code: int) -> None:
        self.left = nth
        self.code = code
        self.failed = ""

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.failed = name
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **options)

        return call


def fail_each_call(
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    prepare: Callable[[LocalStore], Any],
    act: Callable[[LocalStore], Any],
    check: Callable[[LocalStore, bool, str], None],
    code: int,
) -> int:
    """Run `act` on fresh stores, with its 1st, 2nd, ... call failing until none is left to fail."""
    for nth in range(1, 500):
        store = LocalStore.create(path / str(nth))
        prepare(store)
        faulty = Faulty(nth, code)
        with monkeypatch.context() as patch:
            patch.setattr(_files, "os", faulty)
            try:
                act(store)
                raised = False
            except (OSError, StoreError):
                raised = True
        check(store, raised, faulty.failed)
        if not faulty.failed:
            assert not raised
            return nth - 1
    raise AssertionError("500 calls and no end")


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES], ids=os.strerror)
@pytest.mark.parametrize("data", [b"abc", [b"a", b"bc"]], ids=["whole", "pieces"])
@pytest.mark.parametrize("known", [True, False], ids=["known", "new"])
def test_put(monkeypatch, tmp_path, children, code, data, known):
    def prepare(store):
        if known:
            store.put(b"abc")

    def check(store, raised, failed):
        assert store.verify(children).ok
        assert raised or [store.get(digest) for digest in store.objects()] == [b"abc"]
        assert list((store.root / "tmp").iterdir()) == []

    calls = fail_each_call(monkeypatch, tmp_path, prepare, lambda s: s.put(data), check, code)
    assert calls > 5


@pytest.mark.parametrize(
    ("first", "new"),
    [(True, b"2"), (False, b"2"), (False, None)],
    ids=["first", "second", "remove"],
)
def test_move(monkeypatch, tmp_path, children, first, new):
    where = {}

    def prepare(store):
        where["old"], where["new"] = store.put(b"1"), new and store.put(new)
        if first:
            where["old"] = None
        else:
            store.move(SQL, where["old"], expect=None)

    def check(store, raised, failed):
        assert store.verify(children).ok
        now = store.refs().get(SQL)
        logged = [entry.new for entry in store.log(SQL.name)]
        if raised and failed != "unlink":  # the last one removes the lock, after the fact
            assert now == where["old"]
        elif not raised:
            assert now == where["new"]
        assert logged[-1:] == ([now] if logged or now is not None else [])
        assert {path.name for path in (store.root / "tmp").iterdir()} <= {"refs.lock"}
        assert failed == "unlink" or not list((store.root / "tmp").iterdir())

    def act(store):
        store.move(SQL, where["new"], expect=where["old"])

    assert fail_each_call(monkeypatch, tmp_path, prepare, act, check, errno.ENOSPC) > 10


def test_gc(monkeypatch, tmp_path, children, parent, later):
    data = {}

    def prepare(store):
        blob = store.put(b"blob")
        store.move(SQL, store.put(parent(blob)), expect=None)
        low = store.put(b"low")
        for digest in (*store.objects(), store.put(parent(low, blob))):
            data[digest] = store.get(digest)

    def check(store, raised, failed):
        assert store.verify(children).ok
        for digest in data:
            trashed = list((store.root / "trash").glob(f"*/{digest.hex}"))
            assert (digest in store) + len(trashed) == 1
        if not raised:
            assert len(list(store.objects())) == 2
        for trash in (store.root / "trash").iterdir():
            store.restore(trash.name)
        assert all(store.get(digest) == content for digest, content in data.items())

    calls = fail_each_call(
        monkeypatch, tmp_path, prepare, lambda s: s.gc(children, now=later), check, errno.EIO
    )
    assert calls > 20
