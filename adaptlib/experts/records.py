"""Saved results that are no experts, such as clusterings: JSON under refs of their own."""

import difflib
from collections.abc import Mapping
from typing import Any

import msgspec

from adaptlib.errors import NotFoundError
from adaptlib.experts.damage import read_object
from adaptlib.experts.names import move_ref, record_ref
from adaptlib.experts.tensors import parse_json
from library_store import Store


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
    """A document kept by `save_record`."""
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
    return parse_json(str(ref), read_object(store, digest))
