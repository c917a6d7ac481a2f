"""Which names a library takes."""

from collections.abc import Sequence
from typing import NamedTuple

from adaptlib.errors import AdaptlibError, ConflictError, UsageError
from library_store import Digest, InvalidName, Ref, RefConflict, Store

RECORDS = ("clusterings", "routers")
PINS = "pins"
RESERVED = (*RECORDS, PINS)  # first parts of names that are kept for what is no expert


def record_ref(kind: str, name: str) -> Ref:
    """The ref of a saved result, such as `clusterings/NAME`."""
    if kind not in RECORDS:
        raise UsageError(f"no kind of record {kind!r}; there are: {', '.join(RECORDS)}")
    return _parse(f"{kind}/{name}")


def pin_ref(label: str) -> Ref:
    """The ref of a pin, `pins/LABEL`. UsageError where this cannot be a label."""
    if "/" in label or ":" in label:
        raise UsageError(f"a pin's label has no '/' and no ':', got {label!r}")
    return _parse(f"{PINS}/{label}")


def expert_ref(name: str) -> Ref:
    """The ref of an expert's name. UsageError where it is none, or kept for saved results."""
    ref = _parse(name)
    first = ref.name.split("/")[0]
    if first in RESERVED:
        what = "pins" if first == PINS else "saved results"
        raise UsageError(f"names under {first}/ are kept for {what}")
    return ref


def _parse(name: str) -> Ref:
    try:
        return Ref.parse(name)
    except InvalidName as error:
        raise UsageError(str(error), hint=error.hint) from None


class Move(NamedTuple):
    """Where a ref is and where it is to go; None where it is absent."""

    ref: Ref
    old: Digest | None
    new: Digest | None
    reason: str


def move_refs(store: Store, moves: Sequence[Move]) -> None:
    """Make all of these moves, in this order. Where one fails those before it are taken back; an
    AdaptlibError says where that failed too."""
    done: list[Move] = []
    try:
        for move in moves:
            move_ref(store, move.ref, move.new, expect=move.old, reason=move.reason)
            done.append(move)
    except BaseException as error:
        stuck: list[str] = []
        for move in reversed(done):
            try:
                store.move(move.ref, move.old, expect=move.new, reason=f"undo {move.reason}")
            except Exception:
                stuck.append(str(move.ref))
        if stuck and isinstance(error, Exception):
            said = f"{error}; {', '.join(stuck)} had moved before that and could not be moved back"
            if isinstance(error, ConflictError):
                raise ConflictError(said, hint=error.hint) from error
            raise AdaptlibError(
                said, hint="once the disk is well: the same command again"
            ) from error
        raise


def move_ref(
    store: Store, ref: Ref, new: Digest | None, *, expect: Digest | None, reason: str
) -> None:
    """Move a ref, or say which other move was faster."""
    try:
        store.move(ref, new, expect=expect, reason=reason)
    except RefConflict as error:
        raise ConflictError(str(error), hint="look again: adaptlib list") from None
