"""Verification hashes everything once and says what each ref lacks."""

import pytest

from library_store import Digest, LocalStore, Problem, Ref

SQL, PY = Ref("sql"), Ref("py", "v2")


def damage(store: LocalStore, digest: Digest, data: bytes) -> None:
    path = store.root / "objects/sha256" / digest.hex[:2] / digest.hex
    path.chmod(0o644)
    path.write_bytes(data)


def test_an_empty_store_is_well(store, children):
    report = store.verify(children)
    assert (report.checked, report.problems, report.ok) == (0, (), True)


def test_every_object_is_hashed_once(store, children, parent):
    blob = store.put(b"blob")
    both = [store.put(parent(blob, salt=salt)) for salt in "ab"]
    store.move(SQL, both[0], expect=None)
    store.move(PY, both[1], expect=None)
    stray = store.put(b"stray")
    seen = []
    report = store.verify(children, progress=seen.append)
    assert report.ok
    assert report.checked == 4
    assert sorted(seen) == sorted([blob, *both, stray])


def test_a_missing_child_is_a_problem_of_every_ref_above_it(store, children, parent):
    lost = Digest.of(b"lost")
    low = store.put(parent(lost))
    top = store.put(parent(low, store.put(b"fine")))
    store.move(SQL, top, expect=None)
    store.move(PY, low, expect=None)
    store.move(Ref("other"), store.put(b"x"), expect=None)
    report = store.verify(children)
    assert [(p.kind, p.digest, p.refs) for p in report.problems] == [("missing", lost, (PY, SQL))]
    assert report.checked == 4
    assert not report.ok
    assert report.problems[0].hint


def test_what_no_ref_reaches_may_lack_its_children(store, children, parent):
    store.put(parent(Digest.of(b"lost")))
    assert store.verify(children).ok


def test_a_manifest_that_cannot_be_understood(store, children):
    bad = store.put(b"parent\nsha256:nonsense")
    store.move(SQL, bad, expect=None)
    (problem,) = store.verify(children).problems
    assert (problem.kind, problem.digest, problem.refs) == ("unreadable", bad, (SQL,))
    assert "nonsense" in problem.detail


@pytest.mark.parametrize("data", [b"blub", b"blo", b"", b"blob+"])
def test_damaged_bytes(local, children, parent, data):
    blob = local.put(b"blob")
    local.move(SQL, local.put(parent(blob)), expect=None)
    damage(local, blob, data)
    report = local.verify(children)
    assert [(p.kind, p.digest, p.refs) for p in report.problems] == [("corrupt", blob, (SQL,))]
    assert report.checked == 2


def test_damage_that_no_ref_sees(local, children):
    blob = local.put(b"blob")
    damage(local, blob, b"blub")
    assert [(p.kind, p.refs) for p in local.verify(children).problems] == [("corrupt", ())]


def test_a_ref_to_nothing(local, children):
    digest = local.put(b"blob")
    local.move(SQL, digest, expect=None)
    (local.root / "objects/sha256" / digest.hex[:2] / digest.hex).unlink()
    report = local.verify(children)
    assert [(p.kind, p.refs) for p in report.problems] == [("missing", (SQL,))]
    assert report.checked == 0


def test_everything_else_that_can_be_wrong_is_found_in_one_go(local, children):
    digest = local.put(b"blob")
    for ref in (SQL, PY):
        local.move(ref, digest, expect=None)
    (local.root / "refs/sql/latest").write_text("nonsense")
    (local.root / "refs/Upper").write_text("x")
    (local.root / "objects/sha256/zz").write_text("x")
    (local.root / "objects/sha256" / digest.hex[:2] / "README").write_text("x")
    (local.root / "objects/sha256/.DS_Store").write_text("x")
    (local.root / "refs/.DS_Store").write_text("x")
    with (local.root / "log/py.jsonl").open("ab") as log:
        log.write(b"nonsense\n")
    problems = local.verify(children).problems
    assert [(p.kind, p.refs) for p in problems] == [
        ("foreign", ()),
        ("foreign", ()),
        ("foreign", ()),
        ("unreadable", ()),
        ("unreadable", (SQL,)),
    ]
    for name in ("zz", "README", "Upper", "py.jsonl line 2", "refs/sql/latest"):
        assert any(name in problem.detail for problem in problems)
    assert all(isinstance(problem, Problem) and problem.hint for problem in problems)


@pytest.mark.parametrize("place", ["objects/sha256", "refs", "log"])
def test_a_directory_that_is_gone_is_found(local, children, place):
    (local.root / place).rename(local.root / "elsewhere")
    assert [p.kind for p in local.verify(children).problems] == ["unreadable"]


def test_of_what_has_a_size_only_the_size_is_looked_at(local, children, parent):
    blob, stray = local.put(b"blob"), local.put(b"stray")
    top = local.put(parent(blob))
    local.move(SQL, top, expect=None)

    def sizes(_: Digest, data: bytes) -> dict[Digest, int]:
        return {blob: 4} if data.startswith(b"parent") else {}

    damage(local, stray, b"STRAY")
    damage(local, blob, b"BLOB")
    report = local.verify(children, sizes=sizes)
    assert (report.checked, report.problems) == (2, ())
    for data in (b"", b"blob, and more"):
        damage(local, blob, data)
        (problem,) = local.verify(children, sizes=sizes).problems
        assert (problem.kind, problem.digest, problem.refs) == ("corrupt", blob, (SQL,))
        assert f"{len(data)} bytes" in problem.detail
        assert problem.repairable
    (local.root / "objects/sha256" / blob.hex[:2] / blob.hex).unlink()
    (problem,) = local.verify(children, sizes=sizes).problems
    assert (problem.kind, problem.digest, problem.repairable) == ("missing", blob, False)
    damage(local, top, b"parent, more or less")
    assert [p.digest for p in local.verify(children, sizes=sizes).problems] == [top]
