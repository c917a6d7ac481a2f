"""Pinning: which base model an expert is for, written into its card and checked where it can be."""

import warnings
from pathlib import Path
from typing import Any

from adaptlib.errors import BaseMismatchError, BaseWarning, NotFoundError
from adaptlib.experts import base as bases
from adaptlib.experts.codec import Packed, check_card


def pinned(
    packed: Packed, name: str, base: str | None, *, cache: Path | None
) -> tuple[Packed, list[str]]:
    """The expert with its base pinned in the card, and notes for the reader.

    Its shapes are checked against the base where that is on this machine (BaseMismatchError);
    `base` is what the user says against the source. `cache` is where descriptions of bases are
    kept. NotFoundError where `base` is a directory that holds no model."""
    check_card(name, packed)
    said = packed.card.get("base") or {}
    pin: dict[str, Any] = {"id": packed.base, "revision": None, "digest": None}
    pin |= {key: value for key, value in said.items() if value is not None}
    notes: list[str] = []
    if base is not None:
        base = bases.base_id(base)
        if pin["id"] != base:
            notes.append(f"{name}: says it is for {pin['id']}; pinned to {base}, as asked")
        pin = {"id": base, "revision": None, "digest": None}
    where = bases.locate(pin["id"], revision=pin["revision"])
    if where is None:
        if base is not None and (base.startswith((".", "/", "~")) or Path(base).exists()):
            raise NotFoundError(f"no base model at {base}: it has no config.json")
        if pin["digest"] is None:
            notes.append(
                f"{name}: its base model {pin['id']} is not on this machine, so its shapes "
                "are not checked until it is attached"
            )
    else:
        found = bases.describe(where, pin["id"], cache=cache)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", BaseWarning)
            try:
                bases.check_fit(name, packed.shapes, pin, found)
            except BaseMismatchError as error:
                if base is not None:
                    error.hint = "leave out --base, or give the model it was trained on"
                raise
        notes += [str(warning.message) for warning in caught]
        pin = {
            "id": pin["id"],
            "revision": pin["revision"] or found.revision,
            "digest": found.digest,
        }
    card = dict(packed.card) | {"base": pin}
    return Packed(packed.kind, pin["id"], packed.modules, packed.tensors, card), notes
