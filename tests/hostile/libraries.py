"""Hostile libraries: an honest one that somebody has tampered with before sending it.

Each function spoils the library at `root`. `outside` is a directory beside it with files that are
not its own; some of them are a month old.
"""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.hostile import make

MONTH = 30 * 24 * 60 * 60
Spoil = Callable[[Path, Path], Any]


def outside(folder: Path) -> Path:
    """Somebody's own files."""
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    (folder / ("0" * 64)).write_text("mine too")
    (folder / "work" / "deep").mkdir(parents=True)
    (folder / "work" / "deep" / "thesis.safetensors").write_text("years")
    with closing(sqlite3.connect(folder / "mine.db")) as database:
        database.execute("CREATE TABLE summary (mine TEXT)")
        database.execute("INSERT INTO summary VALUES ('mine')")
        database.commit()
    old = time.time() - MONTH
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (old, old))
    return folder


def put(root: Path, data: bytes, name: str | None = None) -> str:
    """An object with this content, and a ref to it."""
    digest = hashlib.sha256(data).hexdigest()
    path = root / "objects" / "sha256" / digest[:2] / digest
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    if name:
        refer(root, name, f"sha256:{digest}\n".encode())
    return digest


def refer(root: Path, name: str, text: bytes) -> None:
    path = root / "refs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)


