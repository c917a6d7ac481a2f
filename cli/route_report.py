"""The page that `route --html` writes: the explanation, and the map of the clusters."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptlib.experts import Expert
    from adaptlib.routing import Trace

MANY = 20  # from so many experts on there are 10 clusters, as `cluster` has it


def write(
    path: Path,
    document: Mapping[str, Any],
    trace: "Trace",
    experts: "Mapping[str, Expert]",
) -> None:
    """Write the page for what `route --explain --json` says, with the `prompt`."""
    from adaptlib.routing.explain import choices
    from adaptlib.routing.report import write_report

    write_report(
        path,
        {
            **document,
            "choices": choices(trace, len(document["tokens"])),
            "map": _map(experts),
        },
    )


def _map(experts: "Mapping[str, Expert]") -> dict[str, Any]:
    """The clusters of the experts, and where each stands on a plane."""
    from adaptlib.clustering import cluster
    from adaptlib.clustering.plot import plane

    found = cluster(experts, k=10 if len(experts) >= MANY else "auto")
    points = plane(found.similarity).tolist()
    return {
        "clusters": found.clusters,
        "positions": dict(zip(found.names, points, strict=True)),
        "basis": found.basis,
    }
