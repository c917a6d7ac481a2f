"""Routers kept in a library: the same choices for ever, whatever its names come to mean."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor

from adaptlib.errors import CorruptError
from adaptlib.experts.codec import to_raw, to_tensor
from adaptlib.experts.damage import view_object
from adaptlib.experts.expert import Expert
from adaptlib.experts.library import Library
from adaptlib.experts.records import load_record, save_record
from adaptlib.experts.tensors import encode, read_tensors
from adaptlib.routing.router import Router
from library_store import Digest

SCHEMA = "adaptlib.router/1"
_PLACED = "stacked"  # what `place` makes, and makes again


def save_router(library: Library, name: str, router: Router) -> str:
    """Keep a router under `routers/NAME`, tied to its experts by the digests that their names have
    now: they stay in the library as long as it does. Returns its own digest.

    NotFoundError where an expert of the router is not in the library.
    """
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for field in dataclasses.fields(router):
        value = getattr(router, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
        elif field.name == "columns":
            tensors |= {f"columns/{m}": torch.tensor(here) for m, here in value.items()}
        elif isinstance(value, Mapping) and field.name != _PLACED:
            tensors |= {f"{field.name}/{key}": part for key, part in value.items()}
        elif field.name not in ("experts", _PLACED):
            plain[field.name] = value
    raw = {key: to_raw(tensor) for key, tensor in tensors.items()}
    document = {
        "schema": SCHEMA,
        "router": router.name,
        "experts": {expert: library.digest(expert) for expert in router.experts},
        "order": list(router.experts),
        "options": plain,
        "tensors": str(library.store.put(encode(raw))),
    }
    return save_record(library.store, "routers", name, document)


def load_router(library: Library, name: str) -> tuple[Router, Mapping[str, Expert]]:
    """A router kept by `save_router`, bit for bit, and its experts, read by digest when looked up.

    A name that points to another expert by now changes nothing here. NotFoundError where there is
    no such router, CorruptError where it is not what `save_router` writes.
    """
    from adaptlib.routing import ROUTERS

    where = f"routers/{name}"
    document = load_record(library.store, "routers", name)
    if document.get("schema") != SCHEMA or document.get("router") not in ROUTERS:
        raise CorruptError(
            f"{where} is no router that this version knows: {document.get('schema')!r:.40}, "
            f"{document.get('router')!r:.40}; known: {', '.join(ROUTERS)}"
        )
    made = ROUTERS[document["router"]]
    tensors = read_tensors(where, view_object(library.store, Digest.parse(document["tensors"])))
    values: dict[str, Any] = dict(document["options"]) | {"experts": document["order"]}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    for field in dataclasses.fields(made):
        prefix = f"{field.name}/"
        parts = {
            key.removeprefix(prefix): to_tensor(raw)
            for key, raw in tensors.items()
            if key.startswith(prefix)
        }
        if field.name == "columns":
            values["columns"] = {m: tuple(here.tolist()) for m, here in parts.items()}
        elif parts:
            values[field.name] = parts
        elif field.name in tensors:
            values[field.name] = to_tensor(tensors[field.name])
    try:
        router = made(**values)
    except TypeError as error:
        raise CorruptError(f"{where} does not fit router {made.name}: {error}") from None
    return router, _ByDigest(library, dict(document["experts"]))


@final
class _ByDigest(Mapping[str, Expert]):
    """Experts by the names that a router knows, whatever these mean in the library by now."""

    def __init__(self, library: Library, digests: dict[str, str]) -> None:
        self._library = library
        self._digests = digests

    def __getitem__(self, name: str) -> Expert:
        return self._library[self._digests[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)
