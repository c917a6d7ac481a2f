"""In whatever order the calls of several actors come, no ref loses what it points to."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from library_store import Digest, LocalStore, Ref, Store, _collect, _files, _lock, _objects, _trash
from library_store._objects import ObjectFiles
from tests.soak import FACTOR, report
from tests.store.scenarios import LYING_PAIRS, PAIRS, TRIPLES
from tests.store.schedule import Machine, Scenario, explore, machine

EACH = 30 * FACTOR  # schedules with as many switches as a scenario has
DEEP = 3000  # for what is broken on purpose, until one is found


@pytest.fixture(scope="module")
def at_work() -> Iterator[Machine]:
    with machine() as made:
        yield made


@pytest.mark.parametrize(
    ("name", "scenarios", "least"),
    [
        ("two actors", PAIRS, 2200),
        ("two actors, a lock that lies", LYING_PAIRS, 900),
        ("three actors", TRIPLES, 2000),
    ],
    ids=["two", "two-lying", "three"],
)
def test_no_order_breaks_a_promise(at_work, name, scenarios, least):
    total, complete = 0, []
    for what, scenario in scenarios.items():
        played, whole, bad = explore(at_work, scenario, limit=EACH, seed=0)
        assert bad is None, f"{what}: {bad}"
        total += played
        complete += [what] if whole else []
    report(f"interleavings of {name}", schedules=total, of=len(scenarios), complete=len(complete))
    assert total >= least  # 5,100 of all three


# --- each part of the protocol is needed: without it, some order breaks a promise ---


def sweep_without_another_look(patch: pytest.MonkeyPatch) -> None:
    def sweep(objects: ObjectFiles, victims: Sequence[tuple[Digest, int]], gc_id: str):
        trash = objects.root / "trash" / gc_id
        _files.make_directories(trash, base=objects.root / "trash")
        for digest, _ in victims:
            with suppress(FileNotFoundError):
                _files.replace(objects.path(digest), trash / digest.hex)
        return tuple(digest for digest, _ in victims)

    patch.setattr(_trash, "sweep", sweep)


def put_without_freshening(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_files, "touch", lambda path: None)


def move_that_looks_once(patch: pytest.MonkeyPatch) -> None:
    need = LocalStore._need

    def before_only(self: LocalStore, ref: Ref, digest: Digest | None) -> None:
        if self._refs.read(ref) != digest:
            need(self, ref, digest)

    patch.setattr(LocalStore, "_need", before_only)


def gc_that_looks_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Store, "_reach_only", lambda self, marked: True)


def gc_that_plans_once(patch: pytest.MonkeyPatch) -> None:
    """It holds the lock, and goes by what it saw before it did."""
    patch.setattr(_collect, "is_current", lambda store, plan: True)
    patch.setattr(Store, "_reach_only", lambda self, marked: True)


def takeover_by_whoever_finds_it(patch: pytest.MonkeyPatch) -> None:
    def take_away(path: Path, seen: _files.Status) -> bool:
        _files.remove(path)
        return True

    patch.setattr(_lock, "_take_away", take_away)


def quarantine_without_another_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_objects, "_has_hash", lambda path, digest: False)


def healing_by_moving_away_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_objects, "keep_aside", _objects.set_aside)


@pytest.mark.parametrize(
    ("scenario", "without"),
    [
        (PAIRS["put again and move, gc"], sweep_without_another_look),
        (PAIRS["put again and move, gc"], put_without_freshening),
        (PAIRS["move to garbage, gc"], gc_that_plans_once),
        (LYING_PAIRS["lies: move to garbage, gc"], move_that_looks_once),
        (LYING_PAIRS["lies: move to garbage, gc"], gc_that_looks_once),
        (PAIRS["takeover"], takeover_by_whoever_finds_it),
        (PAIRS["quarantine, put"], quarantine_without_another_look),
        (PAIRS["put, put"], healing_by_moving_away_first),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_without_it_an_order_is_found_that_breaks_a_promise(
    at_work: Machine,
    monkeypatch: pytest.MonkeyPatch,
    scenario: Scenario,
    without: Callable[[pytest.MonkeyPatch], None],
):
    without(monkeypatch)
    played, _, bad = explore(at_work, scenario, limit=DEEP, seed=0)
    report(f"{without.__name__} found", schedules=played)
    assert bad is not None
    again = at_work.play(scenario, bad.schedule)
    assert (again.wrong, again.steps) == (bad.wrong, bad.steps)


def test_a_lock_that_excludes_nobody_lets_two_moves_win(at_work):
    moves = PAIRS["move, move"]
    lying = Scenario(moves.prepare, moves.actors, moves.check, typed=moves.typed, lies=True)
    _, _, bad = explore(at_work, lying, limit=DEEP, seed=0)
    assert bad is not None
    assert "winners: [0, 1]" in str(bad)
