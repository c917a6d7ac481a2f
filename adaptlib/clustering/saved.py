"""Clusterings kept in a library: the groups, what they were made from, and what `assign` needs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np

from adaptlib.clustering.assign import Assigned, assign
from adaptlib.clustering.kept import library_features
from adaptlib.clustering.mbc import Clustering
from adaptlib.clustering.similarity import Embedding
from adaptlib.errors import CorruptError, NotFoundError
from adaptlib.experts.codec import unpack
from adaptlib.experts.damage import view_object
from adaptlib.experts.expert import Expert
from adaptlib.experts.library import Library
from adaptlib.experts.records import load_record, save_record
from adaptlib.experts.shelf import read_packed
from adaptlib.experts.tensors import RawTensor, encode, read_tensors
from library_store import Digest

SCHEMA = "adaptlib.clustering/1"
KIND = "clusterings"
_TENSORS = {"unit": "F32", "weights": "F32", "tree": "F64"}  # kept so; float64 in memory


def save_clustering(
    library: Library,
    name: str,
    clustering: Clustering,
    *,
    digests: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> str:
    """Keep a clustering under `clusterings/NAME`, tied to its experts by digest: those that their
    names have now, or had when they were read, if `digests` says so. `labels` are words for groups,
    such as `suggest_labels` gives. Returns its own digest.

    Its components are in a blob, so that other experts can be assigned to it; for sketches that is
    256 bytes for each number of a sketch and each expert, 10 MB for 10,000 of a 1B-shaped model.

    NotFoundError where an expert is not in the library.
    """
    held = {n: (digests or {}).get(n) or library.digest(n) for n in clustering.names}
    tensors: dict[str, RawTensor] = {}
    for key, dtype in _TENSORS.items():
        array = getattr(clustering, key)
        if array is not None and array.size:
            array = np.ascontiguousarray(array, "<f4" if dtype == "F32" else "<f8")
            tensors[key] = RawTensor(dtype, array.shape, array.reshape(-1).data)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "method": clustering.method,
        "k": clustering.k,
        "seed": clustering.seed,
        "features": clustering.features,
        "why": clustering.why,
        "silhouette": clustering.silhouette,
        "options": dict(clustering.options),
        "clusters": clustering.clusters,
        "outliers": list(clustering.outliers),
        "labels": dict(labels or {}),
        "experts": held,
    }
    if tensors:
        document["tensors"] = str(library.store.put(encode(tensors)))
    return save_record(library.store, KIND, name, document)


def load_clustering(library: Library, name: str) -> Clustering:
    """A clustering kept by `save_clustering`. One that an earlier version saved has its groups, and
    neither components nor a similarity.

    NotFoundError where there is none, CorruptError where it is not what `save_clustering` writes.
    """
    where = f"{KIND}/{name}"
    document = load_record(library.store, KIND, name)
    if document.get("schema") != SCHEMA:
        raise CorruptError(f"{where} is no clustering that this version knows")
    try:
        names = tuple(sorted(document["experts"]))
        found = {"unit": np.zeros((len(names), 0)), "weights": None, "tree": None}
        if "tensors" in document:
            blob = view_object(library.store, Digest.parse(document["tensors"]))
            for key, raw in read_tensors(where, blob).items():
                found[key] = raw.numpy().astype(np.float64)
        unit = found["unit"]
        if unit is None or unit.ndim != 2 or len(unit) != len(names):
            raise CorruptError(f"{where} has components of other experts than it names")
        return Clustering(
            method=document["method"],
            k=document["k"],
            seed=document["seed"],
            features=document["features"],
            why=document.get("why", "saved"),
            clusters=document["clusters"],
            outliers=tuple(document.get("outliers", ())),
            silhouette=document.get("silhouette"),
            names=names,
            unit=unit,
            points=Embedding.of(names, unit).points if unit.size else unit,
            tree=found["tree"],
            weights=found["weights"],
            options=document.get("options", {}),
        )
    except (KeyError, TypeError) as error:
        raise CorruptError(f"{where} is no clustering: it lacks {error}") from None


def assign_kept(
    library: Library, name: str, experts: Sequence[str] | None = None
) -> dict[str, Assigned]:
    """`assign` for experts of a library and a clustering kept in it: for those named, or for all
    that came since, which are those whose digest it does not have."""
    clustering = load_clustering(library, name)
    members = load_record(library.store, KIND, name)["experts"]
    if experts is None:
        known = set(members.values())
        experts = [n for n, digest in library.names().items() if digest not in known]
    if not experts:
        return {}
    if clustering.features == "sketches":
        others = library_features(library, experts, "sketches")
        return assign(clustering, others)
    return assign(clustering, {n: library[n] for n in experts}, members=Members(library, members))


@final
class Members(Mapping[str, Expert]):
    """The experts that a clustering was made from, whatever their names mean by now."""

    def __init__(self, library: Library, digests: Mapping[str, str]) -> None:
        self._library = library
        self._digests = digests

    def __getitem__(self, name: str) -> Expert:
        if name not in self._digests:
            raise NotFoundError(f"{name} is no member of this clustering")
        return unpack(read_packed(self._library, self._digests[name], name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)
