"""Steps of the protocol, each taken away: by an edit of the source of the function that has it."""

import __future__

import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import pytest

from library_store import LocalStore, Store, _files, _lock, _mend, _objects, _trash
from library_store._objects import ObjectFiles
from library_store._refs import RefFiles

Change: TypeAlias = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    """A protocol with a step less, and the check that has to notice it."""

    name: str
    check: str
    changes: tuple[Change, ...]


def edit(owner: Any, name: str, *pairs: tuple[str, str]) -> Change:
    """`owner.name` with the one place that says `old` saying `new`, for each pair of them."""
    module = owner if inspect.ismodule(owner) else sys.modules[owner.__module__]

    def change(patch: pytest.MonkeyPatch) -> None:
        source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
        for old, new in pairs:
            if source.count(old) != 1:
                raise ValueError(f"{name} has {source.count(old)} times {old!r}, wanted 1")
            source = source.replace(old, new)
        flags = __future__.annotations.compiler_flag
        code = compile(source, f"<{name}, changed>", "exec", flags)
        made: dict[str, Any] = {}
        exec(code, vars(module), made)
        patch.setattr(owner, name, made[name])

    return change


def without(owner: Any, name: str, old: str) -> Change:
    """`owner.name` without the statements `old`."""
    return edit(owner, name, (old, "pass\n" if old.endswith("\n") else "pass"))


def _refs_in_place(patch: pytest.MonkeyPatch) -> None:
    rename = _files.replace

    def replace(source: Any, target: Any) -> None:
        if "/refs/" not in str(target):
            rename(source, target)
            return
        data = _files.read(source)
        flags = _files.os.O_WRONLY | _files.os.O_CREAT | _files.os.O_TRUNC
        fd = _files.os.open(target, flags, 0o666)
        _files.os.write(fd, data)
        _files.os.fsync(fd)
        _files.os.close(fd)

    patch.setattr(_files, "replace", replace)


_OBJECT_IN_PLACE: Final = """_files.make_directories(self.path(digest).parent, base=self.directory)
        _files.write_synced(self.path(digest), [whole], mode=0o444)
        _files.fsync_up(self.path(digest).parent, base=self.directory)
        return digest
"""
_LINE: Final = "self._refs.append(LogEntry(ref, timestamp(), old, new, reason))\n"
_WRITE: Final = "self._refs.write(ref, new)\n"


def _mutant(name: str, check: str, *changes: Change) -> Mutant:
    return Mutant(name, check, changes)


