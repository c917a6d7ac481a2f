"""The report of `bench papers` as Markdown: docs/results.md is one."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptlib.papers.table import MARGIN
from adaptlib.papers.units import CONTROLS, Budget

WORDS = {
    "base": "the base alone",
    "uniform": "private + uniform",
    "oracle": "private + oracle (own expert)",
    "arrow": "private + Arrow (top 4 by token)",
    "arrow_prompt1": "private + Arrow (one expert a prompt)",
    "arrow_tuned": "private + Arrow tuned on 20 prompts a task",
    "spectr": "private + SpectR",
    "lag": "private + LAG",
    "logo": "private + LoGo",
    "cm": "private + CM",
    "tp": "private + TP",
    "phatgoose": "private + PHATGOOSE",
    "merge_linear": "private, merged: mean",
    "merge_ties": "private, merged: TIES",
    "joint": "joint",
    "poly": "Polytropon",
    "mhr": "MHR",
    "mope_token": "MoPE by token",
    "mope_example": "MoPE by example (SMEAR)",
    "mbc_uniform": "MBC + uniform",
    "mbc_arrow": "MBC + Arrow",
    "mbc_oracle": "MBC + oracle",
    "sparse_uniform": "sparse + uniform",
    "sparse_arrow": "sparse + Arrow",
    "sparse_oracle": "sparse + oracle",
    "sparse_merge": "sparse, merged by overlap",
    "lora": "LoRA from nothing",
    "joint_tuned": "joint, trained on",
    "lorahub": "LoraHub on the private experts",
    "poly_z": "Polytropon-z",
    "poly_full": "Polytropon",
    "mhr_z": "MHR-z",
    "mhr_full": "MHR (few-shot)",
    "mhr_mu": "MHR-μ",
}


def write(path: Path, made: Mapping[str, Any], budget: Budget) -> None:
    """Write the report; the same numbers give the same bytes."""
    path.write_text("\n".join(_lines(made, budget)) + "\n", encoding="utf-8")


def _lines(made: Mapping[str, Any], budget: Budget) -> Iterator[str]:
    yield "# Results: the comparisons of the papers"
    yield ""
    yield "Written by `adaptlib bench papers`; nobody edits it. Numbers are exact match (greedy,"
    yield "case-insensitive, outer whitespace left out) on test rows, as measured. Training alone, sparse"
    yield "against LoRA, merges by number of experts and routers over fully trained experts are in"
    yield "[results-experts.md](results-experts.md)."
    yield ""
    yield f"**One budget for all.** Each method that trains sees the first {budget.rows} rows of each held-in"
    yield f"task {budget.epochs} times, and the first {budget.score_rows} test rows of each task are scored. The experts of the"
    yield "bundle saw up to 1,000 rows 5 times and are much better; what is compared here is methods."
    yield f"A new task has {budget.shots} rows, seen {budget.shot_epochs} times, another draw for each seed. Skills: 8 of rank 4; private,"
    yield "joint and MBC experts have rank 8; MHR has 8 heads; MBC makes 6 clusters. Seeds change the order"
    yield "of rows and what is drawn of new tasks; all experts start from one draw of A, as MBC wants."
    yield ""
    yield "Means are over tasks, each counting alike. Intervals are 95% percentile intervals of 10,000 bootstrap"
    yield "resamples of tasks and rows; *seeds* is the smallest and largest mean of one seed. Hard controls"
    yield f"({', '.join(CONTROLS)}), on which words alone do not beat the commonest answer, are in no mean."
    yield ""
    yield "## Which claims hold here"
    yield ""
    yield from _claims(made["claims"])
    yield ""
    yield from _collapse(made["collapse"])
    yield "## Tasks that were trained on, and tasks that were not"
    yield ""
    yield from _methods(made["methods"])
    yield ""
    yield "An oracle knows the task's own expert, so it has no held-out number. Polytropon and MHR answer a"
    yield "held-in task with its own logits, and a held-out one with all skills alike."
    yield ""
    yield "## What routers do"
    yield ""
    yield from _quality(made["methods"])
    yield ""
    yield "## A new task from a few examples"
    yield ""
    yield from _few(made["few_shot"])
    yield ""
    yield "## What training cost"
    yield ""
    yield from _cost(made["training"])
    yield ""
    yield "## Each task"
    yield ""
    yield from _tasks(made["tasks"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _with_interval(row: Mapping[str, Any], group: str) -> str:
    if row.get(group) is None:
        return ""
    low, high = row[f"{group}_interval"]
    return f"{row[group]:.3f} [{low:.3f}, {high:.3f}]"


def _spread(row: Mapping[str, Any], group: str) -> str:
    each = row.get(f"{group}_seeds")
    return f"{min(each):.3f} to {max(each):.3f}" if each and len(each) > 1 else ""


def _claims(claims: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [
        [
            claim["claim"],
            f"**{claim['holds']}**",
            f"{claim['a']:.3f}",
            f"{claim['b']:.3f}",
            f"{claim['difference']:+.3f} [{claim['low']:+.3f}, {claim['high']:+.3f}]",
            f"{claim['p']:.4f}",
        ]
        for claim in claims
    ]
    yield from _table(["claim", "here", "first", "second", "difference", "p"], rows)
    yield ""
    yield f'"Near", "at least" and "as good as" allow .05 less: they hold where the interval stays above -{MARGIN:.2f},'
    yield "fail where the difference itself is below; between these it is not settled. p is of a sign-flip test over rows."


def _collapse(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Whether learned routing has collapsed, as the MoPE case study finds of routing by example."""
    for name, row in found.items():
        verdict = "has **collapsed**" if row["collapsed"] else "has **not collapsed**"
        yield f"{WORDS[name]} {verdict}: prompts of all held-in tasks get as many different mixtures as"
        yield f"{row['varied']:.2f} (1 is the same for all), with an entropy of {row['entropy']:.2f} nats and {row['used']:.1f} of 8 experts used. That"
        yield "per-example routing collapses is a finding of the MoPE case study."
        yield ""


