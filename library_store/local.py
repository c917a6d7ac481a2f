"""A store in a directory.

FORMAT                    {"format": 1, "hash": "sha256"}, written last when a store is made
objects/sha256/ab/<hex>   exact bytes, read-only, never modified; `sha256sum` gives the file's name
refs/<name>/<tag>         "sha256:<hex>" and a newline
log/<name>.jsonl          who moved a ref, when, from what to what
tmp/                      unfinished writes and the lock; gc removes what is older than a day
trash/<gc id>/<hex>       what gc removed, for 7 days
quarantine/<hex>.<time>   corrupt objects; <name>.<time> of refs and logs

Publish: temporary file, hash while writing, fsync, link into place, fsync the directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, Final, final

from library_store import _files, _listing, _lock, _mend, _trash
from library_store._objects import ObjectFiles
from library_store._refs import RefFiles
from library_store.digest import Digest
from library_store.errors import (
    NotAStore,
    ObjectNotFound,
    RefConflict,
    RefCorrupt,
    RefNotFound,
    StoreError,
    StoreExists,
    UnknownFormat,
)
from library_store.names import Ref
from library_store.records import LogEntry, Problem, timestamp
from library_store.store import Store

FORMAT: Final = b'{"format": 1, "hash": "sha256"}\n'
DIRECTORIES: Final = ("objects", "refs", "log", "tmp", "trash", "quarantine")


@final
class LocalStore(Store):
    """A store in the directory `root`, shared safely by processes and threads.

    Make one with `LocalStore.create`, find one with `LocalStore.open`; the constructor looks at
    nothing. OSError (disk full, not permitted) comes through unchanged and leaves no trace.
    """

    def __init__(self, root: str | PathLike[str]) -> None:
        self.root = Path(root)
        self._objects = ObjectFiles(self.root)
        self._refs = RefFiles(self.root)

    @classmethod
    def create(cls, path: str | PathLike[str]) -> LocalStore:
        """Make an empty store. Raises StoreExists, or NotAStore if other things are in `path`."""
        store = cls(Path(path).absolute())
        root = store.root
        if _files.status(root / "FORMAT") is not None:
            raise StoreExists(f"{root} is a store already", hint="open it")
        _files.make_root(root)
        strangers = [name for name, _ in _files.list_directory(root) if name not in DIRECTORIES]
        if strangers:
            message = f"{root} is not a store, and not empty: it has {strangers[0]!r}"
            raise NotAStore(message, hint="choose an empty directory")
        for name in (*DIRECTORIES, "objects/sha256"):
            _files.make_directories(root / name, base=root)
        _files.fsync_directory(root / "objects")
        _files.fsync_to_top(root)  # FORMAT says that all of this is there
        temp = _files.temporary(root / "tmp")
        _files.write_synced(temp, [FORMAT], mode=0o444)
        try:
            _files.publish(temp, root / "FORMAT")
        except FileExistsError:
            raise StoreExists(f"{root} was made a store by another process just now") from None
        finally:
            _files.remove(temp)
        _files.fsync_directory(root)
        return store

    @classmethod
    def open(cls, path: str | PathLike[str]) -> LocalStore:
        """Open the store at `path`. Raises NotAStore, or UnknownFormat where it is no store of
        this version or one of its directories is a link."""
        store = cls(Path(path).absolute())
        file = store.root / "FORMAT"
        try:
            data = _files.read(file, limit=4096)
        except (FileNotFoundError, NotADirectoryError):
            raise NotAStore(
                f"{store.root} is not a store: it has no FORMAT file", hint="create one"
            ) from None
        except (_files.NotRegularError, ValueError) as error:
            raise UnknownFormat(f"{file} cannot be read: {error}") from error
        _check_format(data, file)
        for name in (*DIRECTORIES, "objects/sha256"):
            found = _files.status(store.root / name)
            if found is not None and found.kind != "directory":
                # Or a store that came from somewhere else would have us write and remove there.
                raise UnknownFormat(
                    f"{store.root / name} is a link or a file; a store's directories are its own",
                    hint="link to the store as a whole",
                )
        return store

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    # --- objects ---

    def put(self, data: bytes | bytearray | memoryview | Iterable[bytes | memoryview]) -> Digest:
        return self._objects.put(data)

    def get(self, digest: Digest) -> bytes:
        return self._objects.get(digest)

    def view(self, digest: Digest, *, verify: bool = True) -> memoryview:
        return self._objects.view(digest, verify=verify)

    def size(self, digest: Digest) -> int:
        return self._objects.status(digest).size

    def __contains__(self, digest: Digest) -> bool:
        found = _files.status(self._objects.path(digest))
        return found is not None and found.kind == "file"

    # --- refs ---

    def ref(self, ref: Ref) -> Digest:
        digest = self._refs.read(ref)
        if digest is None:
            raise RefNotFound(f"no ref {ref} in {self.root}")
        return digest

    def listing(
        self, seen: dict[str, Any] | None = None
    ) -> tuple[dict[tuple[str, str], str], dict[str, Any] | None]:
        try:
            return _listing.look(self._refs, self.root, seen)
        except (_listing.Unusual, OSError, RefCorrupt):
            return super().listing()

    def move(
        self, ref: Ref, new: Digest | None, *, expect: Digest | None, reason: str = ""
    ) -> None:
        with self._exclusive() as lock:
            self._need(ref, new)
            old = self._refs.read(ref)
            if old != expect:
                message = f"{ref} is {_where(old)}, not {_where(expect)}"
                raise RefConflict(message, hint="read it again, then retry")
            if new == old:
                self._refs.settle(ref)
                return
            lock.confirm()
            try:
                self._refs.write(ref, new)
                # Once more, after the move: a sweep may have begun under a lock that lies. Either
                # it sees the ref and puts the object back, or we see that the object is gone.
                self._need(ref, new)
                self._refs.append(LogEntry(ref, timestamp(), old, new, reason))
            except BaseException as error:
                try:
                    self._take_back(ref, old)
                except OSError as second:
                    raise StoreError(
                        f"{ref} may have moved: {error}; and taking it back failed: {second}",
                        hint="once the disk is well: look where it is, and at its log",
                    ) from error
                raise

    def _take_back(self, ref: Ref, old: Digest | None) -> None:
        """Undo a move that failed."""
        if self._refs.read(ref) != old:
            self._refs.write(ref, old)
        if old is not None and old not in self:
            # Where the lock lies, others moved the ref on and gc took what they moved it from. It
            # never takes the last place that a log tells.
            last = self._refs.last(ref)
            if last != old:
                self._refs.write(ref, last)

    def log(self, name: str) -> list[LogEntry]:
        return self._refs.log(name)

    # --- care ---

    def quarantine(self, digest: Digest) -> bool:
        return self._objects.quarantine(digest)

    def restore(self, gc_id: str) -> int:
        return _trash.restore(self._objects, gc_id)

    # --- what the algorithms of Store ask ---

    def _scan_objects(self, prefix: str = "") -> tuple[list[Digest], list[Problem]]:
        return self._objects.scan(prefix)

    def _scan_refs(self) -> tuple[dict[Ref, Digest], list[Problem]]:
        return self._refs.scan()

    def _log_names(self) -> list[str]:
        return self._refs.log_names()

    def _modified(self, digest: Digest) -> int:
        return self._objects.status(digest).mtime_ns

    def _exclusive(self) -> AbstractContextManager[_lock.Lock]:
        return _lock.held(self.root / "tmp" / "refs.lock")

    def _sweep(self, victims: Sequence[tuple[Digest, int]], gc_id: str) -> tuple[Digest, ...]:
        return _trash.sweep(self._objects, victims, gc_id)

    def _recover(self, digest: Digest, *, dry_run: bool = False) -> bool:
        return _trash.recover(self._objects, digest, dry_run=dry_run)

    def _mend(self) -> tuple[list[str], list[Problem]]:
        for name in (*DIRECTORIES, "objects/sha256"):  # a copy may have left out what was empty
            _files.make_directories(self.root / name, base=self.root)
        with self._exclusive():
            return _mend.mend(self._refs)

    def _purge(self, now: datetime) -> None:
        _trash.purge(self.root, now)

    def _need(self, ref: Ref, digest: Digest | None) -> None:
        if digest is not None and digest not in self:
            message = f"{ref} cannot point to {digest}: no such object in {self.root}"
            raise ObjectNotFound(message, hint="put it first")


def _where(digest: Digest | None) -> str:
    return "absent" if digest is None else f"at {digest.short}"


def _check_format(data: bytes, path: Path) -> None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnknownFormat(f"{path} is not JSON: {data[:60]!r}") from error
    if found != {"format": 1, "hash": "sha256"}:
        raise UnknownFormat(
            f"{path} is {data[:60]!r}, wanted {FORMAT.decode().strip()}",
            hint="open it with the version that made it, or a newer one",
        )
