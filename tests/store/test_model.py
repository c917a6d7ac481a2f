"""Any sequence of operations leaves a store where a few dicts would be."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from library_store import (
    Digest,
    GcAborted,
    LocalStore,
    MemoryStore,
    ObjectCorrupt,
    ObjectNotFound,
    Ref,
    RefConflict,
    Store,
    _process,
    local,
    records,
)
from tests.soak import FACTOR, report

REFS = st.sampled_from([Ref.parse(text) for text in ("a", "a:b", "a/b", "c/d:e")])
BLOBS = st.integers(0, 4).map(lambda n: b"blob %d" % n)
PICK = st.integers(0, 20)
MOSTLY = st.sampled_from([True, True, True, True, False])
NONE, DAY = timedelta(0), timedelta(days=1)
RUST = b"rust"  # what the bytes of a damaged object are
DEAD = 2**22 + 1  # more than any process id


def below(digest: Digest, data: bytes) -> list[Digest]:
    return [Digest.parse(line) for line in data.decode().split("\n") if line.startswith("sha256:")]


class Model(RuleBasedStateMachine):
    """`objects` and `refs` are what the store should hold."""

    store: Store
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[Digest, bytes] = {}
        self.known: dict[Digest, bytes] = {}  # whatever was put at any time
        self.refs: dict[Ref, Digest] = {}
        self.moves = 0

    def put_both(self, data: bytes) -> Digest:
        digest = self.store.put(data)
        self.objects[digest] = self.known[digest] = data
        return digest

    def below(self, digest: Digest) -> list[Digest]:
        """What an object refers to, if it is there."""
        return below(digest, self.objects.get(digest, b""))

    def reach(self, *starts: Digest) -> set[Digest]:
        """These objects, and what they lead to."""
        found: set[Digest] = set()
        waiting = list(starts)
        while waiting:
            digest = waiting.pop()
            if digest not in found:
                found.add(digest)
                waiting += self.below(digest)
        return found

    def reached(self) -> set[Digest]:
        return self.reach(*self.refs.values())

    def pick(self, number: int) -> Digest | None:
        """One of the objects that are there."""
        known = sorted(self.objects)
        return known[number % len(known)] if known else None

    @initialize()
    def begin(self) -> None:
        """A ref, what it needs, and garbage."""
        for data in (b"blob 0", b"blob 1"):
            self.put_both(data)
        top = self.put_both(f"parent\n{Digest.of(b'blob 0')}".encode())
        self.move(Ref("a"), sorted(self.objects).index(top), right=True, away=False)

    @rule(data=BLOBS)
    def put_blob(self, data: bytes) -> None:
        self.put_both(data)

    @rule(parts=st.lists(BLOBS, max_size=3), again=st.booleans())
    def put_parent(self, parts: list[bytes], again: bool) -> None:
        """`again`: as the contract asks, its children are put first. Otherwise they may lack."""
        for part in parts:
            if again:
                self.put_both(part)
        self.put_both("\n".join(["parent", *(str(Digest.of(part)) for part in parts)]).encode())

    @rule(pick=PICK)
    def put_again(self, pick: int) -> None:
        """What is there, or was."""
        known = sorted(self.known)
        self.put_both(self.known[known[pick % len(known)]])

    @rule(ref=REFS, pick=PICK, right=MOSTLY, away=st.booleans())
    def move(self, ref: Ref, pick: int, right: bool, away: bool) -> None:
        new, old = None if away else self.pick(pick), self.refs.get(ref)
        expect = old if right else Digest.of(b"elsewhere")
        collides = any(
            other != ref and (other.parts[: len(ref.parts)] == ref.parts[: len(other.parts)])
            for other in self.refs
        )
        if not right or (new is not None and collides):
            with pytest.raises(RefConflict):
                self.store.move(ref, new, expect=expect)
            return
        self.store.move(ref, new, expect=expect)
        if new != old:
            self.moved(ref, old, new)
        if new is None:
            self.refs.pop(ref, None)
        else:
            self.refs[ref] = new

    def moved(self, ref: Ref, old: Digest | None, new: Digest | None) -> None:
        self.moves += 1

    @invariant()
    def same_refs(self) -> None:
        type(self).steps += 1
        assert self.store.refs() == self.refs
        logs = [entry for name in ("a", "a/b", "c/d") for entry in self.store.log(name)]
        assert len(logs) == self.moves
        assert self.refs == {
            ref: new for ref, new in {e.ref: e.new for e in logs}.items() if new is not None
        }


class MemoryModel(Model):
    """`trash` is what each gc removed."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.trash: dict[str, dict[Digest, bytes]] = {}

    @rule(dry_run=st.booleans())
    def gc(self, dry_run: bool) -> None:
        reached = self.reached()
        going = set(self.objects) - reached
        options = {"grace": NONE, "history": NONE, "allow_empty": True, "dry_run": dry_run}
        if not reached <= set(self.objects):
            with pytest.raises(GcAborted):
                self.store.gc(below, **options)
            return
        result = self.store.gc(below, **options)
        assert set(result.removed) == going
        assert result.kept == len(self.objects) - len(going)
        if not dry_run and going:
            assert result.id is not None
            self.trash[result.id] = {digest: self.objects.pop(digest) for digest in going}

    @rule()
    def gc_with_grace_removes_nothing(self) -> None:
        try:
            assert self.store.gc(below, allow_empty=True).removed == ()
        except GcAborted:
            assert not self.reached() <= set(self.objects)

    @precondition(lambda self: self.trash)
    @rule(pick=PICK)
    def restore(self, pick: int) -> None:
        gc_id = sorted(self.trash)[pick % len(self.trash)]
        back = self.trash.pop(gc_id)
        assert self.store.restore(gc_id) == len(back)
        self.objects |= back
        with pytest.raises(ObjectNotFound):
            self.store.restore(gc_id)

    @invariant()
    def same_objects(self) -> None:
        assert list(self.store.objects()) == sorted(self.objects)
        for digest, data in self.objects.items():
            assert self.store.get(digest) == data

    @invariant()
    def verify_agrees(self) -> None:
        found = self.store.verify(below)
        assert {p.digest for p in found.problems} == self.reached() - set(self.objects)
        assert {p.kind for p in found.problems} <= {"missing"}
        assert found.checked == len(self.objects)


