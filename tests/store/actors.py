"""One of many processes on a library: operations at random, and what must hold after each.

What an actor may meet is that another was faster, or that the collection, which has no grace at all
here, took what nothing pointed to yet: then what it does is not done. Whatever it has done stays.
"""

import collections
import functools
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from adaptlib.errors import AdaptlibError, ConflictError, CorruptError, NotFoundError
from adaptlib.experts import Library
from adaptlib.experts.codec import Module, Packed
from adaptlib.experts.references import children
from adaptlib.experts.tensors import RawTensor
from library_store import (
    Digest,
    GcAborted,
    LocalStore,
    ObjectNotFound,
    Ref,
    RefConflict,
    RefNotFound,
    StoreLocked,
    _lock,
)

PATIENCE = 10.0  # seconds in which what a collection took under a lock that lies is back
TYPED = (
    *(RefConflict, RefNotFound, StoreLocked, ObjectNotFound, GcAborted),
    *(ConflictError, NotFoundError),
)

LEAVES = [b"leaf %d" % number for number in range(160)]
SHARED = [
    Ref.parse(f"routers/{text}") for text in ("shared", "shared:b", "shared/x", "c:d", "c/d:e")
]
NAMES = ["shared-0", "shared-1", "team/shared-2"]


@contextmanager
def lying(path: Path, **_: Any) -> Iterator[Any]:
    """A lock that everybody has."""
    yield SimpleNamespace(confirm=lambda: None)


def is_typed(error: Exception) -> bool:
    """Whether an operation may end so: another was faster, or the collection was."""
    if isinstance(error, CorruptError) or type(error) is AdaptlibError:
        # A library says so of what is gone, and where it could not take back half of what it did.
        return isinstance(error.__cause__, TYPED)
    return isinstance(error, TYPED)


class BrokenPromise(Exception):  # noqa: N818 -- what it says is what happened
    """What the store promises did not hold."""


def expect(holds: bool, message: str) -> None:
    if not holds:
        raise BrokenPromise(message)


# --- what there is to keep ---


@functools.cache
def records() -> list[bytes]:
    """Objects that refer to others, as the records of a library do."""
    pairs = zip(LEAVES[0::2], LEAVES[1::2], strict=True)
    return [
        json.dumps({"experts": {"a": str(Digest.of(a)), "b": str(Digest.of(b))}}).encode()
        for a, b in pairs
    ]


def experts() -> list[Packed]:
    generator = np.random.default_rng(0)

    def tensor(*shape: int) -> RawTensor:
        values = generator.normal(size=shape).astype("<f4")
        return RawTensor("F32", shape, memoryview(values.tobytes()))

    return [
        Packed(
            "lora",
            "some/base",
            {"q_proj": Module((8, 8), 2, 1.0)},
            {"q_proj.lora_a": tensor(2, 8), "q_proj.lora_b": tensor(8, 2)},
            {"task": f"task {number}"},
        )
        for number in range(6)
    ]


def contents(scratch: Path) -> dict[Digest, bytes]:
    """Every object that any actor ever puts."""
    library = Library.open(scratch, create=True)
    for number, expert in enumerate(experts()):
        library.add(expert, f"e{number}")
    for data in (*LEAVES, *records()):
        library.store.put(data)
    return {digest: library.store.get(digest) for digest in library.store.objects()}


# --- those who act ---


