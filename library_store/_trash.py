"""What gc does to the disk: objects into trash/<gc id>/, back again, and gone after 7 days."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from library_store import _files, _process
from library_store._collect import TEMPORARY_AGE, TRASH_AGE, time_of
from library_store._objects import ObjectFiles
from library_store.digest import Digest
from library_store.errors import InvalidDigest, ObjectNotFound


def sweep(
    objects: ObjectFiles, victims: Sequence[tuple[Digest, int]], gc_id: str
) -> tuple[Digest, ...]:
    """See Store._sweep."""
    trash = objects.root / "trash" / gc_id
    moved: list[Digest] = []
    for digest, modified in victims:
        path = objects.path(digest)
        found = _files.status(path)
        if found is None:  # another gc was faster
            continue
        if found.mtime_ns != modified:
            break
        if not moved:
            _files.make_directories(trash, base=objects.root / "trash")
        try:
            _files.replace(path, trash / digest.hex)
        except FileNotFoundError:  # the same, just now, where the lock lies
            continue
        # `put` freshens before it says that an object is there. If it did so between our look and
        # our rename, its caller relies on this object; if after, it found nothing and wrote it.
        found = _files.status(trash / digest.hex)
        if found is not None and found.mtime_ns != modified:
            objects.publish(trash / digest.hex, digest)
            break
        moved.append(digest)
    if moved:
        with suppress(FileNotFoundError):  # restored at once by somebody
            _files.fsync_up(trash, base=objects.root / "trash")
        for shard in sorted({objects.path(digest).parent for digest in moved}):
            _files.fsync_directory(shard)
    else:
        _files.remove_directory(trash)
    return tuple(moved)


def restore(objects: ObjectFiles, gc_id: str) -> int:
    """See Store.restore."""
    trash = objects.root / "trash" / gc_id
    # time_of first: an id that is no id, such as `../objects`, must not become a path.
    found = None if time_of(gc_id) is None else _listed(trash)
    if found is None:
        kept = ", ".join(name for name, _ in _files.list_directory(objects.root / "trash"))
        raise ObjectNotFound(
            f"no trash {gc_id!r} in {objects.root}", hint=f"there is {kept or 'none'}"
        )
    count = 0
    for name, _ in found:
        try:
            digest = Digest(name)
        except InvalidDigest:
            continue  # not ours: it stays, and so does the directory
        try:
            _files.touch(trash / name)
            objects.publish(trash / name, digest)
        except FileNotFoundError:
            if _files.status(trash / name) is not None:
                raise
            continue  # another one restores it too
        count += 1
    with suppress(OSError):  # the objects are back and durable: what is empty harms nobody
        _files.remove_directory(trash)
    return count


def recover(objects: ObjectFiles, digest: Digest, *, dry_run: bool) -> bool:
    """See Store._recover."""
    if _files.status(objects.path(digest)) is not None:
        return False
    for name, kind in _files.list_directory(objects.root / "trash"):
        copy = objects.root / "trash" / name / digest.hex
        if kind != "directory" or not _is_copy(copy, digest):
            continue
        if not dry_run:
            _files.touch(copy)
            objects.publish(copy, digest)
        return True
    return False


def _is_copy(path: Path, digest: Digest) -> bool:
    try:
        return _files.sha256(path) == digest.hex
    except OSError:  # not there, no file, or not to be read
        return False


def purge(root: Path, now: datetime) -> None:
    """See Store._purge."""
    for name, kind in _files.list_directory(root / "trash"):
        then = time_of(name)
        if kind == "directory" and then is not None and now - then > TRASH_AGE:
            _remove(root / "trash" / name)
    # By the clock of the machine and not by `now`: others are writing in there.
    oldest = (_process.clock() - TEMPORARY_AGE.total_seconds()) * 1e9
    for name, kind in _files.list_directory(root / "tmp"):
        found = _files.status(root / "tmp" / name)
        if kind != "directory" and found is not None and found.mtime_ns < oldest:
            _files.remove(root / "tmp" / name)


def _listed(directory: Path) -> list[tuple[str, _files.Kind]] | None:
    """What is in a directory; None where there is none, or a link to one, which is not ours."""
    found = _files.status(directory)
    if found is None or found.kind != "directory":
        return None
    try:
        return _files.list_directory(directory)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remove(directory: Path) -> None:
    for name, kind in _listed(directory) or ():
        if kind == "directory":
            _remove(directory / name)
        else:
            _files.remove(directory / name)
    _files.remove_directory(directory)
