"""The lock that refs move under: a file that only one process can create.

Not flock: on some network file systems it succeeds for everyone (huggingface_hub #4306). A lock
file outlives a crash instead, so a waiter takes over one whose holder is gone.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from library_store import _files, _process
from library_store.errors import StoreLocked

WAIT: Final = 5.0  # seconds a waiter waits before it gives up
FOREIGN_AGE: Final = 60.0  # seconds after which a lock of another machine is taken for abandoned
# Seconds after which a lock of a live process of this machine is: it is held for milliseconds, so
# the process is another one with the same pid, or was stopped and may never go on.
LIVE_AGE: Final = 600.0


@final
@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that is held. `record` is unique, and is how it recognises its own file."""

    path: Path
    record: bytes

    def confirm(self) -> None:
        """Raise StoreLocked unless this lock is still ours: call it right before the write."""
        try:
            found = _files.read(self.path, limit=len(self.record))
        except (FileNotFoundError, ValueError, _files.NotRegularError):
            found = None
        if found != self.record:
            raise StoreLocked(f"{self.path} was taken over while we held it", hint="try again")


@contextmanager
def held(path: Path, *, wait: float = WAIT) -> Iterator[Lock]:
    """Hold the lock at `path`. Raises StoreLocked, naming the holder, after `wait` seconds."""
    machine, pid = _process.identity()
    record = {"machine": machine, "pid": pid, "token": uuid.uuid4().hex}
    lock = Lock(path, json.dumps(record).encode("ascii"))
    _acquire(lock, machine, deadline=time.monotonic() + wait)
    try:
        yield lock
    finally:
        _release(lock)


def look(path: Path) -> tuple[str, float, bool] | None:
    """Who holds the lock at `path`, for how many seconds, and whether a waiter would take it over;
    None where nobody holds it."""
    holder, seen = _holder(path), _files.status(path)
    if seen is None:
        return None
    age = max(0.0, _process.clock() - seen.mtime_ns / 1e9)
    return _named(holder), age, _is_stale(seen, holder, _process.identity()[0])


def _release(lock: Lock) -> None:
    try:
        lock.confirm()
    except StoreLocked:
        return  # taken over: it is not ours to remove
    except OSError:
        pass  # no descriptor left to look with. Ours, most likely; left, it would block everybody
    try:
        _files.remove(lock.path)
    except OSError:  # once more, or it stays there for as long as this process lives
        _files.remove(lock.path)


def _acquire(lock: Lock, machine: str, *, deadline: float) -> None:
    path = lock.path
    while True:
        try:
            _files.create_exclusive(path, lock.record)
            return
        except FileExistsError:
            seen = _files.status(path)
        if seen is None:
            continue
        holder = _holder(path)
        if _is_stale(seen, holder, machine) and _take_away(path, seen):
            continue
        if time.monotonic() >= deadline:
            hint = f"wait for it; if it is surely gone, remove {path}"
            raise StoreLocked(f"{path} is held by {_named(holder)}", hint=hint)
        _process.pause(random.uniform(0.001, 0.010))


def _named(holder: tuple[str, int] | None) -> str:
    return "an unknown process" if holder is None else f"process {holder[1]} on {holder[0]}"


def _holder(path: Path) -> tuple[str, int] | None:
    try:
        record = json.loads(_files.read(path, limit=4096))
        return str(record["machine"]), int(record["pid"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None  # gone by now, or not written yet


def _is_stale(seen: _files.Status, holder: tuple[str, int] | None, machine: str) -> bool:
    age = _process.clock() - seen.mtime_ns / 1e9
    if holder is None or holder[0] != machine:
        return age > FOREIGN_AGE
    return age > LIVE_AGE or not _process.is_running(holder[1])


def _take_away(path: Path, seen: _files.Status) -> bool:
    """Move a stale lock aside, so that a new one can be created; False if another is doing it.

    Two waiters may both have found it stale. If each just removed `path`, the slower would remove
    the new lock of the faster. So the right to remove this very lock is a file too, named after
    it, which one of them creates. It is left there: nobody may have that right twice. The minute
    in its name lets another try if the first died at this very point.
    """
    minute = int(_process.clock()) // 60
    claim = path.with_name(f"{path.name}.{seen.inode}-{seen.mtime_ns}-{minute}")
    try:
        _files.create_exclusive(claim, b"")
    except FileExistsError:
        return False
    if _files.status(path) == seen:
        with suppress(FileNotFoundError):  # released after all
            _files.replace(path, claim)
    return True
