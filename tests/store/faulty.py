"""A disk on which a chosen call fails: below one directory, whoever makes it.

The calls of `os` are counted, the files that `open` and pathlib give, mappings, and what sqlite3
is asked. The rest of the machine is left alone, so that a test can be run on such a disk within a
process that goes on.
"""

import errno
import io
import mmap
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, final
from unittest import mock

CODES = {name: getattr(errno, name) for name in ("EIO", "ENOSPC", "EACCES", "EMFILE", "EINTR")}
SHORT, FSYNC = "short write", "fsync"  # count writes only, and syncs only
KINDS = (*CODES, SHORT, FSYNC)

_ON_PATHS = (
    *("open", "stat", "lstat", "scandir", "listdir", "readlink", "mkdir", "rmdir", "unlink"),
    *("remove", "rename", "replace", "link", "utime", "chmod"),
)
_ON_DESCRIPTORS = ("fstat", "read", "readv", "pread", "write", "fsync", "ftruncate")
# What sqlite3 says of such a disk.
_SQLITE = {
    "EIO": "disk I/O error",
    "ENOSPC": "database or disk is full",
    "EACCES": "attempt to write a readonly database",
    "EMFILE": "unable to open database file",
    "EINTR": "interrupted",
}


class Fault(NamedTuple):
    """The `nth` call of those that `kind` counts fails so."""

    kind: str
    nth: int


@final
class Disk:
    """What happened on the disk: `calls`, every one of them, and `failed`, those that did."""

    def __init__(self, root: Path, faults: tuple[Fault, ...], full_from: int | None) -> None:
        self.root = str(root)
        self.faults = faults
        self.full_from = full_from
        self.calls: list[str] = []
        self.failed: list[str] = []
        self.open: dict[int, str] = {}  # descriptors of files of this disk
        self._counts = {SHORT: 0, FSYNC: 0}

    def holds(self, what: Any) -> bool:
        """Whether a path or a descriptor is on this disk."""
        if isinstance(what, int):
            return what in self.open
        try:
            path = os.path.abspath(os.fsdecode(what))  # noqa: PTH100 -- pathlib is what is watched
        except TypeError:  # `scandir()` of here
            return False
        return path == self.root or path.startswith(self.root + os.sep)

    def call(self, name: str, what: Any) -> str | None:
        """Count one call. Raises what it is to fail with; SHORT where a write is to be cut."""
        self.calls.append(name)
        turns = {kind: len(self.calls) for kind in CODES}
        for kind, counted in ((SHORT, "write"), (FSYNC, "fsync")):
            if name == counted:
                self._counts[kind] += 1
                turns[kind] = self._counts[kind]
        full = self.full_from is not None and len(self.calls) >= self.full_from
        if full and name in ("write", "mkdir", "link", "fsync", "sqlite"):
            self._fail(name, what, "ENOSPC")
        for kind, nth in self.faults:
            if turns.get(kind) == nth:
                if kind == SHORT:
                    self.failed.append(f"{kind} {what}")
                    return SHORT
                self._fail(name, what, "EIO" if kind == FSYNC else kind)
        return None

    def _fail(self, name: str, what: Any, kind: str) -> None:
        where = self.open.get(what, what) if isinstance(what, int) else what
        self.failed.append(f"{name} {where}")
        if name == "sqlite":
            raise sqlite3.OperationalError(_SQLITE[kind])
        path = () if isinstance(what, int) else (os.fsdecode(what),)
        raise OSError(CODES[kind], os.strerror(CODES[kind]), *path)


@contextmanager
def failing(root: Path, *faults: Fault, full_from: int | None = None) -> Iterator[Disk]:
    """Within it, the disk below `root` has these faults. With `full_from` it is full from that
    call on, and stays so."""
    disk = Disk(root, faults, full_from)
    patches = [mock.patch.object(os, name, _on_path(disk, name)) for name in _ON_PATHS]
    patches += [mock.patch.object(os, name, _on_descriptor(disk, name)) for name in _ON_DESCRIPTORS]
    patches.append(mock.patch.object(os, "close", _close(disk)))
    opened = _open(disk)
    patches += [mock.patch.object(io, "open", opened), mock.patch("builtins.open", opened)]
    patches.append(mock.patch.object(mmap, "mmap", _mmap(disk)))
    patches.append(mock.patch.object(sqlite3, "connect", _connect(disk)))
    with _all(patches):
        yield disk


@contextmanager
def _all(patches: list[Any]) -> Iterator[None]:
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def _on_path(disk: Disk, name: str) -> Callable[..., Any]:
    real = getattr(os, name)

    def call(*args: Any, **options: Any) -> Any:
        # Of the two paths of a rename or a link either may be here; a `dir_fd` goes with a name.
        on = disk.open if options.get("dir_fd") is not None else None
        here = options["dir_fd"] in on if on is not None else any(map(disk.holds, args[:2]))
        if not here:
            return real(*args, **options)
        disk.call(name, args[0])
        found = real(*args, **options)
        if name == "open":
            disk.open[found] = os.fsdecode(args[0])
        return _Entries(disk, found, args[0]) if name == "scandir" else found

    return call


@final
class _Entries:
    """An open directory; its second half, or its end, is one more call."""

    def __init__(self, disk: Disk, real: Any, path: Any) -> None:
        with real:
            self._entries = list(real)
        self._disk, self._path = disk, path

    def __enter__(self) -> "_Entries":
        return self

    def __exit__(self, *_: object) -> None:
        self._entries = []

    close = __exit__

    def __iter__(self) -> Iterator[Any]:
        half = len(self._entries) // 2
        yield from self._entries[:half]
        self._disk.call("readdir", self._path)
        yield from self._entries[half:]


