"""Every call a local store makes to a file system.

The rest of the store is written in these words, so a simulated file system that loses what was not
synced, or fails the n-th call, has one module to stand in for. What is durable, and when, is
written here: data after `write_synced`, a name after `fsync_directory` of the directory it is in.
"""
# One name for each system call is the point of this module, so pathlib is not used:
# ruff: noqa: PTH102, PTH103, PTH104, PTH105, PTH106, PTH108

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import stat
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Kind = Literal["file", "directory", "other"]

_CHUNK: Final = 1 << 20
_NO_HARD_LINKS: Final = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_DIRECTORY_SYNC: Final = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}


class NotRegularError(OSError):
    """A symlink, directory or device where a file of the store belongs."""


@dataclass(frozen=True, slots=True)
class Status:
    """What `lstat` says. Two statuses of one path are equal while nothing happened to it."""

    kind: Kind
    size: int
    mtime_ns: int
    inode: int


# --- looking ------------------------------------------------------------------------------------


def status(path: Path) -> Status | None:
    """What is at `path`, without following a symlink; None if nothing is."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    kind: Kind = "other"
    if stat.S_ISREG(found.st_mode):
        kind = "file"
    elif stat.S_ISDIR(found.st_mode):
        kind = "directory"
    return Status(kind, found.st_size, found.st_mtime_ns, found.st_ino)


def stamp(path: str) -> list[int]:
    """[inode, size, mtime and ctime in ns] of what is at `path`: equal while nothing happened to
    it. Takes text, since thousands of these make a list."""
    found = os.lstat(path)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def list_directory(path: Path) -> list[tuple[str, Kind]]:
    """Names in a directory, sorted, with what each is. Never follows a symlink."""
    with os.scandir(path) as entries:
        return sorted((entry.name, _kind_of_entry(entry)) for entry in entries)


def read(path: Path, *, limit: int | None = None) -> bytes:
    """The whole file. Raises NotRegularError, or ValueError if it is longer than `limit` bytes."""
    with _opened(path) as (fd, size):
        if limit is not None and size > limit:
            raise ValueError(f"{size} bytes, wanted {limit} at most")
        # Asking for all of it at once makes one copy of a big file and not two.
        pieces = iter(lambda: os.read(fd, max(size, _CHUNK)), b"")
        return b"".join(pieces)


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file, read a piece at a time."""
    with _opened(path) as (fd, _):
        return _hash(fd)


def map_copy(path: Path, *, hashed: bool) -> tuple[memoryview, str | None]:
    """A private, writable mapping of a file, and its hex SHA-256 if `hashed`.

    Writing to it changes this process's copy of a page and never the file. The hash is taken by
    reading the same descriptor: on a failing disk a read is an OSError, while touching the mapping
    is a SIGBUS that no caller can catch.
    """
    with _opened(path) as (fd, size):
        found = _hash(fd) if hashed else None
        if size == 0:  # mmap refuses an empty file
            return memoryview(bytearray()), found
        return memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_COPY)), found


# --- writing ------------------------------------------------------------------------------------


def temporary(directory: Path) -> Path:
    """A path in `directory` that nobody else uses. Creates nothing."""
    return directory / f"{os.getpid()}-{uuid.uuid4().hex}"


def write_synced(path: Path, chunks: Iterable[bytes | memoryview], *, mode: int) -> None:
    """Create a file that must not exist, write it all, and force it to the disk.

    `mode` is under the umask. It may deny writing: the descriptor that creates a file may write to
    it, so there is no moment at which a finished object can be written to. Whatever goes wrong, no
    file is left.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        try:
            for chunk in chunks:
                _write_all(fd, chunk)
            _sync(fd)
        finally:
            _close(fd)
    except BaseException:
        remove(path)
        raise


def create_exclusive(path: Path, data: bytes) -> None:
    """Create a small file that must not exist, without forcing it to the disk: for locks, and for
    logs that have no line yet."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _write_all(fd, data)
    except BaseException:
        remove(path)
        raise
    finally:
        _close(fd)


def length_of_lines(data: bytes) -> int:
    """How long a file of lines is without the append that a crash cut short.

    That has no newline at its end, or zeros where a part of it never got to the disk.
    """
    end = data.rfind(b"\n") + 1
    last = data.rfind(b"\n", 0, max(end - 1, 0)) + 1
    return last if b"\0" in data[last:end] else end


