"""The store: immutable objects named by their content, mutable refs named by people.

order of durability     objects first, what refers to them after, the ref last
order of removal        the reverse
order of reading        ref, then what it points to, then what that refers to
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from library_store import _collect, _inspect
from library_store.digest import Digest
from library_store.errors import (
    AmbiguousDigest,
    GcAborted,
    InvalidDigest,
    ObjectNotFound,
    RefCorrupt,
)
from library_store.names import Ref
from library_store.records import Children, GcResult, LogEntry, Problem, Repair, Report, Sizes

DAY: Final = timedelta(hours=24)
TWO_WEEKS: Final = timedelta(days=14)

_PREFIX: Final = re.compile(r"(?:sha256:)?([0-9a-f]{7,64})")


class Store(ABC):
    """A place to keep bytes. It knows nothing of experts, tensors or JSON.

    What every store promises, and `tests/store/test_contract.py` holds:
    once `put` has returned, `get` gives those bytes or raises, never other bytes;
    a ref moves only from where its mover believed it to be;
    `gc` removes nothing that a ref reaches, and nothing at all if it cannot read everything.
    """

    # --- objects ---

    @abstractmethod
    def put(self, data: bytes | bytearray | memoryview | Iterable[bytes | memoryview]) -> Digest:
        """Keep bytes, whole or in pieces, and return their digest; durable on return.

        Bytes that are there already are checked, repaired if damaged, and made young again for
        `gc`. So put an object again before you refer to it; do not ask whether it is there.
        """

    @abstractmethod
    def get(self, digest: Digest) -> bytes:
        """Return the bytes, checked. Raises ObjectNotFound or ObjectCorrupt."""

    @abstractmethod
    def view(self, digest: Digest, *, verify: bool = True) -> memoryview:
        """Return the bytes of a big object without reading them into memory at once.

        The view is writable, as torch.frombuffer wants it, and writing to it alters this process's
        copy alone. Raises ObjectNotFound, or ObjectCorrupt unless `verify` is off.
        """

    @abstractmethod
    def size(self, digest: Digest) -> int:
        """The object's size in bytes. Raises ObjectNotFound."""

    @abstractmethod
    def __contains__(self, digest: Digest) -> bool:
        """Whether the object is there. Does not read it."""

    def objects(self) -> Iterator[Digest]:
        """Every object, in order of digest. Raises OSError if a directory cannot be read."""
        yield from self._listed("")

    def resolve(self, prefix: str) -> Digest:
        """The one object whose digest starts with 7 or more hex digits; `sha256:` may lead.

        Raises InvalidDigest, ObjectNotFound, or AmbiguousDigest with its `candidates`.
        """
        match = _PREFIX.fullmatch(prefix)
        if match is None:
            raise InvalidDigest(f"not a digest: {prefix!r}, wanted 7 to 64 lower-case hex digits")
        found = self._listed(match[1])
        if not found:
            raise ObjectNotFound(f"no object starts with {prefix} in {self}")
        if len(found) > 1:
            names = ", ".join(digest.short for digest in found[:8])
            raise AmbiguousDigest(
                f"{len(found)} objects start with {prefix}: {names}",
                candidates=tuple(found),
                hint="give more digits",
            )
        return found[0]

    def _listed(self, prefix: str) -> list[Digest]:
        found, problems = self._scan_objects(prefix)
        for problem in problems:
            if problem.kind == "unreadable":
                raise OSError(problem.detail)
        return found

    # --- refs ---

    def refs(self) -> dict[Ref, Digest]:
        """Every ref, sorted. Raises RefCorrupt if one cannot be read: none is left out silently."""
        found, problems = self._scan_refs()
        for problem in problems:
            if problem.kind == "unreadable":
                raise RefCorrupt(problem.detail, hint=problem.hint)
        return found

    def listing(
        self, seen: dict[str, Any] | None = None
    ) -> tuple[dict[tuple[str, str], str], dict[str, Any] | None]:
        """Every (name, tag) with the hex of its digest, sorted: `refs`, for people who look at
        thousands of them often.

        The second value is something to keep (dicts, lists, numbers, text) and to give to the next
        call, which then reads only what has changed; the same object where there is nothing new to
        keep. Losing it costs time alone. Raises as `refs` does.
        """
        found = {(ref.name, ref.tag): digest.hex for ref, digest in self.refs().items()}
        return found, None

    @abstractmethod
    def ref(self, ref: Ref) -> Digest:
        """Where a ref points. Raises RefNotFound or RefCorrupt."""

    @abstractmethod
    def move(
        self, ref: Ref, new: Digest | None, *, expect: Digest | None, reason: str = ""
    ) -> None:
        """Move a ref from `expect` to `new` in one step, and log it. None means absent.

        Raises RefConflict if the ref is not at `expect`, or if its name collides with another
        (`a:b` with `a/b`); ObjectNotFound if `new` is not in the store; StoreLocked.
        """

    @abstractmethod
    def log(self, name: str) -> list[LogEntry]:
        """Every move of the refs called `name`, whatever their tag, oldest first; [] if none.

        Raises InvalidName, or RefCorrupt if the log is damaged.
        """

    # --- care ---

    def verify(
        self,
        children: Children,
        *,
        sizes: Sizes | None = None,
        progress: Callable[[Digest], None] | None = None,
    ) -> Report:
        """Hash every object once, and follow every ref to everything that it needs.

        With `sizes` it is quick: only what refs reach is looked at, and of an object whose size is
        said only whether it is there and of that size; the others are hashed. `progress` is called
        after each object. Finds problems, and raises for none of them.
        """
        return _inspect.inspect(self, children, sizes=sizes, progress=progress)

    def repair(
        self, children: Children, *, progress: Callable[[Digest], None] | None = None
    ) -> Repair:
        """Verify, quarantine what is corrupt, and put back what the trash has an intact copy of.

        Refs and logs that cannot be read go to the quarantine too: a ref comes back where its log
        says it was, a log keeps its readable lines. Nothing is ever deleted. Raises StoreLocked.
        """
        return _inspect.repair(self, children, progress=progress)

    def gc(
        self,
        children: Children,
        *,
        sizes: Sizes | None = None,
        grace: timedelta = DAY,
        history: timedelta = TWO_WEEKS,
        dry_run: bool = False,
        allow_empty: bool = False,
        now: datetime | None = None,
    ) -> GcResult:
        """Move to the trash what no ref reaches. `restore` undoes it for 7 days.

        Kept: what a ref reaches, or a log says one reached within `history` (never less than
        `grace`); what was put within `grace`; and what those reach. A dry run changes nothing.
        Raises GcAborted, with nothing removed, if a ref, a log, a directory or an object on the way
        cannot be read; if an object is from the future; or if no ref is left and `allow_empty` is
        off.

        An object of more than PARENT_LIMIT bytes that no ref points to is never asked for its
        children, and neither is one that `sizes` has the size of: it refers to nothing. So
        collecting does not read every blob.
        """
        now = datetime.now(UTC) if now is None else now
        options = {"grace": grace, "history": history, "now": now, "allow_empty": allow_empty}
        options |= {"sizes": sizes}
        plan = _collect.plan(self, children, **options)
        if dry_run:
            return GcResult(None, plan.removed, plan.size(plan.removed), plan.kept)
        with self._exclusive():
            if not _collect.is_current(self, plan):
                plan = _collect.plan(self, children, **options)
            gc_id = _collect.new_id(now)
            self._purge(now)
            removed = self._sweep(plan.victims, gc_id)
            if removed and not self._reach_only(plan.marked):
                with suppress(ObjectNotFound):  # another one has restored it by now
                    self.restore(gc_id)
                raise GcAborted(
                    "nothing was removed: a ref moved during the sweep", hint="try again"
                )
        kept = plan.kept + len(plan.victims) - len(removed)
        return GcResult(gc_id if removed else None, removed, plan.size(removed), kept)

    def _reach_only(self, marked: frozenset[Digest]) -> bool:
        """Whether every ref still points to what a collection has marked.

        No ref moves under the lock, but a lock may lie (NFS). Looking once more closes the gap,
        together with `move`, which looks for its object once more after it has moved the ref.
        """
        try:
            return marked.issuperset(self.refs().values())
        except (RefCorrupt, OSError):
            return False

    @abstractmethod
    def restore(self, gc_id: str) -> int:
        """Put back what the `gc` of this id removed, as young as if just put; how many objects.

        Raises ObjectNotFound if there is no such trash (any more).
        """

    @abstractmethod
    def quarantine(self, digest: Digest) -> bool:
        """Move a corrupt object out of the way, never deleting it, so that it can be put again.

        An intact object stays where it is; whether one was moved. Raises ObjectNotFound.
        """

    # --- what a store tells the algorithms above ---

    @abstractmethod
    def _scan_objects(self, prefix: str = "") -> tuple[list[Digest], list[Problem]]:
        """The objects whose hex starts with `prefix`, sorted, and what else is in their place."""

    @abstractmethod
    def _scan_refs(self) -> tuple[dict[Ref, Digest], list[Problem]]:
        """The refs, sorted, and what else is in their place."""

    @abstractmethod
    def _log_names(self) -> list[str]:
        """The names that have a log. Raises OSError or RefCorrupt."""

    @abstractmethod
    def _modified(self, digest: Digest) -> int:
        """When the object was last put, in ns since 1970. Raises ObjectNotFound."""

    @abstractmethod
    def _exclusive(self) -> AbstractContextManager[object]:
        """Held while refs move and while gc sweeps. Raises StoreLocked."""

    @abstractmethod
    def _sweep(self, victims: Sequence[tuple[Digest, int]], gc_id: str) -> tuple[Digest, ...]:
        """Move (digest, modified) pairs to the trash, in this order, and return those moved.

        Stops at the first that was modified since: somebody is about to refer to it, and its
        children come after it.
        """

    @abstractmethod
    def _recover(self, digest: Digest, *, dry_run: bool = False) -> bool:
        """Put an object that is not there back from the trash, if an intact copy is in it.

        A dry run only says whether it could.
        """

    @abstractmethod
    def _mend(self) -> tuple[list[str], list[Problem]]:
        """Set aside refs and logs that cannot be read: what was done, and what cannot be."""

    @abstractmethod
    def _purge(self, now: datetime) -> None:
        """Forget trash older than 7 days, and unfinished writes older than one."""
