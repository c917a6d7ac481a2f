"""Damage: who needs an object that cannot be read, and what to type to have it back."""

import shlex
from collections.abc import Collection
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptlib.errors import AdaptlibError, CorruptError, RefusedError
from adaptlib.experts.names import PINS, RECORDS, RESERVED
from adaptlib.experts.references import children
from library_store import (
    Digest,
    InvalidDigest,
    ObjectCorrupt,
    ObjectNotFound,
    Problem,
    Ref,
    RefCorrupt,
    Store,
    StoreError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptlib.experts.codec import Manifest

REPAIR = "adaptlib verify --repair"
MAX_OBJECT = 64 * 1024 * 1024  # bytes of what a name leads to
_SHOWN = 6  # names in an error


# -- reading --------------------------------------------------------------------------------------


def read_object(store: Store, digest: Digest) -> bytes:
    """The bytes of something that a name leads to. CorruptError says which experts need it;
    RefusedError where it is too large to be a manifest or a record."""
    with _explained(store, digest):
        return read_parent(store, digest)


def read_parent(store: Store, digest: Digest) -> bytes:
    """The bytes of a manifest or a record. RefusedError where they are more than these have."""
    if (size := store.size(digest)) > MAX_OBJECT:
        raise RefusedError(
            f"object {digest.short} has {size:,} bytes; at most {MAX_OBJECT:,} are read of what a "
            "name leads to"
        )
    return store.get(digest)


def view_object(store: Store, digest: Digest) -> memoryview:
    """`read_object`, mapped."""
    with _explained(store, digest):
        return store.view(digest)


def refuse_lost(store: Store, text: str) -> None:
    """CorruptError where `text` is a whole digest that something in the library needs, and which is
    not there: it is no slip of whoever typed it."""
    try:
        digest = Digest.parse(text if ":" in text else f"sha256:{text}")
    except InvalidDigest:
        return
    if digest not in store and users(store, digest):
        read_object(store, digest)


@contextmanager
def _explained(store: Store, digest: Digest) -> "Iterator[None]":
    try:
        yield
    except (ObjectCorrupt, ObjectNotFound) as error:
        names = [str(ref) for ref in users(store, digest)]
        shown = ", ".join(names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        needed = f"; used by {shown}{more}" if names else ""
        raise CorruptError(f"{error}{needed}", hint=REPAIR) from error


def users(store: Store, digest: Digest) -> list[Ref]:
    """The refs that need an object: those at it, at a manifest of it, or at a record of these.
    Reads every manifest, so it is for when something is wrong."""
    try:
        refs = store.refs()
    except (RefCorrupt, OSError):
        return []
    below: dict[Digest, frozenset[Digest]] = {}

    def needs(at: Digest, depth: int) -> bool:
        if at == digest:
            return True
        if at not in below:
            below[at] = _children(store, at)
        return digest in below[at] or (
            depth > 0 and any(needs(child, depth - 1) for child in below[at])
        )

    return [
        ref for ref, at in refs.items() if needs(at, 1 if ref.name.split("/")[0] in RECORDS else 0)
    ]


def _children(store: Store, digest: Digest) -> frozenset[Digest]:
    """What an object refers to; nothing, where it cannot be read."""
    try:
        return frozenset(children(digest, read_parent(store, digest)))
    except (StoreError, AdaptlibError, OSError, KeyError, TypeError, AttributeError):
        return frozenset()


# -- what to type ---------------------------------------------------------------------------------


def next_command(
    store: Store, path: Path | None, problem: Problem, refs: Collection[Ref] | None
) -> str:
    """The command that does something about a problem; where it leaves a choice, both. `refs` are
    all that there are, None where they cannot be listed."""
    if problem.repairable:
        return REPAIR
    if problem.digest is None:
        if problem.kind == "missing" and problem.refs:  # a ref that could not be mended
            return _name_again(problem.refs[0])
        return problem.hint if problem.hint.startswith("mv ") else "adaptlib doctor"
    if problem.kind == "missing":
        return _bring_back(store, path, problem.refs, refs)
    if problem.kind == "unreadable" and not _can_read(store, problem.digest):
        return "adaptlib doctor"
    return forget(problem.refs, refs) or problem.hint


def _bring_back(
    store: Store, path: Path | None, lacking: Collection[Ref], refs: Collection[Ref] | None
) -> str:
    """What puts a missing object back, for the refs that lack it."""
    experts = [ref for ref in lacking if ref.name.split("/")[0] not in RESERVED]
    if any(_is_bundled(store, ref) for ref in experts):
        here = "" if path is None or path == Path.cwd() / ".adaptlib" else f" {_quoted(path)}"
        return f"adaptlib init{here} --demo"
    for ref in experts:
        if (manifest := _manifest(store, ref)) and (source := _origin(manifest.card)):
            return f"adaptlib add {_quoted(source)} --name {ref} --replace{_said(manifest)}"
    if not experts:
        return forget(lacking, refs)
    manifest = _manifest(store, experts[0])
    again = f"adaptlib add SOURCE --name {experts[0]} --replace{_said(manifest)}"
    return f"{again}, or {forget(lacking, refs)}"


def forget(victims: Collection[Ref], refs: Collection[Ref] | None) -> str:
    """What removes these of all refs: `rm poems` would remove every tag of poems."""
    others = None if refs is None else {ref.name for ref in refs if ref not in victims}
    words: list[str] = []
    for ref in victims:
        alone = ref.tag != "latest" or (others is not None and ref.name not in others)
        if ref.name.split("/")[0] != PINS:
            words.append(str(ref) if alone else f"{ref.name}:{ref.tag}")
    commands = [f"adaptlib rm {' '.join(words)}"] if words else []
    pins = [ref.name.removeprefix(f"{PINS}/") for ref in victims if ref.name.startswith(f"{PINS}/")]
    return " && ".join([*commands, *(f"adaptlib unpin {label}" for label in pins)])


def _name_again(ref: Ref) -> str:
    kind, _, name = ref.name.partition("/")
    if kind == PINS:
        return f"adaptlib pin NAME --label {name}"
    if kind in RECORDS:
        verb = "route --prompt TEXT" if kind == "routers" else "cluster"
        return f"adaptlib {verb} --save {name}"
    return f"adaptlib add SOURCE --name {ref}"


def _manifest(store: Store, ref: Ref) -> "Manifest | None":
    from adaptlib.experts.codec import parse_manifest

    try:
        return parse_manifest(str(ref), read_parent(store, store.ref(ref)))
    except (StoreError, AdaptlibError, OSError):
        return None


def _origin(card: dict[str, Any]) -> str | None:
    """The place on the hub that an expert came from, as `add` takes it."""
    source = card.get("source")
    if not isinstance(source, dict) or not isinstance(source.get("hub"), str):
        return None
    revision, folder = source.get("revision"), source.get("subfolder")
    at = f"@{revision}" if isinstance(revision, str) else ""
    return f"hf://{source['hub']}{at}" + (f"/{folder}" if isinstance(folder, str) else "")


def _said(manifest: "Manifest | None") -> str:
    """Options of `add` that give the expert the card that it had."""
    if manifest is None:
        return ""
    said = {key: manifest.card.get(key) for key in ("task", "description")}
    return "".join(f" --{k} {_quoted(text)}" for k, text in said.items() if isinstance(text, str))


def _is_bundled(store: Store, ref: Ref) -> bool:
    """Whether a ref is at an expert of the bundle, by the name that it has there."""
    from adaptlib.experts.base import BUNDLE

    file = BUNDLE / "experts" / ref.name / "expert.json"
    try:
        return store.ref(ref) == Digest.of(file.read_bytes())
    except (StoreError, OSError):
        return False


def _can_read(store: Store, digest: Digest) -> bool:
    try:
        read_parent(store, digest)
    except (StoreError, AdaptlibError, OSError):
        return False
    return True


def _quoted(text: object) -> str:
    return shlex.quote(str(text))
