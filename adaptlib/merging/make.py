"""Make: the expert of a recipe."""

import difflib
import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import torch

from adaptlib.errors import UsageError
from adaptlib.experts.codec import Manifest, encode_manifest, pack
from adaptlib.experts.expert import Expert
from adaptlib.experts.library import Library
from adaptlib.experts.recipe import Recipe, pin
from adaptlib.merging import MERGES
from adaptlib.merging.kept import Form
from adaptlib.merging.merge import Data, Merge, Progress
from library_store import Digest


def checked(recipe: Recipe) -> Recipe:
    """The recipe with its method by its own name and its options typed. UsageError where there is
    no such method or option, or where what is to be kept contradicts itself; no tensor is read."""
    merge = find_merge(recipe.method)
    Form(recipe.kind, recipe.rank, recipe.keep_ratio)
    return msgspec.structs.replace(recipe, method=merge.name, options=typed(merge, recipe.options))


def make(
    library: Library,
    recipe: Recipe,
    *,
    data: Data | None = None,
    progress: Progress | None = None,
) -> Expert:
    """The expert of a recipe; nothing is kept. Its card holds the recipe, pinned: `parents` are
    [{name, digest}], all else is under `merge`. `data` is for methods that want it.

    It is computed on one thread: matrix products and decompositions of several round by how many
    there are, and the same recipe is to give the same digest on every machine.
    """
    pinned = checked(pin(library, recipe))
    merge = find_merge(pinned.method)
    experts = {name: library.stream(digest) for name, digest in pinned.parents.items()}
    with one_thread():
        merged = merge(
            experts,
            weights=pinned.weights,
            kind=pinned.kind,
            rank=pinned.rank,
            keep_ratio=pinned.keep_ratio,
            on=pinned.on,
            data=data,
            progress=progress,
            **pinned.options,
        )
    about = dict(merged.card["merge"])
    if merge.measure is not None and pinned.weights is not None:
        about["given"] = dict(pinned.weights)  # `weights` are those that it found
    if pinned.data is not None:
        about["data"] = msgspec.to_builtins(pinned.data)
    parents = [{"name": name, "digest": digest} for name, digest in pinned.parents.items()]
    card = dict(merged.card) | {"parents": parents, "merge": about}
    if pinned.description is not None:
        card["description"] = pinned.description
    return replace(merged, card=card)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch has one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_merge(method: str) -> Merge:
    """The method of that name, hyphens or underscores. UsageError with the nearest and all."""
    name = method.strip().lower().replace("-", "_")
    if name in MERGES:
        return MERGES[name]
    close = difflib.get_close_matches(name, MERGES, n=1)
    raise UsageError(
        f"no merge {method!r}"
        + (f"; did you mean {close[0]}?" if close else "")
        + f" There are: {', '.join(MERGES)}",
        hint="adaptlib merge --methods",
    )


def typed(merge: Merge, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method with the types that it wants; `0.2` as text is a number where one is
    wanted. UsageError for one that it does not have."""
    known, wanted = merge.options, _annotations(merge)
    found: dict[str, Any] = {}
    for said, value in given.items():
        name = said.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"{merge.name} has no option {said!r}"
                + (f"; did you mean {close[0]}?" if close else "")
                + f" Its options: {', '.join(known) or 'none'}",
                hint="adaptlib merge --methods",
            )
        kind = wanted[name] if not isinstance(wanted[name], str) else type(known[name])
        try:
            found[name] = msgspec.convert(value, kind, strict=not isinstance(value, str))
            fits = not isinstance(found[name], float) or math.isfinite(found[name])
        except msgspec.ValidationError:
            fits = False
        if not fits:
            raise UsageError(
                f"{name} of {merge.name} is {_kind(kind)}; got {value!r}",
                hint=f"{name}={known[name]}, which it is if not said",
            )
    return found


def _annotations(merge: Merge) -> dict[str, Any]:
    functions = [f for f in (merge.measure, merge.formula) if f is not None]
    return {
        name: parameter.annotation
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
    }


def _kind(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    if options := getattr(kind, "__args__", None):
        return " or ".join(names.get(one, str(one)) for one in options if one is not type(None))
    return names.get(kind, str(kind))


def digest_of(expert: Expert, manifest: Manifest) -> str:
    """The digest that `expert` has in a library where `manifest`, an expert's that should be the
    same, is kept: its base model pinned as it is there."""
    packed = pack(expert)
    card = dict(packed.card) | {"base": manifest.card["base"]}
    hashed = hashlib.sha256()
    for piece in packed.blob():
        hashed.update(piece)
    made = replace(packed, card=card).manifest(f"sha256:{hashed.hexdigest()}")
    return str(Digest.of(encode_manifest("the merged expert", made)))


def difference(one: Expert, other: Expert) -> str:
    """In words, what differs between two experts that should be one."""
    if one.shapes != other.shapes:
        return "it adapts other modules"
    apart = whole = 0.0
    for module in one.deltas:
        mine, others = one.deltas[module].dense(), other.deltas[module].dense()
        apart += float((mine - others).square().sum())
        whole += float(others.square().sum())
    if not apart:
        return "its updates are the same, its card or their form is not"
    return f"its updates differ by {math.sqrt(apart / whole) if whole else 1.0:.1e} of their norm"
