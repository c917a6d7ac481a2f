"""Operations on a store, and what is promised once each has returned."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Final, Protocol, TypeAlias

import pytest

from library_store import Digest, LocalStore, NotAStore, ObjectNotFound, Ref, _collect
from tests.store.simulated import DAY, Disk

HOME: Final = "/srv/team/library"
AGED: Final = 30 * DAY  # longer ago than any period for which gc keeps something
GRACE: Final = timedelta(days=1)

Line: TypeAlias = tuple[Ref, Digest | None, Digest | None]
Children: TypeAlias = Callable[[Digest, bytes], Iterable[Digest]]

_PLANS: Final[dict[Disk, _collect.Plan]] = {}
"""Of each disk, what a gc has decided that waits for the lock."""


class Violation(AssertionError):  # noqa: N818 -- no error of the test, but what it looks for
    """A promise was broken."""


def that(holds: bool, message: str) -> None:
    if not holds:
        raise Violation(message)


@dataclass(frozen=True)
class Model:
    """What is promised after some steps. `log` has with each line whether it must be there."""

    store: bool = True
    refs: dict[Ref, Digest] = field(default_factory=dict)
    objects: frozenset[Digest] = frozenset()
    young: frozenset[Digest] = frozenset()
    trash: frozenset[Digest] = frozenset()  # there, or among the objects
    gone: frozenset[Digest] = frozenset()  # not among the objects
    damaged: frozenset[Digest] = frozenset()  # perhaps corrupt, perhaps missing
    aside: frozenset[bytes] = frozenset()  # what is in quarantine/
    unreadable: bool = False  # perhaps a ref or a log
    log: tuple[tuple[Line, bool], ...] = ()


class Step(Protocol):
    """One operation. `again` is what somebody does who does not know whether it was done."""

    def run(self, store: LocalStore, disk: Disk) -> None: ...
    def again(self, store: LocalStore, disk: Disk) -> None: ...
    def after(self, model: Model, *, again: bool) -> Model: ...


@dataclass(frozen=True)
class Create:
    def run(self, store: LocalStore, disk: Disk) -> None:
        LocalStore.create(HOME)

    def again(self, store: LocalStore, disk: Disk) -> None:
        try:
            LocalStore.open(HOME)
        except NotAStore:
            LocalStore.create(HOME)

    def after(self, model: Model, *, again: bool) -> Model:
        # Who finds the store of one who was killed does not sync what that one did not.
        return replace(model, store=not again)


@dataclass(frozen=True)
class Wait:
    """Long enough for gc to take what was put before."""

    def run(self, store: LocalStore, disk: Disk) -> None:
        disk.now += AGED

    again = run

    def after(self, model: Model, *, again: bool) -> Model:
        return replace(model, young=frozenset())


@dataclass(frozen=True)
class Put:
    pieces: tuple[bytes, ...]
    whole: bool = True

    @property
    def digest(self) -> Digest:
        return Digest.of(b"".join(self.pieces))

    def run(self, store: LocalStore, disk: Disk) -> None:
        store.put(b"".join(self.pieces) if self.whole else self.pieces)

    again = run

    def after(self, model: Model, *, again: bool) -> Model:
        digest = {self.digest}
        return replace(
            model,
            objects=model.objects | digest,
            young=model.young | digest,
            damaged=model.damaged - digest,
            gone=model.gone - digest,
        )


@dataclass(frozen=True)
class Move:
    ref: Ref
    new: Digest | None
    expect: Digest | None
    reason: str = ""

    def run(self, store: LocalStore, disk: Disk) -> None:
        store.move(self.ref, self.new, expect=self.expect, reason=self.reason)

    def again(self, store: LocalStore, disk: Disk) -> None:
        here = store.refs().get(self.ref)
        expect = self.new if here == self.new else self.expect
        store.move(self.ref, self.new, expect=expect, reason=self.reason)

    def after(self, model: Model, *, again: bool) -> Model:
        refs = model.refs | ({} if self.new is None else {self.ref: self.new})
        if self.new is None:
            refs = {ref: digest for ref, digest in refs.items() if ref != self.ref}
        line = ((self.ref, self.expect, self.new), not again)
        return replace(model, refs=dict(sorted(refs.items())), log=(*model.log, line))


@dataclass(frozen=True)
class Refused:
    """A move to an object that is not there, which raises ObjectNotFound."""

    ref: Ref
    new: Digest
    expect: Digest | None

    def run(self, store: LocalStore, disk: Disk) -> None:
        try:
            store.move(self.ref, self.new, expect=self.expect)
        except ObjectNotFound:
            return
        raise Violation(f"{self.ref} was moved to what is not there")

    again = run

    def after(self, model: Model, *, again: bool) -> Model:
        return model


@dataclass(frozen=True)
class Gc:
    victims: frozenset[Digest]
    children: Children

    def run(self, store: LocalStore, disk: Disk) -> None:
        removed = store.gc(self.children, grace=GRACE, now=disk.time()).removed
        that(set(removed) == self.victims, f"gc removed {removed}, not {self.victims}")

    def again(self, store: LocalStore, disk: Disk) -> None:
        store.gc(self.children, grace=GRACE, now=disk.time())

    def after(self, model: Model, *, again: bool) -> Model:
        model = replace(
            model, objects=model.objects - self.victims, young=model.young - self.victims
        )
        # A collection that was cut short may have lost its garbage: neither here nor in the trash.
        if again:
            return model
        return replace(model, trash=model.trash | self.victims, gone=model.gone | self.victims)


@dataclass(frozen=True)
class Restore:
    """Everything that is in the trash."""

    def run(self, store: LocalStore, disk: Disk) -> None:
        trash = disk.directories[disk.find(f"{HOME}/trash") or 0]
        for gc_id in sorted(trash):
            store.restore(gc_id)

    again = run

    def after(self, model: Model, *, again: bool) -> Model:
        return replace(
            model,
            objects=model.objects | model.trash,
            young=model.young | model.trash,
            gone=model.gone - model.trash,
            trash=frozenset(),
        )


@dataclass(frozen=True)
class Quarantine:
    digest: Digest
    corrupt: bytes

    def run(self, store: LocalStore, disk: Disk) -> None:
        store.quarantine(self.digest)

    def again(self, store: LocalStore, disk: Disk) -> None:
        try:
            store.quarantine(self.digest)
        except ObjectNotFound:
            return

    def after(self, model: Model, *, again: bool) -> Model:
        if again:  # by one who found nothing there, and did not sync that
            return model
        aside, gone = model.aside | {self.corrupt}, model.gone | {self.digest}
        return replace(model, aside=aside, gone=gone)


@dataclass(frozen=True)
class Heal(Put):
    """Put what is there and corrupt."""

    corrupt: bytes = b""

    def after(self, model: Model, *, again: bool) -> Model:
        aside = frozenset() if again else frozenset({self.corrupt})
        return replace(super().after(model, again=again), aside=model.aside | aside)


@dataclass(frozen=True)
class Repair:
    """Of what is corrupt there is a copy in the trash; of a ref, its log."""

    children: Children

    def run(self, store: LocalStore, disk: Disk) -> None:
        problems = store.repair(self.children).report.problems
        that(not problems, f"repair left {problems}")

    again = run

    def after(self, model: Model, *, again: bool) -> Model:
        if again:  # by one who found nothing wrong, and did not sync what made it right
            return model
        objects = model.objects | model.damaged
        return replace(model, objects=objects, damaged=frozenset(), unreadable=False)


@dataclass(frozen=True)
class Plan:
    """What a gc does before it takes the lock. What comes next is done meanwhile."""

    children: Children

    def run(self, store: LocalStore, disk: Disk) -> None:
        _PLANS[disk] = _collect.plan(
            store, self.children, sizes=None, grace=GRACE, history=GRACE, now=disk.time(),
            allow_empty=False,
        )  # fmt: skip

    again = run

    def after(self, model: Model, *, again: bool) -> Model:
        return model


@dataclass(frozen=True)
class GcAsPlanned:
    """What it does then: of its victims it leaves the first that was put since, and the rest."""

    children: Children
    removed: frozenset[Digest]

    def run(self, store: LocalStore, disk: Disk) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_collect, "plan", lambda *_, **__: _PLANS[disk])
            removed = store.gc(self.children, grace=GRACE, now=disk.time()).removed
        that(set(removed) == self.removed, f"gc removed {removed}, not {self.removed}")

    def again(self, store: LocalStore, disk: Disk) -> None:
        store.gc(self.children, grace=GRACE, now=disk.time())

    def after(self, model: Model, *, again: bool) -> Model:
        return Gc(self.removed, self.children).after(model, again=again)
