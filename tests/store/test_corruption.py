"""Whatever happens to a file of a store, verify finds it, reading refuses it, and repair loses
nothing."""

import random
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from library_store import (
    Digest,
    LocalStore,
    MemoryStore,
    ObjectCorrupt,
    ObjectNotFound,
    Ref,
    RefCorrupt,
    RefNotFound,
)
from library_store.local import DIRECTORIES
from tests.soak import FACTOR, report
from tests.store.damages import ALL, BYTES, Damage, damaged, object_path

TRIALS = 400 * FACTOR
ZERO = timedelta(0)


def fill(store: LocalStore, parent: Callable[..., bytes], rng: random.Random) -> dict[Digest, set]:
    """Two blobs below one manifest, one of them below another, and one that no ref reaches; the
    refs that need each object."""
    blobs = [store.put(rng.randbytes(rng.choice([1, 40, 5000]))) for _ in range(3)]
    both, low = store.put(parent(*blobs[:2])), store.put(parent(blobs[1], salt="low"))
    top = store.put(parent(low, salt="top"))
    refs = {Ref("both"): both, Ref("low", "v1"): low, Ref("team/top"): top}
    for ref, digest in refs.items():
        store.move(ref, digest, expect=None, reason="test")
    return {
        blobs[0]: {Ref("both")},
        blobs[1]: set(refs),
        blobs[2]: set(),
        both: {Ref("both")},
        low: {Ref("low", "v1"), Ref("team/top")},
        top: {Ref("team/top")},
    }


def test_every_damage_to_an_object_is_found_refused_and_repaired(
    tmp_path: Path, children, parent
) -> None:
    seen: Counter[str] = Counter()
    for seed in range(TRIALS):
        rng = random.Random(seed)
        store = LocalStore.create(tmp_path / f"{seed}" / "library")
        needs = fill(store, parent, rng)
        whole = {digest: store.get(digest) for digest in needs}
        with damaged([object_path(store.root, digest) for digest in needs], rng) as done:
            seen[done.kind] += 1
            hurt = {Digest(path.name) for path in done.paths}
            lost = {p.name for p in done.paths if not p.is_symlink() and not p.exists()}
            lost = {digest for digest in hurt if digest.hex in lost}
            found = store.verify(children)
            known = {p.digest: set(p.refs) for p in found.problems}
            wanted = {d for d in hurt if d not in lost or needs[d]}
            assert set(known) == wanted, (seed, done)
            # What is below an unreadable parent is not known to be needed by what is above it.
            assert all(known[d] <= needs[d] for d in known), (seed, done)
            assert all(known[d] == needs[d] for d in known if len(known) == 1), (seed, done)
            for digest, data in whole.items():
                if digest not in hurt:
                    assert store.get(digest) == bytes(store.view(digest)) == data
                    continue
                for read in (store.get, store.view):
                    with pytest.raises((ObjectCorrupt, ObjectNotFound), match=digest.short):
                        read(digest)

            repaired = store.repair(children)
            assert set(repaired.quarantined) == hurt - lost, (seed, done)
            assert repaired.repaired == ()
            left = {p.digest for p in repaired.report.problems}
            needed = {d for d in hurt if needs[d]}
            assert left == needed or (len(hurt) == 2 and left and left < needed), (seed, done)
            assert {p.kind for p in repaired.report.problems} <= {"missing"}
            aside = list((store.root / "quarantine").iterdir())
            assert sorted(path.name[:64] for path in aside) == sorted(d.hex for d in hurt - lost)
            for digest in hurt:
                assert store.put(whole[digest]) == digest
            assert store.verify(children).ok
            assert all(store.get(digest) == data for digest, data in whole.items())
    assert sum(seen.values()) >= 400
    assert set(seen) == {*ALL, "swap"}
    report("damages to objects of a store", trials=sum(seen.values()), **seen)


