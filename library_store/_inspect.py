"""Verification: is everything that a ref needs there, and is it what it says it is? And repair."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from library_store._collect import PARENT_LIMIT, read_parent
from library_store.digest import Digest
from library_store.errors import ObjectCorrupt, ObjectNotFound, RefCorrupt
from library_store.names import Ref
from library_store.records import Children, Problem, ProblemKind, Repair, Report, Sizes

if TYPE_CHECKING:
    from library_store.store import Store

_HINTS: Final[dict[ProblemKind, str]] = {
    "missing": "put the same bytes again, or remove the refs that need them",
    "corrupt": "repair the store, then put the same bytes again",
    "unreadable": "check the disk and the permissions",
}


def inspect(
    store: Store,
    children: Children,
    *,
    sizes: Sizes | None = None,
    progress: Callable[[Digest], None] | None = None,
) -> Report:
    """See Store.verify."""
    refs, found = store._scan_refs()
    problems = [replace(problem, repairable=bool(problem.refs)) for problem in found]
    present, strays = store._scan_objects()
    problems += strays + _bad_logs(store)

    walk = _Walk(store, children, sizes, roots=frozenset(refs.values()))
    bad: list[Problem] = []
    checked = 0
    seen: set[Digest] = set()
    others = present[::-1] if sizes is None else []
    # First what refs reach, which is followed; then the rest, which is only hashed.
    for waiting, follow in ((sorted(walk.roots, reverse=True), True), (others, False)):
        while waiting:
            digest = waiting.pop()
            if digest in seen:
                continue
            seen.add(digest)
            problem = walk.check(digest, follow=follow)
            waiting.extend(walk.below.get(digest, ()))
            if problem is None or problem.kind != "missing":
                checked += 1
            elif not follow:
                continue  # removed by somebody since the scan, and nobody needs it
            if problem is not None:
                bad.append(problem)
            if progress is not None:
                progress(digest)

    needed_by = _ReachedFrom(refs, walk.below)
    problems += [
        replace(
            problem,
            refs=needed_by(problem.digest),
            repairable=problem.repairable or _is_in_trash(store, problem),
        )
        for problem in bad
    ]
    return Report(checked, tuple(sorted(problems, key=_order)))


def repair(
    store: Store, children: Children, *, progress: Callable[[Digest], None] | None
) -> Repair:
    """See Store.repair.

    An object that is back may refer to others that are gone, so it is verified again until nothing
    more can be done. What was put back once and is bad again is left: its disk is failing.
    """
    mended, lost = store._mend()
    moved: set[Digest] = set()
    healed: set[Digest] = set()
    while True:
        report = inspect(store, children, progress=progress)
        before = (len(moved), len(healed))
        for digest in {problem.digest for problem in report.problems} - healed - {None}:
            assert digest is not None
            with suppress(ObjectNotFound, OSError):  # missing, or not to be read nor moved
                if store.quarantine(digest):
                    moved.add(digest)
            with suppress(OSError):
                if store._recover(digest):
                    healed.add(digest)
        if before == (len(moved), len(healed)):
            problems = tuple(sorted((*report.problems, *lost), key=_order))
            done = (tuple(sorted(moved)), tuple(sorted(healed)), tuple(mended))
            return Repair(replace(report, problems=problems), *done)


class _Walk:
    """Looks at one object after another. `below` is what each one refers to."""

    def __init__(
        self, store: Store, children: Children, sizes: Sizes | None, *, roots: frozenset[Digest]
    ) -> None:
        self._store = store
        self._children = children
        self._sizes = sizes
        self._said: dict[Digest, int] = {}
        self.roots = roots
        self.below: dict[Digest, tuple[Digest, ...]] = {}

    def check(self, digest: Digest, *, follow: bool) -> Problem | None:
        """Hash one object and, where it is to be followed, ask what it refers to."""
        if digest in self._said and digest not in self.roots:
            return self._measure(digest, self._said[digest])
        try:
            # What may refer to others is read at once, so that it is read once.
            whole = follow and (digest in self.roots or self._store.size(digest) <= PARENT_LIMIT)
            data = read_parent(self._store, digest) if whole else self._store.view(digest)
        except ObjectNotFound as error:
            return _problem("missing", digest, error)
        except ObjectCorrupt as error:
            return _problem("corrupt", digest, error)
        except OSError as error:
            return _problem("unreadable", digest, error)
        if not isinstance(data, bytes):
            return None
        try:
            self.below[digest] = tuple(self._children(digest, data))
            if self._sizes is not None:
                self._said |= self._sizes(digest, data)
        except Exception as error:  # both are the caller's, and may raise anything
            return _problem("unreadable", digest, error)
        return None

    def _measure(self, digest: Digest, size: int) -> Problem | None:
        """Whether an object is there, and of the size that is said."""
        try:
            found = self._store.size(digest) if digest in self._store else -1
        except OSError as error:
            return _problem("unreadable", digest, error)
        if found == size:
            return None
        if found >= 0:
            said = f"object {digest} has {found:,} bytes; what refers to it says {size:,}"
            return _problem("corrupt", digest, ValueError(said))
        try:
            self._store.view(digest, verify=False)
        except ObjectCorrupt as error:
            return _problem("corrupt", digest, error)
        except (ObjectNotFound, OSError) as error:
            return _problem("missing", digest, error)
        return None  # put by somebody just now


def _problem(kind: ProblemKind, digest: Digest, error: Exception) -> Problem:
    bad_sector = isinstance(error, OSError) and error.errno == errno.EIO
    said = str(error) or type(error).__name__
    return Problem(kind, digest, (), said, _HINTS[kind], kind == "corrupt" or bad_sector)


def _is_in_trash(store: Store, problem: Problem) -> bool:
    if problem.kind != "missing" or problem.digest is None:
        return False
    try:
        return store._recover(problem.digest, dry_run=True)
    except OSError:
        return False


def _bad_logs(store: Store) -> list[Problem]:
    problems: list[Problem] = []
    try:
        names = store._log_names()
    except (RefCorrupt, OSError) as error:
        return [_bad_log(error)]
    for name in names:
        try:
            store.log(name)
        except (RefCorrupt, OSError) as error:
            problems.append(_bad_log(error))
    return problems


def _bad_log(error: RefCorrupt | OSError) -> Problem:
    hint = error.hint if isinstance(error, RefCorrupt) else None
    damaged = isinstance(error, RefCorrupt)
    return Problem("unreadable", None, (), str(error), hint or _HINTS["unreadable"], damaged)


class _ReachedFrom:
    """Which refs reach an object: the graph walked upwards, from the few that are bad."""

    def __init__(self, refs: dict[Ref, Digest], below: dict[Digest, tuple[Digest, ...]]) -> None:
        self._refs = refs
        self._above: dict[Digest, set[Digest]] = {}
        for parent, children in below.items():
            for child in children:
                self._above.setdefault(child, set()).add(parent)

    def __call__(self, digest: Digest | None) -> tuple[Ref, ...]:
        reached: set[Digest | None] = set()
        waiting: list[Digest | None] = [digest]
        while waiting:
            one = waiting.pop()
            if one is not None and one not in reached:
                reached.add(one)
                waiting.extend(self._above.get(one, ()))
        return tuple(ref for ref, target in self._refs.items() if target in reached)


def _order(problem: Problem) -> tuple[Iterable[object], ...]:
    digest = "" if problem.digest is None else problem.digest.hex
    return (problem.kind, digest, problem.detail)
