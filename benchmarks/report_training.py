"""The training part of docs/results-experts.md."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from intervals import RESAMPLES, interval

TITLES = {
    "base": "base",
    "lora": "LoRA",
    "element-0.1": "el .1",
    "element-0.02": "el .02",
    "block-0.1": "bl .1",
    "block-0.02": "bl .02",
    "full": "full",
    "joint": "joint",
    "mbc": "MBC",
}
LONG = {
    "base": "the base",
    "lora": "LoRA",
    "element-0.1": "element-sparse .1",
    "element-0.02": "element-sparse .02",
    "block-0.1": "block-sparse .1",
    "block-0.02": "block-sparse .02",
    "full": "full fine-tuning",
    "joint": "joint",
    "mbc": "MBC clusters",
}
PAIRS = (
    ("element-0.1", "lora"),
    ("block-0.1", "lora"),
    ("element-0.02", "lora"),
    ("block-0.02", "lora"),
    ("element-0.1", "full"),
    ("block-0.1", "full"),
    ("lora", "full"),
    ("joint", "lora"),
    ("mbc", "lora"),
    ("mbc", "joint"),
    ("mbc", "category"),
    ("mbc", "text"),
    ("mbc", "random"),
)
# What experts of several tasks may be grouped by, beside MBC.
CONTROLS = {
    "category": "experts of categories",
    "text": "experts of text clusters",
    "random": "experts of random groups",
}
HOW = {
    "mbc": "by MBC, 10 clusters of the LoRA experts' parameters",
    "category": "by the 11 categories that people gave the tasks",
    "text": "by the words of instructions and inputs (TF-IDF and K-means, 10 clusters)",
    "random": "by chance, in 10 groups of MBC's sizes",
}
Tasks = Mapping[str, Mapping[str, Any]]


def training_part(done: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown from docs/results-training.json."""
    tasks: Tasks = done["tasks"]
    real = {name: task for name, task in tasks.items() if not task["control"]}
    controls = {name: task for name, task in tasks.items() if task["control"]}
    methods = [method for method in TITLES if any(method in t["hits"] for t in tasks.values())]
    lines = [*_verdict(real), *_how(done, methods), "### Each task", "", *_columns(methods)]
    lines += [*_task_table(real, methods), ""]
    if controls:
        lines += [
            "### Hard controls",
            "",
            "Words alone do not beat the commonest answer here (naive Bayes, see the data's README), and a",
            "model of this size is not expected to. They are in no mean and no difference below.",
            "",
            *_task_table(controls, methods),
            "",
        ]
    lines += [*_category_part(real, methods), *_full_part(real, methods), *_pair_part(real)]
    lines += [*_cluster_part(done["clusters"], tasks), *_groupings_part(real, tasks)]
    return [*lines, *_cost_part(done["methods"])]


def _hits(task: Mapping[str, Any], method: str) -> np.ndarray:
    return np.array([int(hit) for hit in task["hits"][method]])


def _value(task: Mapping[str, Any], method: str) -> str:
    return f"{_hits(task, method).mean():.3f}" if method in task["hits"] else ""


def _floor(task: Mapping[str, Any]) -> float:
    return max(task["label"] or 0.0, task["majority"])


def _with(tasks: Tasks, *methods: str) -> dict[str, Mapping[str, Any]]:
    """The tasks that have all these methods."""
    return {n: t for n, t in tasks.items() if all(method in t["hits"] for method in methods)}


def _difference(tasks: Tasks, left: str, right: str) -> tuple[float, float, float]:
    return interval([_hits(task, left) - _hits(task, right) for task in tasks.values()])