MUTANTS: Final = [
    # what is synced
    _mutant("data is not synced", "put", without(_files, "write_synced", "_sync(fd)\n")),
    _mutant("data is synced once it has its name", "put",
            without(_files, "write_synced", "_sync(fd)\n"),
            edit(ObjectFiles, "publish", ("base=self.directory)\n    _files.remove",
                 "base=self.directory)\n    _files.touch(path)\n    _files.remove"))),
    _mutant("a shard is not synced", "put",
            edit(ObjectFiles, "publish", ("_files.fsync_up(path.parent, base=self.directory)",
                 "_files.fsync_directory(self.directory)"))),
    _mutant("a new shard's name is not synced", "put",
            edit(ObjectFiles, "publish", ("_files.fsync_up(path.parent, base=self.directory)",
                 "_files.fsync_directory(path.parent)"))),
    _mutant("a ref's directory is not synced", "first ref",
            edit(RefFiles, "write", ("self._sync_up(path.parent)",
                 "self._sync_up(path.parent.parent)"))),
    _mutant("what is above a ref's directory is not synced", "first ref",
            edit(RefFiles, "write", ("self._sync_up(path.parent)", "self._sync(path.parent)"))),
    _mutant("a removal is not synced", "remove",
            edit(RefFiles, "_remove", ("self._sync(directory)\n    # rmdir", "# rmdir"))),
    _mutant("a log line is not synced", "first ref",
            edit(_files, "append_synced", ("_write_all(fd, line)\n            _sync(fd)",
                 "_write_all(fd, line)"))),
    _mutant("a log's directory is not synced", "first ref",
            without(RefFiles, "append", '_files.fsync_up(path.parent, base=self.root / "log")')),
    _mutant("what is above a log's directory is not synced", "first ref",
            edit(RefFiles, "append", ('_files.fsync_up(path.parent, base=self.root / "log")',
                 "_files.fsync_directory(path.parent)"))),
    _mutant("a log is made by its first line", "first ref",
            edit(RefFiles, "append", ("_files.status(path) is None", "False"))),
    _mutant("a log is not synced before a line is added", "torn log",
            edit(_files, "append_synced", ("        _sync(fd)  #", "        #"))),
    _mutant("quarantine is not synced", "quarantine",
            without(_objects, "set_aside", '_files.fsync_directory(root / "quarantine")')),
    _mutant("what was moved to quarantine is not synced away", "quarantine",
            without(_objects, "set_aside", "_files.fsync_directory(path.parent)")),
    _mutant("quarantine is not synced before a healing", "heal",
            without(_objects, "keep_aside", '_files.fsync_directory(root / "quarantine")')),
    _mutant("the trash is not synced", "gc",
            without(_trash, "sweep", '_files.fsync_up(trash, base=objects.root / "trash")')),
    _mutant("a collection's name in the trash is not synced", "gc",
            edit(_trash, "sweep", ('_files.fsync_up(trash, base=objects.root / "trash")',
                 "_files.fsync_directory(trash)"))),
    _mutant("a sweep is not synced", "gc",
            without(_trash, "sweep", "_files.fsync_directory(shard)")),
    _mutant("a time is not synced", "put what is old", without(_files, "touch", "_sync(fd)")),
    _mutant("what another one put is not synced", "put, killed",
            without(ObjectFiles, "_is_settled",
                    "_files.fsync_up(path.parent, base=self.directory)")),
    _mutant("what another one moved is not synced", "move, killed",
            without(LocalStore, "move", "self._refs.settle(ref)")),
    _mutant("a store's directories are not synced before FORMAT", "create",
            without(LocalStore, "create", "_files.fsync_to_top(root)")),
    _mutant("what is above a new store is not synced", "create",
            edit(LocalStore, "create", ("_files.fsync_to_top(root)",
                 "_files.fsync_directory(root)"))),
    _mutant("objects/ is not synced", "create",
            without(LocalStore, "create", '_files.fsync_directory(root / "objects")')),
    _mutant("FORMAT is not synced", "create",
            without(LocalStore, "create", "_files.fsync_directory(root)")),
    # in which order
    _mutant("objects are written in their place", "put",
            edit(ObjectFiles, "put", ("_files.write_synced(temp, [whole], mode=0o444)\n",
                 _OBJECT_IN_PLACE))),
    _mutant("refs are written in their place", "first ref", _refs_in_place),
    _mutant("the old name goes before the new one is synced", "restore",
            edit(ObjectFiles, "publish", ("_files.publish(temp, path)",
                 "_files.publish(temp, path); _files.remove(temp)"))),
    _mutant("the log tells of a move before it is made", "first ref",
            edit(LocalStore, "move", (_LINE, "pass\n"),
                 (_WRITE, f"{_LINE}            {_WRITE}"))),
    _mutant("a damaged ref is moved away before it is set again", "repair a ref",
            edit(_mend, "_mend_ref", ("keep_aside(path", "set_aside(path"))),
    _mutant("a damaged log is moved away before it is written again", "repair a log",
            edit(_mend, "_mend_log", ("keep_aside(path", "set_aside(path"))),
    # what is looked at
    _mutant("a torn log is not cut", "torn log",
            edit(_files, "append_synced", ("if end != found.st_size:", "if False:"))),
    _mutant("zeros are taken for a log line", "many moves",
            edit(_files, "length_of_lines", (r'return last if b"\0" in data[last:end] else end',
                 "return end"))),
    _mutant("what a crash left in a ref's way stays", "a name that was a directory",
            edit(RefFiles, "_refuse_collision", ("not _prune(path)", "True"))),
    _mutant("the lock of a dead process is respected", "first ref",
            edit(_lock, "_acquire", ("_is_stale(seen, holder, machine)", "False"))),
    _mutant("a move does not ask for its object before", "a move to nothing",
            edit(LocalStore, "move", ("self._need(ref, new)\n        old", "old"))),
    _mutant("a move does not ask for its object after", "move and gc, the lock lies",
            edit(LocalStore, "move", ("self._need(ref, new)\n            self", "self"))),
    _mutant("a move does not look whether it still has the lock", "a lock is taken over",
            without(LocalStore, "move", "lock.confirm()")),
    _mutant("a move that cannot be logged stays", "a log cannot be written",
            without(LocalStore, "move", "self._take_back(ref, old)")),
    _mutant("a stale lock is removed by whoever finds it", "a stale lock is found by two",
            edit(_lock, "_take_away", ("_files.create_exclusive(claim, b\"\")",
                 "_files.remove(path); return True"))),
    _mutant("gc goes by what it saw before it had the lock", "gc and move",
            edit(Store, "gc", ("not _collect.is_current(self, plan)", "False"))),
    _mutant("gc does not look at the refs after the sweep", "gc and move, the lock lies",
            edit(Store, "gc", ("not self._reach_only(plan.marked)", "False"))),
    _mutant("a sweep does not look before it moves", "gc, and a put meanwhile",
            edit(_trash, "sweep", ("if found.mtime_ns != modified:", "if False:"))),
    _mutant("a sweep does not look after it has moved", "gc and put",
            edit(_trash, "sweep", ("found is not None and found.mtime_ns != modified", "False"))),
    _mutant("a put does not make young", "put what is old",
            without(ObjectFiles, "_is_settled", "_files.touch(path)")),
    _mutant("a restore does not make young", "restore",
            without(_trash, "restore", "_files.touch(trash / name)")),
    _mutant("a put does not read what is there", "heal",
            edit(ObjectFiles, "_is_settled", ("or not self._is_intact(digest)", ""))),
    _mutant("get does not hash", "damage", edit(ObjectFiles, "get", ("Digest.of(data) != digest",
                                                "False"))),
    _mutant("view does not hash", "damage",
            edit(ObjectFiles, "view", ("verify and found != digest.hex", "False"))),
]  # fmt: skip