@pytest.mark.parametrize("kind", ALL)
def test_a_copy_in_the_trash_is_put_back(
    tmp_path: Path, children, parent, later, kind: str
) -> None:
    store = LocalStore.create(tmp_path / "library")
    blob = store.put(b"the blob of it")
    manifest = store.put(parent(blob))
    store.gc(children, grace=ZERO, allow_empty=True, now=later)
    assert blob not in store
    assert store.put(b"the blob of it") == blob  # once more, and a copy is in the trash
    assert store.put(parent(blob)) == manifest
    store.move(Ref("sql"), manifest, expect=None)
    for digest in (blob, manifest):
        ALL[kind](object_path(store.root, digest), random.Random(1))
    before = store.verify(children)
    assert before.problems
    assert all(problem.repairable for problem in before.problems)
    done = store.repair(children)
    assert done.report.ok
    assert set(done.repaired) == {blob, manifest}
    assert (store.get(blob), store.get(manifest)) == (b"the blob of it", parent(blob))
    assert store.repair(children).quarantined == ()


def test_a_copy_that_is_damaged_itself_is_not_put_back(local, children, later) -> None:
    blob = local.put(b"blob")
    (gc_id,) = {local.gc(children, grace=ZERO, allow_empty=True, now=later).id}
    copy = local.root / "trash" / str(gc_id) / blob.hex
    copy.chmod(0o644)
    copy.write_bytes(b"blub")
    local.put(b"blob")
    local.move(Ref("sql"), blob, expect=None)
    object_path(local.root, blob).unlink()
    done = local.repair(children)
    assert [(p.kind, p.digest, p.repairable) for p in done.report.problems] == [
        ("missing", blob, False)
    ]
    assert done.repaired == ()
    assert copy.read_bytes() == b"blub"


def test_memory_is_repaired_from_its_trash(children, later) -> None:
    store = MemoryStore()
    blob = store.put(b"blob")
    store.gc(children, grace=ZERO, allow_empty=True, now=later)
    store._refs[Ref("sql")] = blob
    (problem,) = store.verify(children).problems
    assert (problem.kind, problem.repairable) == ("missing", True)
    assert store.repair(children).repaired == (blob,)
    assert store.get(blob) == b"blob"
    assert store.verify(children).ok


@pytest.mark.parametrize("kind", ["flip", "truncate", "extend", "zero page", "symlink", "fifo"])
def test_a_damaged_ref_is_found_and_comes_back_from_its_log(local, children, kind: str) -> None:
    for seed in range(10 * FACTOR):
        rng, ref = random.Random(seed), Ref(f"team/r{seed}", rng_tag(seed))
        old, new = local.put(f"old {seed}".encode()), local.put(f"new {seed}".encode())
        local.move(ref, old, expect=None)
        local.move(ref, new, expect=old)
        path = local.root.joinpath("refs", *ref.parts)
        ALL[kind](path, rng)
        found = local.verify(children)
        assert not found.ok
        assert any(ref in p.refs or p.kind == "missing" for p in found.problems)
        done = local.repair(children)
        if kind != "flip" or done.mended:  # a flipped digit may be a digit: a ref to nothing
            assert local.ref(ref) == new
            assert done.report.ok
            assert ref.name in done.mended[0]
        else:
            (problem,) = done.report.problems
            assert (problem.kind, problem.refs) == ("missing", (ref,))
            local.move(ref, new, expect=local.ref(ref))
        assert local.verify(children).ok


def rng_tag(seed: int) -> str:
    return "latest" if seed % 2 else "v1"


@pytest.mark.parametrize("kind", BYTES)
def test_a_damaged_log_keeps_what_can_be_read_of_it(local, children, kind: str) -> None:
    found = 0
    for seed in range(20 * FACTOR):
        rng, ref = random.Random(seed), Ref(f"r{seed}")
        digests = [local.put(f"{seed} {i}".encode()) for i in range(4)]
        for old, new in zip([None, *digests], digests, strict=False):
            local.move(ref, new, expect=old)
        moves = local.log(ref.name)
        path = local.root / "log" / f"{ref.name}.jsonl"
        BYTES[kind](path, rng)
        damaged_bytes = path.read_bytes()
        problems = local.verify(children).problems
        if problems:
            found += 1
            assert [(p.kind, p.refs, p.repairable) for p in problems] == [("unreadable", (), True)]
            with pytest.raises(RefCorrupt, match="line"):
                local.log(ref.name)
            done = local.repair(children)
            assert done.report.ok
            assert ref.name in done.mended[0]
            aside = (local.root / "quarantine").glob(f"log~{ref.name}.jsonl.*")
            assert [one.read_bytes() for one in aside] == [damaged_bytes]
        # What is left is what was there, but for what a flipped bit made of a word or a time.
        kept = local.log(ref.name)
        assert len(kept) <= 2 * len(moves)
        assert kind in ("flip", "extend") or all(entry in moves for entry in kept)
        assert local.ref(ref) == digests[-1]  # a log never decides where a ref is
        local.move(ref, digests[0], expect=digests[-1])
        assert local.log(ref.name)[-1].new == digests[0]
    assert found or kind in ("truncate", "extend")  # an end that is cut off was never acknowledged