def _methods(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    cells = [
        [
            WORDS[row["method"]],
            str(row["seeds"]),
            _with_interval(row, "held_in"),
            _spread(row, "held_in"),
            _with_interval(row, "held_out"),
            _spread(row, "held_out"),
        ]
        for row in rows
    ]
    yield from _table(["method", "seeds", "held in", "by seed", "held out", "by seed"], cells)


def _quality(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "*Own first*: prompts of held-in tasks whose most weighted expert is their task's own (or their cluster's)."
    yield "*Entropy*: of a prompt's mean weights, in nats; *of a token*: of single choices. *Used*: as how many experts"
    yield "with equal weight all prompts together use; *varied*: as how many different mixtures the prompts get, 1"
    yield "where every prompt gets the same: routing has collapsed. *Cost*: multiply-adds a token over the base's."
    yield ""
    keys = ("agreement", "entropy", "token_entropy", "used", "varied", "cost")
    cells = [
        [WORDS[row["method"]], *(_number(row[key], 2) for key in keys)]
        for row in rows
        if row["entropy"] is not None
    ]
    head = ["method", "own first", "entropy", "of a token", "used", "varied", "cost"]
    yield from _table(head, cells)


def _few(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    cells = [
        [
            WORDS[row["method"]],
            str(row["seeds"]),
            _with_interval(row, "few_shot"),
            _spread(row, "few_shot"),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    yield from _table(["method", "seeds", "exact match", "by seed", "seconds for all tasks"], cells)


def _cost(training: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for name, line in training.items():
        by_method.setdefault(name.rpartition("-")[0], []).append(line)
    cells = [
        [
            name.replace("_", " "),
            str(len(lines)),
            f"{sum(line['steps'] for line in lines) / len(lines):,.0f}",
            f"{sum(line['seconds'] for line in lines) / len(lines):,.0f}",
        ]
        for name, lines in by_method.items()
    ]
    yield "One thread of a CPU with two cores, both in use, so seconds are no benchmark."
    yield ""
    yield from _table(["what", "runs", "steps a run", "seconds a run"], cells)


def _tasks(tasks: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    shown = (
        "base",
        "oracle",
        "uniform",
        "arrow",
        "arrow_tuned",
        "tp",
        "joint",
        "mhr",
        "mope_token",
    )
    shown += ("mbc_arrow", "sparse_oracle")
    names = [name for name in shown if any(name in row for row in tasks.values())]
    cells = [[task, *(_number(row.get(name), 2) for name in names)] for task, row in tasks.items()]
    yield from _table(["task", *(name.replace("_", " ") for name in names)], cells)
