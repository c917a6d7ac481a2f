"""Any sequence of operations leaves a store where a few dicts would be."""

import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from library_store import (
    Digest,
    GcAborted,
    LocalStore,
    MemoryStore,
    ObjectNotFound,
    Ref,
    RefConflict,
    Store,
)

REFS = st.sampled_from([Ref.parse(text) for text in ("a", "a:b", "a/b", "c/d:e")])
BLOBS = st.integers(0, 4).map(lambda n: b"blob %d" % n)


def below(digest: Digest, data: bytes) -> list[Digest]:
    return [Digest.parse(line) for line in data.decode().split("\n") if line.startswith("sha256:")]


class Model(RuleBasedStateMachine):
    """`objects` and `refs` are what the store should hold; `trash` what each gc removed."""

    def make(self) -> Store:
        return MemoryStore()

    def __init__(self) -> None:
        super().__init__()
        self.store = self.make()
        self.objects: dict[Digest, bytes] = {}
        self.refs: dict[Ref, Digest] = {}
        self.moves = 0
        self.trash: dict[str, dict[Digest, bytes]] = {}

    def put_both(self, data: bytes) -> Digest:
        digest = self.store.put(data)
        self.objects[digest] = data
        return digest

    def reached(self) -> set[Digest]:
        found: set[Digest] = set()
        waiting = list(self.refs.values())
        while waiting:
            digest = waiting.pop()
            if digest not in found:
                found.add(digest)
                waiting += below(digest, self.objects.get(digest, b""))
        return found

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

    @rule(ref=REFS, pick=st.integers(0, 20), right=st.booleans())
    def move(self, ref: Ref, pick: int, right: bool) -> None:
        known = sorted(self.objects)
        new = known[pick] if pick < len(known) else None
        old = self.refs.get(ref)
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
        self.moves += new != old
        if new is None:
            self.refs.pop(ref, None)
        else:
            self.refs[ref] = new

    @rule(dry_run=st.booleans())
    def gc(self, dry_run: bool) -> None:
        reached = self.reached()
        going = set(self.objects) - reached
        options = {
            "grace": timedelta(0),
            "history": timedelta(0),
            "allow_empty": True,
            "dry_run": dry_run,
        }
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

    @rule(pick=st.integers(0, 3))
    def restore(self, pick: int) -> None:
        if pick < len(self.trash):
            gc_id = sorted(self.trash)[pick]
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
    def same_refs(self) -> None:
        assert self.store.refs() == self.refs
        logs = [entry for name in ("a", "a/b", "c/d") for entry in self.store.log(name)]
        assert len(logs) == self.moves
        assert self.refs == {
            ref: new for ref, new in {e.ref: e.new for e in logs}.items() if new is not None
        }

    @invariant()
    def verify_agrees(self) -> None:
        report = self.store.verify(below)
        assert {p.digest for p in report.problems} == self.reached() - set(self.objects)
        assert {p.kind for p in report.problems} <= {"missing"}
        assert report.checked == len(self.objects)


class LocalModel(Model):
    """The same, on disk, opened anew each time."""

    def make(self) -> Store:
        self.home = Path(tempfile.mkdtemp(prefix="store-model-"))
        return LocalStore.create(self.home / "library")

    @rule()
    def reopen(self) -> None:
        assert isinstance(self.store, LocalStore)
        self.store = LocalStore.open(self.store.root)

    def teardown(self) -> None:
        shutil.rmtree(self.home)


@pytest.mark.parametrize(
    ("model", "steps"), [(Model, 30), (LocalModel, 12)], ids=["memory", "local"]
)
def test_a_store_behaves_like_dicts(model, steps):
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=50,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
