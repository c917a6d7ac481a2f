"""What scenarios are made of: what there is before, who acts, and what must hold after."""

import hashlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from library_store import (
    Digest,
    LocalStore,
    Ref,
    _process,
)
from tests.store.schedule import Actor, Outcome

A, B, C = Ref("team/a"), Ref("team/b"), Ref("team/a", "second")
LEAF, OTHER, JUNK = b"leaf", b"other", b"junk"
PARENT = f"parent\n{Digest.of(LEAF)}".encode()
HOUR, NONE = timedelta(hours=1), timedelta(0)


def below(digest: Digest, data: bytes) -> list[Digest]:
    return [Digest.parse(line) for line in data.decode().split("\n") if line.startswith("sha256:")]


# --- what there is before ---


def digest_of(data: bytes | None) -> Digest | None:
    return None if data is None else Digest.of(data)


def place(root: Path, digest: Digest) -> Path:
    return root / "objects/sha256" / digest.hex[:2] / digest.hex


def old(store: LocalStore, *contents: bytes) -> None:
    """Objects that were put two days ago."""
    for data in contents:
        path = place(store.root, store.put(data))
        then = _process.clock() - 2 * 86_400
        os.utime(path, (then, then))


def kept(store: LocalStore) -> None:
    """`team/a` points to a parent and its leaf, and there is old garbage."""
    old(store, LEAF, PARENT, JUNK)
    store.move(A, Digest.of(PARENT), expect=None)


def damaged(store: LocalStore) -> None:
    """As `kept`, with a leaf that has other bytes."""
    kept(store)
    path = place(store.root, Digest.of(LEAF))
    path.chmod(0o644)
    path.write_bytes(b"rust")


def scratched(store: LocalStore) -> None:
    """As `kept`; `team/a` was somewhere else before, and a line of its log cannot be read."""
    old(store, OTHER)
    store.move(A, Digest.of(OTHER), expect=None)
    with (store.root / "log/team/a.jsonl").open("a") as log:
        log.write("rust\n")
    old(store, LEAF, PARENT, JUNK)
    store.move(A, Digest.of(PARENT), expect=Digest.of(OTHER))


def collected(store: LocalStore) -> None:
    """`team/a` points to an object, and a parent and its leaf are in the trash."""
    old(store, OTHER, LEAF, PARENT)
    store.move(A, Digest.of(OTHER), expect=None)
    gc()(store)


def abandoned(store: LocalStore) -> None:
    """Two objects, and the lock of a process that is dead."""
    old(store, LEAF, OTHER)
    record = {"machine": "machine", "pid": 7, "token": "x"}
    (store.root / "tmp/refs.lock").write_text(json.dumps(record))


# --- who acts ---


def put(*contents: bytes) -> Actor:
    return lambda store: [store.put(data) for data in contents]


def put_and_read(store: LocalStore) -> None:
    store.get(store.put(LEAF))


def move(ref: Ref, new: bytes | None, expect: bytes | None = None) -> Actor:
    def act(store: LocalStore) -> None:
        store.move(ref, digest_of(new), expect=digest_of(expect))

    return act


def rename(store: LocalStore) -> None:
    move(B, PARENT)(store)
    move(A, None, PARENT)(store)


def gc(grace: timedelta = HOUR, history: timedelta = NONE) -> Actor:
    def act(store: LocalStore) -> Any:
        now = datetime.fromtimestamp(_process.clock(), UTC)
        return store.gc(below, now=now, grace=grace, history=history, allow_empty=True)

    return act


def restore(store: LocalStore) -> int:
    """What the first gc removed that has not been restored yet."""
    return store.restore(min([path.name for path in (store.root / "trash").iterdir()] or ["none"]))


def quarantine(store: LocalStore) -> bool:
    return store.quarantine(Digest.of(LEAF))


def verify(store: LocalStore) -> Any:
    return store.verify(below)


def repair(store: LocalStore) -> Any:
    return store.repair(below)


