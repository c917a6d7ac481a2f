"""Each step of the protocol is needed: without it, a check fails that passes with it."""

from collections.abc import Callable, Iterator

import pytest

from tests.soak import report
from tests.store.crashes import Tally, changes, check, record
from tests.store.mutants import MUTANTS, Mutant
from tests.store.operations import Violation
from tests.store.races import RACES
from tests.store.simulated import Disk, installed
from tests.store.workloads import store_workloads

CAP = 60
WORKLOADS = {workload.name: workload for workload in store_workloads()}


def _power(name: str) -> Callable[[Disk], None]:
    """The power is cut, whenever."""

    def run(disk: Disk) -> None:
        found = record(disk, WORKLOADS[name], cuts=2)
        check(disk, found, Tally(), cap=CAP, all_of_it=True)

    return run


def _killed(name: str) -> Callable[[Disk], None]:
    """And the process that made the first step is killed before that, whenever."""

    def run(disk: Disk) -> None:
        tally = Tally()
        for change in range(1, changes(disk, WORKLOADS[name])[0] + 1):
            found = record(disk, WORKLOADS[name], cuts=1, kill=(0, change))
            check(disk, found, tally, cap=1, all_of_it=True)

    return run


CHECKS: dict[str, Callable[[Disk], None]] = {
    **{name: _power(name) for name in WORKLOADS},
    "put, killed": _killed("put"),
    "move, killed": _killed("a lock that was left"),
    **RACES,
}


@pytest.fixture
def disk() -> Iterator[Disk]:
    with installed() as made:
        yield made


@pytest.mark.parametrize("name", sorted({mutant.check for mutant in MUTANTS}))
def test_the_protocol_passes_what_its_mutants_do_not(disk: Disk, name: str) -> None:
    CHECKS[name](disk)


def test_every_mutant_is_killed(disk: Disk) -> None:
    survivors = [mutant.name for mutant in MUTANTS if not _is_killed(disk, mutant)]
    report("mutants", killed=len(MUTANTS) - len(survivors), of=len(MUTANTS))
    assert survivors == []
    assert len(MUTANTS) >= 40


def _is_killed(disk: Disk, mutant: Mutant) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        for change in mutant.changes:
            change(patch)
        try:
            CHECKS[mutant.check](disk)
        except Violation:
            return True
    return False
