"""An evaluation as a page for a browser: a single file without scripts, which asks the network for
nothing."""

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from adaptlib.routing.report import check_report

COLLAPSED = 1.5  # `used` or `varied` below this with several experts: everybody gets the same


def write(path: str | Path, document: Mapping[str, Any]) -> Path:
    """Write the document of an evaluation (`compare`) as one .html file: routers with intervals and
    tests, what they choose, and every task. Names may be hostile: they are escaped, and the page's
    policy allows no script and no request. The errors of `check_report`."""
    path = check_report(path)
    style = files("adaptlib.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(_body(document))
    # what differs from cell to cell is set by rules of their own, since inline styles are not allowed
    rules = "\n".join(sorted(_rules(body)))
    whole = style + rules
    digest = base64.b64encode(hashlib.sha256(whole.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>Evaluation</title>\n<style>{whole}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    path.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return path


def _rules(body: str) -> Iterator[str]:
    """A rule for each hundredth that a class of the page names: heat, and places on a bar."""
    kinds = {"h": "--a: {v}", "l": "left: {p}%", "w": "width: {p}%"}
    for kind, number in set(re.findall(r"\b([hlw])(\d{1,3})\b(?=[\" ])", body)):
        value = int(number)
        rule = kinds[kind].format(v=round(value * 0.0075, 4), p=value)
        yield f".{kind}{value} {{ {rule}; }}"


def _body(document: Mapping[str, Any]) -> Iterator[str]:
    tasks = list(dict.fromkeys(row["task"] for row in document["results"]))
    yield f"<h1>Evaluation on {len(tasks)} task{'s' * (len(tasks) != 1)}</h1>"
    for note in document.get("notes", ()):
        yield f"<p>{escape(note)}</p>"
    for metric in dict.fromkeys(row["metric"] for row in document["routers"]):
        yield from _routers(document, metric)
    yield from _quality(document.get("quality") or {})
    for metric in dict.fromkeys(row["metric"] for row in document["results"]):
        yield from _tasks(document, metric, tasks)
    yield from _confusions(document.get("quality") or {})


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Cells are HTML already; one that begins with <td is a whole cell."""
    yield '<div class="wide"><table><thead><tr>'
    yield "".join(f"<th>{escape(cell)}</th>" for cell in head)
    yield "</tr></thead><tbody>"
    for row in rows:
        cells = (cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"


def _name(text: str) -> str:
    return f"<bdi>{escape(text)}</bdi>"


def _routers(document: Mapping[str, Any], metric: str) -> Iterator[str]:
    rows = [row for row in document["routers"] if row["metric"] == metric]
    rows.sort(key=lambda row: row["value"], reverse=metric != "loss")
    tests = {row["a"]: row for row in document["comparisons"] if row["metric"] == metric}
    best = next((row["b"] for row in tests.values()), None)
    yield f"<h2>{escape(metric.replace('_', ' '))}</h2>"
    yield (
        "<p>Means over tasks with 95% bootstrap intervals. The difference is to the best router on the "
        "same rows, p of a sign-flip test; share and regret are against each task's own expert.</p>"
    )
    top = max(max(row["high"] for row in rows), 1.0 if metric != "loss" else 0.0) or 1.0
    head = ["router", "mean", "95% interval", "", "to the best", "p", "better / worse", "of oracle"]
    head += ["regret"]
    table = []
    for row in rows:
        test = tests.get(row["router"])
        low, high, mean = (max(0.0, row[key] / top) for key in ("low", "high", "value"))
        bar = (
            f'<td><div class="bar"><i class="l{_hundredth(low)} w{_hundredth(high - low)}"></i>'
            f'<b class="l{_hundredth(mean)}"></b></div></td>'
        )
        name = _name(row["router"])
        difference = (
            f"{test['difference']:+.3f}" if test else "best" if row["router"] == best else ""
        )
        table.append(
            [
                f'<td class="best">{name}</td>' if row["router"] == best else name,
                f"{row['value']:.3f}",
                f"{row['low']:.3f} to {row['high']:.3f}",
                bar,
                difference,
                f"{test['p']:.4f}" if test else "",
                f"{test['better']} / {test['worse']}" if test else "",
                "" if row["oracle_share"] is None else f"{row['oracle_share']:.0%}",
                "" if row["regret"] is None else f"{row['regret']:.3f}",
            ]
        )
    yield from _table(head, table)


def _hundredth(value: float) -> int:
    return min(100, max(0, round(100 * value))) if math.isfinite(value) else 0


def _quality(quality: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if not quality:
        return
    yield "<h2>What routers choose</h2>"
    yield (
        "<p>Own first: prompts whose most weighted expert is their task's own. Entropy of a prompt's "
        "mean weights, in nats. Used: as how many experts with equal weight all prompts together use; "
        "varied: as how many different mixtures they get, 1 where every prompt gets the same. Cost: "
        "multiply-adds a prompt token over the base's.</p>"
    )
    rows = []
    for router, found in quality.items():
        collapsed = len(found["shares"]) > 2 and min(found["used"], found["varied"]) < COLLAPSED
        rows.append(
            [
                _name(router),
                "" if found["agreement"] is None else f"{found['agreement']:.0%}",
                f"{found['entropy']:.2f}",
                f"{found['token_entropy']:.2f}",
                f"{found['used']:.1f} of {len(found['shares'])}",
                f"{found['varied']:.1f}",
                f"{found['cost']:.2f}",
                '<td class="collapsed">collapsed: nearly the same for every prompt</td>'
                if collapsed
                else "",
            ]
        )
    head = ["router", "own first", "entropy", "of a token", "used", "varied", "cost", ""]
    yield from _table(head, rows)


def _tasks(document: Mapping[str, Any], metric: str, tasks: Sequence[str]) -> Iterator[str]:
    rows = [row for row in document["results"] if row["metric"] == metric]
    routers = list(dict.fromkeys(row["router"] for row in rows))
    values = {(row["task"], row["router"]): row for row in rows}
    yield f"<h2>Each task: {escape(metric.replace('_', ' '))}</h2>"
    top = max((row["value"] for row in rows), default=1.0) or 1.0

    def cell(task: str, router: str) -> str:
        row = values.get((task, router))
        if row is None:
            return "<td></td>"
        return f'<td class="heat h{_hundredth(row["value"] / top)}">{row["value"]:.3f}</td>'

    table = [
        [_name(task), *(cell(task, router) for router in routers)]
        for task in tasks
        if any((task, router) in values for router in routers)
    ]
    yield from _table(["task", *routers], table)


def _confusions(quality: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for router, found in quality.items():
        pairs = {(pair["own"], pair["expert"]): pair["n"] for pair in found["confusion"]}
        own = sorted({pair[0] for pair in pairs})
        chosen = sorted({pair[1] for pair in pairs if pair[1] is not None})
        if not own or not chosen:
            continue
        yield f"<h2>Whom {_name(router)} chooses first</h2>"
        yield "<p>A row is a task's own expert, a column the expert with most weight, in prompts.</p>"
        table = []
        for one in own:
            total = sum(n for (mine, _), n in pairs.items() if mine == one)
            counts = [pairs.get((one, other), 0) for other in chosen]
            cells = [f'<td class="heat h{_hundredth(n / total)}">{n or ""}</td>' for n in counts]
            table.append([_name(one), *cells])
        yield from _table(["own", *chosen], table)
