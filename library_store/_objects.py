"""Objects on disk: objects/sha256/ab/<hex> holds the exact bytes of that hash, read-only."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from library_store import _files
from library_store.digest import Digest
from library_store.errors import ObjectCorrupt, ObjectNotFound
from library_store.records import Problem, move_out, timestamp

_SHARD: Final = re.compile(r"[0-9a-f]{2}")
_HEX: Final = re.compile(r"[0-9a-f]{64}")


@final
@dataclass(frozen=True, slots=True)
class ObjectFiles:
    """The `objects/` and `quarantine/` of the store at `root`."""

    root: Path

    @property
    def directory(self) -> Path:
        """Where the shards are. It must exist: a store without it is damaged, not empty."""
        return self.root / "objects" / "sha256"

    def path(self, digest: Digest) -> Path:
        """Where an object is, or would be."""
        return self.directory / digest.hex[:2] / digest.hex

    def put(self, data: bytes | bytearray | memoryview | Iterable[bytes | memoryview]) -> Digest:
        """See Store.put. Bytes given whole and kept already are not written again."""
        temp = _files.temporary(self.root / "tmp")
        if isinstance(data, bytes | bytearray | memoryview):
            whole = memoryview(data)
            digest = Digest.of(whole)
            if self._is_settled(digest):
                return digest
            _files.write_synced(temp, [whole], mode=0o444)
        else:
            hasher = hashlib.sha256()
            _files.write_synced(temp, _hashing(data, hasher), mode=0o444)
            digest = Digest(hasher.hexdigest())
        try:
            self.publish(temp, digest)
        except BaseException:
            _files.remove(temp)
            raise
        return digest

    def publish(self, temp: Path, digest: Digest) -> None:
        """Move a finished, synced file to its place among the objects; durable on return."""
        path = self.path(digest)
        _files.make_directories(path.parent, base=self.directory)
        try:
            _files.publish(temp, path)
        except FileExistsError:
            if self._is_settled(digest):
                _files.remove(temp)
                return
            if not self._is_intact(digest):
                keep_aside(path, self.root, digest.hex)
            _files.replace(temp, path)
        _files.fsync_up(path.parent, base=self.directory)
        _files.remove(temp)

    def get(self, digest: Digest) -> bytes:
        """See Store.get."""
        try:
            data = _files.read(self.path(digest))
        except OSError as error:
            raise self._explain(digest, error) from error
        if Digest.of(data) != digest:
            raise self._corrupt(digest, f"its {len(data)} bytes hash to something else")
        return data

    def view(self, digest: Digest, *, verify: bool) -> memoryview:
        """See Store.view."""
        try:
            mapped, found = _files.map_copy(self.path(digest), hashed=verify)
        except OSError as error:
            raise self._explain(digest, error) from error
        if verify and found != digest.hex:
            raise self._corrupt(digest, f"its {len(mapped)} bytes hash to something else")
        return mapped

    def status(self, digest: Digest) -> _files.Status:
        """What is at the object's place. Raises ObjectNotFound."""
        found = _files.status(self.path(digest))
        if found is None:
            raise self._missing(digest)
        return found

    def quarantine(self, digest: Digest) -> bool:
        """See Store.quarantine."""
        self.status(digest)
        if self._is_intact(digest):
            return False
        aside = set_aside(self.path(digest), self.root, digest.hex)
        # Somebody may have put intact bytes there between our look and our move, and rely on them.
        if aside is not None and _has_hash(aside, digest):
            self.publish(aside, digest)
            return False
        return aside is not None

    def scan(self, prefix: str = "") -> tuple[list[Digest], list[Problem]]:
        """Every object whose hex starts with `prefix`, sorted, and what else is in their place."""
        found: list[Digest] = []
        problems: list[Problem] = []
        for shard, kind in _listed(self.directory, problems):
            if kind != "directory" or not _SHARD.fullmatch(shard):
                _stray(self.directory / shard, problems)
            elif not prefix or shard == prefix[:2]:
                for name, _ in _listed(self.directory / shard, problems):
                    if not _HEX.fullmatch(name) or name[:2] != shard:
                        _stray(self.directory / shard / name, problems)
                    elif name.startswith(prefix):
                        found.append(Digest(name))
        return found, problems

    def _is_settled(self, digest: Digest) -> bool:
        """Whether the object is here, intact, durable and young."""
        path = self.path(digest)
        if _files.status(path) is None or not self._is_intact(digest):
            return False
        try:
            _files.touch(path)
        except (FileNotFoundError, PermissionError):
            return False  # gc took it just now; or it is another user's, and ours will replace it
        # Whoever linked it may not have come to this yet, and we are about to say it is durable.
        _files.fsync_up(path.parent, base=self.directory)
        return True

    def _is_intact(self, digest: Digest) -> bool:
        try:
            return _files.sha256(self.path(digest)) == digest.hex
        except _files.NotRegularError:
            return False
        except FileNotFoundError:
            return True  # gone meanwhile, and the next step will see that
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False  # a bad sector: new bytes can heal it

    def _explain(self, digest: Digest, error: OSError) -> Exception:
        """What a failed read means: no such object, no proper object, or the disk's own error."""
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return self._missing(digest)
        if isinstance(error, _files.NotRegularError):
            return self._corrupt(digest, "it is not a regular file")
        return error

    def _missing(self, digest: Digest) -> ObjectNotFound:
        return ObjectNotFound(f"no object {digest.short} in {self.root}")

    def _corrupt(self, digest: Digest, why: str) -> ObjectCorrupt:
        return ObjectCorrupt(
            f"object {digest} at {self.path(digest)} is corrupt: {why}",
            hint="quarantine it, then put the same bytes again",
        )


def set_aside(path: Path, root: Path, name: str) -> Path | None:
    """Move what is at `path` to `quarantine/<name>.<time>`; durable on return. None if another
    process was faster."""
    aside = _aside(root, name)
    try:
        _files.replace(path, aside)
    except FileNotFoundError:
        return None
    _files.fsync_directory(root / "quarantine")
    _files.fsync_directory(path.parent)
    return aside


def keep_aside(path: Path, root: Path, name: str) -> None:
    """As `set_aside`, for what new bytes are about to be renamed over. Where that can be, it stays
    until they are: another process may have put them already, and they must not vanish, not even
    until ours are there."""
    if _files.link(path, _aside(root, name)):
        _files.fsync_directory(root / "quarantine")
    else:
        set_aside(path, root, name)


def _aside(root: Path, name: str) -> Path:
    return root / "quarantine" / f"{name}.{timestamp().replace(':', '').replace('-', '')}"


def _has_hash(path: Path, digest: Digest) -> bool:
    try:
        return _files.sha256(path) == digest.hex
    except OSError:
        return False


def _hashing(
    pieces: Iterable[bytes | memoryview], hasher: hashlib._Hash
) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        hasher.update(piece)
        yield piece


def _listed(path: Path, problems: list[Problem]) -> list[tuple[str, _files.Kind]]:
    try:
        return _files.list_directory(path)
    except OSError as error:
        hint = "check the disk and the permissions"
        problems.append(Problem("unreadable", None, (), f"{path}: {error}", hint))
        return []


def _stray(path: Path, problems: list[Problem]) -> None:
    if path.name.startswith("."):
        return  # .DS_Store and its like
    detail = f"{path} is not an object of this store"
    problems.append(Problem("foreign", None, (), detail, move_out(path)))
