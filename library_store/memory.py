"""A store in memory: what the promises of a store mean, without a disk. Also what tests use."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import final

from library_store import _collect, _process
from library_store.digest import Digest
from library_store.errors import ObjectNotFound, RefConflict, RefNotFound
from library_store.names import Ref
from library_store.records import LogEntry, Problem, timestamp
from library_store.store import Store


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    modified: int  # ns since 1970


@final
class MemoryStore(Store):
    """A store that is gone with the process. Threads may share one."""

    def __init__(self) -> None:
        self._objects: dict[Digest, _Object] = {}
        self._refs: dict[Ref, Digest] = {}
        self._logs: dict[str, list[LogEntry]] = {}
        self._trash: dict[str, dict[Digest, _Object]] = {}
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"MemoryStore({len(self._objects)} objects)"

    def put(self, data: bytes | bytearray | memoryview | Iterable[bytes | memoryview]) -> Digest:
        pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        whole = b"".join(pieces)
        digest = Digest.of(whole)
        with self._lock:
            self._objects[digest] = _Object(whole, _now_ns())
        return digest

    def get(self, digest: Digest) -> bytes:
        return self._object(digest).data

    def view(self, digest: Digest, *, verify: bool = True) -> memoryview:
        return memoryview(bytearray(self._object(digest).data))

    def size(self, digest: Digest) -> int:
        return len(self._object(digest).data)

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._objects

    def ref(self, ref: Ref) -> Digest:
        try:
            return self._refs[ref]
        except KeyError:
            raise RefNotFound(f"no ref {ref} in {self}") from None

    def move(
        self, ref: Ref, new: Digest | None, *, expect: Digest | None, reason: str = ""
    ) -> None:
        with self._lock:
            if new is not None and new not in self:
                raise ObjectNotFound(f"{ref} cannot point to {new}: no such object in {self}")
            old = self._refs.get(ref)
            if old != expect:
                raise RefConflict(f"{ref} is at {old}, not at {expect}", hint="read it again")
            if new == old:
                return
            if new is None:
                del self._refs[ref]
            else:
                self._refuse_collision(ref)
                self._refs[ref] = new
            entry = LogEntry(ref, timestamp(), old, new, reason)
            self._logs.setdefault(ref.name, []).append(entry)

    def log(self, name: str) -> list[LogEntry]:
        return list(self._logs.get(Ref(name).name, ()))

    def restore(self, gc_id: str) -> int:
        with self._lock:
            if gc_id not in self._trash:
                raise ObjectNotFound(f"no trash {gc_id!r} in {self}")
            back = self._trash.pop(gc_id)
            for digest, thing in back.items():
                self._objects[digest] = _Object(thing.data, _now_ns())
            return len(back)

    def quarantine(self, digest: Digest) -> bool:
        self._object(digest)
        return False  # bytes in memory cannot be damaged

    def _object(self, digest: Digest) -> _Object:
        try:
            return self._objects[digest]
        except KeyError:
            raise ObjectNotFound(f"no object {digest.short} in {self}") from None

    def _refuse_collision(self, ref: Ref) -> None:
        # Nothing collides in memory, but a name that cannot be kept on a disk must not be a name
        # here either: `a:b` and `a/b` are a file and a directory of the same path.
        for other in self._refs:
            shorter, longer = sorted((ref.parts, other.parts), key=len)
            if shorter != longer and longer[: len(shorter)] == shorter:
                raise RefConflict(f"{ref} collides with {other}", hint="choose another name")

    def _scan_objects(self, prefix: str = "") -> tuple[list[Digest], list[Problem]]:
        return sorted(one for one in list(self._objects) if one.hex.startswith(prefix)), []

    def _scan_refs(self) -> tuple[dict[Ref, Digest], list[Problem]]:
        return dict(sorted(self._refs.items())), []

    def _log_names(self) -> list[str]:
        return sorted(self._logs)

    def _modified(self, digest: Digest) -> int:
        return self._object(digest).modified

    def _exclusive(self) -> AbstractContextManager[object]:
        return self._lock

    def _sweep(self, victims: Sequence[tuple[Digest, int]], gc_id: str) -> tuple[Digest, ...]:
        trash: dict[Digest, _Object] = {}
        for digest, modified in victims:
            if self._modified(digest) != modified:
                break
            trash[digest] = self._objects.pop(digest)
        if trash:
            self._trash[gc_id] = trash
        return tuple(trash)

    def _recover(self, digest: Digest, *, dry_run: bool = False) -> bool:
        with self._lock:
            for trash in self._trash.values():
                if digest in self._objects or digest not in trash:
                    continue
                if not dry_run:
                    self._objects[digest] = _Object(trash.pop(digest).data, _now_ns())
                return True
        return False

    def _mend(self) -> tuple[list[str], list[Problem]]:
        return [], []

    def _purge(self, now: datetime) -> None:
        for gc_id in list(self._trash):
            then = _collect.time_of(gc_id)
            if then is not None and now.astimezone(UTC) - then > _collect.TRASH_AGE:
                del self._trash[gc_id]


def _now_ns() -> int:
    return int(_process.clock() * 1_000_000_000)
