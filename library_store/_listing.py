"""Listing refs at the price of one stat for each instead of one read.

    listed, seen = look(refs, root, seen=None)      # reads every ref
    listed, seen = look(refs, root, seen)           # reads what has changed

`seen` is made of plain dicts, lists, numbers and text, for whoever can keep it. Whether it is kept
changes no answer: what it says of a file or directory holds only while inode, size and both times
are the same, and what changed less than SETTLED before it was looked at is not in it, since it
could change again without a new time (git calls this "racy").
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from library_store import _files, _process
from library_store.errors import InvalidName
from library_store.names import Ref

if TYPE_CHECKING:
    from library_store._refs import RefFiles

Seen: TypeAlias = dict[str, Any]
"""{directory below refs/: [stamp, names of directories, {tag: [stamp, hex] or None}]}"""

SETTLED: Final = 2_000_000_000
"""Nanoseconds. Longer than the steps in which any file system counts time."""


class Unusual(Exception):  # noqa: N818 -- no error: a reason to look more slowly
    """Something is among the refs, or happened to them, that only reading them all can judge."""


def look(refs: RefFiles, root: Path, seen: Seen | None) -> tuple[dict[tuple[str, str], str], Seen]:
    """Every (name, tag) with the hex of its digest, sorted, and what to give to the next look.

    The second is `seen` itself where there is nothing new to keep. Raises Unusual, and OSError.
    """
    top, seen = f"{root}/refs", seen or {}
    newest = int(_process.clock() * 1e9) - SETTLED
    listed: dict[tuple[str, str], str] = {}
    now: Seen = {}
    fresh = False
    waiting = [""]
    while waiting:
        name = waiting.pop()
        try:
            stamp = _files.stamp(f"{top}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            raise Unusual(name) from None
        known = seen.get(name)
        if known is not None and known[0] == stamp:
            _, below, tags = known
        else:
            below, present = _entries(top, name)
            tags = {tag: known[2].get(tag) if known else None for tag in present}
            fresh = True
        held = tags  # the same object where nothing is new, as it is nearly everywhere
        for tag, entry in tags.items():
            try:
                there = _files.stamp(f"{top}/{name}/{tag}")
            except (FileNotFoundError, NotADirectoryError):
                raise Unusual(name) from None
            if entry is None or entry[0] != there:
                entry = [there, _read(refs, name, tag)]
                settled = _is_settled(there, newest)
                held = {**held, tag: entry if settled else None}
                fresh = fresh or settled
            listed[name, tag] = entry[1]
        if below:
            waiting.extend(f"{name}/{one}" if name else one for one in below)
        if known is not None and held is known[2] and below is known[1]:
            now[name] = known
        elif _is_settled(stamp, newest):
            now[name] = [stamp, below, held]
    fresh = fresh or len(now) != len(seen)
    return dict(sorted(listed.items())), now if fresh else seen


def _is_settled(stamp: list[int], newest: int) -> bool:
    return stamp[2] < newest and stamp[3] < newest


def _entries(top: str, name: str) -> tuple[list[str], list[str]]:
    below: list[str] = []
    tags: list[str] = []
    for entry, kind in _files.list_directory(Path(top, name)):
        if kind == "directory":
            below.append(entry)
        elif kind == "file" and not entry.startswith("."):
            tags.append(entry)
        elif kind != "file":
            raise Unusual(entry)
    return below, tags


def _read(refs: RefFiles, name: str, tag: str) -> str:
    try:
        digest = refs.read(Ref(name, tag))
    except InvalidName:
        raise Unusual(f"{name}:{tag}") from None
    if digest is None:
        raise Unusual(f"{name}:{tag}")
    return digest.hex
