"""Which experts a command is about: names, one base model, each expert once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from adaptlib.experts.codec import Manifest
    from adaptlib.experts.library import Library

CLUSTER = "cluster:"  # and NAME/LABEL, the experts of one cluster of a saved clustering
OUTLIERS = "outliers"  # the LABEL of those in no cluster
SAID = ("task", "description", "instruction", "examples", "category")  # in a card, of its task


def select(
    library: "Library", names: list[str], base: str | None, *, once: bool = True
) -> list[str]:
    """The names given, or all; of `base` only, where one is given. `cluster:NAME/LABEL` stands for
    the experts of a cluster. An expert that goes by several of the names is there `once`.
    NotFoundError where none is left."""
    from adaptlib.errors import NotFoundError

    chosen: dict[str, str] = {}
    for name in expand(library, names) or library:
        digest = library.digest(name)
        chosen.setdefault(digest if once else name, name)
    if not chosen:
        raise NotFoundError(
            "the library is empty", hint="adaptlib add SOURCE, or adaptlib init --demo"
        )
    if base is None:
        return list(chosen.values())
    of_base = [name for name in chosen.values() if library.manifest(name).base == base]
    if not of_base:
        known = sorted({library.manifest(name).base for name in chosen.values()})
        raise NotFoundError(
            f"no expert of base model {base!r} here; there are: {', '.join(known)}",
            hint=f"--base {known[0]}",
        )
    return of_base


def expand(library: "Library", names: Sequence[str]) -> list[str]:
    """These names, with the members of a cluster in the place of `cluster:NAME/LABEL`.

    A member is the expert that was clustered: where its name leads to another now, it goes by its
    digest. NotFoundError lists the clusterings, or the clusters of one."""
    return [
        name
        for one in names
        for name in (_members(library, one) if one.startswith(CLUSTER) else [one])
    ]


def _members(library: "Library", asked: str) -> list[str]:
    from adaptlib.errors import NotFoundError, UsageError
    from adaptlib.experts.records import load_record

    saved, _, label = asked.removeprefix(CLUSTER).rpartition("/")
    if not saved:
        saved, label = label, ""
    if not saved:
        raise UsageError(f"{asked!r} names no cluster", hint=f"{CLUSTER}NAME/LABEL")
    record = load_record(library.store, "clusterings", saved)
    groups: dict[str, list[str]] = dict(record["clusters"])
    if record.get("outliers"):
        groups.setdefault(OUTLIERS, record["outliers"])
    if label not in groups:
        what = f"{asked} is no cluster" if label else f"{asked} names no cluster"
        raise NotFoundError(
            f"{what}; in {saved} there are: {listed(groups, record.get('labels', {}))}",
            hint=f"{CLUSTER}{saved}/{next(iter(groups), 0)}",
        )
    digests: Mapping[str, Any] = record["experts"]
    return [_now(library, name, str(digests[name]), saved) for name in groups[label]]


def _now(library: "Library", name: str, digest: str, saved: str) -> str:
    from adaptlib.errors import CorruptError, NotFoundError

    try:
        if library.digest(name) == digest:
            return name
    except NotFoundError:
        pass
    try:
        return library.digest(digest)
    except (NotFoundError, CorruptError) as error:
        raise type(error)(
            f"{name} as it was in the clustering {saved}, {digest[:19]}, is gone",
            hint=f"cluster again: adaptlib cluster --save {saved}",
        ) from None


def listed(groups: Mapping[str, Sequence[str]], labels: Mapping[str, str]) -> str:
    """The labels of clusters with their words and sizes, of many the first."""
    said = [
        " ".join(filter(None, [label, labels.get(label, "")])) + f" ({len(names)})"
        for label, names in groups.items()
    ]
    more = f" and {len(said) - 12} more" if len(said) > 12 else ""
    return ", ".join(said[:12]) + more


@final
@dataclass(frozen=True)
class About:
    """What a command needs of a manifest, small enough to be held for ten thousand experts."""

    digest: str
    weights: str  # alike for experts of the same updates to the last bit, whatever their cards
    base: str
    revision: str | None
    card: Mapping[str, Any]


def about(library: "Library", names: Sequence[str]) -> dict[str, About]:
    """Each manifest read once. Of the cards what says what an expert is for."""
    found = {}
    for name in names:
        digest = library.digest(name)
        manifest = library.manifest(name)  # by a digest it would look for what begins so
        card = {key: manifest.card[key] for key in SAID if key in manifest.card}
        revision = manifest.card["base"].get("revision")
        weights = f"{manifest.blob.digest} {_form(manifest)}"  # scales are not in the blob
        found[name] = About(digest, weights, manifest.base, revision, card)
    return found


def _form(manifest: "Manifest") -> str:
    import msgspec

    return sha256(msgspec.json.encode(manifest.modules, order="sorted")).hexdigest()


def one_base(library: "Library", names: list[str]) -> tuple[str, str | None]:
    """The base model (id, revision) that all of `names` are for. UsageError where they are for
    several; a revision that only some cards know counts for all."""
    return one_base_of(about(library, names))


def one_base_of(experts: Mapping[str, About]) -> tuple[str, str | None]:
    """`one_base` of what is known already."""
    from adaptlib.errors import UsageError

    pins: dict[tuple[str, str | None], list[str]] = {}
    for name, one in experts.items():
        pins.setdefault((one.base, one.revision), []).append(name)
    known = {pin: held for pin, held in pins.items() if pin[1] is not None}
    bases = {base for base, _ in pins}
    if len(bases) > 1:
        parts = [f"{base} ({len(held)}: {held[0]}, ...)" for (base, _), held in pins.items()]
        raise UsageError(
            f"these experts are for {len(bases)} base models: {'; '.join(parts)}",
            hint=f"choose those of one: --base {next(iter(pins))[0]}",
        )
    if len(known) > 1:
        parts = [f"{revision} ({held[0]}, ...)" for (_, revision), held in known.items()]
        raise UsageError(
            f"these experts are for several revisions of {bases.pop()}: {'; '.join(parts)}",
            hint="choose those of one with --experts a,b,c, or say which model: --model DIRECTORY",
        )
    return next(iter(known or pins))
