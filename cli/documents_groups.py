"""What `--json` prints of several experts: their clusters, and what they are merged into."""

from typing import Any

from msgspec import UNSET, UnsetType

from .document import Count, Digest, Document, Kind, Part


class Measures(Part):
    """How good a clustering or a control is."""

    method: str
    k: Count
    silhouette: float | None
    stability: float | None
    ari: float | None
    nmi: float | None


class Assigned(Part):
    """An expert that was put into a cluster of a saved clustering."""

    name: str
    cluster: str
    cosine: float


class Cluster(Document, tag="adaptlib.cluster/1"):
    """Groups of experts by label; `measures` with --measure, `assigned` with --assign."""

    method: str
    k: Count
    clusters: dict[str, list[str]]
    silhouette: float | None
    outliers: list[str]
    labels: dict[str, str]
    features: str
    basis: str
    seed: int
    measures: list[Measures] | UnsetType = UNSET
    assigned: list[Assigned] | UnsetType = UNSET


class Moved(Part):
    """An expert that is in another cluster now; null is none, an outlier."""

    name: str
    before: str | None
    after: str | None


class ClusterDiff(Document, tag="adaptlib.cluster-diff/1"):
    """What became of the clusters of one saved clustering in another, or now."""

    before: str
    after: str
    same: bool
    matched: dict[str, str]
    moved: list[Moved]
    split: dict[str, dict[str, Count]]
    merged: dict[str, dict[str, Count]]
    gone: list[str]
    new: list[str]
    only_before: list[str]
    only_after: list[str]
    changed: list[str]
    common: Count
    ari: float | None
    nmi: float | None


class Duplicate(Part):
    """Names of experts that are one by their updates; `copies` are alike to the last bit."""

    names: list[str]
    cosine: float
    copies: list[list[str]]


class ClusterDuplicates(Document, tag="adaptlib.cluster-duplicates/1"):
    """Groups of experts with at least this cosine, of so many experts."""

    threshold: float
    experts: Count
    duplicates: list[Duplicate]


class Parent(Part):
    """An expert that went into a merge."""

    name: str
    digest: Digest


class Merge(Document, tag="adaptlib.merge/1"):
    """A merged expert; `error` is what rounding to its form lost, as a share of the update."""

    name: str
    digest: Digest
    method: str
    parents: list[Parent]
    weights: list[float]
    options: dict[str, Any]
    kind: Kind
    base: str
    rank: int | None
    modules: Count
    params: Count
    bytes: Count
    error: float | None
    new: bool
    notes: list[str]


class MergePlan(Document, tag="adaptlib.merge-plan/1"):
    """What a merge would come to, from the modules that were `tried`; memory in bytes."""

    name: str
    method: str
    parents: list[Parent]
    kind: Kind
    rank: int | None
    modules: Count
    params: Count
    bytes: Count
    memory: Count | None
    error: float | None
    tried: list[str]
    notes: list[str]


class MergeMethod(Part):
    """A way to merge, with its options and their defaults; `data` where it learns from tasks."""

    name: str
    summary: str
    options: dict[str, Any]
    data: bool


class MergeMethods(Document, tag="adaptlib.merge-methods/1"):
    """Every way to merge."""

    methods: list[MergeMethod]
