"""Verification: is everything that a ref needs there, and is it what it says it is?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from library_store._collect import PARENT_LIMIT
from library_store.digest import Digest
from library_store.errors import ObjectCorrupt, ObjectNotFound, RefCorrupt
from library_store.names import Ref
from library_store.records import Children, Problem, ProblemKind, Report

if TYPE_CHECKING:
    from library_store.store import Store

_HINTS: Final[dict[ProblemKind, str]] = {
    "missing": "put the same bytes again, or remove the refs that need them",
    "corrupt": "quarantine it, then put the same bytes again",
    "unreadable": "check the disk and the permissions",
}


def inspect(
    store: Store, children: Children, *, progress: Callable[[Digest], None] | None
) -> Report:
    """See Store.verify."""
    refs, problems = store._scan_refs()
    present, strays = store._scan_objects()
    problems += strays + _bad_logs(store)

    roots = set(refs.values())
    below: dict[Digest, tuple[Digest, ...]] = {}
    bad: list[Problem] = []
    checked = 0
    seen: set[Digest] = set()
    # First what refs reach, which is followed; then the rest, which is only hashed.
    for waiting, follow in ((sorted(roots, reverse=True), True), (present[::-1], False)):
        while waiting:
            digest = waiting.pop()
            if digest in seen:
                continue
            seen.add(digest)
            found, problem = _check(store, digest, children if follow else None, digest in roots)
            below[digest] = found
            waiting.extend(found)
            if problem is None or problem.kind != "missing":
                checked += 1
            elif not follow:
                continue  # removed by somebody since the scan, and nobody needs it
            if problem is not None:
                bad.append(problem)
            if progress is not None:
                progress(digest)

    needed_by = _ReachedFrom(refs, below)
    problems += [replace(problem, refs=needed_by(problem.digest)) for problem in bad]
    return Report(checked, tuple(sorted(problems, key=_order)))


def _check(
    store: Store, digest: Digest, children: Children | None, is_root: bool
) -> tuple[tuple[Digest, ...], Problem | None]:
    """Hash one object and, if `children` is given, ask what it refers to."""
    try:
        data = store.view(digest)
    except ObjectNotFound as error:
        return (), _problem("missing", digest, error)
    except ObjectCorrupt as error:
        return (), _problem("corrupt", digest, error)
    except OSError as error:
        return (), _problem("unreadable", digest, error)
    if children is None or (len(data) > PARENT_LIMIT and not is_root):
        return (), None
    try:
        return tuple(children(digest, bytes(data))), None
    except Exception as error:  # `children` is the caller's, and may raise anything
        return (), _problem("unreadable", digest, error)


def _problem(kind: ProblemKind, digest: Digest, error: Exception) -> Problem:
    return Problem(kind, digest, (), str(error) or type(error).__name__, _HINTS[kind])


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
    return Problem("unreadable", None, (), str(error), hint or _HINTS["unreadable"])


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
