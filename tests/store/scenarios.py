"""What actors do to one store at the same time, and what must hold whatever the order."""

import hashlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from library_store import (
    Digest,
    GcAborted,
    LocalStore,
    ObjectNotFound,
    Ref,
    RefConflict,
    _process,
)
from tests.store.schedule import Actor, Outcome, Scenario

A, B, C = Ref("team/a"), Ref("team/b"), Ref("team/a", "second")
LEAF, OTHER, JUNK = b"leaf", b"other", b"junk"
PARENT = f"parent\n{Digest.of(LEAF)}".encode()
HOUR, NONE = timedelta(hours=1), timedelta(0)


def below(digest: Digest, data: bytes) -> list[Digest]:
    return [Digest.parse(line) for line in data.decode().split("\n") if line.startswith("sha256:")]


# --- what there is before ---


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
        store.move(ref, new and Digest.of(new), expect=expect and Digest.of(expect))

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
        found, wanted = store.refs().get(ref), data and Digest.of(data)
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


CONFLICT = (RefConflict,)
GONE = (ObjectNotFound,)
ABORTED = (GcAborted,)
add = both(put(LEAF, PARENT), move(B, PARENT))

PAIRS: dict[str, Scenario] = {
    "put, gc": Scenario(
        lambda s: old(s, LEAF), [put(LEAF), gc()], sound(has(0, LEAF)), whole, ABORTED
    ),
    "put and move, gc": Scenario(
        lambda s: old(s, JUNK), [add, gc()], sound(succeeds(0, 1), at(0, B, PARENT), logged), whole
    ),
    "put again and move, gc": Scenario(
        lambda s: old(s, LEAF, PARENT, JUNK),
        [add, gc()],
        sound(succeeds(0), at(0, B, PARENT), logged),
        whole,
        ABORTED,
    ),
    "move to garbage, gc": Scenario(
        lambda s: old(s, LEAF, PARENT),
        [move(B, PARENT), gc()],
        sound(at(0, B, PARENT), logged),
        whole,
        (*GONE, *ABORTED),
    ),
    "put and move, gc of all": Scenario(
        lambda s: old(s, JUNK),
        [both(put(LEAF), move(B, LEAF)), gc(NONE)],
        sound(at(0, B, LEAF), logged),
        whole,
        (*GONE, *ABORTED),
    ),
    "move, move": Scenario(
        lambda s: old(s, LEAF, OTHER),
        [move(A, LEAF), move(A, OTHER)],
        sound(one_wins, at(0, A, LEAF), at(1, A, OTHER), logged),
        whole,
        CONFLICT,
    ),
    "move, remove": Scenario(
        lambda s: (kept(s), old(s, OTHER)),
        [move(A, OTHER, PARENT), move(A, None, PARENT)],
        sound(one_wins, at(0, A, OTHER), at(1, A, None), logged),
        whole,
        CONFLICT,
    ),
    "mv, gc": Scenario(
        kept,
        [rename, gc(NONE)],
        sound(succeeds(0, 1), at(0, B, PARENT), at(0, A, None), logged),
        whole,
    ),
    "restore, gc": Scenario(
        collected, [restore, gc()], sound(succeeds(0, 1), has(0, LEAF, PARENT), no_trash), whole
    ),
    "restore, gc of all": Scenario(
        collected, [restore, gc(NONE)], sound(removed_once), whole, (*GONE, *ABORTED)
    ),
    "restore, put": Scenario(
        collected,
        [restore, add],
        sound(succeeds(0, 1), at(1, B, PARENT), logged, no_trash),
        whole,
    ),
    "restore, restore": Scenario(
        collected, [restore, restore], sound(has(0, LEAF, PARENT), no_trash), whole, GONE
    ),
    "quarantine, put": Scenario(
        damaged, [quarantine, put(LEAF)], sound(succeeds(1), has(1, LEAF)), None, GONE
    ),
    "put, put": Scenario(damaged, [put_and_read, put_and_read], sound(succeeds(0, 1)), switches=3),
    "quarantine, gc": Scenario(kept, [quarantine, gc(NONE)], sound(succeeds(0, 1)), whole),
    "restore, gc at work": Scenario(
        kept, [restore, gc()], sound(succeeds(1), removed_once), whole, GONE
    ),
    "verify, gc": Scenario(
        kept, [verify, gc(NONE)], sound(succeeds(0, 1), reports_nothing(0)), whole
    ),
    "gc, gc": Scenario(kept, [gc(NONE), gc(NONE)], sound(removed_once), whole, ABORTED),
    "last tag, another tag": Scenario(
        kept,
        [move(A, None, PARENT), both(put(OTHER), move(C, OTHER))],
        sound(succeeds(0, 1), at(0, A, None), at(1, C, OTHER), logged),
        whole,
    ),
    "last tag, look": Scenario(
        kept, [move(A, None, PARENT), look], sound(succeeds(0, 1), logged), whole
    ),
    "a:b, a/b:c": Scenario(
        lambda s: old(s, LEAF, OTHER),
        [move(Ref("team/a", "b"), LEAF), move(Ref("team/a/b", "c"), OTHER)],
        sound(one_wins),
        whole,
        CONFLICT,
    ),
    "takeover": Scenario(
        abandoned,
        [move(A, LEAF), move(A, OTHER)],
        sound(one_wins, at(0, A, LEAF), at(1, A, OTHER), logged),
        whole,
        CONFLICT,
    ),
    "remove, gc that remembers": Scenario(
        kept,
        [move(A, None, PARENT), gc(NONE, HOUR)],
        sound(succeeds(0, 1), has(0, PARENT, LEAF), logged),
        whole,
    ),
    "move and back, gc that remembers": Scenario(
        lambda s: (kept(s), old(s, OTHER)),
        [both(move(A, OTHER, PARENT), move(A, PARENT, OTHER)), gc(HOUR, HOUR)],
        sound(has(0, OTHER), logged),
        whole,
        (*GONE, *ABORTED),
    ),
    "repair, gc that remembers": Scenario(
        scratched, [repair, gc(HOUR, HOUR)], sound(has(0, OTHER), logged), whole, ABORTED
    ),
    "repair, move": Scenario(
        lambda s: scratched(s),
        [repair, move(A, OTHER, PARENT)],
        sound(succeeds(0, 1), logged),
        whole,
    ),
    "repair, put": Scenario(damaged, [repair, put(LEAF)], sound(succeeds(0, 1), has(1, LEAF))),
}