def both(*actors: Actor) -> Actor:
    return lambda store: [actor(store) for actor in actors]


def look(store: LocalStore) -> None:
    """Read as people do: all refs, what they point to, the log."""
    store.refs()
    store.listing()
    for name in ("team/a", "team/b"):
        store.log(name)


# --- what must hold ---


def whole(root: Path) -> str | None:
    """Every ref points to an object that is there and right, and so are its children."""
    for path in sorted((root / "refs").rglob("*")):
        if path.is_dir():
            continue
        waiting = [Digest.parse(path.read_text().strip())]
        while waiting:
            digest = waiting.pop()
            try:
                data = place(root, digest).read_bytes()
            except FileNotFoundError:
                return f"{path.relative_to(root)} needs {digest.short}, which is missing"
            if hashlib.sha256(data).hexdigest() != digest.hex:
                return f"{path.relative_to(root)} needs {digest.short}, which is corrupt"
            waiting += below(digest, data)
    return None


Check = Callable[[LocalStore, list[Outcome]], str | None]


def done(outcome: Outcome) -> bool:
    return outcome.error is None


def sound(*more: Check) -> Check:
    """The store verifies, nothing unfinished is left in it, logs end where refs are; and `more`."""

    def check(store: LocalStore, outcomes: list[Outcome]) -> str | None:
        report = store.verify(below)
        if not report.ok:
            return str(report.problems[0])
        left = [path.name for path in (store.root / "tmp").iterdir()]
        if [name for name in left if not name.startswith("refs.lock.")]:
            return f"left in tmp: {left}"
        for one in more:
            if wrong := one(store, outcomes):
                return wrong
        return None

    return check


def has(actor: int, *contents: bytes) -> Check:
    """What that actor put, if it did, is there."""

    def check(store: LocalStore, outcomes: list[Outcome]) -> str | None:
        lost = [data for data in contents if Digest.of(data) not in store]
        return f"{lost} lost" if lost and done(outcomes[actor]) else None

    return check


def at(actor: int, ref: Ref, data: bytes | None) -> Check:
    """The ref is where that actor put it, if it did."""

    def check(store: LocalStore, outcomes: list[Outcome]) -> str | None:
        found, wanted = store.refs().get(ref), digest_of(data)
        return f"{ref} is at {found}" if found != wanted and done(outcomes[actor]) else None

    return check


def succeeds(*actors: int) -> Check:
    def check(store: LocalStore, outcomes: list[Outcome]) -> str | None:
        return next((str(outcomes[i]) for i in actors if not done(outcomes[i])), None)

    return check


def one_wins(store: LocalStore, outcomes: list[Outcome]) -> str | None:
    winners = [i for i in (0, 1) if done(outcomes[i])]
    return None if len(winners) == 1 else f"winners: {winners}"


def logged(store: LocalStore, outcomes: list[Outcome]) -> str | None:
    """Each move in a log begins where the one before it ended, and the last is where the ref is."""
    last: dict[Ref, Digest | None] = {}
    for name in ("team/a", "team/b"):
        for entry in store.log(name):
            if last.get(entry.ref) != entry.old:
                return f"{entry} follows {last.get(entry.ref)}"
            last[entry.ref] = entry.new
    there = {ref: digest for ref, digest in last.items() if digest is not None}
    return None if there == store.refs() else f"the log says {there}, refs say {store.refs()}"


def removed_once(store: LocalStore, outcomes: list[Outcome]) -> str | None:
    found = [path.name for path in (store.root / "trash").glob("*/*")]
    return None if len(found) == len(set(found)) else f"twice in the trash: {found}"


def no_trash(store: LocalStore, outcomes: list[Outcome]) -> str | None:
    left = [path.name for path in (store.root / "trash").iterdir()]
    return f"left in the trash: {left}" if left else None


def reports_nothing(actor: int) -> Check:
    def check(store: LocalStore, outcomes: list[Outcome]) -> str | None:
        found = outcomes[actor].value
        return None if found is None or found.ok else str(found)

    return check