@dataclass(frozen=True)
class Trash:
    """What a collection removed, and when. Some of the bytes may be damaged."""

    when: datetime
    objects: dict[Digest, bytes]


class LocalModel(Model):
    """On disk: time passes, processes die, and the disk and its user do harm.

    `times` is when each object was put, `damaged` those whose bytes on disk are others, `lines`
    what was moved when, `litter` what crashes left in tmp/ and when, `aside` how many files are in
    the quarantine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="store-model-"))
        self.clock = datetime.now(UTC)
        self.times: dict[Digest, datetime] = {}
        self.damaged: set[Digest] = set()
        self.lines: list[tuple[datetime, Ref, Digest | None, Digest | None]] = []
        self.trash: dict[str, Trash] = {}
        self.litter: dict[str, datetime] = {}
        self.aside = 0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(local, "timestamp", lambda: records.timestamp(self.clock))
        self.patch.setattr(_process, "clock", lambda: self.clock.timestamp())
        self.root = self.home / "library"
        self.store = LocalStore.create(self.root)

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.home)

    def below(self, digest: Digest) -> list[Digest]:
        return [] if digest in self.damaged else super().below(digest)

    def put_both(self, data: bytes) -> Digest:
        digest = super().put_both(data)
        self.aside += digest in self.damaged
        self.damaged.discard(digest)
        self.freshen(digest)
        return digest

    def freshen(self, *digests: Digest) -> None:
        """They were put just now, by this clock: it runs ahead of that of the machine."""
        for digest in digests:
            self.times[digest] = self.clock
            self.set_time(self.place(digest), self.clock)

    def set_time(self, path: Path, when: datetime) -> None:
        os.utime(path, (when.timestamp(), when.timestamp()))

    def place(self, digest: Digest) -> Path:
        return self.root / "objects/sha256" / digest.hex[:2] / digest.hex

    def take(self, digest: Digest) -> bytes:
        """An object is not at its place any more; its bytes, as they are."""
        del self.times[digest]
        data = self.objects.pop(digest)
        if digest not in self.damaged:
            return data
        self.damaged.remove(digest)
        return RUST

    def moved(self, ref: Ref, old: Digest | None, new: Digest | None) -> None:
        super().moved(ref, old, new)
        self.lines.append((self.clock, ref, old, new))
        self.clock += timedelta(seconds=1)

    # --- collecting, after so many hours ---

    def kept(self, grace: timedelta, history: timedelta) -> set[Digest]:
        """What a collection at this moment must not remove."""
        since = self.clock - max(grace, history)
        named = [digest for line in self.lines if line[0] >= since for digest in line[2:]]
        named += {ref: new for _, ref, _, new in self.lines}.values()
        young = [digest for digest, when in self.times.items() if when > self.clock - grace]
        return self.reach(*self.refs.values(), *filter(None, named), *young)

    @rule(
        hours=st.sampled_from([0, 1, 30, 24 * 6, 24 * 8, 24 * 15]),
        grace=st.sampled_from([NONE, DAY]),
        history=st.sampled_from([NONE, 14 * DAY]),
        dry_run=MOSTLY.map(lambda wet: not wet),
    )
    def gc(self, hours: int, grace: timedelta, history: timedelta, dry_run: bool) -> None:
        self.clock += timedelta(hours=hours, seconds=1)
        options = {"grace": grace, "history": history, "allow_empty": True, "now": self.clock}
        kept = self.kept(grace, history)
        if not self.reached() <= set(self.objects) or kept & self.damaged:
            with pytest.raises(GcAborted):
                self.store.gc(below, dry_run=dry_run, **options)
            return
        going = set(self.objects) - kept
        result = self.store.gc(below, dry_run=dry_run, **options)
        assert set(result.removed) == going
        assert result.kept == len(self.objects) - len(going)
        if dry_run:
            return
        self.litter = {n: when for n, when in self.litter.items() if when >= self.clock - DAY}
        self.trash = {n: one for n, one in self.trash.items() if one.when >= self.clock - 7 * DAY}
        if going:
            assert result.id is not None
            self.trash[result.id] = Trash(self.clock, {one: self.take(one) for one in going})

    # --- the trash ---

    @precondition(lambda self: self.trash)
    @rule(pick=PICK)
    def restore(self, pick: int) -> None:
        gc_id = sorted(self.trash)[pick % len(self.trash)]
        back = self.trash.pop(gc_id).objects
        assert self.store.restore(gc_id) == len(back)
        for digest, data in back.items():
            if digest in self.objects and digest not in self.damaged:
                continue  # what was put since is as good
            self.aside += digest in self.objects
            self.objects[digest] = self.known[digest]
            (self.damaged.add if data == RUST else self.damaged.discard)(digest)
        self.freshen(*back)
        with pytest.raises(ObjectNotFound):
            self.store.restore(gc_id)

    @precondition(lambda self: self.trash)
    @rule(pick=PICK)
    def delete_trash(self, pick: int) -> None:
        gc_id = sorted(self.trash)[pick % len(self.trash)]
        del self.trash[gc_id]
        shutil.rmtree(self.root / "trash" / gc_id)
        with pytest.raises(ObjectNotFound):
            self.store.restore(gc_id)

    # --- harm, and what is done about it ---

    @rule(pick=PICK)
    def damage(self, pick: int) -> None:
        if (digest := self.pick(pick)) is None:
            return
        path = self.place(digest)
        path.chmod(0o644)
        path.write_bytes(RUST)
        self.set_time(path, self.times[digest])
        self.damaged.add(digest)

    @rule(pick=PICK)
    def quarantine(self, pick: int) -> None:
        if (digest := self.pick(pick)) is None:
            return
        assert self.store.quarantine(digest) == (digest in self.damaged)
        if digest in self.damaged:
            self.aside += 1
            self.take(digest)

    @rule()
    def repair(self) -> None:
        moved: set[Digest] = set()
        healed: set[Digest] = set()
        while bad := (self.damaged | (self.reached() - set(self.objects))) - healed:
            before = len(moved), len(healed)
            for digest in bad:
                if digest in self.damaged:
                    self.take(digest)
                    moved.add(digest)
                copies = [one.objects for _, one in sorted(self.trash.items())]
                if copy := next((c for c in copies if c.get(digest, RUST) != RUST), None):
                    self.objects[digest] = copy.pop(digest)
                    healed.add(digest)
            if before == (len(moved), len(healed)):
                break
        done = self.store.repair(below)
        self.aside += len(moved)
        self.freshen(*healed)
        assert (set(done.quarantined), set(done.repaired)) == (moved, healed)
        assert {p.digest for p in done.report.problems} == self.reached() - set(self.objects)

    @rule(lock=st.sampled_from(["none", "dead", "foreign", "empty"]), torn=st.booleans())
    def crash_and_reopen(self, lock: str, torn: bool) -> None:
        """A process dies in the middle of something and leaves it; somebody opens the store."""
        name = f"{DEAD}-{len(self.litter)}-{self.clock.timestamp()}"
        (self.root / "tmp" / name).write_bytes(RUST)
        self.set_time(self.root / "tmp" / name, self.clock)
        self.litter[name] = self.clock
        if lock != "none":
            machine = _process.identity()[0] if lock == "dead" else "elsewhere"
            record = {"machine": machine, "pid": DEAD, "token": "x"}
            path = self.root / "tmp/refs.lock"
            path.write_text("" if lock == "empty" else json.dumps(record))
            self.set_time(path, self.clock - timedelta(seconds=61))
        if torn:
            with (self.root / "log/a.jsonl").open("ab") as log:
                log.write(b'{"when": "2026-01-')
        self.store = LocalStore.open(self.root)

    @invariant()
    def same_objects(self) -> None:
        assert list(self.store.objects()) == sorted(self.objects)
        for digest, data in self.objects.items():
            if digest in self.damaged:
                with pytest.raises(ObjectCorrupt):
                    self.store.get(digest)
            else:
                assert self.store.get(digest) == data

    @invariant()
    def verify_agrees(self) -> None:
        found = self.store.verify(below)
        of = {kind: {p.digest for p in found.problems if p.kind == kind} for kind in KINDS}
        assert of["missing"] == self.reached() - set(self.objects)
        assert of["corrupt"] == self.damaged
        assert of["unreadable"] == of["foreign"] == set()
        assert found.checked == len(self.objects)

    @invariant()
    def nothing_else(self) -> None:
        found = {
            top: {path.name for path in (self.root / top).iterdir()}
            for top in ("tmp", "trash", "quarantine")
        }
        assert {name for name in found["tmp"] if not name.startswith("refs.lock")} == set(
            self.litter
        )
        assert found["trash"] == set(self.trash)
        assert len(found["quarantine"]) == self.aside


KINDS = ("missing", "corrupt", "unreadable", "foreign")


@pytest.mark.parametrize(
    ("model", "steps"), [(MemoryModel, 30), (LocalModel, 30)], ids=["memory", "local"]
)
def test_a_store_behaves_like_dicts(model, steps):
    model.steps = 0
    examples = 50 * FACTOR
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps if FACTOR == 1 else 100,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
    report(f"state machine {model.__name__}", examples=examples, steps=model.steps)
    assert model.steps >= examples