LYING_PAIRS: dict[str, Scenario] = {
    "lies: move to garbage, gc": Scenario(
        lambda s: old(s, LEAF, PARENT),
        [move(B, PARENT), gc()],
        sound(at(0, B, PARENT), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: put again and move, gc": Scenario(
        lambda s: old(s, LEAF, PARENT, JUNK),
        [add, gc()],
        sound(at(0, B, PARENT), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: mv, gc": Scenario(
        kept,
        [rename, gc(NONE)],
        sound(at(0, B, PARENT), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: move, gc": Scenario(
        lambda s: (kept(s), old(s, OTHER)),
        [move(A, OTHER, PARENT), gc(NONE)],
        sound(at(0, A, OTHER), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: gc, gc": Scenario(
        kept, [gc(NONE), gc(NONE)], sound(removed_once), whole, ABORTED, lies=True
    ),
    "lies: restore, gc": Scenario(
        collected, [restore, gc(NONE)], sound(removed_once), whole, (*GONE, *ABORTED), lies=True
    ),
    "lies: move, move": Scenario(
        lambda s: old(s, LEAF, OTHER),
        [move(A, LEAF), move(A, OTHER)],
        sound(),
        whole,
        CONFLICT,
        lies=True,
    ),
    "lies: move, remove": Scenario(
        lambda s: (kept(s), old(s, OTHER)),
        [move(A, OTHER, PARENT), move(A, None, PARENT)],
        sound(),
        whole,
        CONFLICT,
        lies=True,
    ),
    "lies: remove, remove": Scenario(
        kept,
        [move(A, None, PARENT), move(A, None, PARENT)],
        sound(),
        whole,
        CONFLICT,
        lies=True,
    ),
    "lies: last tag, another tag": Scenario(
        kept,
        [move(A, None, PARENT), both(put(OTHER), move(C, OTHER))],
        sound(succeeds(0, 1), at(0, A, None), at(1, C, OTHER)),
        whole,
        lies=True,
    ),
    "lies: last tag of one, of two": Scenario(
        lambda s: (kept(s), move(B, PARENT)(s)),
        [move(A, None, PARENT), move(B, None, PARENT)],
        sound(succeeds(0, 1), at(0, A, None), at(1, B, None), logged),
        whole,
        lies=True,
    ),
    "lies: last tag, look": Scenario(
        kept, [move(A, None, PARENT), look], sound(succeeds(0, 1), logged), whole, lies=True
    ),
    "lies: a:b, a/b:c": Scenario(
        lambda s: old(s, LEAF, OTHER),
        [move(Ref("team/a", "b"), LEAF), move(Ref("team/a/b", "c"), OTHER)],
        sound(),
        whole,
        CONFLICT,
        lies=True,
    ),
}

TRIPLES: dict[str, Scenario] = {
    "put again and move, move, gc": Scenario(
        lambda s: old(s, LEAF, PARENT, OTHER),
        [add, both(put(OTHER), move(A, OTHER)), gc()],
        sound(succeeds(0, 1), at(0, B, PARENT), at(1, A, OTHER), logged),
        whole,
        ABORTED,
    ),
    "mv, remove, gc": Scenario(
        kept,
        [rename, move(A, None, PARENT), gc(NONE)],
        sound(logged),
        whole,
        (*CONFLICT, *GONE, *ABORTED),
    ),
    "restore, put and move, gc": Scenario(
        collected,
        [restore, add, gc()],
        sound(succeeds(0, 1), at(1, B, PARENT), has(0, LEAF, PARENT), logged),
        whole,
        ABORTED,
    ),
    "put again and move, gc, gc": Scenario(
        lambda s: old(s, LEAF, PARENT, JUNK),
        [add, gc(), gc()],
        sound(succeeds(0), at(0, B, PARENT), logged, removed_once),
        whole,
        ABORTED,
    ),
    "quarantine, put, put": Scenario(
        damaged, [quarantine, put(LEAF), put(LEAF)], sound(succeeds(1, 2)), None, GONE
    ),
    "lies: put again and move, move, gc": Scenario(
        lambda s: (kept(s), old(s, OTHER)),
        [both(put(OTHER), move(B, OTHER)), move(A, None, PARENT), gc(NONE)],
        sound(at(0, B, OTHER), at(1, A, None), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: mv, gc, gc": Scenario(
        kept,
        [rename, gc(NONE), gc(NONE)],
        sound(at(0, B, PARENT), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "lies: mv, restore, gc": Scenario(
        lambda s: (collected(s), put(LEAF, PARENT)(s), move(A, PARENT, OTHER)(s)),
        [rename, restore, gc(NONE)],
        sound(at(0, B, PARENT), logged),
        typed=(*GONE, *ABORTED),
        lies=True,
    ),
    "takeover by three": Scenario(
        abandoned,
        [move(A, LEAF), move(A, OTHER), both(put(LEAF), move(B, LEAF))],
        sound(one_wins, succeeds(2), at(2, B, LEAF), logged),
        whole,
        CONFLICT,
    ),
}