@pytest.mark.parametrize("kind", ["directory", "symlink", "fifo"])
def test_a_log_that_is_no_file_is_moved_aside(local, children, kind: str) -> None:
    digest = local.put(b"x")
    local.move(Ref("team/sql"), digest, expect=None)
    ALL[kind](local.root / "log/team/sql.jsonl", random.Random(0))
    assert not local.verify(children).ok
    done = local.repair(children)
    assert done.report.ok
    assert "team/sql" in done.mended[0]
    assert local.log("team/sql") == []
    assert local.ref(Ref("team/sql")) == digest


def test_a_ref_without_a_log_is_told_before_it_is_forgotten(local, children) -> None:
    local.move(Ref("sql"), local.put(b"x"), expect=None)
    (local.root / "refs/sql/latest").write_text("nonsense")
    (local.root / "log/sql.jsonl").unlink()
    done = local.repair(children)
    (problem,) = done.report.problems
    assert (problem.kind, problem.refs, problem.digest) == ("missing", (Ref("sql"),), None)
    (aside,) = (local.root / "quarantine").iterdir()
    assert aside.read_text() == "nonsense"
    with pytest.raises(RefNotFound):
        local.ref(Ref("sql"))
    assert local.verify(children).ok


def test_a_ref_comes_back_although_its_object_is_gone(local, children) -> None:
    digest = local.put(b"x")
    local.move(Ref("sql"), digest, expect=None)
    (local.root / "refs/sql/latest").write_text("nonsense")
    object_path(local.root, digest).unlink()
    (problem,) = local.repair(children).report.problems
    assert (problem.kind, problem.digest, problem.refs) == ("missing", digest, (Ref("sql"),))
    local.put(b"x")
    assert local.verify(children).ok


def test_repair_of_a_sound_store_moves_nothing(local, children, parent) -> None:
    fill(local, parent, random.Random(0))
    files = {p: p.stat().st_mtime_ns for p in local.root.rglob("*") if p.is_file()}
    done = local.repair(children)
    assert (done.report.ok, done.quarantined, done.repaired, done.mended) == (True, (), (), ())
    assert {p: p.stat().st_mtime_ns for p in local.root.rglob("*") if p.is_file()} == files


def test_repair_makes_the_directories_that_a_copy_left_out(local, children) -> None:
    local.move(Ref("sql"), local.put(b"x"), expect=None)
    for name in DIRECTORIES:
        if not any((local.root / name).iterdir()):
            (local.root / name).rmdir()
    assert local.repair(children).report.ok
    assert all((local.root / name).is_dir() for name in DIRECTORIES)
    local.put(b"y")


def test_bytes_that_were_healed_just_now_stay(local, monkeypatch) -> None:
    """Between the look at damaged bytes and the move, somebody may put the right ones."""
    digest = local.put(b"blob")
    path = object_path(local.root, digest)
    look: Damage = ALL["flip"]
    look(path, random.Random(0))
    intact = local._objects._is_intact

    def healed(one: Digest) -> bool:
        found = intact(one)
        LocalStore(local.root).put(b"blob")
        return found

    monkeypatch.setattr(type(local._objects), "_is_intact", lambda _, one: healed(one))
    monkeypatch.setattr(LocalStore, "put", lambda _, data: path.write_bytes(data))
    assert local.quarantine(digest) is False
    assert local.get(digest) == b"blob"
