"""Libraries that earlier versions wrote are read by this one, whole, and go on being used."""

import importlib.util
import json
import shutil
import sqlite3
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from adaptlib.clustering.saved import load_clustering
from adaptlib.errors import CorruptError
from adaptlib.experts import Library
from adaptlib.experts.peft import write_peft
from adaptlib.experts.prototypes import catalogue
from adaptlib.experts.records import load_record
from adaptlib.experts.sketches import sketches
from adaptlib.routing.saved import load_router
from library_store import LocalStore, UnknownFormat
from library_store.local import DIRECTORIES
from tests.tiny import make_expert

GOLDEN = Path(__file__).parent.parent / "golden" / "stores"
STORES = sorted(path.name for path in GOLDEN.glob("*/") if (path / "expected.json").is_file())


def load_make() -> Any:
    spec = importlib.util.spec_from_file_location("make_golden_store", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


make = load_make()


@pytest.fixture(params=STORES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of an old library, and what its own version said of it."""
    source, root = GOLDEN / request.param, tmp_path / "library"
    shutil.copytree(source / "library", root)
    for name in DIRECTORIES:  # git leaves out what is empty
        (root / name).mkdir(exist_ok=True)
    return root, json.loads((source / "expected.json").read_text())


def test_there_is_a_library_of_each_milestone() -> None:
    assert len(STORES) >= 6


def test_every_name_log_and_tensor_is_what_it_was(golden: tuple[Path, dict[str, Any]]) -> None:
    root, expected = golden
    library = Library.open(root)
    assert library.tags() == expected["tags"]
    assert library.names() == expected["names"]
    assert sorted(map(str, library.store.objects())) == expected["objects"]
    for name, moves in expected["logs"].items():
        found = [
            [e.when, str(e.ref), e.old and str(e.old), e.new and str(e.new), e.reason]
            for e in library.log(name)
        ]
        assert found == moves
    assert set(expected["tensors"]) == set(library.tags())
    for name, tensors in expected["tensors"].items():
        assert make.tensors_of(library[name]) == tensors
        assert make.tensors_of(library.stream(name)) == {
            part: about for part, about in tensors.items() if not part.endswith(".gate")
        }
    assert library.verify(deep=True).problems == ()
    assert library.verify(quick=True).problems == ()


def test_what_was_derived_changes_no_answer(golden: tuple[Path, dict[str, Any]]) -> None:
    """The index and derived/ of an old version are used, or are as if they were not there."""
    root, _ = golden
    with_old = Library.open(root)
    found = with_old.summaries(), sketches(with_old), catalogue(with_old)
    assert Library.open(root).verify(deep=True).ok
    shutil.rmtree(root / "derived")
    (root / "index.db").unlink()
    fresh = Library.open(root)
    assert fresh.summaries() == found[0]
    made = sketches(fresh)
    assert made.names == found[1].names
    assert (made.rows == found[1].rows).all()
    assert (made.scales == found[1].scales).all()
    anew, names = catalogue(fresh), list(fresh)
    for module in make.SHAPES:
        assert anew.prototypes(module, names).equal(found[2].prototypes(module, names))


def test_what_was_saved_is_read(golden: tuple[Path, dict[str, Any]]) -> None:
    root, expected = golden
    library = Library.open(root)
    for ref in expected["records"]:
        kind, name = ref.split("/")
        members = load_record(library.store, kind, name)["experts"]
        assert members == {one: expected["digests"][one] for one in ("poems", "team/sql")}
        if kind == "routers":
            router, held = load_router(library, name)
            assert list(router.experts) == ["poems", "team/sql"]
            assert make.tensors_of(held["poems"]) == expected["tensors"]["poems"]
        elif "schema" in load_record(library.store, kind, name):
            assert sorted(load_clustering(library, name).names) == ["poems", "team/sql"]


def test_an_old_library_goes_on_being_used(
    golden: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, expected = golden
    library = Library.open(root)
    gone = expected["digests"]["gone"]
    assert library.restore(expected["gc"]["id"]) == len(expected["gc"]["removed"]) == 2
    library.tag(gone, "back")
    assert make.tensors_of(library["back"]) == make.tensors_of(make.experts()["gone"])
    library.add(make_expert(9), "new")
    library.tag("new", "new:v1")
    library.rename("best", "better")
    library.remove("new:v1")
    removed = library.gc(grace=timedelta(0), history=timedelta(0)).removed
    assert removed == ()  # everything in it has a name, or a record needs it
    assert library.verify(deep=True).ok
    write_peft(library.packed("poems"), tmp_path / "out")
    again = Library.open(tmp_path / "again", create=True)
    again.add(tmp_path / "out", "poems")
    assert make.tensors_of(again["poems"]) == expected["tensors"]["poems"]


def test_the_same_expert_has_the_digest_that_it_had(
    golden: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Names of experts are for ever: a manifest's bytes have not changed since the first one."""
    _, expected = golden
    library = Library.open(tmp_path / "fresh", create=True)
    made = make.experts()
    assert {name: library.add(made[name], name).digest for name in expected["digests"]} == expected[
        "digests"
    ]


def test_the_index_of_a_later_version_is_made_again(golden: tuple[Path, dict[str, Any]]) -> None:
    root, _ = golden
    wanted = Library.open(root).summaries()
    database = sqlite3.connect(root / "index.db")
    with database:
        database.execute("PRAGMA user_version = 987654")
    database.close()
    assert Library.open(root).summaries() == wanted


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 2, "hash": "sha256"}\n',
        '{"format": 1, "hash": "blake3"}\n',
        '{"format": 1, "hash": "sha256", "packs": true}\n',
        "2\n",
        "",
    ],
)
def test_a_format_that_is_not_known_is_refused(tmp_path: Path, text: str) -> None:
    root = tmp_path / "library"
    Library.open(root, create=True)
    (root / "FORMAT").chmod(0o644)
    (root / "FORMAT").write_text(text)
    with pytest.raises(UnknownFormat, match="FORMAT"):
        LocalStore.open(root)
    with pytest.raises((UnknownFormat, CorruptError)):
        Library.open(root)


def test_a_later_format_is_said_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from adaptlib.cli.main import invoke

    root = tmp_path / "library"
    Library.open(root, create=True)
    (root / "FORMAT").chmod(0o644)
    (root / "FORMAT").write_text('{"format": 2, "hash": "sha256"}\n')
    assert invoke(["list", "-L", str(root)]) == 4
    said = capsys.readouterr().err
    assert '"format": 2' in said
    assert "Next: open it with the version that made it, or a newer one" in said
