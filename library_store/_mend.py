"""Refs and logs that cannot be read: what can be saved of them; the rest goes to quarantine/."""

from __future__ import annotations

from pathlib import Path

from library_store import _files
from library_store._objects import keep_aside, set_aside
from library_store._refs import RefFiles
from library_store.digest import Digest
from library_store.errors import RefCorrupt
from library_store.names import Ref
from library_store.records import Problem, decode_log


def mend(refs: RefFiles) -> tuple[list[str], list[Problem]]:
    """See Store._mend. The caller holds the lock. Logs first: they say where the refs were."""
    done = _mend_logs(refs.root / "log", refs.root)
    lost: list[Problem] = []
    for problem in refs.scan()[1]:
        for ref in problem.refs:
            _mend_ref(refs, ref, done, lost)
    return done, lost


def _mend_logs(directory: Path, root: Path) -> list[str]:
    done: list[str] = []
    for name, kind in _files.list_directory(directory):
        path = directory / name
        where = path.relative_to(root).as_posix()
        if name.endswith(".jsonl"):
            if said := _mend_log(path, root, where):
                done.append(said)
        elif kind == "directory":
            done += _mend_logs(path, root)
        elif kind == "other":
            set_aside(path, root, where.replace("/", "~"))
            done.append(f"{where} is neither a log nor a directory: moved to quarantine/")
    return done


def _mend_log(path: Path, root: Path, where: str) -> str | None:
    try:
        data = _files.read(path)
    except _files.NotRegularError:
        set_aside(path, root, where.replace("/", "~"))
        return f"{where} was not a file: moved to quarantine/"
    lines = data.split(b"\n")[:-1]
    kept = [line for line in lines if _is_entry(line)]
    if len(kept) == len(lines):
        return None
    temp = _files.temporary(root / "tmp")
    _files.write_synced(temp, [line + b"\n" for line in kept], mode=0o666)
    keep_aside(path, root, where.replace("/", "~"))  # so that there is a log at every moment
    _files.replace(temp, path)
    _files.fsync_directory(path.parent)
    return f"{where}: kept {len(kept)} of {len(lines)} lines; moved the file to quarantine/"


def _is_entry(line: bytes) -> bool:
    try:
        decode_log(line + b"\n", source="")
    except RefCorrupt:
        return False
    return True


def _mend_ref(refs: RefFiles, ref: Ref, done: list[str], lost: list[Problem]) -> None:
    where = f"refs/{'/'.join(ref.parts)}"
    path = refs.root / where
    try:
        refs.read(ref)
        return
    except (RefCorrupt, OSError):
        last = _last_place(refs, ref)
    if last is None:
        set_aside(path, refs.root, where.replace("/", "~"))
        detail = f"{where} could not be read and no log says where it was: moved to quarantine/"
        lost.append(Problem("missing", None, (ref,), detail, "set the ref again"))
        return
    keep_aside(path, refs.root, where.replace("/", "~"))  # so that the name is never gone
    refs.write(ref, last)
    done.append(f"{where} is back at {last.short}, where its log says it was")


def _last_place(refs: RefFiles, ref: Ref) -> Digest | None:
    try:
        return refs.last(ref)
    except (RefCorrupt, OSError):
        return None