def _on_descriptor(disk: Disk, name: str) -> Callable[..., Any]:
    real = getattr(os, name)

    def call(fd: int, *args: Any) -> Any:
        if not disk.holds(fd):
            return real(fd, *args)
        if disk.call(name, fd) == SHORT:
            return real(fd, _half(args[0]))
        return real(fd, *args)

    return call


def _half(data: Any) -> memoryview:
    view = memoryview(data).cast("B")
    return view[: max(1, len(view) // 2)]


def _close(disk: Disk) -> Callable[[int], None]:
    real = os.close

    def call(fd: int) -> None:
        real(fd)  # Linux closes it, whatever it says
        path = disk.open.pop(fd, None)
        if path is not None:
            disk.call("close", path)

    return call


def _open(disk: Disk) -> Callable[..., Any]:
    real = io.open

    class Raw(io.FileIO):
        """A file whose calls are counted. What buffers it calls these."""

        path = ""

        def readinto(self, buffer: Any, /) -> int:
            disk.call("read", self.path)
            return super().readinto(buffer)

        def readall(self) -> bytes:
            disk.call("read", self.path)
            return super().readall()

        def write(self, data: Any, /) -> int:
            return super().write(_half(data) if disk.call("write", self.path) == SHORT else data)

        def close(self) -> None:
            if self.closed:
                return
            disk.open.pop(self.fileno(), None)
            super().close()
            disk.call("close", self.path)

    def call(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        **options: Any,
    ) -> Any:
        if not disk.holds(file):
            return real(file, mode, buffering, encoding, errors, newline, **options)
        if not isinstance(file, int):  # a descriptor was counted when it was opened
            disk.call("open", file)
        raw = Raw(file, mode.translate({ord("b"): None, ord("t"): None}))
        raw.path = disk.open[file] if isinstance(file, int) else os.fsdecode(file)
        disk.open[raw.fileno()] = raw.path
        if buffering == 0:
            return raw
        if "+" in mode:
            binary: Any = io.BufferedRandom(raw)
        else:
            binary = io.BufferedReader(raw) if "r" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)

    return call


def _mmap(disk: Disk) -> type[mmap.mmap]:
    class Mapping(mmap.mmap):
        def __new__(cls, fd: int, *args: Any, **options: Any) -> "Mapping":
            if disk.holds(fd):
                disk.call("mmap", fd)
            return super().__new__(cls, fd, *args, **options)

    return Mapping


def _connect(disk: Disk) -> Callable[..., Any]:
    real = sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, *args: Any, **options: Any) -> Any:
            disk.call("sqlite", "execute")
            return super().execute(*args, **options)

        def executemany(self, *args: Any, **options: Any) -> Any:
            disk.call("sqlite", "executemany")
            return super().executemany(*args, **options)

        def commit(self) -> None:
            disk.call("sqlite", "commit")
            super().commit()

        def __exit__(self, *error: Any) -> Any:
            if error[0] is None:
                try:
                    disk.call("sqlite", "commit")
                except sqlite3.Error:
                    self.rollback()
                    raise
            return super().__exit__(*error)

    def call(path: Any, *args: Any, **options: Any) -> Any:
        if not disk.holds(path):
            return real(path, *args, **options)
        disk.call("sqlite", path)
        return real(path, *args, factory=Connection, **options)

    return call


def count(root: Path, act: Callable[[], Any]) -> Disk:
    """What `act` does on a disk without a fault."""
    with failing(root) as disk:
        act()
    return disk


def schedule(disk: Disk, *, rounds: int, turn: int = 0) -> list[Fault]:
    """Faults for every call that was made: each with `rounds` of the codes, which take turns; each
    write cut short, and each sync failing."""
    codes = tuple(CODES)
    found = [
        Fault(codes[(nth + turn + 2 * i) % len(codes)], nth)
        for nth in range(1, len(disk.calls) + 1)
        for i in range(min(rounds, len(codes)))
    ]
    found += [Fault(SHORT, nth) for nth in range(1, disk.calls.count("write") + 1)]
    found += [Fault(FSYNC, nth) for nth in range(1, disk.calls.count("fsync") + 1)]
    return found


def pairs(disk: Disk, *, number: int, seed: int) -> list[tuple[Fault, Fault]]:
    """Two faults in one command, at random."""
    generator = random.Random(seed)
    last = len(disk.calls)
    found: list[tuple[Fault, Fault]] = []
    for _ in range(number):
        first, second = sorted(generator.sample(range(1, last + last // 2 + 2), 2))
        kinds = generator.choices(tuple(CODES), k=2)
        found.append((Fault(kinds[0], first), Fault(kinds[1], second)))
    return found


def lay(template: Path, root: Path) -> None:
    """Make `root` what `template` is, with its times. What is the same already stays, since the
    same few files change again and again."""
    root.mkdir(exist_ok=True)
    wanted = {entry.name: entry for entry in os.scandir(template)}
    found = {entry.name: entry for entry in os.scandir(root)}
    for name, entry in found.items():
        if name not in wanted:
            remove(root / name)
            continue
        if entry.is_file() != wanted[name].is_file():
            remove(root / name)
    for name, entry in wanted.items():
        if entry.is_dir():
            fresh = name not in found
            lay(template / name, root / name)
            if fresh:
                shutil.copystat(entry.path, root / name)
        elif name not in found or not _same(entry.stat(), found[name].stat()):
            (root / name).unlink(missing_ok=True)
            shutil.copy2(entry.path, root / name)


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def remove(path: Path) -> None:
    """Remove a file or a tree."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
