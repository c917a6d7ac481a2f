"""What stays: pins, and what gc could take if a name went. No NumPy."""

from collections.abc import Iterable
from contextlib import suppress

from adaptlib.errors import ConflictError, CorruptError, NotFoundError, RefusedError
from adaptlib.experts import index
from adaptlib.experts.catalog import Catalog, is_digest
from adaptlib.experts.names import PINS, move_ref, pin_ref
from library_store import Digest, ObjectCorrupt, ObjectNotFound, Ref


def pin(catalog: Catalog, name: str, label: str | None = None) -> tuple[str, str]:
    """See `Library.pin`."""
    digest = Digest.parse(catalog.digest(name))
    ref = pin_ref(label or digest.short)
    before = catalog.store.refs().get(ref)
    if before not in (None, digest):
        raise ConflictError(
            f"the pin {label} is at {before.short if before else ''}, not at {digest.short}",
            hint=f"take another label, or: adaptlib unpin {label}",
        )
    if before is None:
        move_ref(catalog.store, ref, digest, expect=None, reason=f"pin of {name}")
    return ref.name.removeprefix(f"{PINS}/"), str(digest)


def unpin(catalog: Catalog, label: str) -> str:
    """See `Library.unpin`."""
    pins = catalog.pins()
    found = [one for one in pins if one == label] or [
        one for one, digest in pins.items() if is_digest(label) and _starts(digest, label)
    ]
    if len(found) != 1:
        raise NotFoundError(
            f"{'no' if not found else 'more than one'} pin is {label!r}; there are: "
            f"{', '.join(pins) or 'none'}",
            hint="see all: adaptlib pin",
        )
    digest = pins[found[0]]
    ref = pin_ref(found[0])
    move_ref(catalog.store, ref, None, expect=Digest.parse(digest), reason="unpin")
    return digest


def freed_by(catalog: Catalog, victims: Iterable[Ref]) -> int:
    """See `Library.freed_by`."""
    refs, going = catalog.store.refs(), set(victims)
    kept = {digest for ref, digest in refs.items() if ref not in going}
    loose = {refs[ref] for ref in going & refs.keys()} - kept
    held = _below(catalog, kept)
    freed = [digest for digest in _below(catalog, loose) - held if digest in catalog.store]
    return sum(catalog.store.size(digest) for digest in freed)


def _below(catalog: Catalog, digests: set[Digest]) -> set[Digest]:
    """These objects and all that they lead to; of manifests, by the index."""
    from adaptlib.experts.damage import read_parent
    from adaptlib.experts.references import children

    texts = {str(digest) for digest in digests}
    known = index.read(catalog.path / "index.db", texts) if catalog.path else {}
    found = set(digests) | {Digest.parse(known[text].blob) for text in known}
    waiting = [digest for digest in digests if str(digest) not in known]
    while waiting:
        digest = waiting.pop()
        # Of damage, what is known.
        with suppress(ObjectCorrupt, ObjectNotFound, CorruptError, RefusedError):
            below = set(children(digest, read_parent(catalog.store, digest))) - found
            found |= below
            waiting += below
    return found


def _starts(digest: str, prefix: str) -> bool:
    return digest.removeprefix("sha256:").startswith(prefix.removeprefix("sha256:"))
