"""The routing part of docs/results-experts.md."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from report_routers import (
    Row,
    choices_part,
    each_part,
    means_part,
    outside_part,
    thresholds_part,
    verdict_part,
)

from adaptlib.demo import BUNDLE

K = 10  # clusters


def bundle_digest() -> str:
    """One digest over the bundle's files: results of another bundle are not mixed in."""
    digest = hashlib.sha256()
    for path in sorted(BUNDLE.rglob("*.safetensors")):
        digest.update(path.relative_to(BUNDLE).as_posix().encode() + path.read_bytes())
    return "sha256:" + digest.hexdigest()


def routing_part(done: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown from docs/results.json."""
    lines = [
        "## Routing on the bundle",
        "",
        f"From `docs/results.json`, on the first {done['rows']} rows of each test split: the experts in",
        "`adaptlib/demo/bundle/experts/`, without the joint one and the clusters'.",
        "",
    ]
    if done["bundle"] != bundle_digest():
        lines += ["These numbers are of **an earlier bundle** than the one that is there now.", ""]
    rows, unseen = _sorted(done["tasks"]), _sorted(done.get("unseen", {}))
    thresholds = done.get("thresholds", {})
    if rows and unseen and thresholds:
        lines += verdict_part(rows, unseen, thresholds)
    if rows:
        lines += [*means_part(rows), *each_part(rows), *choices_part(rows)]
    if rows and unseen:
        lines += outside_part(rows, unseen)
    if thresholds:
        lines += thresholds_part(thresholds)
    return [*lines, *_sparse(_sorted(done.get("sparse", {})))]


def _sorted(found: Mapping[str, Row]) -> list[Row]:
    return sorted(found.values(), key=lambda row: row["task"])


def _mean(rows: Sequence[Row], pick: Callable[[Row], float]) -> float:
    return sum(pick(row) for row in rows) / len(rows)


def _sparse(rows: Sequence[Row]) -> list[str]:
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.get("family", "sparse"), []).append(row)
    lines = []
    for family, some in families.items():
        some.sort(key=lambda row: row["task"])
        count = some[0]["experts"]

        def first(row: Row) -> float:
            return row["first"].count(row["own"]) / len(row["first"])

        lines += [
            f"### The {family} experts among themselves",
            "",
            f"The same with the {count} {family} experts only: exact match of each router, and how often",
            f"Arrow's first choice is the task's own expert (chance {1 / count:.1%}).",
            "",
            "| task | uniform | Arrow | oracle | first choice is own |",
            "|---|---:|---:|---:|---:|",
            *(
                f"| {row['task']} | {row['uniform']:.3f} | {row['arrow']:.3f} | "
                f"{row['oracle']:.3f} | {first(row):.1%} |"
                for row in some
            ),
            f"| **mean** | {_mean(some, lambda r: r['uniform']):.3f} | "
            f"{_mean(some, lambda r: r['arrow']):.3f} | {_mean(some, lambda r: r['oracle']):.3f} | "
            f"{_mean(some, first):.1%} |",
            "",
        ]
    return lines
