"""A POSIX file system in memory that `library_store` runs on, for power cuts and killed processes.

`installed()` puts a `Disk` where `library_store._files` has the module `os`. It knows the calls
that a local store makes and no other: whatever else is asked for is an AttributeError, so nothing
gets past it to a real disk. Time, process ids and random names come from it too, so that two runs
of the same calls are the same.

What a power cut may leave of what was written is in `tests/store/power.py`. A process that is
killed loses nothing: what it wrote is there for the next (`Disk.kill_at`).

Not modelled: permissions, symlinks, devices, ctime, and what an `fsync` that failed has forgotten.
"""

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from types import SimpleNamespace, TracebackType
from typing import Any, Final, Protocol

import pytest

from library_store import _collect, _files, _lock, _objects, _process, local, records
from tests.store.image import EMPTY, ROOT, Image
from tests.store.text_path import TextPath

START: Final = 1_700_000_000_000_000_000  # ns; when a disk is made
SECOND: Final = 1_000_000_000
DAY: Final = 86_400 * SECOND

_TICK: Final = 1_000_000  # each change takes a millisecond, so that no two have one time
_MACHINE: Final = "machine"

Path = str | os.PathLike[str]


class Killed(BaseException):
    """The process is no more: nothing that it does from here on reaches the disk."""


class Blocked(BaseException):
    """A lock is held by one who will not go on while this one waits."""


class Journal(Protocol):
    """Who wants to know of each change, and of what was synced."""

    def entry(self, directory: int, name: str, child: int | None) -> None: ...
    def made(self, inode: int, mtime: int | None) -> None: ...
    def wrote(self, inode: int, data: bytes, mtime: int) -> None: ...
    def touched(self, inode: int, mtime: int) -> None: ...
    def synced(self, inode: int) -> None: ...
    def changed(self, call: str) -> None: ...


