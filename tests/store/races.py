"""What no power cut shows: two at work at once, a full disk, damage. On a simulated disk, so that
one does all of its work between two given calls of the other.
"""

import errno
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any, Final, TypeAlias

import pytest

from library_store import LocalStore, ObjectCorrupt, Ref, StoreError
from library_store._refs import RefFiles
from tests.store.crashes import Workload, kept, prepare
from tests.store.operations import GRACE, HOME, Step, Violation
from tests.store.simulated import SECOND, Blocked, Disk
from tests.store.workloads import KEPT, A, B, C, leave_lock, move, put, text_children

Act: TypeAlias = Callable[[LocalStore], Any]

SQL: Final = Ref("sql")
LOCK: Final = f"{HOME}/tmp/refs.lock"
OLD: Final = put("old")


def interleave(
    disk: Disk,
    before: tuple[Step, ...],
    outer: Act,
    inner: Act,
    check: Callable[[Disk], None],
    *,
    may_fail: bool = False,
) -> int:
    """Run `inner` as another process right before the 1st, 2nd, ... change that `outer` makes."""
    for nth in range(1, 200):
        prepare(disk, Workload("races", before, (), text_children))
        left = nth

        def watch(call: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                _other(disk, inner)

        disk.watch = watch
        try:
            outer(LocalStore(HOME))
        except StoreError as error:
            if not may_fail:
                raise Violation(f"interrupted before change {nth}: {error}") from error
        disk.watch = None
        if left > 0:
            return nth - 1
        try:
            check(disk)
        except Violation as error:
            raise Violation(f"interrupted before change {nth}: {error}") from error
    raise AssertionError("200 changes and no end")


def _other(disk: Disk, act: Act) -> None:
    """Another process does this now, unless the lock is held: then it does so later, or never."""
    me, disk.pid = disk.pid, disk.pid + 1
    disk.others = frozenset({me, disk.pid})
    with suppress(Blocked, StoreError):
        act(LocalStore(HOME))
    disk.pid = me


def _gc(store: LocalStore) -> None:
    store.gc(text_children, grace=GRACE, now=_disk_of(store).time())


def _disk_of(store: LocalStore) -> Disk:
    from library_store import _files

    disk: Any = _files.os
    return disk


def _reaches_all(disk: Disk) -> None:
    objects = kept(disk, "objects/sha256")
    for ref, digest in LocalStore(HOME).refs().items():
        if digest.hex not in objects:
            raise Violation(f"{ref} points to nothing")


def gc_and_put(disk: Disk) -> None:
    def check(disk: Disk) -> None:
        if OLD.digest.hex not in kept(disk, "objects/sha256"):
            raise Violation("what was put is gone")

    interleave(disk, (*KEPT, OLD), _gc, lambda store: store.put(b"old"), check)


def gc_and_move(disk: Disk) -> None:
    """Nothing is collected that is needed, not even for a moment, so nothing is put back."""
    to_old = move("sql", OLD)
    interleave(disk, (*KEPT, OLD), _gc, lambda store: to_old.run(store, disk), _reaches_all)


def _lies(disk: Disk, outer: Act, inner: Act) -> None:
    lock = nullcontext(SimpleNamespace(confirm=lambda: None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "_exclusive", lambda self: lock)
        interleave(disk, (*KEPT, OLD), outer, inner, _reaches_all, may_fail=True)


def gc_and_move_lying(disk: Disk) -> None:
    _lies(disk, _gc, lambda store: move("sql", OLD).run(store, disk))


def move_and_gc_lying(disk: Disk) -> None:
    _lies(disk, lambda store: move("sql", OLD).run(store, disk), _gc)


def lock_taken_over(disk: Disk) -> None:
    """A process stops for ten minutes, right after it has read a ref that it is to move."""
    prepare(disk, Workload("races", (A, B, C, move("sql", A)), (), text_children))
    read = RefFiles.read

    def read_and_stop(self: RefFiles, ref: Ref) -> Any:
        found = read(self, ref)
        patch.undo()
        disk.now += 700 * SECOND
        _other(disk, lambda store: store.move(SQL, C.digest, expect=A.digest))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RefFiles, "read", read_and_stop)
        with suppress(StoreError):
            LocalStore(HOME).move(SQL, B.digest, expect=A.digest)
    if LocalStore(HOME).ref(SQL) != C.digest:
        raise Violation("the move of the one who took the lock over is lost")


def lock_found_by_two(disk: Disk) -> None:
    """One takes a stale lock over and holds it, while another has found it stale as well."""

    def hold(store: LocalStore) -> None:
        lock = store._exclusive()
        lock.__enter__()
        held.append(lock)

    for nth in range(1, 20):
        prepare(disk, Workload("races", (A,), (), text_children, spoil=leave_lock))
        held: list[Any] = []
        left = nth

        def watch(call: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                _other(disk, hold)

        disk.watch = watch
        with suppress(Blocked), LocalStore(HOME)._exclusive():
            if held:
                raise Violation(f"two hold the lock, interrupted before change {nth}")
        if left > 0:
            return


def unlogged_move(disk: Disk) -> None:
    """The disk is full when the line is to be written."""
    prepare(disk, Workload("races", (A, B, move("sql", A)), (), text_children))

    def watch(call: str, path: str) -> None:
        if path.endswith(".jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    disk.watch = watch
    with suppress(OSError):
        LocalStore(HOME).move(SQL, B.digest, expect=A.digest)
    disk.watch = None
    if LocalStore(HOME).ref(SQL) != A.digest:
        raise Violation("a move that failed was made")


def damage(disk: Disk) -> None:
    prepare(disk, Workload("races", (A,), (), text_children))
    hex_ = A.digest.hex
    disk.overwrite(f"{HOME}/objects/sha256/{hex_[:2]}/{hex_}", b"A")
    store = LocalStore(HOME)
    for read in (store.get, store.view):
        try:
            read(A.digest)
        except ObjectCorrupt:
            continue
        raise Violation(f"{read.__name__} gives other bytes than were put")


RACES: Final[dict[str, Callable[[Disk], None]]] = {
    "gc and put": gc_and_put,
    "gc and move": gc_and_move,
    "gc and move, the lock lies": gc_and_move_lying,
    "move and gc, the lock lies": move_and_gc_lying,
    "a lock is taken over": lock_taken_over,
    "a stale lock is found by two": lock_found_by_two,
    "a log cannot be written": unlogged_move,
    "damage": damage,
}
