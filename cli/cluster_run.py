"""What `cluster` is asked for: options checked before anything heavy is imported, and done."""

import difflib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .selection import About, about, one_base_of, select

if TYPE_CHECKING:
    from adaptlib.clustering import Clustering
    from adaptlib.clustering.compare import Difference
    from adaptlib.clustering.grow import Grown
    from adaptlib.experts import Library
    from adaptlib.experts.codec import Manifest

# What each option takes; also said here because what says it first imports torch. Tests hold them
# to one another.
METHODS = ("agglomerative", "category", "hdbscan", "mbc", "random", "text")
COUNTING = ("category", "hdbscan")  # they find the number of clusters themselves
FEATURES = ("auto", "factors", "gram", "sketches")
PICTURES = ("map", "tree", "heat")
LAYOUTS = ("mds", "pca", "tsne")
THRESHOLD = 0.99
NOW = "now"  # in --diff: the clusters that the library has now
MANY = 20  # from so many experts on there are 10 clusters


def check(
    *,
    method: str | None,
    features: str | None,
    k: str | None,
    plot: Path | None,
    plot_kind: str,
    layout: str | None,
    save: str | None,
    threshold: float | None,
    duplicates: bool,
) -> None:
    """UsageError for options that mean nothing, before the library is opened."""
    from adaptlib.errors import UsageError
    from adaptlib.experts.records import check_record_name
    from adaptlib.paths import check_path

    choices = {
        "--method": (method, METHODS),
        "--features": (features, FEATURES),
        "--plot-kind": (plot_kind, PICTURES),
        "--layout": (layout, LAYOUTS),
    }
    for option, (value, known) in choices.items():
        if value is not None and value not in known:
            close = difflib.get_close_matches(value, known, n=1)
            raise UsageError(
                f"{option} is one of {', '.join(known)}; got {value!r}"
                + (f"; did you mean {close[0]}?" if close else ""),
                hint=f"{option} {close[0] if close else known[0]}",
            )
    if k not in (None, "auto") and not (k.isdecimal() and int(k) > 0):
        raise UsageError(
            f"--k wants a whole number, 1 or more, or auto; got {k!r}", hint="--k auto"
        )
    if plot is not None:
        check_path(plot)
    if save == NOW:
        raise UsageError(
            f"--save {NOW}: in --diff that stands for the library as it is", hint="--save other"
        )
    if save is not None:
        check_record_name("clusterings", save)
    if threshold is not None and not duplicates:
        raise UsageError("--threshold belongs to --duplicates", hint="add --duplicates")
    if threshold is not None and not 0 < threshold <= 1:
        raise UsageError(
            f"--threshold is a cosine above 0 and up to 1; got {threshold:g}",
            hint=f"--threshold {THRESHOLD}",
        )


def parts(only: Sequence[str]) -> list[str]:
    """Layers and modules as `cluster` takes them; `2-5` are four layers."""
    found: list[str] = []
    for word in only:
        if pair := re.fullmatch(r"(\d+)-(\d+)", word):
            found += map(str, range(int(pair[1]), int(pair[2]) + 1))
        else:
            found.append(word)
    return found


def count(k: str | None, method: str, experts: int) -> Any:
    """The number of clusters that is asked for. UsageError where there are not so many experts."""
    from adaptlib.errors import UsageError

    if k is None:
        return 10 if experts >= MANY and method not in COUNTING else "auto"
    if k == "auto":
        return k
    if int(k) > experts and method not in COUNTING:
        raise UsageError(
            f"{int(k):,} clusters cannot be made of {experts:,} expert{'s' * (experts != 1)}",
            hint=f"--k with a number from 1 to {experts}, or --k auto",
        )
    return int(k)


def meter(what: str, *, quiet: bool) -> Callable[[int, int], None]:
    """What to call after each of many: a line on a terminal, nothing elsewhere."""
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if quiet or not sys.stderr.isatty():
            return
        if done == total or time.monotonic() - last > 0.2:
            last = time.monotonic()
            sys.stderr.write(
                f"{what}  {done:,} of {total:,}{chr(10) if done == total else chr(13)}"
            )
            sys.stderr.flush()

    return progress


