"""Run operations on a simulated disk, cut the power everywhere, and hold what is left to promises.

A `Workload` is what was there before and the steps that are then made, one after the other. Each
step says what is true once it has returned (`Model`). `record` runs them; `check` takes every state
that a power cut at any moment may leave, starts another process on it, and holds in `_examine`:

what had returned is there, and what had not has happened wholly or not at all; everything that a
ref reaches is there and intact; logs can be read; no lock of the dead process blocks; the step can
be made again and the rest after it; and gc, right then and much later, takes nothing that a ref
reaches and nothing that was just put.

A process may have been killed before (`record(kill=...)`), or the power may have gone before
(`resume`): then the power is cut while another process makes the step again, and the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from library_store import (
    Digest,
    LocalStore,
    NotAStore,
    Ref,
    RefCorrupt,
    Store,
    StoreError,
)
from tests.store.image import Image
from tests.store.operations import (
    AGED,
    GRACE,
    HOME,
    Children,
    Create,
    Model,
    Step,
    Violation,
    that,
)
from tests.store.power import Moment, Recorder, states
from tests.store.simulated import SECOND, Blocked, Disk, Killed

WAIT: Final = 120 * SECOND  # longer than a lock of an unknown process is respected

_TURNS: Final = ((True, True), (True, False), (False, True), (True, False), (False, True))
"""Which collections follow: right afterwards, and much later."""


@dataclass(frozen=True)
class Workload:
    """`before` is made first, all of it is old and durable, and `spoil` does to it what it does."""

    name: str
    before: tuple[Step, ...]
    steps: tuple[Step, ...]
    children: Children
    spoil: Callable[[Disk], None] | None = None
    damaged: frozenset[Digest] = frozenset()
    unreadable: bool = False
    hard_links: bool = True
    width: int = 1
    """How many times as many states of a moment to look at as usual."""
    always: Callable[[dict[Ref, Digest]], bool] = lambda refs: True


@dataclass
class Tally:
    """What was looked at. `outside_tmp` counts states that differ in more than unfinished files."""

    moments: int = 0
    states: set[int] = field(default_factory=set)
    outside_tmp: set[int] = field(default_factory=set)
    checked: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True)
class Run:
    """What was done on a disk: what is promised after each step, and each moment meanwhile."""

    workload: Workload
    models: list[Model]
    moments: list[Moment]


def check(disk: Disk, run: Run, tally: Tally, *, cap: int, all_of_it: bool = False) -> None:
    """Hold every state of every moment, as `states` gives them, to its promises, or raise.

    Collecting right afterwards and much later takes more time than all else, so that states take
    turns at it, unless `all_of_it`.
    """
    finals = {
        done: _final(run.workload, run.models, done)
        for done in {moment.done for moment in run.moments}
    }
    for number, moment in enumerate(run.moments):
        tally.moments += 1
        for image in states(moment, cap=cap, seed=number):
            tree = image.tree()
            key = hash(frozenset(tree.items()))
            if (key, moment.done) in tally.checked:
                continue
            tally.checked.add((key, moment.done))
            tally.states.add(key)
            outside = (item for item in tree.items() if not item[0].startswith(f"{HOME}/tmp/"))
            tally.outside_tmp.add(hash(frozenset(outside)))
            which = (True, True) if all_of_it else _TURNS[len(tally.states) % len(_TURNS)]
            _hold(disk, run, moment, image, finals[moment.done], which)


def changes(disk: Disk, workload: Workload) -> list[int]:
    """How many changes each step makes."""
    counts: list[int] = []
    prepare(disk, workload)
    for step in workload.steps:
        count = 0

        def watch(call: str, path: str) -> None:
            nonlocal count
            count += 1

        disk.watch = watch
        step.run(LocalStore(HOME), disk)
        disk.watch = None
        counts.append(count)
    return counts


def prepare(disk: Disk, workload: Workload) -> Model:
    """The disk before the first step; all that is on it is old."""
    disk.new()
    disk.hard_links = workload.hard_links
    model = Model(store=False)
    if not any(isinstance(step, Create) for step in workload.steps):
        model = _run(Create(), disk, model)
    for step in workload.before:
        model = _run(step, disk, model)
    if workload.spoil is not None:
        workload.spoil(disk)
    disk.now += AGED
    objects, damaged = model.objects - workload.damaged, workload.damaged
    return replace(
        model,
        young=frozenset(),
        objects=objects,
        damaged=damaged,
        unreadable=workload.unreadable,
    )


def record(
    disk: Disk, workload: Workload, *, cuts: int, kill: tuple[int, int] | None = None
) -> Run:
    """Run the steps. `kill=(step, n)` kills the process before the n-th change of that step, and
    another process makes the step again."""
    model = prepare(disk, workload)
    if kill is None:
        return _record(disk, workload, [model], cuts=cuts)
    models = [model]
    recorder = disk.journal = Recorder(disk.image(), cuts=cuts)
    for step in workload.steps[: kill[0]]:
        models.append(_run(step, disk, models[-1]))
        recorder.returned(len(models) - 1)
    disk.kill_at(kill[1])
    try:
        workload.steps[kill[0]].run(LocalStore(HOME), disk)
    except Killed:
        disk.next_process(after=WAIT)
        return _record(disk, workload, models, recorder=recorder)
    raise AssertionError(f"{workload.name}: step {kill[0]} makes no {kill[1]} changes")


def resume(disk: Disk, run: Run, moment: Moment, image: Image, *, cuts: int) -> Run:
    """The power went at this moment and left this image. Another process makes the step again."""
    disk.load(image)
    disk.next_process(after=WAIT)
    if disk.find(f"{HOME}/FORMAT") is None:
        LocalStore.create(HOME)
    return _record(disk, run.workload, run.models[: moment.done + 1], cuts=cuts, again=True)


def _record(
    disk: Disk,
    workload: Workload,
    models: list[Model],
    *,
    cuts: int = 0,
    again: bool = False,
    recorder: Recorder | None = None,
) -> Run:
    again = again or recorder is not None
    if recorder is None:
        recorder = Recorder(disk.image(), cuts=cuts, done=len(models) - 1)
    disk.journal = recorder
    models = list(models)
    for step in workload.steps[len(models) - 1 :]:
        models.append(_run(step, disk, models[-1], again=again))
        recorder.returned(len(models) - 1)
        again = False
    disk.journal = None
    return Run(workload, models, recorder.moments)


def _run(step: Step, disk: Disk, model: Model, *, again: bool = False) -> Model:
    try:
        (step.again if again else step.run)(LocalStore(HOME), disk)
    except StoreError as error:
        raise Violation(f"{step} fails: {error}") from error
    return step.after(model, again=again)


def _final(workload: Workload, models: list[Model], done: int) -> Model:
    """What is promised if the steps from `done` on are made by another process."""
    model = models[done]
    for number, step in enumerate(workload.steps[done:]):
        model = step.after(model, again=number == 0)
    return model


# --- what holds after a power cut ---------------------------------------------------------------


def _hold(
    disk: Disk,
    run: Run,
    moment: Moment,
    image: Image,
    final: Model,
    after_it: tuple[bool, bool],
) -> None:
    now, pid = disk.now, disk.pid
    try:
        disk.load(image)
        disk.next_process(after=WAIT)
        _examine(disk, run.workload, moment.done, run.models, final, after_it)
    except (AssertionError, StoreError, OSError, Blocked) as error:
        tree = "\n".join(f"  {path}: {what}" for path, what in sorted(image.tree().items()))
        raise Violation(
            f"{run.workload.name}: power cut after {moment.after!r}, {moment.done} steps had "
            f"returned: {type(error).__name__}: {error}\n{tree}"
        ) from error
    finally:
        disk.now, disk.pid = now, pid


def _examine(
    disk: Disk,
    workload: Workload,
    done: int,
    models: list[Model],
    final: Model,
    after_it: tuple[bool, bool],
) -> None:
    before = models[done]
    after = models[min(done + 1, len(models) - 1)]
    try:
        store = LocalStore.open(HOME)
    except NotAStore:
        that(not before.store, "there is no store any more")
        store = LocalStore.create(HOME)
    _examine_store(disk, workload, store, before, after)
    for number, step in enumerate(workload.steps[done:]):
        (step.again if number == 0 else step.run)(LocalStore(HOME), disk)
    if final.damaged or final.unreadable:
        LocalStore(HOME).repair(workload.children)
    soon, late = after_it
    _examine_life(disk, workload.children, LocalStore(HOME), final, soon=soon, late=late)


def _examine_store(
    disk: Disk, workload: Workload, store: LocalStore, before: Model, after: Model
) -> None:
    if before.unreadable:
        try:
            store.refs()
            _examine_logs(store, before.refs, before, after)
        except RefCorrupt:
            return  # as before; and what is made again is looked at
    damaged = before.damaged | after.damaged
    for problem in store.verify(workload.children).problems:
        that(problem.digest in damaged, f"verify: {problem}")
    refs = store.refs()
    for ref in {*before.refs, *after.refs, *refs}:
        where = (before.refs.get(ref), after.refs.get(ref))
        that(refs.get(ref) in where, f"{ref} is at {refs.get(ref)}, wanted one of {where}")
    that(workload.always(refs), f"refs are {refs}")

    objects, trash = kept(disk, "objects/sha256"), kept(disk, "trash")
    for digest in before.objects & after.objects:
        that(digest.hex in objects, f"{digest} had been put, and is gone")
    for digest in before.trash & (after.trash | after.objects):
        that(digest.hex in objects or digest.hex in trash, f"{digest} was in the trash")
    for digest in before.gone & after.gone:
        that(digest.hex not in objects, f"{digest} had been removed, and is there")
    aside = set(kept(disk, "quarantine").values())
    that((before.aside & after.aside) <= aside, "what was in quarantine is gone")
    _examine_logs(store, refs, before, after)


def _examine_logs(store: Store, refs: dict[Ref, Digest], before: Model, after: Model) -> None:
    for name in {line[0].name for line, _ in after.log}:
        found = [(entry.ref, entry.old, entry.new) for entry in store.log(name)]
        for line, needed in before.log:
            if line[0].name != name:
                continue
            if found[:1] == [line]:
                del found[0]
            else:
                that(not needed, f"the log of {name} lacks {line}, it has {store.log(name)}")
        for line, _ in after.log[len(before.log) :]:
            if found[:1] == [line]:
                that(refs.get(line[0]) == line[2], f"the log tells of {line}, which was not")
                del found[0]
        that(not found, f"the log of {name} has more: {found}")


def _examine_life(
    disk: Disk, children: Children, store: LocalStore, final: Model, *, soon: bool, late: bool
) -> None:
    """All steps were made again: everything is there, and the store goes on working."""
    that(store.refs() == final.refs, f"refs are {store.refs()}, wanted {final.refs}")
    ref, extra = Ref("after"), store.put(b"after")
    store.move(ref, extra, expect=None)
    if soon and late:
        dry = store.gc(children, grace=GRACE, now=disk.time(), dry_run=True).removed
        wet = store.gc(children, grace=GRACE, now=disk.time()).removed
        that(dry == wet, f"gc removed {wet}, a dry run said {dry}")
    elif soon:
        store.gc(children, grace=GRACE, now=disk.time())
    if soon:
        _reached(disk, children, {*final.refs.values(), *final.young, extra})
    if late:
        disk.now += AGED
        store.gc(children, grace=GRACE, now=disk.time())
        _reached(disk, children, {*final.refs.values(), extra})
        left = disk.directories[disk.find(f"{HOME}/tmp") or 0]
        that(not left, f"tmp/ still has {list(left)}")


def _reached(disk: Disk, children: Children, waiting: set[Digest]) -> None:
    objects = kept(disk, "objects/sha256")
    seen: set[Digest] = set()
    while waiting:
        digest = waiting.pop()
        if digest not in seen:
            seen.add(digest)
            that(digest.hex in objects, f"gc removed {digest}")
            waiting |= set(children(digest, objects[digest.hex]))


def kept(disk: Disk, where: str) -> dict[str, bytes]:
    """The files below a directory of the store, by name, looked at directly."""
    found: dict[str, bytes] = {}
    top = disk.find(f"{HOME}/{where}")
    waiting = [] if top is None else [top]
    while waiting:
        for name, child in disk.directories[waiting.pop()].items():
            if child in disk.directories:
                waiting.append(child)
            else:
                found[name] = disk.files[child][0]
    return found
