"""Garbage collection: what may go, and in which order. Decides and removes nothing."""

from __future__ import annotations

import errno
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Final, final

from library_store.digest import Digest
from library_store.errors import GcAborted, ObjectNotFound, RefCorrupt
from library_store.names import Ref
from library_store.records import Children, LogEntry, Sizes

if TYPE_CHECKING:
    from library_store.store import Store

PARENT_LIMIT: Final = 16 << 20
"""Bytes. What refers to other objects must not be longer than this, unless a ref points to it."""

ROOT_LIMIT: Final = 64 << 20
"""Bytes. What a ref points to is read into memory, so it must not be longer than this."""

TRASH_AGE: Final = timedelta(days=7)
TEMPORARY_AGE: Final = timedelta(hours=24)

_SKEW: Final = timedelta(minutes=5)
_NS: Final = 1_000_000_000
_ID: Final = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{8}")
_CHECK: Final = "verify the store, and put back or quarantine what it reports"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a collection would do. `victims` are (digest, modified in ns), parents first."""

    refs: dict[Ref, Digest]
    named: datetime  # what a log says had a name since stays
    marked: frozenset[Digest]
    victims: tuple[tuple[Digest, int], ...]
    sizes: dict[Digest, int]
    kept: int

    @property
    def removed(self) -> tuple[Digest, ...]:
        return tuple(digest for digest, _ in self.victims)

    def size(self, digests: Iterable[Digest]) -> int:
        return sum(self.sizes[digest] for digest in digests)


@final
class _Marks:
    """Objects that were reached by following others. `found` are all of them.

    `sizes` tells which children are leaves: these refer to nothing, so no blob is read to see what
    it refers to. What is a leaf to one object and a child to another is followed.
    """

    def __init__(self, store: Store, children: Children, sizes: Sizes | None) -> None:
        self._store = store
        self._children = children
        self._sizes = sizes
        self._followed: set[Digest] = set()
        self.found: set[Digest] = set()

    def follow(
        self, starts: Iterable[Digest], *, whole: bool = False, may_lack: bool = False
    ) -> None:
        """Find all that `starts` reach. What cannot be followed is a GcAborted, unless it is gone
        and `may_lack`. `whole`: `starts` are read whatever their size."""
        waiting = [(digest, False) for digest in starts]
        roots = {digest for digest, _ in waiting} if whole else set()
        while waiting:
            digest, leaf = waiting.pop()
            if digest in self._followed or (leaf and digest in self.found):
                continue
            self.found.add(digest)
            try:
                if leaf:
                    self._store.size(digest)  # it must be there
                else:
                    self._followed.add(digest)
                    waiting.extend(self.below(digest, whole=digest in roots))
            except Exception as error:  # `children` is the caller's, and may raise anything
                if isinstance(error, ObjectNotFound) and may_lack and digest not in self._store:
                    continue
                message = f"nothing was removed: object {digest.short} cannot be followed: {error}"
                raise GcAborted(message, hint=_CHECK) from error

    def below(self, digest: Digest, *, whole: bool = False) -> list[tuple[Digest, bool]]:
        """What an object refers to, from its checked bytes, and whether it is a leaf."""
        if not whole and self._store.size(digest) > PARENT_LIMIT:
            return []
        data = read_parent(self._store, digest)
        leaves = self._sizes(digest, data) if self._sizes else {}
        return [(child, child in leaves) for child in self._children(digest, data)]


def read_parent(store: Store, digest: Digest) -> bytes:
    """The bytes of what may refer to other objects. OSError where they are above ROOT_LIMIT."""
    if (size := store.size(digest)) > ROOT_LIMIT:
        said = f"object {digest.short} has {size:,} bytes; of a parent {ROOT_LIMIT:,} are read"
        raise OSError(errno.EFBIG, said)
    return store.get(digest)


def new_id(now: datetime) -> str:
    """A name for one collection, which tells its time."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"


