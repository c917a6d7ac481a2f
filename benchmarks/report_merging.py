"""The merging part of docs/results-experts.md."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from intervals import interval

KINDS = {
    "lora": "LoRA",
    "element": "element .1",
    "block": "block .1",
    "full": "full",
    "element-0.02": "element .02",
    "block-0.02": "block .02",
}
MAIN = ("lora", "element", "block", "full")
SPARSE = ("element", "block")
MOST = 20
Line = Mapping[str, Any]
Found = tuple[float, float, float]


def merging_part(done: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown from docs/results-merging.json."""
    lines: dict[str, Line] = done["lines"]
    out, into = done["held_out"], done["held_in"]
    cells = [line for line in lines.values() if "method" in line]
    most = [line for line in cells if line["count"] == MOST]
    return [
        "## Merging",
        "",
        f"From `docs/results-merging.json` (`benchmarks/merging_bundle.py`): the experts of the first {MOST}",
        "tasks merged into one, by every method, and scored on the test splits of those tasks (*held-in*)",
        f"and of {len(out)} tasks that no expert saw (*held-out*). *As it comes*: the method's published",
        "settings. *Scaled*: ΔW times the scale with the highest exact match on",
        f"{done['valid']} validation rows of each held-in task; test rows and held-out tasks chose nothing.",
        "Intervals as above; differences are paired.",
        "",
        *_verdict(most, into, out),
        *_table(most, into, out),
        *_best(most, into, out),
        *_both(most, into, out),
        *_by_count(cells, done),
        *_small(most, into, out),
        *_own(lines, done),
    ]


def _hits(line: Line, which: str, tasks: Sequence[str]) -> list[np.ndarray]:
    return [np.array([int(hit) for hit in unpacked(line[which][task])]) for task in tasks]


def unpacked(hits: str) -> str:
    """ "4:3" is "0011"."""
    rows, bits = hits.split(":")
    return f"{int(bits, 16):0{int(rows)}b}"


def _value(line: Line, which: str, tasks: Sequence[str]) -> float:
    return float(np.mean([hits.mean() for hits in _hits(line, which, tasks)]))


def _difference(one: Line, other: Line, which: str, tasks: Sequence[str]) -> Found:
    pairs = zip(_hits(one, which, tasks), _hits(other, which, tasks), strict=True)
    return interval([left - right for left, right in pairs])