def how(given: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """What `cluster_library` takes, of the options given and the number of experts."""
    method = given.get("method", "mbc")
    return {
        "method": method,
        "k": count(given.get("k"), method, experts),
        "seed": given.get("seed", 0),
        "features": given.get("features", "auto"),
        "only": parts(given.get("only", ())),
    }


def unused(given: Mapping[str, Any], *, layout: str | None, kind: str) -> list[str]:
    """Which options a method or a picture does not take."""
    notes = []
    if "k" in given and given.get("method") in COUNTING:
        notes.append(f"{given['method']} finds the number of clusters itself; --k is not used")
    if layout is not None and kind != "map":
        notes.append(f"a {kind} has no --layout; it is not used")
    return notes


def labels_of(
    clusters: Mapping[str, Sequence[str]], experts: Mapping[str, About]
) -> dict[str, str]:
    """Words for each cluster, of the cards of its experts."""
    from adaptlib.clustering.labels import card_text, suggest_labels

    return suggest_labels(clusters, {name: card_text(one.card) for name, one in experts.items()})


def grown(
    library: "Library", name: str, experts: list[str], base: str | None
) -> "tuple[Grown, dict[str, str]]":
    """A saved clustering with the experts that it lacks, or with those named, and its words."""
    from adaptlib.errors import UsageError
    from adaptlib.experts.records import load_record

    record = load_record(library.store, "clusterings", name)
    own = _member(library, name, record).base
    if experts:
        experts = select(library, experts, base)
    else:
        held = set(record["experts"].values())
        found = library.summaries()  # of a library with several base models, those of this one
        experts = [
            one for one, (digest, it) in found.items() if digest not in held and it.base == own
        ]
    strangers = [one for one in experts if library.manifest(one).base != own]
    if strangers:
        raise UsageError(
            f"{strangers[0]} is for another base model than the experts of {name}, {own}",
            hint=f"--base {own}",
        )

    from adaptlib.clustering.grow import grow

    with _hint(f"adaptlib cluster --features sketches --save {name}, then --assign"):
        return grow(library, name, experts), dict(record.get("labels", {}))


def difference(
    library: "Library",
    which: tuple[str, str],
    given: Mapping[str, Any],
    experts: list[str],
    base: str | None,
    *,
    quiet: bool,
) -> "tuple[Difference, tuple[dict[str, str], dict[str, str]]]":
    """What differs between two saved clusterings, or one and what it would be `now`; and the words
    of both."""
    from adaptlib.errors import UsageError
    from adaptlib.experts.records import load_record

    if which[0] == NOW:
        raise UsageError("--diff wants first what was before", hint=f"--diff {which[1]} {NOW}")
    before = load_record(library.store, "clusterings", which[0])
    if which[1] == NOW:
        after = _now(library, which[0], before, given, experts, base, quiet=quiet)
    else:
        after = load_record(library.store, "clusterings", which[1])

    from adaptlib.clustering.compare import compare

    found = compare(
        before["clusters"],
        after["clusters"],
        outliers=(before.get("outliers", ()), after.get("outliers", ())),
        digests=(before["experts"], after["experts"]),
    )
    return found, (dict(before.get("labels", {})), dict(after.get("labels", {})))


def _now(
    library: "Library",
    name: str,
    before: Mapping[str, Any],
    given: Mapping[str, Any],
    experts: list[str],
    base: str | None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """A record of the library's experts, grouped as those of a saved clustering were."""
    member = _member(library, name, before)
    names = select(library, experts, base or member.base)
    known = about(library, names)
    one_base_of(known)
    modules = before.get("options", {}).get("modules", ())
    asked = before.get("why") == "asked for"
    same = {
        "method": before["method"],
        "k": str(min(before["k"], len(names))),
        "seed": before["seed"],
        "features": before["features"] if asked else "auto",
        "only": modules if member.modules.keys() - set(modules) else (),
    }
    found = clustered(library, names, how({**same, **given}, len(names)), quiet=quiet)
    return {
        "clusters": found.clusters,
        "outliers": found.outliers,
        "experts": {one: known[one].digest for one in names},
        "labels": labels_of(found.clusters, known),
    }


def _member(library: "Library", name: str, record: Mapping[str, Any]) -> "Manifest":
    """The manifest of a member that is still there."""
    from adaptlib.errors import NotFoundError

    for digest in record["experts"].values():
        with suppress(NotFoundError):
            return library.manifest(digest)
    raise NotFoundError(
        f"all experts of the clustering {name} are gone",
        hint=f"cluster again: adaptlib cluster --save {name}",
    )


def clustered(
    library: "Library", names: Sequence[str], options: Mapping[str, Any], *, quiet: bool
) -> "Clustering":
    """The experts grouped, with a line on a terminal while sketches are made."""
    from adaptlib.clustering import cluster_library

    with _hint("--features sketches"):
        return cluster_library(library, names, **options, progress=meter("Sketches", quiet=quiet))


@contextmanager
def _hint(words: str) -> Iterator[None]:
    """What to type where factors do not line up."""
    from adaptlib.errors import UsageError

    try:
        yield
    except UsageError as error:
        if "line up" not in str(error):
            raise
        raise UsageError(str(error), hint=words) from None


def fields_of(found: "Clustering", labels: Mapping[str, str]) -> dict[str, Any]:
    """What JSON says of a clustering."""
    return {
        "method": found.method,
        "k": found.k,
        "clusters": found.clusters,
        "silhouette": found.silhouette,
        "outliers": found.outliers,
        "labels": labels,
        "features": found.features,
        "basis": found.basis,
        "seed": found.seed,
    }
