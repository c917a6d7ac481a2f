"""The routing part of docs/results.md."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptlib.demo import BUNDLE

TOP_K = 4
K = 10  # clusters
Row = Mapping[str, Any]


def bundle_digest() -> str:
    """One digest over the bundle's files: results of another bundle are not mixed in."""
    digest = hashlib.sha256()
    for path in sorted(BUNDLE.rglob("*.safetensors")):
        digest.update(path.relative_to(BUNDLE).as_posix().encode() + path.read_bytes())
    return "sha256:" + digest.hexdigest()


def routing_part(done: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown from docs/results.json."""
    routed = sorted((r for r in done["tasks"].values() if "own" in r), key=lambda r: r["task"])
    lines = [
        "## Routing on the bundle",
        "",
        f"From `docs/results.json`, on the first {done['rows']} rows of each test split: the experts in",
        "`adaptlib/demo/bundle/experts/`, without the joint one and the clusters'.",
        "",
    ]
    if done["bundle"] != bundle_digest():
        lines += ["These numbers are of **an earlier bundle** than the one that is there now.", ""]
    return [
        *lines,
        *_routers(routed),
        *_choices(routed),
        *_sparse(sorted(done["sparse"].values(), key=lambda row: row["task"])),
    ]


def _mean(rows: Sequence[Row], pick: Callable[[Row], float]) -> float:
    return sum(pick(row) for row in rows) / len(rows)


def _routers(routed: Sequence[Row]) -> list[str]:
    picks: list[Callable[[Row], float]] = [
        lambda row: row["base"],
        lambda row: row["uniform"],
        lambda row: row["arrow"],
        lambda row: row["arrow_top1"],
        lambda row: row["experts"][row["own"]],
    ]
    means = " | ".join(f"{_mean(routed, pick):.3f}" for pick in picks)
    return [
        "### Routers over all LoRA experts at once",
        "",
        f"The {round(1 / routed[0]['chance_own'])} LoRA experts together; nobody says which task a prompt is",
        f"from. Oracle is the task's own expert alone. Arrow mixes {TOP_K} experts a token and module,",
        "Arrow-1 one.",
        "",
        "| task | base | uniform | Arrow | Arrow-1 | oracle |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {row['task']} | {' | '.join(f'{pick(row):.3f}' for pick in picks)} |"
            for row in routed
        ),
        f"| **mean** | {means} |",
        "",
    ]


def _choices(routed: Sequence[Row]) -> list[str]:
    keys = ("first_own", "chance_own", "first_cluster", "chance_cluster")
    means = " | ".join(f"{_mean(routed, lambda row, key=key: row[key]):.1%}" for key in keys)
    return [
        "### Does Arrow find the expert of the task?",
        "",
        "Arrow's first choice for a prompt is the expert with the most routing weight over its tokens",
        f"and modules (top {TOP_K}). *Own*: it is the expert trained on that task. *Cluster*: it is in",
        f"the same MBC cluster (k = {K}). Beside each, what choosing blindly would give.",
        "",
        "| task | own | chance | cluster | chance | most often chosen |",
        "|---|---:|---:|---:|---:|---|",
        *(
            f"| {row['task']} | {' | '.join(f'{row[key]:.1%}' for key in keys)} | "
            f"{row['most_chosen']} |"
            for row in routed
        ),
        f"| **mean** | {means} | |",
        "",
    ]


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