class Actor:
    """One process. `refs` is where its own refs are; `moves` what it moved of those of all."""

    def __init__(self, library: Library, number: int, seed: int, known: dict[Digest, bytes]):
        assert isinstance(library.store, LocalStore)
        self.library, self.store, self.known = library, library.store, known
        self.random = random.Random(f"{seed}/{number}")
        self.own = f"own{number}"
        self.refs: dict[Ref, Digest] = {}
        self.own_moves = 0
        self.moves: list[tuple[Ref, Digest | None]] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.experts = experts()

    def run(self, operations: int) -> None:
        weights: list[tuple[Callable[[], None], int]] = [
            (self.put, 20),
            (self.move_own, 25),
            (self.move_shared, 20),
            (self.read_shared, 20),
            (self.read_own, 20),
            (self.quarantine_intact, 8),
            (self.read_log, 6),
            (self.verify, 1),
            (self.add, 8),
            (self.tag, 5),
            (self.rename, 4),
            (self.remove, 4),
            (self.list, 4),
            (self.open_expert, 8),
        ]
        for act in self.random.choices(*map(list, zip(*weights, strict=True)), k=operations):
            name = act.__name__
            try:
                act()
            except Exception as error:
                if not is_typed(error):
                    raise
                name = f"{name}: {type(error).__name__}"
            self.counts[name] += 1
        self.read_all_own()

    def below(self, digest: Digest) -> list[Digest]:
        return list(children(digest, self.known[digest]))

    def keep(self, digest: Digest) -> None:
        """Put it, after what it refers to."""
        for child in self.below(digest):
            self.store.put(self.known[child])
        self.store.put(self.known[digest])

    def some(self) -> Digest:
        return Digest.of(self.random.choice([*LEAVES, *records()]))

    # --- the store ---

    def put(self) -> None:
        data = self.random.choice(LEAVES)
        digest = self.store.put(data if self.random.random() < 0.5 else [data[:3], data[3:]])
        expect(digest == Digest.of(data), "put gives another digest")

    def move_own(self) -> None:
        ref = Ref(f"routers/{self.own}", self.random.choice("abc"))
        old, new = self.refs.get(ref), self.some() if self.random.random() < 0.75 else None
        if new is not None:
            self.keep(new)
        try:
            self.store.move(ref, new, expect=old, reason="own")
        except RefConflict as error:
            raise BrokenPromise(f"nobody else moves {ref}, and yet: {error}") from error
        self.own_moves += new != old
        self.know(ref, new)
        self.read(ref)

    def know(self, ref: Ref, digest: Digest | None) -> None:
        """One of its own refs was moved."""
        self.refs.pop(ref, None)
        if digest is not None:
            self.refs[ref] = digest
            self.keep(digest)  # what it refers to may have gone before it was referred to

    def read(self, ref: Ref) -> None:
        """Through one of its own refs to everything below it."""
        found = None
        with suppress(RefNotFound):
            found = self.store.ref(ref)
        wanted = self.refs.get(ref)
        expect(found == wanted, f"{ref} was put at {wanted} and is at {found}")
        for digest in [wanted, *self.below(wanted)] if wanted is not None else []:
            expect(self.patiently(digest) == self.known[digest], f"{digest} has other bytes")

    def patiently(self, digest: Digest) -> bytes:
        end = time.monotonic() + (PATIENCE if _lock.held is lying else 0)
        while True:
            try:
                return self.store.get(digest)
            except ObjectNotFound:
                if time.monotonic() >= end:
                    raise BrokenPromise(
                        f"{digest} is gone, and a ref of {self.own} needs it"
                    ) from None
                time.sleep(0.002)

    def read_own(self) -> None:
        if self.refs:
            self.read(self.random.choice(sorted(self.refs)))

    def read_all_own(self) -> None:
        for ref in self.refs:
            self.read(ref)
        entries = self.store.log(f"routers/{self.own}")
        expect(len(entries) == self.own_moves, f"{self.own_moves} moves, {len(entries)} in the log")

    def move_shared(self) -> None:
        ref = self.random.choice(SHARED)
        old, new = None, self.some() if self.random.random() < 0.7 else None
        with suppress(RefNotFound):
            old = self.store.ref(ref)
        if new is not None:
            self.keep(new)
        self.store.move(ref, new, expect=old, reason="shared")
        self.moved(ref, new)

    def moved(self, ref: Ref, digest: Digest | None) -> None:
        self.moves.append((ref, digest))
        if digest is not None:
            self.keep(digest)

    def read_shared(self) -> None:
        digest = self.store.ref(self.random.choice(SHARED))
        for one in (digest, *self.below(digest)):
            view = self.store.view(one)
            expect(bytes(view) == self.known[one], f"{one} has other bytes")

    def quarantine_intact(self) -> None:
        expect(not self.store.quarantine(self.some()), "an intact object was quarantined")

    def read_log(self) -> None:
        self.store.log(self.random.choice(SHARED).name)
        last = {entry.ref: entry.new for entry in self.store.log(f"routers/{self.own}")}
        for ref, digest in last.items():
            expect(self.refs.get(ref) == digest, f"{ref} is not where its log ends")

    def verify(self) -> None:
        kinds = {problem.kind for problem in self.store.verify(children).problems}
        expect(kinds <= {"missing"}, f"verify finds {kinds}")

    # --- the library ---

    def name(self) -> tuple[str, bool]:
        """A name of an expert, and whether it is its own."""
        if self.random.random() < 0.5:
            return self.random.choice(NAMES), False
        return f"{self.own}/e{self.random.randrange(2)}", True

    def note(self, name: str, digest: str | None, *, own: bool) -> None:
        ref, found = Ref.parse(name), None if digest is None else Digest.parse(digest)
        self.know(ref, found) if own else self.moved(ref, found)

    def add(self) -> None:
        name, own = self.name()
        added = self.library.add(self.random.choice(self.experts), name, replace=True)
        if own:
            expect(
                self.store.ref(Ref.parse(name)) == Digest.parse(added.digest), f"{name} not kept"
            )
            self.refs[Ref.parse(name)] = Digest.parse(added.digest)
            self.read(Ref.parse(name))
        else:
            self.moved(Ref.parse(name), Digest.parse(added.digest))

    def tag(self) -> None:
        name, own = self.name()
        new = f"{name}:{self.random.choice('vw')}"
        self.note(new, self.library.tag(name, new, replace=True), own=own)

    def rename(self) -> None:
        name, own = self.name()
        new = f"{self.own}/e{self.random.randrange(2, 4)}" if own else self.random.choice(NAMES)
        before = self.library.store.refs() if own else {}
        if own and self.random.random() < 0.5:
            name, new = new, name
        try:
            digest = self.library.rename(name, new)
        except Exception:
            if own:
                self.look_again()
            raise
        if own:
            for ref in [ref for ref in before if ref.name == name]:
                self.know(Ref(new, ref.tag), self.refs[ref])
                self.know(ref, None)
            return
        for ref, there in self.store.refs().items():
            if ref.name == new and there != Digest.parse(digest):
                self.keep(there)
        self.keep(Digest.parse(digest))

    def look_again(self) -> None:
        """After something with several moves failed: each of them was made, or was not."""
        there = {
            ref: at for ref, at in self.store.refs().items() if ref.name.startswith(f"{self.own}/")
        }
        ours = {ref: at for ref, at in self.refs.items() if ref.name.startswith(f"{self.own}/")}
        expect(set(ours.values()) == set(there.values()), f"{ours} has become {there}")
        for ref in ours:
            del self.refs[ref]
        for ref, digest in there.items():
            self.know(ref, digest)

    def remove(self) -> None:
        name, own = self.name()
        if own:
            name += self.random.choice(["", ":v"])
        asked, removed = Ref.parse(name), False
        going = [ref for ref in self.refs if ref == asked or ref.name == name]
        try:
            self.library.remove(name)
            removed = True
        finally:
            there = self.store.refs() if own else {}
            for ref in going:
                expect(not removed or ref not in there, f"{ref} was removed and is there")
                if ref not in there:
                    del self.refs[ref]

    def list(self) -> None:
        listed = self.library.names()
        for ref in self.refs:
            if ref.name.startswith(f"{self.own}/") and ref.tag == "latest":
                expect(listed.get(str(ref)) == str(self.refs[ref]), f"{ref} is not listed")
        self.library.summaries()

    def open_expert(self) -> None:
        name, own = self.name()
        mine = self.refs.get(Ref.parse(name)) if own else None
        if mine is None:
            self.library.packed(name)
            return
        self.patiently(mine)
        for child in self.below(mine):
            self.patiently(child)
        if _lock.held is not lying:
            expect(self.library.packed(name).card["task"].startswith("task"), f"{name} is another")
