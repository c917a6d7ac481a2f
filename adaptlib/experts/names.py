"""Which names a library takes, and what its objects refer to."""

from collections.abc import Iterator

from adaptlib.errors import ConflictError, UsageError
from adaptlib.experts.codec import SCHEMA
from adaptlib.experts.tensors import parse_json
from library_store import Digest, InvalidName, Ref, RefConflict, Store

RECORDS = ("clusterings", "routers")  # first parts of names that are kept for what is no expert


def children(_: Digest, data: bytes) -> Iterator[Digest]:
    """What a kept object refers to: a manifest its blob, a record its experts and its tensors, a
    blob nothing."""
    if not data.startswith(b'{"') or b"\0" in data[:8]:
        return
    document = parse_json("object", data)
    if document.get("schema") == SCHEMA:
        yield Digest.parse(document["blob"]["digest"])
    elif isinstance(document.get("experts"), dict):
        for digest in document["experts"].values():
            yield Digest.parse(digest)
        if "tensors" in document:
            yield Digest.parse(document["tensors"])


def record_ref(kind: str, name: str) -> Ref:
    """The ref of a saved result, such as `clusterings/NAME`."""
    if kind not in RECORDS:
        raise UsageError(f"no kind of record {kind!r}; there are: {', '.join(RECORDS)}")
    return _parse(f"{kind}/{name}")


def expert_ref(name: str) -> Ref:
    """The ref of an expert's name. UsageError where it is none, or kept for saved results."""
    ref = _parse(name)
    if ref.name.split("/")[0] in RECORDS:
        raise UsageError(f"names under {ref.name.split('/')[0]}/ are kept for saved results")
    return ref


def _parse(name: str) -> Ref:
    try:
        return Ref.parse(name)
    except InvalidName as error:
        raise UsageError(str(error), hint=error.hint) from None


def move_ref(
    store: Store, ref: Ref, new: Digest | None, *, expect: Digest | None, reason: str
) -> None:
    """Move a ref, or say which other move was faster."""
    try:
        store.move(ref, new, expect=expect, reason=reason)
    except RefConflict as error:
        raise ConflictError(str(error), hint="look again: adaptlib list") from None
