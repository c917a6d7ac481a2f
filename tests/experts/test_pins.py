"""What is kept though no name leads to it, and what gc could take if a name went."""

from datetime import timedelta
from pathlib import Path

import pytest

from adaptlib.errors import ConflictError, NotFoundError, UsageError
from adaptlib.experts import Library
from adaptlib.experts.names import expert_ref, record_ref
from adaptlib.experts.records import save_record
from library_store import Digest
from tests.tiny import make_expert

NOW = timedelta(0)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library.open(tmp_path / "library", create=True)


def collected(library: Library) -> int:
    return len(library.gc(grace=NOW, history=NOW).removed)


def test_gc_keeps_what_is_pinned_whatever_becomes_of_its_names(library: Library) -> None:
    library.add(make_expert(0), "stays")
    digest = library.add(make_expert(1), "goes").digest
    label, pinned = library.pin("goes")
    assert (label, pinned) == (digest[7:19], digest)
    library.remove("goes")
    assert collected(library) == 0
    assert library[digest].deltas.keys() == make_expert(1).deltas.keys()
    assert list(library) == ["stays"]
    library.tag(digest, "back")  # a pin is no name, but what it holds can get one
    assert library.unpin(label) == digest
    assert collected(library) == 0
    library.remove("back")
    assert collected(library) == 2


def test_pins_by_label(library: Library) -> None:
    first = library.add(make_expert(0), "sql").digest
    other = library.add(make_expert(1), "poems").digest
    assert library.pins() == {}
    library.pin("sql", "paper")
    library.pin("sql", "paper")  # again is no matter
    assert library.pins() == {"paper": first}
    with pytest.raises(ConflictError, match="the pin paper is at") as error:
        library.pin("poems", "paper")
    assert error.value.hint == "take another label, or: adaptlib unpin paper"
    library.pin(other[:20], "poems")
    assert library.pins() == {"paper": first, "poems": other}
    assert library.unpin(first[:17]) == first  # by what it holds
    with pytest.raises(NotFoundError, match="no pin is 'paper'; there are: poems"):
        library.unpin("paper")


def test_pins_are_no_experts(library: Library) -> None:
    library.add(make_expert(0), "sql")
    library.pin("sql", "paper")
    assert "pins/paper" not in library
    assert list(library.tags()) == ["sql"]
    for name in ("pins/paper", "pins/paper:latest"):
        with pytest.raises(UsageError, match="kept for pins"):
            library.tag("sql", name)
    for label in ("a/b", "a:b", "", "..", "A"):
        with pytest.raises(UsageError):
            library.pin("sql", label or " ")
    assert library.verify(deep=True).ok


def test_what_a_name_keeps_alone_is_what_gc_frees(library: Library) -> None:
    """Foretold by `freed_by` from the index, done by `gc` from the objects themselves."""
    one, two, three = (library.add(make_expert(i), f"e{i}") for i in range(3))
    library.tag("e0", "same")
    library.pin("e1")
    save_record(library.store, "clusterings", "mine", {"experts": {"e2": three.digest}})
    assert [library.freed_by([expert_ref(f"e{i}")]) for i in range(3)] == [0, 0, 0]
    both = [expert_ref("e2"), record_ref("clusterings", "mine")]
    foretold = library.freed_by(both)
    assert foretold > three.manifest.blob.size
    before = library.gc(grace=NOW, history=NOW)
    assert before.removed == ()
    for ref in both:
        library.store.move(ref, None, expect=library.store.ref(ref))
    assert library.gc(grace=NOW, history=NOW).bytes == foretold
    assert library.freed_by([expert_ref("e0"), expert_ref("same")]) > one.manifest.blob.size
    assert two.digest in library
    (library.path / "index.db").unlink()  # type: ignore[operator]
    assert library.freed_by([expert_ref("e0"), expert_ref("same")]) > one.manifest.blob.size


def test_experts_that_share_their_tensors_free_only_what_is_theirs(library: Library) -> None:
    library.add(make_expert(0), "a")
    library.add(make_expert(0), "b", description="the same weights, another card")
    alone = library.freed_by([expert_ref("a")])
    assert alone == library.store.size(Digest.parse(library.digest("a")))
    library.remove("a")
    assert library.gc(grace=NOW, history=NOW).bytes == alone
    assert library.verify(deep=True).ok
