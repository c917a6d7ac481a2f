"""Whenever the power goes, and whatever of the last writes is lost, nothing acknowledged is."""

import random

from tests.soak import FACTOR, report
from tests.store.crashes import Run, Tally, Workload, changes, check, record, resume
from tests.store.power import states
from tests.store.simulated import Disk, installed
from tests.store.workloads import library_workloads, store_workloads

CUTS = 2 if FACTOR == 1 else 5
CAP = 40 * FACTOR
KILLS = 8 * FACTOR
AGAIN = 3 * FACTOR


def cut_the_power(disk: Disk, workload: Workload, tally: Tally) -> None:
    """At every moment; at moments after the process was killed; and at moments after the power had
    gone before."""
    generator = random.Random(workload.name)
    run = record(disk, workload, cuts=CUTS)
    check(disk, run, tally, cap=CAP * workload.width)
    kills = [
        (step, change)
        for step, count in enumerate(changes(disk, workload))
        for change in range(1, count + 1)
    ]
    for kill in generator.sample(kills, min(KILLS, len(kills))):
        check(disk, record(disk, workload, cuts=CUTS, kill=kill), tally, cap=FACTOR)
    for _ in range(AGAIN):
        check(disk, _again(disk, run, generator), tally, cap=FACTOR)


def _again(disk: Disk, run: Run, generator: random.Random) -> Run:
    moment = generator.choice(run.moments[:-1])
    image = generator.choice(list(states(moment, cap=CAP, seed=0)))
    return resume(disk, run, moment, image, cuts=CUTS)


def test_no_power_cut_breaks_a_promise() -> None:
    tally = Tally()
    with installed() as disk:
        for workload in [*store_workloads(), *library_workloads()]:
            cut_the_power(disk, workload, tally)
    report(
        "power cuts",
        states=len(tally.states),
        outside_tmp=len(tally.outside_tmp),
        moments=tally.moments,
    )
    assert len(tally.states) >= 20_000
    assert len(tally.outside_tmp) >= 3_500