def _said(found: tuple[float, float, float], *, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    value, low, high = (0.0 if abs(part) < 5e-4 else part for part in found)
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _verdict(real: Tasks) -> list[str]:
    """Whether sparse is above LoRA and full fine-tuning, in plain words."""
    lines = ["## Training", ""]
    answers, sentences = [], []
    for method in ("element-0.1", "block-0.1"):
        for other in ("lora", "full"):
            common = _with(real, method, other)
            if not common:
                continue
            found = _difference(common, method, other)
            verdict = (
                "above" if found[1] > 0 else "below" if found[2] < 0 else "not told apart from"
            )
            answers.append(verdict)
            sentences.append(
                f"- {LONG[method]} is **{verdict}** {LONG[other]}: difference "
                f"{_said(found, sign=True)}, {len(common)} tasks"
            )
    if not answers:
        return lines
    if all(answer == "above" for answer in answers):
        plain = "That holds here, in all comparisons."
    elif "above" in answers:
        plain = "That holds here in part only."
    else:
        plain = "**That does not hold here**: no comparison shows sparse above the other."
    return [
        *lines,
        "The paper on sparse adapters (arXiv:2507.07140) finds them above LoRA and above full",
        f"fine-tuning on single tasks. {plain}",
        "",
        *sentences,
        "",
        "One seed, one base model of 3.9 M parameters, learning rates chosen by a small trial: another",
        "seed moves single tasks by several points, and the intervals do not know of that.",
        "",
    ]


def _how(done: Mapping[str, Any], methods: Sequence[str]) -> list[str]:
    tasks = done["tasks"]
    kinds = {"LoRA": "lora", "element": "element-0.1", "block": "block-0.1", "full": "full"}
    rates = {
        words: f"{done['methods'][method]['lr']:g}"
        for words, method in kinds.items()
        if method in methods
    }
    said = ", ".join(f"{words} {rate}" for words, rate in rates.items())
    return [
        f"{len(tasks)} held-in tasks, {sum(task['n'] for task in tasks.values()):,} test rows: all the rows "
        "of each test split.",
        "Everything was trained on the train splits, and the epoch chosen by the loss",
        f"on the valid splits; the test rows chose nothing. Peak learning rates: {said}.",
        "Joint is one LoRA expert trained on all tasks at once; MBC is "
        f"{len(done['clusters'])}, each trained on the tasks whose",
        "LoRA experts MBC puts together, and scored on each of those tasks.",
        "",
        f"Intervals are 95% percentile intervals of {RESAMPLES:,} bootstrap resamples of a mean over tasks",
        "(each task counts alike, whatever its rows): as many tasks as there are are drawn with replacement,",
        "and within each drawn task as many of its test rows as it has, with replacement. A difference is",
        "paired: rows are drawn with both methods' answers. With two to four tasks in a category such an",
        "interval is too narrow; trained weights are not resampled anywhere.",
        "",
    ]


def _columns(methods: Sequence[str]) -> list[str]:
    said = {
        "floor": "the better of the base's likeliest label and the commonest answer",
        "el": "element-sparse, one entry at a time, at that keep ratio",
        "bl": "block-sparse, 16x16 blocks, at that keep ratio",
        "full": "full fine-tuning of the same linear modules",
    }
    shown = [f"*{key}*: {text}" for key, text in said.items() if key != "full" or key in methods]
    return ["; ".join(shown) + ". The base was never shown the form of an answer.", ""]


def _task_table(tasks: Tasks, methods: Sequence[str]) -> list[str]:
    rest = [method for method in methods if method != "base"]
    head = ["task", "category", "n", "base", "floor", *(TITLES[method] for method in rest)]
    lines = _head(head, texts=2)
    for name, task in sorted(tasks.items(), key=lambda item: (item[1]["category"], item[0])):
        cells = [
            name,
            task["category"],
            str(task["n"]),
            _value(task, "base"),
            f"{_floor(task):.3f}",
        ]
        lines.append(_row([*cells, *(_value(task, method) for method in rest)]))
    return lines


def _category_part(real: Tasks, methods: Sequence[str]) -> list[str]:
    """Means by category, of the methods that all tasks have."""
    methods = [m for m in methods if len(_with(real, m)) == len(real)]
    categories: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, task in sorted(real.items()):
        categories.setdefault(task["category"], {})[name] = task
    groups = [*sorted(categories.items()), ("**all**", dict(real))]
    lines = ["### Means by category, with intervals", ""]
    shown = [[m for m in methods if m in ("base", "lora", "element-0.1", "block-0.1")]]
    shown.append([m for m in methods if m not in shown[0] and m != "base"])
    for some in shown:
        if not some:
            continue
        lines += _head(["category", "tasks", "rows", *(TITLES[method] for method in some)], texts=1)
        for category, tasks in groups:
            rows = sum(task["n"] for task in tasks.values())
            cells = [_said(interval([_hits(t, m) for t in tasks.values()])) for m in some]
            lines.append(_row([category, str(len(tasks)), f"{rows:,}", *cells]))
        lines.append("")
    return lines


def _full_part(real: Tasks, methods: Sequence[str]) -> list[str]:
    some = _with(real, "full")
    methods = [m for m in methods if len(_with(some, m)) == len(some)]
    if not some:
        return []
    return [
        f"### The {len(some)} tasks with full fine-tuning",
        "",
        *_head(["method", "mean over the tasks"], texts=1),
        *(
            _row([LONG[method], _said(interval([_hits(task, method) for task in some.values()]))])
            for method in methods
        ),
        "",
    ]


def _pair_part(real: Tasks) -> list[str]:
    lines = [
        "### Paired differences",
        "",
        "*better* and *worse* count tasks, whatever the size of the difference.",
        "",
        *_head(["", "tasks", "difference", "better", "equal", "worse"], texts=1),
    ]
    for left, right in PAIRS:
        common = _with(real, left, right)
        if not common:
            continue
        means = [(_hits(t, left) - _hits(t, right)).mean() for t in common.values()]
        counts = [sum(map(test, means)) for test in _SIGNS]
        named = LONG | CONTROLS
        lines.append(
            _row(
                [
                    f"{named[left]} - {named[right]}",
                    str(len(common)),
                    _said(_difference(common, left, right), sign=True),
                    *map(str, counts),
                ]
            )
        )
    return [*lines, ""]


_SIGNS: tuple[Callable[[float], bool], ...] = (
    lambda mean: mean > 0,
    lambda mean: mean == 0,
    lambda mean: mean < 0,
)


def _cluster_part(clusters: Mapping[str, Mapping[str, Any]], tasks: Tasks) -> list[str]:
    if not clusters:
        return []
    lines = [
        "### The MBC clusters",
        "",
        "Means over the tasks of each, controls included: the cluster's expert, and each task's own LoRA",
        "expert.",
        "",
        *_head(["cluster", "tasks", "train rows", "MBC", "LoRA"], texts=2),
    ]
    for name, cluster in clusters.items():
        means = [
            np.mean([_hits(tasks[task], method).mean() for task in cluster["tasks"]])
            for method in ("mbc", "lora")
        ]
        cells = [name, ", ".join(cluster["tasks"]), f"{cluster['examples']:,}"]
        lines.append(_row([*cells, *(f"{mean:.3f}" for mean in means)]))
    return [*lines, ""]


def _groupings_part(real: Tasks, tasks: Tasks) -> list[str]:
    """Experts of several tasks, by what the tasks were grouped by."""
    groupings = {"mbc": "MBC (parameters)", **CONTROLS}
    found = [name for name in groupings if len(_with(real, name)) == len(real)]
    if found in ([], ["mbc"]):
        return []
    lines = [
        "### What to group tasks by",
        "",
        "One LoRA expert for each group, trained on the rows of all its tasks and scored on each of them.",
        "Grouped " + "; ".join(HOW[name] for name in found) + ".",
        "",
        *_head(["grouping", "mean, 34 tasks", "less own LoRA expert", "hard controls"], texts=1),
    ]
    hard = {name: task for name, task in tasks.items() if task["control"]}
    for name in (*found, "joint"):
        cells = [
            _said(interval([_hits(task, name) for task in some.values()])) for some in (real, hard)
        ]
        title = (groupings | {"joint": "one for all 40 tasks"})[name]
        less = _said(_difference(real, name, "lora"), sign=True)
        lines.append(_row([title, cells[0], less, cells[1]]))
    return [*lines, ""]


def _cost_part(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "### What it took",
        "",
        "Two trainings side by side, one thread each, on two CPU cores; seconds are a training's own, in",
        "the mean over those that were not interrupted.",
        "",
        *_head(
            ["method", "experts", "parameters", "kB each", "steps", "tokens", "s each"], texts=1
        ),
    ]
    for method in TITLES:
        if method not in methods:
            continue
        cost = methods[method]
        size, seconds = cost["bytes"], cost["seconds_each"]
        lines.append(
            _row(
                [
                    LONG[method],
                    str(cost["experts"]),
                    f"{cost['params']:,}",
                    "" if size is None else f"{size / 1e3:,.0f}",
                    f"{cost['steps']:,}",
                    f"{cost['tokens'] / 1e6:.1f} M",
                    "" if seconds is None else f"{seconds:,.0f}",
                ]
            )
        )
    return [*lines, ""]


def _head(names: Sequence[str], *, texts: int) -> list[str]:
    """A table's first lines; the first `texts` columns are words, the others numbers."""
    return [_row(names), "|" + "---|" * texts + "---:|" * (len(names) - texts)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
