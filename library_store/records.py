"""The small values a store hands out: log entries, problems, results."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, TypeAlias, final

from library_store.digest import Digest
from library_store.errors import InvalidDigest, InvalidName, RefCorrupt
from library_store.names import Ref

Children: TypeAlias = Callable[[Digest, bytes], Iterable[Digest]]
"""What an object refers to. How a store follows manifests without knowing what a manifest is.

It answers () for an object that refers to nothing, and may raise for one it cannot understand.
"""

Sizes: TypeAlias = Callable[[Digest, bytes], Mapping[Digest, int]]
"""What an object says of the sizes, in bytes, of objects that it refers to."""

ProblemKind: TypeAlias = Literal["corrupt", "missing", "unreadable", "foreign"]


@final
@dataclass(frozen=True, slots=True)
class LogEntry:
    """One move of one ref. `old` or `new` is None where the ref was absent."""

    ref: Ref
    when: str  # UTC, ISO 8601, to the microsecond: 2026-01-31T12:00:00.000000Z
    old: Digest | None
    new: Digest | None
    reason: str = ""

    @property
    def time(self) -> datetime:
        """`when`, as an aware datetime."""
        return datetime.fromisoformat(self.when)


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a store.

    `corrupt`: bytes that do not hash to their name. `missing`: a ref or an object refers to it and
    it is not there. `unreadable`: the disk, or whoever reads manifests, refuses. `foreign`: a file
    that is not the store's. `refs` are the refs that cannot be used because of it. `repairable` is
    whether `repair` would do something about it.
    """

    kind: ProblemKind
    digest: Digest | None
    refs: tuple[Ref, ...]
    detail: str
    hint: str
    repairable: bool = False


@final
@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found: how many objects were hashed, and what is wrong."""

    checked: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@final
@dataclass(frozen=True, slots=True)
class Repair:
    """What `repair` did. `report` is how things are afterwards.

    `quarantined` are the objects whose damaged bytes were moved aside, `repaired` those of which
    an intact copy was put back; `mended` says in words what was done to refs and logs.
    """

    report: Report
    quarantined: tuple[Digest, ...]
    repaired: tuple[Digest, ...]
    mended: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class GcResult:
    """What `gc` removed (or would have, in a dry run).

    `id` is what `restore` takes; None where nothing was moved to the trash. `bytes` is the size of
    the removed objects, `kept` the number of objects that stay.
    """

    id: str | None
    removed: tuple[Digest, ...]
    bytes: int
    kept: int


MAX_LINE: Final = 64 * 1024
"""Bytes of one entry of a log."""

_NOT_AN_ENTRY: Final = (
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
    InvalidName,
    InvalidDigest,
)
_LOG_KEYS: Final = {"when", "ref", "old", "new", "reason"}


def move_out(path: Path) -> str:
    """What to type to have a file that is not the store's out of it."""
    return f"mv -n {shlex.quote(str(path))} ~/"


def timestamp(moment: datetime | None = None) -> str:
    """`moment` (now, if None) as UTC ISO 8601, of one width: text order is time order."""
    moment = datetime.now(UTC) if moment is None else moment.astimezone(UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def encode_entry(entry: LogEntry) -> bytes:
    """One line of `log/<name>.jsonl`."""
    record = {
        "when": entry.when,
        "ref": str(entry.ref),
        "old": None if entry.old is None else str(entry.old),
        "new": None if entry.new is None else str(entry.new),
        "reason": entry.reason,
    }
    return json.dumps(record).encode("ascii") + b"\n"


def decode_log(data: bytes, *, source: str) -> list[LogEntry]:
    """Read a log, oldest entry first. Raises RefCorrupt with the number of the bad line.

    What follows the last newline is an append that never finished, was never acknowledged, and is
    ignored.
    """
    lines = enumerate(io.BytesIO(data), start=1)
    return [
        _decode_entry(line, where=f"{source} line {number}")
        for number, line in lines
        if line.endswith(b"\n")
    ]


def _decode_entry(line: bytes, *, where: str) -> LogEntry:
    try:
        if len(line) > MAX_LINE:
            raise ValueError(f"it has {len(line):,} bytes; an entry has {MAX_LINE:,} at most")
        record = json.loads(line)
        if not isinstance(record, dict) or set(record) != _LOG_KEYS:
            raise ValueError(f"wanted an object with the keys {sorted(_LOG_KEYS)}")
        if not isinstance(record["reason"], str):
            raise ValueError("'reason' is not text")
        entry = LogEntry(
            ref=Ref.parse(record["ref"]),
            when=record["when"],
            old=None if record["old"] is None else Digest.parse(record["old"]),
            new=None if record["new"] is None else Digest.parse(record["new"]),
            reason=record["reason"],
        )
        if entry.time.tzinfo is None:
            raise ValueError("'when' has no time zone")
    except _NOT_AN_ENTRY as error:
        hint = "move the file aside to go on without this history; the refs themselves are unharmed"
        raise RefCorrupt(f"{where} is not a log entry: {error!s:.300}", hint=hint) from error
    return entry
