"""What is done to a store while the power goes: its own operations, and what a library does."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import pytest

from adaptlib.experts import Library
from adaptlib.experts.references import children as expert_children
from library_store import Digest, LocalStore, MemoryStore, Ref
from tests.store.crashes import Workload
from tests.store.operations import (
    HOME,
    Create,
    Gc,
    GcAsPlanned,
    Heal,
    Move,
    Plan,
    Put,
    Quarantine,
    Refused,
    Repair,
    Restore,
    Step,
    Wait,
)
from tests.store.power import SECTOR
from tests.store.simulated import Disk
from tests.tiny import make_expert


@lru_cache(maxsize=4096)
def text_children(digest: Digest, data: bytes) -> tuple[Digest, ...]:
    """What an object of these workloads refers to: each line after the first of a parent."""
    if not data.startswith(b"parent"):
        return ()
    return tuple(Digest.parse(line) for line in data.decode().split("\n")[1:])


@lru_cache(maxsize=4096)
def _expert_children(digest: Digest, data: bytes) -> tuple[Digest, ...]:
    return tuple(expert_children(digest, data))


def put(text: str | bytes, *more: bytes) -> Put:
    first = text.encode() if isinstance(text, str) else text
    return Put((first, *more), whole=not more)


def parent(*of: Put) -> Put:
    return put("\n".join(["parent", *(str(one.digest) for one in of)]))


def move(name: str, to: Put | None, was: Put | None = None) -> Move:
    return Move(Ref.parse(name), to and to.digest, was and was.digest)


def _same_shard(start: str) -> tuple[Put, Put]:
    """Two objects whose digests start alike."""
    seen: dict[str, Put] = {}
    for number in range(10_000):
        one = put(f"{start} {number}")
        if (other := seen.setdefault(one.digest.hex[:2], one)) is not one:
            return other, one
    raise AssertionError("sha256 is broken")


A, B, C, D, E = (put(letter) for letter in "abcde")
TOP, MIDDLE = parent(A, B), parent(C)
BIG: Final = put(bytes(range(256)) * 3, b"more" * 50)
TWIN, OTHER = _same_shard("twin")
HOLDER: Final = parent(A)
KEPT: Final = (D, move("kept", D))


def store_workloads() -> Iterator[Workload]:
    """The operations of a store, each where it has the most to lose."""

    def of(name: str, before: tuple[Step, ...], *steps: Step, **more: Any) -> Workload:
        return Workload(name, before, steps, text_children, **more)

    yield of("create", (), Create(), A, move("sql", A), width=6)
    yield of("put", (), A, BIG, TWIN, OTHER)
    yield of("put what is old", (A, BIG, *KEPT), A, BIG, A)
    yield of("first ref", (A, B), move("team/x/sql", A), move("team/x/sql", B, A))
    yield of("remove", (A, B, move("team/sql", A), move("team/sql:v1", B)),
             move("team/sql", None, A), move("team/sql:v1", None, B))  # fmt: skip
    yield of("remove and again", (A, move("team/sql", A)),
             move("team/sql", None, A), move("team/sql", A))  # fmt: skip
    yield of("many moves", (A, B), *(move("sql", *ab) for ab in
             ((A,), (B, A), (A, B), (B, A))))  # fmt: skip
    yield of("torn log", (A, B, move("sql", A), move("sql", B, A)),
             move("sql", A, B), move("sql", B, A), spoil=_tear)  # fmt: skip
    yield of("a name that was a directory", (A,), move("a/b:c", A), spoil=_leave_directories)
    yield of("a lock that was left", (A,), move("sql", A), spoil=leave_lock)
    yield of("a move to nothing", (A, move("sql", A)), Refused(Ref("sql"), B.digest, A.digest), B,
             move("sql", B, A))  # fmt: skip
    yield of("no hard links", (A, move("sql", A)), B, move("sql", B, A), B, hard_links=False)
    damaged = {"spoil": _corrupt(A), "damaged": frozenset({A.digest})}
    yield of("heal", (*KEPT, A, HOLDER, move("top", HOLDER)), Heal(A.pieces, True, b"damaged"),
             **damaged)  # fmt: skip
    yield of("quarantine", (*KEPT, A), Quarantine(A.digest, b"damaged"), **damaged)
    yield of("quarantine and put", (*KEPT, A, HOLDER, move("top", HOLDER)),
             Quarantine(A.digest, b"damaged"), A, **damaged)  # fmt: skip
    copied = (*KEPT, A, B, Wait(), Gc(frozenset({A.digest, B.digest}), text_children),
              A, B, move("sql", A), move("sql", B, A))  # fmt: skip
    yield of("repair an object", copied, Repair(text_children), spoil=_corrupt(B),
             damaged=frozenset({B.digest}))  # fmt: skip
    yield of("repair a ref", copied, Repair(text_children), unreadable=True,
             spoil=lambda disk: disk.overwrite(f"{HOME}/refs/sql/latest", b"damaged"))  # fmt: skip
    yield of("repair a log", copied, Repair(text_children), unreadable=True, spoil=_insert)
    garbage = (A, B, C, TOP, MIDDLE)
    victims = frozenset(one.digest for one in garbage)
    yield of("gc", (*KEPT, *garbage), Gc(victims, text_children), width=24)
    twins = frozenset({TWIN.digest, OTHER.digest, E.digest})
    yield of("gc of one shard", (*KEPT, TWIN, OTHER, E), Gc(twins, text_children), E, width=8)
    planned = GcAsPlanned(text_children, frozenset(sorted(twins)[:1]))
    yield of("gc, and a put meanwhile", (*KEPT, TWIN, OTHER, E), Plan(text_children),
             *(one for one in (TWIN, OTHER, E) if one.digest not in planned.removed),
             planned)  # fmt: skip
    gone = (*KEPT, TWIN, OTHER, E, Wait(), Gc(twins, text_children))
    yield of("restore", (*KEPT, *garbage, Wait(), Gc(victims, text_children)), Restore(), width=24)
    yield of("restore what was put since", gone, E, Restore(), move("sql", TWIN))
    yield of("gc and restore", (*KEPT, A, parent(A)),
             Gc(frozenset({A.digest, parent(A).digest}), text_children), Restore())  # fmt: skip


def library_workloads() -> Iterator[Workload]:
    """What a library asks of its store, recorded from the library itself."""
    for name, scenario in SCENARIOS.items():
        before, steps = recorded(scenario)
        workload = Workload(name, before, steps, _expert_children)
        yield keeps_all(workload) if name == "library mv" else workload


def recorded(scenario: Callable[[Library], Iterator[None]]) -> tuple[tuple[Step, ...], ...]:
    """The changes that a scenario asks of the store, before its `yield` and after."""
    store, steps = MemoryStore(), []
    put, move = store.put, store.move

    def record_put(data: Any) -> Digest:
        whole = isinstance(data, bytes)
        pieces = (data,) if whole else tuple(bytes(piece) for piece in data)
        steps.append(Put(pieces, whole))
        return put(data if whole else pieces)

    def record_move(
        ref: Ref, new: Digest | None, *, expect: Digest | None, reason: str = ""
    ) -> None:
        steps.append(Move(ref, new, expect, reason))
        move(ref, new, expect=expect, reason=reason)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "put", record_put)
        patch.setattr(store, "move", record_move)
        part = scenario(Library(store))
        next(part)
        before = len(steps)
        assert next(part, None) is None
    return tuple(steps[:before]), tuple(steps[before:])


def _add(library: Library) -> Iterator[None]:
    yield
    library.add(make_expert(1), "sql")


def _two_commits(library: Library) -> Iterator[None]:
    yield
    library.add(make_expert(1), "sql")
    library.add(make_expert(2), "py")


def _replace(library: Library) -> Iterator[None]:
    library.add(make_expert(1), "sql")
    yield
    library.add(make_expert(2), "sql", replace=True)


def _one_blob(library: Library) -> Iterator[None]:
    library.add(make_expert(1), "sql")
    yield
    library.add(make_expert(1, task="other"), "other")


def _tag(library: Library) -> Iterator[None]:
    library.add(make_expert(1), "sql")
    yield
    library.tag("sql", "sql:v1")
    library.tag("sql", "team/sql")


def _retag(library: Library) -> Iterator[None]:
    library.add(make_expert(1), "sql")
    library.add(make_expert(2), "py:v2")
    yield
    library.tag("py:v2", "sql", replace=True)


def _mv(library: Library) -> Iterator[None]:
    library.add(make_expert(1), "sql")
    library.add(make_expert(2), "sql:v2")
    yield
    library.rename("sql", "team/sql")


def _rm(library: Library) -> Iterator[None]:
    library.add(make_expert(1), "sql")
    library.add(make_expert(2), "sql:v2")
    library.add(make_expert(3), "py")
    yield
    library.remove("sql")


SCENARIOS: Final[dict[str, Callable[[Library], Iterator[None]]]] = {
    "library add": _add,
    "library add, twice": _two_commits,
    "library add, replacing": _replace,
    "library add, of a blob that is there": _one_blob,
    "library tag": _tag,
    "library tag, replacing": _retag,
    "library mv": _mv,
    "library rm": _rm,
}


def keeps_all(workload: Workload) -> Workload:
    """`workload`, and at no moment may an expert be without a name."""
    names = {step.new for step in workload.before if isinstance(step, Move)}
    return replace(workload, always=lambda refs: names <= set(refs.values()))


# --- what is there already ----------------------------------------------------------------------


def _tear(disk: Disk) -> None:
    """A line in two sectors, cut short: half of it could be taken for half of the next line."""
    inode = disk.find(f"{HOME}/log/sql.jsonl")
    assert inode is not None
    data, mtime = disk.files[inode]
    torn = data.splitlines(keepends=True)[-1][:-20]
    assert len(data) < SECTOR < len(data) + len(torn)
    disk.files[inode] = (data + torn, mtime)


def _insert(disk: Disk) -> None:
    inode = disk.find(f"{HOME}/log/sql.jsonl")
    assert inode is not None
    lines = disk.files[inode][0].splitlines(keepends=True)
    disk.overwrite(f"{HOME}/log/sql.jsonl", b"".join([lines[0], b"damaged\n", *lines[1:]]))


def _corrupt(one: Put) -> Callable[[Disk], None]:
    hex_ = one.digest.hex
    return lambda disk: disk.overwrite(f"{HOME}/objects/sha256/{hex_[:2]}/{hex_}", b"damaged")


def _leave_directories(disk: Disk) -> None:
    disk.makedirs(f"{HOME}/refs/a/b/c/d", exist_ok=True)


def leave_lock(disk: Disk) -> None:
    with LocalStore(HOME)._exclusive():
        left = disk.image()
    disk.load(left)
    disk.pid += 1
