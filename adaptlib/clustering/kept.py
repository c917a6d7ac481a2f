"""Clustering a library: from what `add` kept of its experts, not from them where possible."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, final

import numpy as np

from adaptlib.clustering.features import KINDS, Features, Outline, features, lacking, obstacle
from adaptlib.clustering.mbc import Clustering, check, check_count, cluster
from adaptlib.clustering.modules import chosen
from adaptlib.errors import BaseMismatchError, UsageError
from adaptlib.experts.codec import Manifest, parse_manifest
from adaptlib.experts.damage import read_object
from adaptlib.experts.library import Library
from adaptlib.experts.sketches import SEED, SIDE, sketches
from library_store import Digest

MANY = 500  # experts above which `auto` takes sketches, whatever their factors


def cluster_library(
    library: Library,
    names: Sequence[str] | None = None,
    *,
    method: str = "mbc",
    k: int | Literal["auto"] = 10,
    seed: int = 0,
    features: str = "auto",
    sparsity: float = 0.5,
    only: Sequence[str | int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Clustering:
    """Group the experts of a library, or some of its names, by any method of CLUSTERINGS.

    Options are those of `cluster`; `progress` is that of `library_features`. Experts are read only
    for factors and exact products, so 10,000 of them take a minute by their sketches.
    """
    check(method, k, sparsity)
    wanted = list(library.names() if names is None else names)
    check_count(method, k, len(wanted))
    rows = library_features(
        library, wanted, features, sparsity=sparsity, only=only, progress=progress
    )
    return cluster(rows, method=method, k=k, seed=seed)


def library_features(
    library: Library,
    names: Sequence[str] | None = None,
    kind: str = "auto",
    *,
    sparsity: float = 0.5,
    only: Sequence[str | int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """`features` of a library's experts. Sketches are those in `derived/`; what is missing there is
    made, and `progress` is told how many of them are done, and of how many.

    `auto` takes factors where they line up, for up to 500 experts, and sketches otherwise. Errors
    are those of `features`, and NotFoundError for a name that is not there.
    """
    if kind != "auto" and kind not in KINDS:
        *most, last = ("auto", *KINDS)
        raise UsageError(f"features are {', '.join(most)} or {last}; got {kind!r}")
    wanted = list(library.names() if names is None else names)
    if not wanted:
        raise UsageError("there are no experts to group", hint="adaptlib add SOURCE")
    digests = {name: library.digest(name) for name in wanted}
    cards = _Cards(library, digests)
    why = "asked for"
    if kind == "auto":
        why = f"more than {MANY} experts" if len(wanted) > MANY else _why(library, digests, only)
    if kind in ("factors", "gram") or not why:
        loaded = features(
            {name: library[name] for name in wanted}, kind, sparsity=sparsity, only=only
        )
        return dataclasses.replace(loaded, cards=cards)
    _one_base(library, digests)
    table = sketches(library, wanted, progress=progress)
    rows, modules = table.rows, list(table.modules)
    if only:
        modules = chosen(table.modules, only)
        places = [table.modules.index(module) for module in modules]
        blocks = rows.reshape(len(rows), -1, SIDE**2)[:, places]
        fewer = np.ascontiguousarray(blocks).reshape(len(rows), -1)
        for i in np.flatnonzero(rows.any(axis=1) & ~fewer.any(axis=1)):
            raise lacking(table.names[i], only)
        rows = fewer
    options = {"modules": modules, "seed": SEED, "size": SIDE}
    return Features(table.names, rows, "sketches", why, options, cards)


def read_manifest(library: Library, digest: str, name: str) -> Manifest:
    """The manifest with this digest; `name` is what errors call it. A library's own lookup would
    first ask whether the digest is a name."""
    return parse_manifest(name, read_object(library.store, Digest.parse(digest)))


def _why(library: Library, digests: Mapping[str, str], only: Sequence[str | int]) -> str:
    """Why the factors of these experts do not line up, from their manifests; "" where they do."""
    manifests = [read_manifest(library, digest, name) for name, digest in digests.items()]
    modules = {module for manifest in manifests for module in manifest.modules}
    kept = set(chosen(modules, only)) if only else modules
    return obstacle(_outline(manifest, kept) for manifest in manifests) or ""


def _outline(manifest: Manifest, kept: set[str]) -> Outline:
    held = sorted((name, m.rank) for name, m in manifest.modules.items() if name in kept)
    return Outline(manifest.kind, tuple(n for n, _ in held), tuple(rank for _, rank in held))


def _one_base(library: Library, digests: Mapping[str, str]) -> None:
    known = {digest: summary.base for digest, summary in library.summaries().values()}
    first: dict[str, str] = {}
    for name, digest in digests.items():
        base = known.get(digest) or read_manifest(library, digest, name).base
        first.setdefault(base, name)
    if len(first) > 1:
        listed = ", ".join(f"{base!r} ({name!r})" for base, name in first.items())
        raise BaseMismatchError(
            f"experts of {len(first)} base models cannot be compared: {listed}",
            hint="group the experts of one base model at a time",
        )


@final
class _Cards(Mapping[str, Mapping[str, Any]]):
    """The cards of a library's experts by name, read when they are looked at."""

    def __init__(self, library: Library, digests: dict[str, str]) -> None:
        self._library = library
        self._digests = digests

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        return read_manifest(self._library, self._digests[name], name).card

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)
