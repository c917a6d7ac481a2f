"""What `eval` prints: a line a router, who is above whom, and a line a task where asked."""

from collections.abc import Mapping
from typing import Any

from . import out


def print_evaluation(document: Mapping[str, Any], *, by_task: bool, quiet: bool) -> None:
    """Tables for people; with `quiet` names and means alone, two spaces between."""
    routers = document["routers"]
    if quiet:
        for row in routers:
            out.line(f"{row['router']}  {row['metric']}  {row['value']:.4f}")
        return
    for metric in dict.fromkeys(row["metric"] for row in routers):
        _routers(document, metric)
    if by_task or len({row["router"] for row in routers}) == 1:
        _tasks(document)
    for note in document["notes"]:
        out.note(f"Note: {note}")


def _routers(document: Mapping[str, Any], metric: str) -> None:
    rows = [row for row in document["routers"] if row["metric"] == metric]
    tests = {row["a"]: row for row in document["comparisons"] if row["metric"] == metric}
    best = next((row["b"] for row in tests.values()), None)
    order = sorted(rows, key=lambda row: row["value"], reverse=metric != "loss")
    count = max(row["tasks"] for row in rows)
    out.line(f"{metric}, mean over {out.count(count, 'task')} with its 95% interval")
    columns = [("Router", "left"), ("Mean", "right"), ("Interval", "left")]
    if best is not None:
        columns += [("To best", "right"), ("p", "right")]
    columns += [
        ("Of oracle", "right"),
        ("Own first", "right"),
        ("Used", "right"),
        ("Cost", "right"),
    ]
    table = []
    for row in order:
        cells = [row["router"], f"{row['value']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}"]
        if best is not None:
            test = tests.get(row["router"])
            here = "best" if row["router"] == best else ""
            cells += [f"{test['difference']:+.3f}", _p(test["p"])] if test else [here, ""]
        cells += [_percent(row["oracle_share"]), _percent(row["agreement"])]
        cells += [_number(row["used"]), _number(row["cost"])]
        table.append(cells)
    shown = [i for i in range(len(columns)) if i < 3 or any(line[i] for line in table)]
    out.table([columns[i] for i in shown], ([line[i] for i in shown] for line in table))


def _tasks(document: Mapping[str, Any]) -> None:
    results = document["results"]
    several = len({row["metric"] for row in results}) > 1
    names = list(dict.fromkeys(row["router"] for row in results))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in results:
        cells.setdefault((row["task"], row["metric"]), {})[row["router"]] = f"{row['value']:.3f}"
    out.line()
    out.table(
        [("Task", "fold"), *([("Metric", "left")] if several else []),
         *((name, "right") for name in names)],
        (
            [task, *([metric] if several else []), *(values.get(name, "") for name in names)]
            for (task, metric), values in cells.items()
        ),
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}"