def _linked(name: str) -> Spoil:
    """One of the library's own directories is a link to another."""

    def spoil(root: Path, elsewhere: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            path.rename(root.parent / "moved")
        path.symlink_to(elsewhere)

    return spoil


def _replaced(name: str, how: Callable[[Path], Any]) -> Spoil:
    """Something else in the place of a file."""

    def spoil(root: Path, _: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        how(path)

    return spoil


def _text(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def _sparse(size: int) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return write


def _manifest(name: str = "evil", /, **changes: Any) -> Spoil:
    """An expert under a name, whose manifest and blob are objects with true digests."""

    def spoil(root: Path, _: Path) -> None:
        data = make.blob()
        put(root, data)
        put(root, json.dumps(make.manifest(data, **changes)).encode(), f"{name}/latest")

    return spoil


def _card(**fields: Any) -> Spoil:
    return _manifest(card={"base": {"id": "org/base", "revision": None, "digest": None}, **fields})


def _raw(text: bytes) -> Spoil:
    return lambda root, _: put(root, text, "evil/latest")


def _database(*statements: str, version: int = 2) -> Spoil:
    """An index with tables, views and triggers of somebody's own."""

    def spoil(root: Path, _: Path) -> None:
        (root / "index.db").unlink(missing_ok=True)
        with closing(sqlite3.connect(root / "index.db")) as database:
            for statement in statements:
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {version}")
            database.commit()

    return spoil


_SUMMARY = "CREATE TABLE summary (digest TEXT PRIMARY KEY, body BLOB, checksum INTEGER)"
_LISTING = "CREATE TABLE listing (id INTEGER PRIMARY KEY, body BLOB, checksum INTEGER)"
_FOR_EVER = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x, x, x FROM n"


def _index_link(root: Path, elsewhere: Path) -> None:
    (root / "index.db").unlink(missing_ok=True)
    (root / "index.db").symlink_to(elsewhere / "mine.db")


def _index_dangling(root: Path, elsewhere: Path) -> None:
    (root / "index.db").unlink(missing_ok=True)
    (root / "index.db").symlink_to(elsewhere / "new.db")


def _index_log_link(root: Path, elsewhere: Path) -> None:
    _database(_SUMMARY, _LISTING, "PRAGMA journal_mode = WAL")(root, elsewhere)
    for suffix in ("-wal", "-shm"):
        (root / f"index.db{suffix}").unlink(missing_ok=True)
        (root / f"index.db{suffix}").symlink_to(elsewhere / f"new{suffix}")


def _index_hot_journal(root: Path, elsewhere: Path) -> None:
    """SQLite rolls back a journal that it finds, and removes the file that it names as the journal
    of several databases."""
    _database(_SUMMARY, _LISTING)(root, elsewhere)
    page = 4096
    size = (root / "index.db").stat().st_size // page
    magic = bytes.fromhex("d9d505f920a163d7")
    header = magic + b"".join(n.to_bytes(4, "big") for n in (0, 0, size, 512, page))
    name = str(elsewhere / "letter.txt").encode()
    total = sum(c - 256 if c > 127 else c for c in name) & 0xFFFFFFFF
    tail = (2**30 // page + 1).to_bytes(4, "big") + name
    tail += len(name).to_bytes(4, "big") + total.to_bytes(4, "big") + magic
    (root / "index.db-journal").write_bytes(header.ljust(512, b"\0") + tail)


def _index_huge(root: Path, elsewhere: Path) -> None:
    digests = [path.name for path in (root / "objects" / "sha256").glob("*/*")]
    rows = ", ".join(f"('sha256:{digest}', zeroblob(100000000), 0)" for digest in digests)
    _database(_SUMMARY, _LISTING, f"INSERT INTO summary VALUES {rows}")(root, elsewhere)


def _log_long_line(root: Path, _: Path) -> None:
    with (root / "log" / "good.jsonl").open("wb") as file:
        file.write(b'{"when": "' + b"a" * 100_000_000 + b'"}\n')


def _log_of_lines(root: Path, _: Path) -> None:
    (root / "log" / "good.jsonl").write_bytes(b"\n" * 30_000_000)


def _object_of_a_terabyte(root: Path, _: Path) -> None:
    digest = "ab" * 32
    path = root / "objects" / "sha256" / "ab" / digest
    path.parent.mkdir(exist_ok=True)
    _sparse(1 << 40)(path)
    refer(root, "evil/latest", f"sha256:{digest}\n".encode())


def _record(kind: str, document: Any) -> Spoil:
    """A saved result; of the schema that is read, where it is an object."""
    if isinstance(document, dict):
        document = {"schema": f"adaptlib.{kind.removesuffix('s')}/1"} | document
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return lambda root, _: put(root, text, f"{kind}/evil/latest")


def _lock(how: Callable[[Path], Any], *, old: bool = False) -> Spoil:
    """A lock that nobody holds. One that is `old` is taken over at once."""

    def write(path: Path) -> None:
        how(path)
        if old:
            when = time.time() - MONTH
            os.utime(path, (when, when))

    return _replaced("tmp/refs.lock", write)


NEST = 100_000
LIBRARIES: dict[str, Spoil] = {
    **{
        f"{name.replace('/', '-')}-is-a-link": _linked(name)
        for name in (
            "objects",
            "objects/sha256",
            "objects/sha256/ab",
            "refs",
            "refs/evil",
            "refs/evil/latest",
            "log",
            "tmp",
            "trash",
            "trash/20260101T000000Z-00000000",
            "quarantine",
            "derived",
            "derived/bases",
            "derived/prototypes",
            "derived/prototypes/1-evil",
            "derived/sketches",
            "derived/sketches/1-evil",
            "derived/training",
            "derived/training/evil",
        )
    },
    "format-of-a-gigabyte": _replaced("FORMAT", _sparse(1 << 30)),
    "format-nested": _replaced("FORMAT", _text(b"[" * 4000)),
    "format-a-pipe": _replaced("FORMAT", os.mkfifo),
    "format-endless": _replaced("FORMAT", lambda path: path.symlink_to("/dev/zero")),
    "format-of-the-future": _replaced("FORMAT", _text(b'{"format": 2, "hash": "sha256"}')),
    "format-a-directory": _replaced("FORMAT", Path.mkdir),
    "ref-to-passwd": _replaced("refs/evil/latest", lambda path: path.symlink_to("/etc/passwd")),
    "ref-a-pipe": _replaced("refs/evil/latest", os.mkfifo),
    "ref-of-a-gigabyte": _replaced("refs/evil/latest", _sparse(1 << 30)),
    "ref-a-path": _replaced("refs/evil/latest", _text(b"sha256:../../../../etc/passwd\n")),
    "ref-with-escapes": _replaced("refs/evil/latest", _text(b"\x1b]0;evil\x07\n")),
    "ref-name-with-escapes": _replaced("refs/\x1b[2J/latest", _text(b"x\n")),
    "ref-to-nothing": _replaced("refs/evil/latest", _text(b"sha256:" + b"0" * 64 + b"\n")),
    "index-a-link": _index_link,
    "index-a-link-to-nothing": _index_dangling,
    "index-with-linked-log": _index_log_link,
    "index-with-hot-journal": _index_hot_journal,
    "index-garbage": _replaced("index.db", _text(b"evil" * 10_000)),
    "index-a-pipe": _replaced("index.db", os.mkfifo),
    "index-a-directory": _replaced("index.db", Path.mkdir),
    "index-a-view-for-ever": _database(
        f"CREATE VIEW summary (digest, body, checksum) AS {_FOR_EVER}",
        f"CREATE VIEW listing (id, body, checksum) AS {_FOR_EVER}",
    ),
    "index-a-trigger-for-ever": _database(
        _SUMMARY,
        _LISTING,
        "CREATE TABLE junk (a, b, c)",
        "CREATE TRIGGER evil AFTER INSERT ON summary BEGIN INSERT INTO junk SELECT * FROM ("
        f"{_FOR_EVER}); END",
    ),
    "index-of-huge-blobs": _index_huge,
    "index-of-other-columns": _database("CREATE TABLE summary (x)", "CREATE TABLE listing (x)"),
    "log-a-long-line": _log_long_line,
    "log-of-empty-lines": _log_of_lines,
    "log-nested": _replaced("log/good.jsonl", _text(b"[" * NEST + b"\n")),
    "log-a-link": _replaced("log/good.jsonl", lambda path: path.symlink_to("/etc/passwd")),
    "log-a-pipe": _replaced("log/good.jsonl", os.mkfifo),
    "object-of-a-terabyte": _object_of_a_terabyte,
    "object-a-pipe": lambda root, _: (
        refer(root, "evil/latest", b"sha256:" + b"ab" * 32 + b"\n"),
        _replaced(f"objects/sha256/ab/{'ab' * 32}", os.mkfifo)(root, _),
    ),
    "object-a-link": lambda root, elsewhere: (
        refer(root, "evil/latest", b"sha256:" + b"ab" * 32 + b"\n"),
        _replaced(
            f"objects/sha256/ab/{'ab' * 32}", lambda path: path.symlink_to(elsewhere / "letter.txt")
        )(root, elsewhere),
    ),
    "expert-a-blob": _raw(make.blob()),
    "expert-nothing": _raw(b""),
    "expert-of-lists": _raw(b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"),
    "expert-nested": _raw(b'{"a":' + b"[" * NEST),
    "expert-of-100-MB": _raw(b'{"' + b" " * 100_000_000 + b'":0}'),
    "expert-digest-a-path": _manifest(blob={"digest": "../../../etc/passwd", "size": 1}),
    "expert-size-lies": _manifest(blob=make.manifest(make.blob())["blob"] | {"size": 10**18}),
    "expert-shapes-huge": _manifest(
        modules={"m": {"shape": [2**62, 2**62], "rank": 2**62, "scale": 1}},
        tensors={"m.lora_a": {"dtype": "F32", "shape": [2**62] * 8}},
    ),
    "expert-digits": _manifest(tensors={"m": {"dtype": "F32", "shape": [10**4000]}}),
    "expert-module-a-path": _manifest(
        modules={"../../../evil": {"shape": [4, 6], "rank": 2, "scale": 2.0}}
    ),
    "expert-with-escapes": _manifest(
        base="org/base", modules={"\x1b[2J\x9b2J": {"shape": [4, 6], "rank": 2, "scale": 2.0}}
    ),
    "card-with-escapes": _card(task="\x1b]0;evil\x07", description="\u202e\x9b31m", x="\x1b[2J"),
    "card-keys-with-escapes": _card(**{"\x1b[2J\nError": 1, "a": {"\x07": "\x1b"}}),
    "card-of-10-MB": _card(description="word " * 2_000_000, x="a" * 2_000_000),
    "card-without-base": _manifest(card={}),
    "card-base-a-list": _manifest(card={"base": [1]}),
    "card-task-a-list": _card(task=["x"]),
    "card-merge-wrong": _card(merge={"method": 5, "weights": {"a": []}}, parents=7),
    "card-merge-empty": _card(merge={}, parents=[]),
    "card-parents-wrong": _card(merge={"method": "ties", "weights": [1]}, parents=[{"name": 3}]),
    "card-training-wrong": _card(training="x", metrics=[1], gate={"steps": "many"}, examples=5),
    "card-peft-wrong": _card(peft={"config": 5, "layout": []}),
    "card-source-wrong": _card(source={"hub": "x; rm -rf ~", "revision": 5, "subfolder": {}}),
    "card-licence-wrong": _card(licence=[[]], category={}, instruction=[]),
    "clustering-wrong": _record("clusterings", {"experts": 5}),
    "clustering-a-list": _record("clusterings", []),
    "clustering-digests-wrong": _record("clusterings", {"experts": {"a": "../../x"}}),
    "clustering-with-escapes": _record(
        "clusterings",
        {
            "method": "\x1b[2J",
            "k": "\x07",
            "seed": [],
            "features": {},
            "experts": {},
            "clusters": {"\x1b": ["\x9b"]},
        },
    ),
    "clustering-of-lists": _record("clusterings", b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"),
    "router-wrong": _record("routers", {"router": [], "options": 5, "experts": []}),
    "router-tensors-wrong": _record(
        "routers", {"router": "arrow", "options": {}, "experts": {}, "tensors": "x"}
    ),
    "lock-a-pipe": _lock(os.mkfifo, old=True),
    "lock-endless": _lock(lambda path: path.symlink_to("/dev/zero")),
    "lock-nested": _lock(_text(b"[" * NEST), old=True),
    "strangers-everywhere": lambda root, _: [
        (root / name / "\x1b[2J evil").write_text("x")
        for name in ("objects", "objects/sha256", "refs", "log", "tmp", "trash", "quarantine")
    ],
}