def _said(found: Found, *, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    value, low, high = (0.0 if abs(part) < 5e-4 else part for part in found)
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _find(lines: Sequence[Line], kind: str, method: str) -> Line | None:
    return next((x for x in lines if x["kind"] == kind and x["method"] == method), None)


def _title(line: Line) -> str:
    return f"{KINDS[line['kind']]} {line['method']}"


# The paper's Table 1: sparse merging against what it was compared with.
RIVALS = (
    ("lora", "linear"),
    ("full", "linear"),
    ("full", "task_arithmetic"),
    ("full", "ties"),
    ("full", "breadcrumbs"),
)


def _verdict(lines: Sequence[Line], into: Sequence[str], out: Sequence[str]) -> list[str]:
    """Does sparse win held-in and lose held-out, as the paper finds?"""
    text = [
        "### Does sparse win held-in and lose held-out?",
        "",
        "The paper on sparse adapters (arXiv:2507.07140, table 1) merges 20 experts and finds its sparse",
        "merge above all others on held-in tasks, and below averaged LoRA and TIES of full fine-tuning on",
        "held-out ones. The same comparisons here, differences of sparse less the other:",
        "",
        "| sparse | other | held-in, as it comes | held-out, as it comes | held-in, scaled | held-out, scaled |",
        "|---|---|---:|---:|---:|---:|",
    ]
    verdicts: dict[str, list[str]] = {"held-in": [], "held-out": []}
    for kind in SPARSE:
        one = _find(lines, kind, "uniform_sparse")
        for rival in RIVALS:
            other = _find(lines, *rival)
            if one is None or other is None:
                continue
            cells = []
            for which in ("test", "tuned"):
                for name, tasks in (("held-in", into), ("held-out", out)):
                    found = _difference(one, other, which, tasks)
                    cells.append(_said(found, sign=True))
                    if which == "tuned":
                        verdicts[name].append(_verdict_of(found))
            text.append(f"| {KINDS[kind]} | {_title(other)} | {' | '.join(cells)} |")
    for name, found in verdicts.items():
        if found:
            text += ["", f"{name.capitalize()}, scaled: {_counted(found)}."]
    return [*text, ""]


def _verdict_of(found: Found) -> str:
    return "above" if found[1] > 0 else "below" if found[2] < 0 else "not told apart"


def _counted(verdicts: Sequence[str]) -> str:
    parts = []
    for word in ("above", "below", "not told apart"):
        if count := verdicts.count(word):
            parts.append(f"sparse is **{word}** in {count} of {len(verdicts)} comparisons")
    return "; ".join(parts)


def _table(lines: Sequence[Line], into: Sequence[str], out: Sequence[str]) -> list[str]:
    methods = sorted({line["method"] for line in lines if line["kind"] in MAIN})
    text = ["### Every method, 20 experts", ""]
    for which, title in (("test", "As it comes"), ("tuned", "Scaled")):
        text += [
            f"{title}, held-in / held-out:",
            "",
            "| method | " + " | ".join(KINDS[kind] for kind in MAIN) + " |",
            "|---|" + "---:|" * len(MAIN),
        ]
        for method in methods:
            row = []
            for kind in MAIN:
                line = _find(lines, kind, method)
                row.append(
                    ""
                    if line is None
                    else f"{_value(line, which, into):.3f} / {_value(line, which, out):.3f}"
                )
            text.append(f"| {method} | {' | '.join(row)} |")
        text.append("")
    return text


def _best(lines: Sequence[Line], into: Sequence[str], out: Sequence[str]) -> list[str]:
    """The ten best held-in, with intervals, and what they do held-out."""
    main = [line for line in lines if line["kind"] in MAIN]
    ranked = sorted(main, key=lambda line: -_value(line, "tuned", into))[:10]
    text = [
        "### The ten best held-in, scaled",
        "",
        "| experts and method | scale | held-in | held-out | relative error of what is kept |",
        "|---|---:|---:|---:|---:|",
    ]
    for line in ranked:
        inside = _said(interval(_hits(line, "tuned", into)))
        outside = _said(interval(_hits(line, "tuned", out)))
        text.append(
            f"| {_title(line)} | {line['scale']:.3g} | {inside} | {outside} | {line['error']:.3f} |"
        )
    held_out = max(main, key=lambda line: _value(line, "tuned", out), default=None)
    if held_out is not None:
        text += [
            "",
            f"The best held-out is {_title(held_out)}: {_said(interval(_hits(held_out, 'tuned', out)))} "
            f"(held-in {_value(held_out, 'tuned', into):.3f}).",
        ]
    return [*text, ""]


# What does well on both in the tables, against what the paper compares.
BOTH = (
    ("full", "iso_c"),
    ("full", "tsv"),
    ("lora", "regmean"),
    ("element", "regmean"),
    ("element", "iso_c"),
)
AGAINST = (("element", "uniform_sparse"), ("lora", "linear"), ("full", "ties"))


def _both(lines: Sequence[Line], into: Sequence[str], out: Sequence[str]) -> list[str]:
    """Whether a merge wins on held-in and held-out tasks."""
    text = [
        "### Does anything win on both?",
        "",
        "Scaled; differences of the first less the second. The first were picked from the tables above, on the",
        "same test rows: another set of experts would have to confirm them.",
        "",
        "| merge | against | held-in | held-out |",
        "|---|---|---:|---:|",
    ]
    for pick in BOTH:
        one = _find(lines, *pick)
        for rival in AGAINST:
            other = _find(lines, *rival)
            if one is None or other is None:
                continue
            inside = _said(_difference(one, other, "tuned", into), sign=True)
            outside = _said(_difference(one, other, "tuned", out), sign=True)
            text.append(f"| {_title(one)} | {_title(other)} | {inside} | {outside} |")
    return [*text, ""]


def _by_count(cells: Sequence[Line], done: Mapping[str, Any]) -> list[str]:
    counts = sorted({line["count"] for line in cells})
    followed = sorted({line["method"] for line in cells if line["count"] < MOST})
    if not followed:
        return []
    out = done["held_out"]
    text = [
        "### By the number of experts, scaled",
        "",
        "Held-in (the tasks of the merged experts) / held-out:",
        "",
        "| experts | method | " + " | ".join(map(str, counts)) + " |",
        "|---|---|" + "---:|" * len(counts),
    ]
    for kind in MAIN:
        for method in followed:
            row = []
            for count in counts:
                line = _find([x for x in cells if x["count"] == count], kind, method)
                inside = done["held_in"][:count]
                row.append(
                    ""
                    if line is None
                    else f"{_value(line, 'tuned', inside):.3f} / {_value(line, 'tuned', out):.3f}"
                )
            text.append(f"| {KINDS[kind]} | {method} | {' | '.join(row)} |")
    return [*text, ""]


def _small(lines: Sequence[Line], into: Sequence[str], out: Sequence[str]) -> list[str]:
    """The smaller keep ratio beside the larger."""
    methods = sorted({line["method"] for line in lines if line["kind"] not in MAIN})
    if not methods:
        return []
    kinds = ("element", "element-0.02", "block", "block-0.02")
    text = [
        "### Keep ratio .02 and .1, 20 experts, scaled",
        "",
        "| method | " + " | ".join(KINDS[kind] for kind in kinds) + " |",
        "|---|" + "---:|" * len(kinds),
    ]
    for method in methods:
        row = []
        for kind in kinds:
            line = _find(lines, kind, method)
            row.append(
                ""
                if line is None
                else f"{_value(line, 'tuned', into):.3f} / {_value(line, 'tuned', out):.3f}"
            )
        text.append(f"| {method} | {' | '.join(row)} |")
    return [*text, ""]


def _own(lines: Mapping[str, Line], done: Mapping[str, Any]) -> list[str]:
    text = [
        "### What merging is measured by",
        "",
        "Held-in, each task by its own expert: "
        + ", ".join(
            f"{KINDS[kind]} {_value(lines[f'{kind} own'], 'test', done['held_in']):.3f}"
            for kind in KINDS
            if f"{kind} own" in lines
        )
        + ".",
    ]
    return [*text, ""]