def append_synced(path: Path, line: bytes) -> None:
    """Add a line to a file and force it to the disk; all of it, or none of it.

    A tail that is no whole line is an earlier append that a crash cut short: it is cut off first,
    so that it cannot glue itself to this line, not even where only a part of this is written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags, 0o666)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _not_regular(path)
        end = _end_of_last_line(fd, found.st_size)
        if end != found.st_size:
            os.ftruncate(fd, end)
        _sync(fd)  # the cut, and what one who was killed wrote: no two appends may be torn at once
        try:
            _write_all(fd, line)
            _sync(fd)
        except BaseException:
            os.ftruncate(fd, end)
            raise
    finally:
        _close(fd)


def publish(temp: Path, path: Path) -> None:
    """Give a finished temporary file a name. Raises FileExistsError.

    `temp` is for the caller to remove, once the name is durable: before, a power cut could take
    both names. Without hard links it is gone already.
    """
    try:
        os.link(temp, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # exFAT, some FUSE and network file systems. The window between this check and the rename
        # is harmless for objects: whoever wins it writes the same bytes.
        if status(path) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(temp, path)


def link(path: Path, second: Path) -> bool:
    """Give a file a second name, if it is there and the name is free. False where that cannot be:
    a file system without hard links, a directory, a file of another user."""
    try:
        os.link(path, second)
    except (FileNotFoundError, FileExistsError):
        return True
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return False
    return True


def replace(source: Path, target: Path) -> None:
    """Rename, over whatever file is at `target`."""
    os.replace(source, target)


def touch(path: Path) -> None:
    """Set a file's time to now; durable on return."""
    # By path and not by descriptor: one that was just moved away must not be taken for this one.
    os.utime(path, follow_symlinks=False)
    with _opened(path) as (fd, _):
        _sync(fd)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def remove_directory(path: Path) -> bool:
    """Remove a directory if it is empty; whether it is gone. One that somebody fills stays."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            return False
        raise
    return True


def make_root(path: Path) -> None:
    """Make the directory that a store will live in, and its parents; its user may use symlinks."""
    os.makedirs(path, exist_ok=True)


def make_directories(path: Path, *, base: Path) -> None:
    """Make `path` and what is missing between it and `base`, which exists.

    Raises NotADirectoryError if anything on the way is a file or a symlink, so that a library that
    came from somewhere else cannot point a write outside itself.
    """
    made = base
    for part in path.relative_to(base).parts:
        made = made / part
        with suppress(FileExistsError):
            os.mkdir(made)
        found = status(made)
        if found is not None and found.kind != "directory":
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(made))


def fsync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync(fd)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a directory; they order names themselves.
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        _close(fd)


def fsync_up(path: Path, *, base: Path) -> None:
    """Sync `path` and every directory above it up to `base`.

    Always, and not only when this process made one of them: another one may have made it a moment
    ago and not have synced it yet, and what is acknowledged below it must not vanish with it.
    """
    while True:
        fsync_directory(path)
        if path == base:
            return
        path = path.parent


def fsync_to_top(path: Path) -> None:
    """Sync `path` and every directory above it, except those that only others may read."""
    fsync_directory(path)
    for above in path.parents:
        with suppress(PermissionError):
            fsync_directory(above)


# --- below --------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """A descriptor and the size of a regular file that is not reached through a final symlink."""
    try:  # O_NONBLOCK: opening a FIFO that somebody left there must not hang
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise _not_regular(path) from error
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _not_regular(path)
        yield fd, found.st_size
    finally:
        _close(fd)


def _not_regular(path: Path) -> NotRegularError:
    return NotRegularError(errno.EINVAL, "not a regular file", str(path))


def _close(fd: int) -> None:
    """Give a descriptor back. It is gone whatever this says, and what it may say of lost data a
    sync has said before; an error here would undo what is durable already."""
    with suppress(OSError):
        os.close(fd)


def _hash(fd: int) -> str:
    hasher, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    while count := os.readv(fd, [buffer]):
        hasher.update(buffer[:count])
    return hasher.hexdigest()


def _write_all(fd: int, data: bytes | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def _sync(fd: int) -> None:
    if sys.platform == "darwin":  # there, fsync leaves the data in the drive's cache
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def _end_of_last_line(fd: int, size: int) -> int:
    tail, start = b"", size
    while start > 0 and tail.count(b"\n") < 2:
        begin = max(0, start - 4096)
        tail = os.pread(fd, start - begin, begin) + tail
        start = begin
    return start + length_of_lines(tail)


def _kind_of_entry(entry: os.DirEntry[str]) -> Kind:
    if entry.is_dir(follow_symlinks=False):
        return "directory"
    return "file" if entry.is_file(follow_symlinks=False) else "other"
