"""What `--json` prints of a library: keeping experts and looking at them."""

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from .document import Count, Digest, Document, Kind, Part

# -- keeping ----------------------------------------------------------------------------------


class Init(Document, tag="adaptlib.init/1"):
    """A library, and how many experts it holds; whether it is new."""

    path: str
    experts: Count
    new: bool


class Added(Part):
    """An expert that was kept; `new` is false where it had this name already."""

    name: str
    digest: Digest
    kind: Kind
    base: str
    rank: int | None
    modules: Count
    params: Count
    bytes: Count
    new: bool
    notes: list[str]


class Add(Document, tag="adaptlib.add/1"):
    """The experts that were kept, in the order of their sources."""

    added: list[Added]


class Removed(Part):
    """A name, and what it led to."""

    name: str
    digest: Digest


class Rm(Document, tag="adaptlib.rm/1"):
    """The names that were removed, or would be in a dry run, and the bytes that gc could take then:
    what no other name, pin or saved result needs."""

    removed: list[Removed]
    frees: Count
    dry_run: bool


class Pinned(Part):
    """A pin, and what it holds; `new` is true where it was just made."""

    label: str
    digest: Digest
    new: bool


class Pin(Document, tag="adaptlib.pin/1"):
    """The pin that was made, or all of them."""

    pins: list[Pinned]


class Unpin(Document, tag="adaptlib.unpin/1"):
    """The pin that was taken away, and what it held."""

    label: str
    digest: Digest


class Mv(Document, tag="adaptlib.mv/1"):
    """An expert's old and new name."""

    old: str
    new: str
    digest: Digest


class Tag(Document, tag="adaptlib.tag/1"):
    """An expert's name, and the one that it got beside it."""

    name: str
    new: str
    digest: Digest


class Export(Document, tag="adaptlib.export/1"):
    """Where an expert was written, and how: `model` is a whole model with the expert in it."""

    name: str
    path: str
    format: Literal["peft", "adaptlib", "model"]
    notes: list[str]


class Gc(Document, tag="adaptlib.gc/1"):
    """Objects and bytes that went into the trash, whose `id` brings them back; training runs and
    derived files that were deleted. With --restore, how many objects came back."""

    removed: list[Digest]
    bytes: Count
    restored: Count | UnsetType = UNSET
    id: str | UnsetType | None = UNSET
    training_runs: Count | UnsetType = UNSET
    prototypes: Count | UnsetType = UNSET
    sketches: Count | UnsetType = UNSET
    dry_run: bool | UnsetType = UNSET


class Problem(Part):
    """What is wrong with one object, ref or file, and the names that cannot be used for it."""

    kind: Literal["corrupt", "missing", "unreadable", "foreign"]
    digest: Digest | None
    experts: list[str]
    detail: str
    hint: str


class Verify(Document, tag="adaptlib.verify/1"):
    """How many objects were looked at, and what is wrong; exit code 4 where anything is. With
    --repair, what was moved to quarantine/, put back, and mended otherwise."""

    checked: Count
    problems: list[Problem]
    quarantined: list[Digest]
    repaired: list[Digest]
    mended: list[str]


class Check(Part):
    """One look at the machine or the library."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    hint: str | UnsetType | None = UNSET


class Doctor(Document, tag="adaptlib.doctor/1"):
    """Every check; exit code 1 where one fails."""

    checks: list[Check]


class Schema(Part):
    """A kind of document."""

    name: str
    description: str


class Schemas(Document, tag="adaptlib.schema/1"):
    """The documents that --json prints."""

    schemas: list[Schema]


class Completion(Document, tag="adaptlib.completion/1"):
    """The script that completes command lines in a shell."""

    shell: Literal["bash", "zsh", "fish"]
    script: str


# -- looking ----------------------------------------------------------------------------------


class Listed(Part):
    """One expert, by the name it is listed under."""

    name: str
    digest: Digest
    kind: Kind
    base: str
    task: str | None
    rank: int | None
    modules: Count
    params: Count
    bytes: Count


class List(Document, tag="adaptlib.list/1"):
    """The experts of a library."""

    experts: list[Listed]


class Fields(Part):
    """One expert, by the fields that were asked for."""

    name: str | UnsetType = UNSET
    tag: str | UnsetType = UNSET
    digest: Digest | UnsetType = UNSET
    kind: Kind | UnsetType = UNSET
    base: str | UnsetType = UNSET
    task: str | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    rank: int | UnsetType | None = UNSET
    modules: Count | UnsetType = UNSET
    params: Count | UnsetType = UNSET
    bytes: Count | UnsetType = UNSET
    added: str | UnsetType | None = UNSET
    cluster: list[str] | UnsetType = UNSET


class ListFields(Document, tag="adaptlib.list-fields/1"):
    """The experts of a library, with --fields."""

    experts: list[Fields]


class Module(Part):
    """One adapted module; `shape` is (d_out, d_in)."""

    shape: tuple[int, int]
    rank: int | UnsetType = UNSET
    scale: float | UnsetType = UNSET
    block: int | UnsetType = UNSET


class Tensor(Part):
    """One tensor of the blob."""

    dtype: str
    shape: list[Count]


class Blob(Part):
    """The file of an expert's tensors, in bytes."""

    digest: Digest
    size: Count


class Manifest(Part, tag_field="schema", tag="adaptlib.expert/1"):
    """What is kept of an expert beside its tensors; the card is free in its keys."""

    kind: Kind
    base: str
    blob: Blob
    modules: dict[str, Module]
    tensors: dict[str, Tensor]
    card: dict[str, Any]


class ShowExpert(Document, tag="adaptlib.show/1"):
    """An expert whole, with all names that lead to it."""

    name: str
    names: list[str]
    digest: Digest
    manifest: Manifest


class Clustering(Part, tag_field="schema", tag="adaptlib.clustering/1"):
    """A saved clustering."""

    method: str
    k: Count
    seed: int
    features: str
    why: str
    silhouette: float | None
    options: dict[str, Any]
    clusters: dict[str, list[str]]
    outliers: list[str]
    labels: dict[str, str]
    experts: dict[str, Digest]
    tensors: Digest | UnsetType = UNSET


class ShowClustering(Document, tag="adaptlib.show/1"):
    """A saved clustering, as `show clusterings/NAME` gives it."""

    name: str
    record: Clustering


class SavedRouter(Part, tag_field="schema", tag="adaptlib.router/1"):
    """A saved router."""

    router: str
    experts: dict[str, Digest]
    order: list[str]
    options: dict[str, Any]
    tensors: Digest


class ShowRouter(Document, tag="adaptlib.show/1"):
    """A saved router, as `show routers/NAME` gives it."""

    name: str
    record: SavedRouter


class Move(Part):
    """One move of a name; null where it led to nothing."""

    ref: str
    when: str
    old: Digest | None
    new: Digest | None
    reason: str


class Log(Document, tag="adaptlib.log/1"):
    """The moves of a name, newest first."""

    name: str
    entries: list[Move]


class ModuleDiff(Part):
    """The updates of one module in two experts."""

    module: str
    status: Literal["both", "only in A", "only in B", "other shape"]
    norm_a: float | None
    norm_b: float | None
    cosine: float | None


class Diff(Document, tag="adaptlib.diff/1"):
    """Two experts side by side: facts that differ as [of a, of b], keys of their cards that
    differ, and each module."""

    a: str
    b: str
    same: bool
    cosine: float
    fields: dict[str, tuple[Any, Any]]
    card: list[str]
    modules: list[ModuleDiff]