class Disk:
    """Stands in for the module `os`. One at a time; `load` makes it another disk."""

    def __init__(self) -> None:
        self.now = START
        self.pid = 100
        self.journal: Journal | None = None
        self.watch: Callable[[str, str], None] | None = None
        """Called before every call that may change something, with its name and the path."""
        self.hard_links = True
        self.others: frozenset[int] = frozenset()  # processes that run beside this one
        self._names = itertools.count(1)
        self.load(EMPTY)

    def new(self) -> None:
        """Be an empty disk, at the time and with the names that the first one had."""
        self.now, self.pid, self.hard_links = START, 100, True
        self.others = frozenset()
        self._names = itertools.count(1)
        self.load(EMPTY)

    def load(self, image: Image) -> None:
        """Be the disk that holds `image`. What is changed here is not changed there."""
        self.directories = dict(image.directories)
        self.files = dict(image.files)
        self._inode = max(max(self.directories), max(self.files, default=0))
        self._open: dict[int, list[int]] = {}  # descriptor: [inode, position, append]
        self._fd = 2
        self.journal = self.watch = None
        self._dead = False

    def image(self) -> Image:
        """What is here now, as it would be after a `sync` of everything."""
        return Image(dict(self.directories), dict(self.files))

    def next_process(self, *, after: int) -> None:
        """The process is gone, and `after` ns later another one runs."""
        self.pid += 1
        self.now += after
        self.watch = None
        self._dead = False

    def kill_at(self, nth: int) -> None:
        """Kill this process right before its n-th change from here on; the first is 1."""
        left = nth

        def watch(call: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._dead = True

        self.watch = watch

    def time(self) -> datetime:
        return datetime.fromtimestamp(self.now / SECOND, UTC)

    def find(self, path: str) -> int | None:
        """The inode at `path`, if any."""
        try:
            return self._find(path)
        except OSError:
            return None

    def overwrite(self, path: str, data: bytes) -> None:
        """Damage: other bytes in a file, and nobody was told."""
        inode = self._find(path)
        self.files[inode] = (data, self.files[inode][1])

    # --- the calls ---------------------------------------------------------------------------

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        text = str(path)
        if flags & os.O_CREAT:
            self._before("create", text)
        directory, name = self._parent(text)
        inode = self.directories[directory].get(name)
        if inode is None:
            if not flags & os.O_CREAT:
                raise _error(errno.ENOENT, text)
            inode = self._create(directory, name, text)
        elif flags & os.O_EXCL:
            raise _error(errno.EEXIST, text)
        elif inode in self.directories:
            if flags & (os.O_WRONLY | os.O_RDWR):
                raise _error(errno.EISDIR, text)
        elif flags & os.O_DIRECTORY:
            raise _error(errno.ENOTDIR, text)
        elif flags & os.O_TRUNC:
            self._write(inode, b"", "truncate", text)
        self._fd += 1
        self._open[self._fd] = [inode, 0, flags & os.O_APPEND]
        return self._fd

    def close(self, fd: int) -> None:
        del self._open[fd]

    def read(self, fd: int, count: int) -> bytes:
        inode, position, _ = file = self._open[fd]
        data = self.files[inode][0][position : position + count]
        file[1] += len(data)
        return data

    def readv(self, fd: int, buffers: list[memoryview]) -> int:
        data = self.read(fd, len(buffers[0]))
        buffers[0][: len(data)] = data
        return len(data)

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        return self.files[self._open[fd][0]][0][offset : offset + count]

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self._before("write", "")
        inode, position, append = file = self._open[fd]
        old = self.files[inode][0]
        if append:
            position = len(old)
        new = old[:position] + bytes(data) + old[position + len(data) :]
        self._write(inode, new, "write", "")
        file[1] = position + len(data)
        return len(data)

    def ftruncate(self, fd: int, size: int) -> None:
        self._before("ftruncate", "")
        inode = self._open[fd][0]
        self._write(inode, self.files[inode][0][:size], "ftruncate", "")

    def fsync(self, fd: int) -> None:
        self._before("fsync", "")
        if self.journal is not None:
            self.journal.synced(self._open[fd][0])

    def fstat(self, fd: int) -> Any:
        return self._stat(self._open[fd][0])

    def lstat(self, path: Path) -> Any:
        return self._stat(self._find(str(path)))

    def scandir(self, path: Path) -> "_Listing":
        inode = self._find(str(path))
        if inode not in self.directories:
            raise _error(errno.ENOTDIR, str(path))
        entries = self.directories[inode].items()
        return _Listing([_Entry(name, child in self.directories) for name, child in entries])

    def link(self, source: Path, target: Path, *, follow_symlinks: bool = True) -> None:
        self._before("link", str(target))
        inode = self._find(str(source))
        directory, name = self._parent(str(target))
        if not self.hard_links:
            raise _error(errno.EPERM, str(target))
        if name in self.directories[directory]:
            raise _error(errno.EEXIST, str(target))
        self._enter(directory, name, inode)
        self._after("link", str(target))

    def replace(self, source: Path, target: Path) -> None:
        self._before("rename", str(target))
        directory, name = self._parent(str(source))
        inode = self.directories[directory].get(name)
        if inode is None:
            raise _error(errno.ENOENT, str(source))
        onto, named = self._parent(str(target))
        old = self.directories[onto].get(named)
        if old in self.directories:
            raise _error(errno.EISDIR, str(target))
        self._enter(onto, named, inode)
        if old != inode or (onto, named) != (directory, name):
            self._enter(directory, name, None)
        self._after("rename", str(target))

    rename = replace

    def unlink(self, path: Path) -> None:
        self._before("unlink", str(path))
        directory, name = self._parent(str(path))
        inode = self.directories[directory].get(name)
        if inode is None:
            raise _error(errno.ENOENT, str(path))
        if inode in self.directories:
            raise _error(errno.EISDIR, str(path))
        self._enter(directory, name, None)
        self._after("unlink", str(path))

    def utime(self, path: Path, *, follow_symlinks: bool = True) -> None:
        self._before("utime", str(path))
        inode = self._find(str(path))
        self.now += _TICK
        self.files[inode] = (self.files[inode][0], self.now)
        if self.journal is not None:
            self.journal.touched(inode, self.now)
        self._after("utime", str(path))

    def mkdir(self, path: Path) -> None:
        self._before("mkdir", str(path))
        directory, name = self._parent(str(path))
        if name in self.directories[directory]:
            raise _error(errno.EEXIST, str(path))
        inode = self._new()
        self.directories[inode] = {}
        if self.journal is not None:
            self.journal.made(inode, None)
        self._enter(directory, name, inode)
        self._after("mkdir", str(path))

    def makedirs(self, path: Path, *, exist_ok: bool) -> None:
        made = ""
        for part in str(path).split("/")[1:]:
            made += "/" + part
            if self.find(made) is None:
                self.mkdir(made)

    def rmdir(self, path: Path) -> None:
        self._before("rmdir", str(path))
        directory, name = self._parent(str(path))
        inode = self.directories[directory].get(name)
        if inode is None:
            raise _error(errno.ENOENT, str(path))
        if inode not in self.directories:
            raise _error(errno.ENOTDIR, str(path))
        if self.directories[inode]:
            raise _error(errno.ENOTEMPTY, str(path))
        self._enter(directory, name, None)
        self._after("rmdir", str(path))

    def getpid(self) -> int:
        return self.pid

    strerror = staticmethod(os.strerror)
    O_RDONLY, O_WRONLY, O_RDWR = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
    O_CREAT, O_EXCL, O_TRUNC, O_APPEND = os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND
    O_DIRECTORY, O_NOFOLLOW = os.O_DIRECTORY, os.O_NOFOLLOW
    O_NONBLOCK, O_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC

    # --- for the others ----------------------------------------------------------------------

    def map(self, fd: int, size: int, *, access: int) -> bytearray:
        """Stands in for `mmap.mmap` with ACCESS_COPY."""
        return bytearray(self.files[self._open[fd][0]][0][:size])

    def unique(self) -> Any:
        """Stands in for `uuid.uuid4`."""
        return SimpleNamespace(hex=f"{next(self._names):032x}"[::-1])

    def clock(self) -> float:
        return self.now / SECOND

    def pause(self, seconds: float) -> None:
        raise Blocked

    def identity(self) -> tuple[str, int]:
        return _MACHINE, self.pid

    def is_running(self, pid: int) -> bool:
        return pid == self.pid or pid in self.others

    # --- below -------------------------------------------------------------------------------

    def _find(self, path: str) -> int:
        if self._dead:
            raise Killed
        inode = ROOT
        for part in _parts(path):
            entries = self.directories.get(inode)
            if entries is None:
                raise _error(errno.ENOTDIR, path)
            if part not in entries:
                raise _error(errno.ENOENT, path)
            inode = entries[part]
        return inode

    def _parent(self, path: str) -> tuple[int, str]:
        above, _, name = path.rpartition("/")
        inode = self._find(above) if above else ROOT
        if inode not in self.directories:
            raise _error(errno.ENOTDIR, path)
        return inode, name

    def _stat(self, inode: int) -> Any:
        if inode in self.directories:
            return _Status(stat.S_IFDIR, 0, 0, inode)
        data, mtime = self.files[inode]
        return _Status(stat.S_IFREG, len(data), mtime, inode)

    def _new(self) -> int:
        self._inode += 1
        return self._inode

    def _create(self, directory: int, name: str, path: str) -> int:
        inode = self._new()
        self.now += _TICK
        self.files[inode] = (b"", self.now)
        if self.journal is not None:
            self.journal.made(inode, self.now)
        self._enter(directory, name, inode)
        self._after("create", path)
        return inode

    def _write(self, inode: int, data: bytes, call: str, path: str) -> None:
        self.now += _TICK
        self.files[inode] = (data, self.now)
        if self.journal is not None:
            self.journal.wrote(inode, data, self.now)
        self._after(call, path)

    def _enter(self, directory: int, name: str, child: int | None) -> None:
        entries = dict(self.directories[directory])
        if child is None:
            del entries[name]
        else:
            entries[name] = child
        self.directories[directory] = entries
        if self.journal is not None:
            self.journal.entry(directory, name, child)

    def _before(self, call: str, path: str) -> None:
        if self.watch is not None:
            self.watch(call, path)
        if self._dead:
            raise Killed

    def _after(self, call: str, path: str) -> None:
        self.now += _TICK
        if self.journal is not None:
            self.journal.changed(f"{call} {path}")


@dataclass(slots=True)
class _Status:
    st_mode: int
    st_size: int
    st_mtime_ns: int
    st_ino: int


@dataclass(slots=True)
class _Entry:
    name: str
    directory: bool

    def is_dir(self, *, follow_symlinks: bool) -> bool:
        return self.directory

    def is_file(self, *, follow_symlinks: bool) -> bool:
        return not self.directory


class _Listing(list[_Entry]):
    def __enter__(self) -> Iterator[_Entry]:
        return iter(self)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None: ...


@lru_cache(maxsize=1 << 16)
def _parts(path: str) -> tuple[str, ...]:
    return tuple(path.split("/")[1:])


def _error(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)


@contextmanager
def installed() -> Iterator[Disk]:
    """A disk that every local store is on while this lasts."""
    disk = Disk()
    unique = SimpleNamespace(uuid4=disk.unique)

    def timestamp(moment: datetime | None = None) -> str:
        return records.timestamp(disk.time() if moment is None else moment)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_files, "os", disk)
        patch.setattr(_files, "mmap", SimpleNamespace(mmap=disk.map, ACCESS_COPY=0))
        patch.setattr(local, "Path", TextPath)
        for module in (_files, _lock, _collect):
            patch.setattr(module, "uuid", unique)
        for module in (_objects, local):
            patch.setattr(module, "timestamp", timestamp)
        for name in ("clock", "pause", "identity", "is_running"):
            patch.setattr(_process, name, getattr(disk, name))
        yield disk
