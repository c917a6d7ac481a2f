"""A library on a disk that fails: right answers or errors with a type, and names that are old or
new. The command line has more of this, call by call: tests/cli/test_faults.py."""

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adaptlib.errors import AdaptlibError
from adaptlib.experts import Library
from adaptlib.experts.references import children
from adaptlib.experts.sketches import sketches
from library_store import StoreError
from tests.soak import FACTOR, report
from tests.store.faulty import CODES, count, failing, lay, schedule
from tests.tiny import make_expert

ROUNDS = 2 if FACTOR == 1 else len(CODES)
TYPED = (OSError, StoreError, AdaptlibError)

Act = Callable[[Library], Any]
CHANGES: dict[str, Act] = {
    "add": lambda library: library.add(make_expert(5), "new"),
    "add --replace": lambda library: library.add(make_expert(5), "one", replace=True),
    "tag": lambda library: library.tag("two", "one", replace=True),
    "rename": lambda library: library.rename("one", "uno"),
    "remove": lambda library: library.remove("one"),
}
LOOKS: dict[str, Act] = {
    "summaries": lambda library: library.summaries(),
    "sketches": lambda library: [part.tobytes() for part in _table(library)],
    "tensors": lambda library: library["one"].deltas["layers.0.proj"].dense().tolist(),
}


def _table(library: Library) -> tuple[Any, Any]:
    table = sketches(library)
    return table.rows, table.scales


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    library = Library.open(tmp_path / "template", create=True)
    for number, name in enumerate(("one", "two", "three")):
        library.add(make_expert(number), name)
    library.tag("one", "one:v1")
    library.summaries()
    return tmp_path / "template"


@contextmanager
def fresh(template: Path) -> Iterator[Library]:
    """A copy to work on, checked after: what a name leads to is there, whole."""
    root = template.parent / "copy"
    lay(template, root)
    yield Library.open(root)
    report_ = Library.open(root).store.verify(children)
    assert report_.ok, report_.problems


@pytest.mark.parametrize(
    ("name", "derived"),
    [(name, derived) for name in LOOKS for derived in (True, False)],
)
def test_a_look_is_right_or_raises(name: str, derived: bool, template: Path) -> None:
    """Whatever fails. Where the index or sketches cannot be read they are made again."""
    if not derived:
        (template / "index.db").unlink()
        shutil.rmtree(template / "derived")
    act = LOOKS[name]
    with fresh(template) as library:
        right = act(library)
        before = library.tags()
    with fresh(template) as library:
        planned = schedule(count(template.parent, lambda: act(library)), rounds=ROUNDS)
    raised = 0
    for fault in planned:
        with fresh(template) as library:
            with failing(library.path or template, fault) as disk:
                try:
                    found = act(library)
                except TYPED:
                    found = None
            raised += found is None
            assert found is None or found == right, disk.failed
            assert disk.open == {}
            assert act(Library.open(library.path)) == right
            assert library.tags() == before
    report(f"faults: {name}", trials=len(planned), raised=raised)


def changed(act: Act, library: Library, limits: Callable[[], Any]) -> bool:
    """Whether a change went through; where it did not, it says so with a type."""
    try:
        with limits():
            act(library)
    except TYPED:
        return False
    return True


def old_or_new(library: Library, old: dict[str, str], new: dict[str, str]) -> None:
    """Each name is where it was or where it was to go."""
    tags = library.tags()
    for name in old.keys() | new.keys() | tags.keys():
        assert tags.get(name) in (old.get(name), new.get(name)), name


@pytest.mark.parametrize("name", CHANGES)
def test_a_disk_that_is_full_and_stays_so(name: str, template: Path) -> None:
    """From each call on, in turn. There may be no room to take back what was done before it, so
    some names may be new; none is lost, and with room again the same call goes through."""
    act = CHANGES[name]
    with fresh(template) as library:
        old = library.tags()
        calls = len(count(template.parent, lambda: act(library)).calls)
        new = library.tags()
    refused = 0
    root = template.parent
    turns = range(1, calls + 1, 3 if FACTOR == 1 else 1)
    for nth in turns:
        with fresh(template) as library:
            done = changed(act, library, lambda nth=nth: failing(root, full_from=nth))
            old_or_new(library, old, new)
            assert not done or library.tags() == new
            refused += not done
            if library.tags() == old:
                assert changed(act, library, lambda: failing(root))
                assert library.tags() == new
    assert refused > len(turns) // 3
    report(f"full disk: {name}", trials=len(turns), refused=refused)


@contextmanager
def limited(kind: int, amount: int) -> Iterator[None]:
    """What this process may have of something, for a moment."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("what", ["descriptors", "bytes"])
def test_real_limits(name: str, what: str, template: Path) -> None:
    """The kernel refuses descriptors, or cuts each write at so many bytes of a file: SQLite's too,
    which no test can stand in for."""
    act = CHANGES[name]
    with fresh(template) as library:
        old = library.tags()
        act(library)
        new = library.tags()
    refused = enough = 0
    for amount in [*range(8), *range(16, 1024, 96), 1 << 20]:
        with fresh(template) as library:
            limit = amount
            if what == "descriptors":
                first = os.open(os.devnull, os.O_RDONLY)  # the lowest that is free
                os.close(first)
                limit = first + amount
            kind = resource.RLIMIT_NOFILE if what == "descriptors" else resource.RLIMIT_FSIZE
            limit = min(limit, resource.getrlimit(kind)[1] % (1 << 62))
            done = changed(act, library, lambda limit=limit, kind=kind: limited(kind, limit))
            old_or_new(library, old, new)
            assert not done or library.tags() == new
            refused += not done
            enough += done
            if library.tags() == old:
                act(library)
                assert library.tags() == new
    assert refused
    assert enough
    report(f"real limits: {what}, {name}", refused=refused, enough=enough)
