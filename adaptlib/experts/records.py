"""Saved results that are no experts, such as clusterings: JSON under refs of their own."""

import difflib
from collections.abc import Mapping
from typing import Any

import msgspec

from adaptlib.errors import CorruptError, NotFoundError
from adaptlib.experts.damage import read_object
from adaptlib.experts.names import move_ref, record_ref
from adaptlib.experts.tensors import parse_json
from library_store import Digest, InvalidDigest, Store


class _Clustering(msgspec.Struct):
    """What is read of a clustering, where it is there; there may be more."""

    clusters: dict[str, list[str]]
    experts: dict[str, str]
    method: str = ""
    k: int = 0
    features: str = ""
    seed: int | None = None
    outliers: list[str] = []
    labels: dict[str, str] = {}
    options: dict[str, Any] = {}
    why: str | None = None
    silhouette: float | None = None
    tensors: str | None = None


class _Router(msgspec.Struct):
    """The same of a router."""

    experts: dict[str, str]
    router: str = ""
    options: dict[str, Any] = {}
    order: list[str] = []
    tensors: str | None = None


_FORMS = {
    "clusterings": ("adaptlib.clustering/1", _Clustering),
    "routers": ("adaptlib.router/1", _Router),
}


def save_record(store: Store, kind: str, name: str, document: Mapping[str, Any]) -> str:
    """Keep a JSON document about experts (a clustering, a router) under `kind/name`. Its
    `experts` maps names to digests, and its `tensors`, where it has any, is the digest of a
    blob; gc then keeps these."""
    ref = record_ref(kind, name)
    digest = store.put(msgspec.json.encode(dict(document), order="sorted"))
    before = store.refs().get(ref)
    if before != digest:
        move_ref(store, ref, digest, expect=before, reason=f"save {kind}")
    return str(digest)


def check_record_name(kind: str, name: str) -> None:
    """UsageError where `save_record` could not take this name."""
    record_ref(kind, name)


def load_record(store: Store, kind: str, name: str) -> dict[str, Any]:
    """A document kept by `save_record`. CorruptError where it is something else."""
    ref = record_ref(kind, name)
    digest = store.refs().get(ref)
    if digest is None:
        known = [str(r).split("/", 1)[1] for r in store.refs() if r.name.startswith(f"{kind}/")]
        close = difflib.get_close_matches(name, known, n=1)
        made = {"routers": "adaptlib route --save", "clusterings": "adaptlib cluster --save"}
        raise NotFoundError(
            f"no {kind} named {name!r}; there are: {', '.join(known) or 'none'}",
            hint=f"did you mean {close[0]}?" if close else f"{made[kind]} {name} keeps one",
        )
    document = parse_json(str(ref), read_object(store, digest))
    schema, wanted = _FORMS[kind]
    found = document.get("schema") if isinstance(document, dict) else None
    if found not in (schema, None):
        raise CorruptError(
            f"{ref} is no {kind.removesuffix('s')} that this version knows: {found!r:.40}",
            hint=f"adaptlib rm {ref}",
        )
    try:
        form = msgspec.convert(document, wanted)
        for digest in (*form.experts.values(), *filter(None, [form.tensors])):
            Digest.parse(digest)
    except (msgspec.ValidationError, InvalidDigest) as error:
        raise CorruptError(
            f"{ref} is not what is kept there: {error!s:.200}", hint=f"adaptlib rm {ref}"
        ) from None
    return document
