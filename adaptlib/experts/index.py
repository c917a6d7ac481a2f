"""index.db: a summary of each manifest, by digest, so that `list` need not read them all.

Rows are keyed by what they were made from, so they cannot go stale; a missing or broken file is
made again. Refs are always read from the store.
"""

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path

import msgspec

from adaptlib.experts.codec import Manifest

VERSION = 1


class Summary(msgspec.Struct, frozen=True):
    """The columns of `list`. `bytes` is the size of the blob."""

    kind: str
    base: str
    task: str | None
    description: str | None
    rank: int | None
    modules: int
    params: int
    bytes: int

    @classmethod
    def of(cls, manifest: Manifest) -> "Summary":
        return cls(
            kind=manifest.kind,
            base=manifest.base,
            task=manifest.card.get("task"),
            description=manifest.card.get("description"),
            rank=manifest.rank,
            modules=len(manifest.modules),
            params=manifest.params,
            bytes=manifest.blob.size,
        )


def read(path: Path, digests: Iterable[str]) -> dict[str, Summary]:
    """The summaries that are there; an unreadable index has none."""
    wanted = set(digests)
    if not path.is_file():
        return {}
    try:
        with closing(_connect(path)) as database:
            rows = database.execute("SELECT digest, summary FROM summary").fetchall()
        return {d: msgspec.json.decode(s, type=Summary) for d, s in rows if d in wanted}
    except (sqlite3.Error, msgspec.DecodeError, TypeError):
        _forget(path)
        return {}


def write(path: Path, summaries: Mapping[str, Summary]) -> None:
    """Add rows. It is a cache: where it cannot be written, nothing is lost."""
    try:
        with closing(_connect(path)) as database, database:
            database.executemany(
                "INSERT OR REPLACE INTO summary VALUES (?, ?)",
                [(digest, msgspec.json.encode(s)) for digest, s in summaries.items()],
            )
    except sqlite3.Error:
        _forget(path)


def _forget(path: Path) -> None:
    with suppress(OSError):  # in a library that is for reading only
        path.unlink()


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=5)
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version != VERSION:
        database.execute("DROP TABLE IF EXISTS summary")
        database.execute("CREATE TABLE summary (digest TEXT PRIMARY KEY, summary BLOB)")
        database.execute(f"PRAGMA user_version = {VERSION}")
    return database
