"""index.db: what `list` would otherwise read thousands of files for.

    summary   a summary of each manifest, by digest: what it was made from, so it cannot go stale
    listing   what the refs were when they were last listed, see `Store.listing`

Each row has a checksum of its own, since SQLite has none: a damaged one is as if it were not there.
A missing or broken file is made again, in silence; deleting it changes no answer.
"""

import os
import sqlite3
import zlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from adaptlib.experts.codec import Manifest

VERSION = 2
WORTH_KEEPING = 200  # names; fewer are listed as fast without

_TABLES = """
    DROP TABLE IF EXISTS summary;
    DROP TABLE IF EXISTS listing;
    CREATE TABLE summary (digest TEXT PRIMARY KEY, body BLOB, checksum INTEGER);
    CREATE TABLE listing (id INTEGER PRIMARY KEY, body BLOB, checksum INTEGER);
"""
# Not the file's fault: another process is writing, or this one may not, or cannot just now.
_PASSING = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM,
}
_SIDES = ("-journal", "-wal", "-shm")  # files that SQLite puts beside a database
_MAX_VALUE = 64 << 20  # bytes of one value


class Summary(msgspec.Struct, frozen=True):
    """The columns of `list`. `bytes` is the size of the blob, whose digest is `blob`."""

    kind: str
    base: str
    task: str | None
    description: str | None
    rank: int | None
    modules: int
    params: int
    bytes: int
    blob: str

    @classmethod
    def of(cls, manifest: "Manifest") -> "Summary":
        return cls(
            kind=manifest.kind,
            base=manifest.base,
            task=manifest.card.get("task"),
            description=manifest.card.get("description"),
            rank=manifest.rank,
            modules=len(manifest.modules),
            params=manifest.params,
            bytes=manifest.blob.size,
            blob=manifest.blob.digest,
        )


def read(path: Path, digests: Iterable[str]) -> dict[str, Summary]:
    """The summaries there are."""
    wanted = set(digests)
    one = f"WHERE digest = '{next(iter(wanted))}'" if len(wanted) == 1 else ""
    rows = _rows(path, f"SELECT digest, body, checksum FROM summary {one}", wanted)
    with suppress(msgspec.DecodeError, TypeError, AttributeError):
        decode = msgspec.json.Decoder(Summary).decode
        return {
            digest: decode(body)
            for digest, body, checksum in rows
            if digest in wanted and _checksum(digest, body) == checksum
        }
    return {}


def write(path: Path, summaries: Mapping[str, Summary]) -> None:
    """Add rows. It is a cache: where it cannot be written, nothing is lost."""
    rows = [(digest, msgspec.json.encode(summary)) for digest, summary in summaries.items()]
    _insert(
        path,
        "INSERT OR REPLACE INTO summary VALUES (?, ?, ?)",
        [(digest, body, _checksum(digest, body)) for digest, body in rows],
    )


def read_listing(path: Path) -> dict[str, Any] | None:
    """What `write_listing` kept; None where there is nothing."""
    for body, checksum in _rows(path, "SELECT body, checksum FROM listing"):
        with suppress(msgspec.DecodeError, TypeError, AttributeError):
            if _checksum("listing", body) == checksum:
                return msgspec.msgpack.decode(body, type=dict[str, Any])
    return None


def write_listing(path: Path, seen: dict[str, Any]) -> None:
    """Keep what `Store.listing` gave, where there is enough of it to be worth keeping."""
    if len(seen) < WORTH_KEEPING:
        return
    body = msgspec.msgpack.encode(seen)
    row = (1, body, _checksum("listing", body))
    _insert(path, "INSERT OR REPLACE INTO listing VALUES (?, ?, ?)", [row])


def _checksum(key: str, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(key.encode()))


def _rows(path: Path, query: str, wanted: Collection[str] | None = None) -> list[Any]:
    """The rows of a query, or those that begin with a wanted value, of each the last."""
    if not _is_ours(path, there=True):
        return []
    try:
        with closing(_connect(path)) as database:
            if database.execute("PRAGMA user_version").fetchone() != (VERSION,):
                return []
            _check_tables(database)
            rows = database.execute(query)
            if wanted is None:
                return rows.fetchmany(2)
            return list({row[0]: row for row in rows if row[0] in wanted}.values())
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        _forget_broken(path, error)
        return []


def _insert(path: Path, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
    if not _is_ours(path, there=False):
        return
    try:
        with closing(_connect(path)) as database:
            database.execute("BEGIN IMMEDIATE")
            if database.execute("PRAGMA user_version").fetchone() == (VERSION,):
                _check_tables(database)
            else:
                for table in _TABLES.strip().split(";\n"):
                    database.execute(table)
                database.execute(f"PRAGMA user_version = {VERSION}")
            database.executemany(statement, rows)
            database.execute("COMMIT")
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        _forget_broken(path, error)


def _is_ours(path: Path, *, there: bool) -> bool:
    """Whether SQLite may open this: a file of the library (or, unless it is to be `there`, nothing)
    with no journal beside it. We keep none, and one that is found is obeyed: it may name files to
    write and to remove."""
    try:
        if _is_odd(path):
            _forget(path)
        return not _is_odd(path) and (path.is_file() or not there)
    except OSError:  # nobody can look just now
        return False


def _is_odd(path: Path) -> bool:
    return path.is_symlink() or any(os.path.lexists(f"{path}{side}") for side in _SIDES)


def _connect(path: Path) -> sqlite3.Connection:
    """A database that came from anywhere: it may not ask for more than a file of its size can."""
    database = sqlite3.connect(path, timeout=5, isolation_level=None)
    with suppress(OSError):
        size = path.stat().st_size
        steps = iter(range(100 + size // 10_000))  # of 100,000 each, ten for a byte
        database.set_progress_handler(lambda: next(steps, -1) < 0, 100_000)
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE)
    # A journal in memory: where a crash leaves half a change, the file is broken and made again.
    database.execute("PRAGMA journal_mode = MEMORY")
    return database


def _check_tables(database: sqlite3.Connection) -> None:
    """sqlite3.DatabaseError where there is any table, view or trigger but ours."""
    ours = {statement.strip() for statement in _TABLES.split(";") if "CREATE" in statement}
    found = database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchmany(9)
    if {sql for (sql,) in found} != ours:
        raise sqlite3.DatabaseError("tables that are not ours")


def _forget_broken(path: Path, error: Exception) -> None:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if code not in _PASSING:
        _forget(path)


def _forget(path: Path) -> None:
    # The journal first: left behind, SQLite would roll it back into the next file of this name.
    for suffix in (*_SIDES, ""):
        with suppress(OSError):  # in a library that is for reading only
            path.with_name(path.name + suffix).unlink()