def time_of(gc_id: str) -> datetime | None:
    """When that collection ran; None for text that is not the id of one, such as a path."""
    match = _ID.fullmatch(gc_id)
    try:
        return match and datetime.strptime(match[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def plan(
    store: Store,
    children: Children,
    *,
    sizes: Sizes | None,
    grace: timedelta,
    history: timedelta,
    now: datetime,
    allow_empty: bool,
) -> Plan:
    """Mark what stays, order what goes. Raises GcAborted, and so does anything unreadable."""
    marks = _Marks(store, children, sizes)
    young, named = now - grace, now - max(grace, history)
    try:
        return _plan(store, marks, young=young, named=named, now=now, allow_empty=allow_empty)
    except (OSError, ObjectNotFound, RefCorrupt) as error:
        raise GcAborted(f"nothing was removed: {error}", hint=_CHECK) from error


def is_current(store: Store, plan: Plan) -> bool:
    """Whether the refs are where they were, and no log names what the plan does not keep."""
    try:
        return store.refs() == plan.refs and _logged(store, plan.named) <= plan.marked
    except (OSError, RefCorrupt):  # what that means, a new plan says
        return False


def _plan(
    store: Store,
    marks: _Marks,
    *,
    young: datetime,
    named: datetime,
    now: datetime,
    allow_empty: bool,
) -> Plan:
    """`young`: what was put since stays. `named`: so does what a log says had a name since."""
    refs, strays = store._scan_refs()
    if strays:
        # A file among the refs that is no ref may be one by a rule that this code does not know.
        raise GcAborted(f"nothing was removed: {strays[0].detail}", hint=strays[0].hint)
    modified = {digest: store._modified(digest) for digest in store.objects()}
    if modified and not refs and not allow_empty:
        raise GcAborted(
            f"nothing was removed: the store has {len(modified)} objects and no ref at all",
            hint="if that is right, collect again and allow an empty store",
        )
    newest = int((now + _SKEW).timestamp() * _NS)
    for digest, when in modified.items():
        if when > newest:
            raise GcAborted(
                f"nothing was removed: object {digest.short} is from the future",
                hint="set the clock",
            )

    marks.follow(refs.values(), whole=True)
    # What only a log or its youth protects may have lost parts already: to an earlier collection
    # with less of either, or to a quarantine. There is nothing left to protect in what is gone.
    marks.follow(_logged(store, named), may_lack=True)
    youngest = int(young.timestamp() * _NS)
    recent = [digest for digest, when in modified.items() if when > youngest]
    for digest in sorted(
        recent, key=store.size
    ):  # the small ones say which of the large are leaves
        if digest not in marks.found:
            marks.follow([digest], may_lack=True)

    victims = _parents_first(store, marks, sorted(set(modified) - marks.found))
    return Plan(
        refs=refs,
        named=named,
        marked=frozenset(marks.found),
        victims=tuple((digest, modified[digest]) for digest in victims),
        sizes={digest: store.size(digest) for digest in victims},
        kept=len(modified) - len(victims),
    )


def _logged(store: Store, cutoff: datetime) -> set[Digest]:
    """Every digest that a ref pointed to at some time since `cutoff`."""
    found: set[Digest | None] = set()
    for name in store._log_names():
        last: dict[Ref, LogEntry] = {}
        for entry in store.log(name):
            last[entry.ref] = entry
            if entry.time >= cutoff:
                found |= {entry.old, entry.new}
        # The last known place of each ref: a crash between a move and its log line leaves the ref
        # elsewhere, and nobody knows since when.
        found |= {entry.new for entry in last.values()}
    return {digest for digest in found if digest is not None}


def _parents_first(store: Store, marks: _Marks, victims: list[Digest]) -> list[Digest]:
    """Order victims so that a crash in the middle leaves no object that lacks its children."""
    graph: TopologicalSorter[Digest] = TopologicalSorter(dict.fromkeys(victims, ()))
    going, leaves = set(victims), set()
    for digest in sorted(victims, key=store.size):
        if digest in leaves:
            continue
        try:
            below = marks.below(digest)
        except Exception:  # garbage that nobody can read: it has no order to keep
            continue
        for child, leaf in below:
            if child in going and child != digest:
                graph.add(child, digest)
                leaves |= {child} if leaf else set()
    return list(graph.static_order())
