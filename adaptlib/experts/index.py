"""index.db: what `list` would otherwise read thousands of files for.

    summary   a summary of each manifest, by digest: what it was made from, so it cannot go stale
    listing   what the refs were when they were last listed, see `Store.listing`

Each row has a checksum of its own, since SQLite has none: a damaged one is as if it were not there.
A missing or broken file is made again, in silence; deleting it changes no answer.
"""

import sqlite3
import zlib
from collections.abc import Iterable, Mapping
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
    sqlite3.SQLITE_INTERRUPT,
}


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
    rows = _rows(path, f"SELECT digest, body, checksum FROM summary {one}")
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


def _rows(path: Path, query: str) -> list[Any]:
    if not path.is_file():
        return []
    try:
        with closing(sqlite3.connect(path, timeout=5)) as database:
            if database.execute("PRAGMA user_version").fetchone() != (VERSION,):
                return []
            return database.execute(query).fetchall()
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        _forget_broken(path, error)
        return []


def _insert(path: Path, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
    try:
        with closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            if database.execute("PRAGMA user_version").fetchone() != (VERSION,):
                for table in _TABLES.strip().split(";\n"):
                    database.execute(table)
                database.execute(f"PRAGMA user_version = {VERSION}")
            database.executemany(statement, rows)
            database.execute("COMMIT")
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        _forget_broken(path, error)


def _forget_broken(path: Path, error: Exception) -> None:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if code in _PASSING:
        return
    # The journal first: left behind, SQLite would roll it back into the next file of this name.
    for suffix in ("-journal", "-wal", "-shm", ""):
        with suppress(OSError):  # in a library that is for reading only
            path.with_name(path.name + suffix).unlink()
