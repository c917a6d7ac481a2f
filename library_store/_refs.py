"""Refs and their logs on disk: refs/<name>/<tag> holds a digest, log/<name>.jsonl every move."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from library_store import _files
from library_store.digest import Digest
from library_store.errors import InvalidDigest, InvalidName, RefConflict, RefCorrupt
from library_store.names import Ref
from library_store.records import (
    LogEntry,
    Problem,
    ProblemKind,
    decode_log,
    encode_entry,
    move_out,
)

_LIMIT: Final = 128  # bytes; a ref file is 72 long
_LOG: Final = ".jsonl"
_LOG_LIMIT: Final = 64 << 20  # bytes; 200,000 moves of one name


@final
@dataclass(frozen=True, slots=True)
class RefFiles:
    """The `refs/` and `log/` of the store at `root`. Writers hold the store's lock."""

    root: Path

    def read(self, ref: Ref) -> Digest | None:
        """Where `ref` points; None if there is no such ref. Raises RefCorrupt."""
        path = self._path(ref)
        try:
            text = _files.read(path, limit=_LIMIT).decode("ascii")
            if not text.endswith("\n"):
                raise ValueError("no newline at the end")
            return Digest.parse(text[:-1])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except _files.NotRegularError as error:
            found = _files.status(path)
            if found is None or found.kind == "directory":  # `a:b` where `a/b` is a name
                return None
            raise self._corrupt(ref, error) from error
        except (ValueError, InvalidDigest) as error:
            raise self._corrupt(ref, error) from error

    def write(self, ref: Ref, digest: Digest | None) -> None:
        """Point `ref` at `digest`, or remove it; durable on return. Raises RefConflict."""
        if digest is None:
            self._remove(ref)
            return
        self._refuse_collision(ref)
        path = self._path(ref)
        temp = _files.temporary(self.root / "tmp")
        _files.write_synced(temp, [f"{digest}\n".encode("ascii")], mode=0o666)
        try:
            self._rename(temp, ref)
        except BaseException:
            _files.remove(temp)
            raise
        self._sync_up(path.parent)

    def settle(self, ref: Ref) -> None:
        """Make durable where `ref` is: whoever moved it there may have been killed before that."""
        directory = self._path(ref).parent
        while (found := _files.status(directory)) is None or found.kind != "directory":
            directory = directory.parent
        self._sync_up(directory)

    def scan(self) -> tuple[dict[Ref, Digest], list[Problem]]:
        """Every ref, sorted, and every file that is none."""
        found: dict[Ref, Digest] = {}
        problems: list[Problem] = []
        waiting: list[tuple[str, ...]] = [()]
        while waiting:
            above = waiting.pop()
            directory = self.root.joinpath("refs", *above)
            try:
                entries = _files.list_directory(directory)
            except OSError as error:
                if above and isinstance(error, FileNotFoundError):
                    continue  # the last tag in it was just removed
                if above and isinstance(error, NotADirectoryError):  # and its name made a tag
                    self._scan_file(above[:-1], above[-1], "file", found, problems)
                    continue
                problems.append(_problem("unreadable", f"{directory}: {error}"))
                continue
            for name, kind in entries:
                if kind == "directory":
                    waiting.append((*above, name))
                elif kind == "file" and name.startswith("."):
                    continue  # .DS_Store and its like; the grammar of names excludes them for good
                else:
                    self._scan_file(above, name, kind, found, problems)
        return dict(sorted(found.items())), problems

    def append(self, entry: LogEntry) -> None:
        """Write one move to its log; durable on return. The line is the last that can fail."""
        path = self._log_path(entry.ref.name)
        _files.make_directories(path.parent, base=self.root / "log")
        if _files.status(path) is None:
            with suppress(FileExistsError):  # where the lock lies
                _files.create_exclusive(path, b"")  # so that there is a name to sync
        _files.fsync_up(path.parent, base=self.root / "log")
        _files.append_synced(path, encode_entry(entry))

    def log(self, name: str) -> list[LogEntry]:
        """Every move of `name`, oldest first. Raises RefCorrupt."""
        path = self._log_path(name)
        try:
            data = _files.read(path, limit=_LOG_LIMIT)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except ValueError as error:
            raise RefCorrupt(f"{path} has {error}", hint=f"move {path} aside") from error
        except _files.NotRegularError as error:
            raise RefCorrupt(f"{path} is not a file", hint=f"move {path} aside") from error
        return decode_log(data[: _files.length_of_lines(data)], source=str(path))

    def last(self, ref: Ref) -> Digest | None:
        """Where its log says that `ref` is. Raises RefCorrupt."""
        moves = [entry for entry in self.log(ref.name) if entry.ref == ref]
        return moves[-1].new if moves else None

    def log_names(self) -> list[str]:
        """The names that have a log. Raises OSError or RefCorrupt."""
        found: list[str] = []
        waiting: list[tuple[str, ...]] = [()]
        while waiting:
            above = waiting.pop()
            for name, kind in _files.list_directory(self.root.joinpath("log", *above)):
                if name.endswith(_LOG):  # whatever kind it is: reading it says what is wrong
                    found.append("/".join((*above, name.removesuffix(_LOG))))
                elif kind == "directory":
                    waiting.append((*above, name))
                elif kind == "other":
                    path = self.root.joinpath("log", *above, name)
                    raise RefCorrupt(f"{path} is not a directory", hint=f"move {path} aside")
        return sorted(name for name in found if _is_name(name))

    def _path(self, ref: Ref) -> Path:
        return self.root.joinpath("refs", *ref.parts)

    def _log_path(self, name: str) -> Path:
        *above, last = Ref(name).name.split("/")
        return self.root.joinpath("log", *above, last + _LOG)

    def _scan_file(
        self,
        above: tuple[str, ...],
        name: str,
        kind: _files.Kind,
        found: dict[Ref, Digest],
        problems: list[Problem],
    ) -> None:
        try:
            ref = Ref("/".join(above), name)
        except InvalidName:
            path = self.root.joinpath("refs", *above, name)
            # A symlink may stand for a directory of refs: not following it would leave them out.
            what = "unreadable" if kind == "other" else "foreign"
            problems.append(_problem(what, f"{path} is not a ref", hint=move_out(path)))
            return
        try:
            digest = self.read(ref)
        except (RefCorrupt, OSError) as error:
            hint = error.hint if isinstance(error, RefCorrupt) else None
            problems.append(_problem("unreadable", str(error), ref, hint))
            return
        if digest is not None:
            found[ref] = digest

    def _remove(self, ref: Ref) -> None:
        refs = self.root / "refs"
        directory = self._path(ref).parent
        _files.remove(self._path(ref))
        self._sync(directory)
        # rmdir refuses a directory that somebody has put a ref into meanwhile. It need not be
        # durable: an empty directory is no ref, and `_prune` removes it where it is in the way.
        while directory != refs and _files.remove_directory(directory):
            directory = directory.parent

    def _rename(self, temp: Path, ref: Ref) -> None:
        # What is handled here happens only where the lock lies.
        path = self._path(ref)
        for attempt in range(5):
            try:
                _files.make_directories(path.parent, base=self.root / "refs")
                _files.replace(temp, path)
                return
            except FileNotFoundError:  # removing another tag took our empty directory away
                if attempt == 4:
                    raise
            except (IsADirectoryError, NotADirectoryError):
                self._refuse_collision(ref)  # unless the name that was faster is gone again
                if attempt == 4:
                    raise

    def _sync_up(self, directory: Path) -> None:
        self._sync(directory)
        while directory != self.root / "refs":
            directory = directory.parent
            self._sync(directory)

    def _sync(self, directory: Path) -> None:
        """Sync a directory that another process, where the lock lies, may have removed again."""
        try:
            _files.fsync_directory(directory)
        except (FileNotFoundError, NotADirectoryError):
            if directory == self.root / "refs":
                raise

    def _refuse_collision(self, ref: Ref) -> None:
        """`a:b` is the file refs/a/b and the name `a/b` is that directory: it cannot be both."""
        path, refs = self._path(ref), self.root / "refs"
        found = _files.status(path)
        if found is not None and found.kind == "directory" and not _prune(path):
            taken = path.relative_to(refs).as_posix()
            message = f"{ref} collides with the refs whose name is or starts with {taken}"
            raise RefConflict(message, hint="choose another name or tag")
        for above in path.parents:
            if above == refs:
                return
            found = _files.status(above)
            if found is not None and found.kind == "file":
                *name, tag = above.relative_to(refs).parts
                raise RefConflict(
                    f"{ref} collides with {'/'.join(name)}:{tag}",
                    hint="choose another name or tag",
                )
            if found is not None and found.kind == "other":
                raise RefCorrupt(f"{above} is not a directory", hint=f"move {above} aside")

    def _corrupt(self, ref: Ref, error: Exception) -> RefCorrupt:
        path = self._path(ref)
        hint = f"move {path} aside and set the ref again; {self._log_path(ref.name)} has its moves"
        return RefCorrupt(f"ref {ref} at {path} cannot be read: {error}", hint=hint)


def _prune(directory: Path) -> bool:
    """Remove a tree of empty directories, left by a crash; whether it is gone."""
    try:
        entries = _files.list_directory(directory)
    except FileNotFoundError:
        return True
    for name, kind in entries:
        if kind != "directory" or not _prune(directory / name):
            return False
    return _files.remove_directory(directory)


def _is_name(text: str) -> bool:
    try:
        return Ref(text).name == text
    except InvalidName:
        return False


def _problem(
    kind: ProblemKind, detail: str, ref: Ref | None = None, hint: str | None = None
) -> Problem:
    refs = () if ref is None else (ref,)
    return Problem(kind, None, refs, detail, hint or "check the disk and the permissions")
