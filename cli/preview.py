"""--dry-run: what the model will see, and what it will take."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from . import out
from .progress import amount, clock

if TYPE_CHECKING:
    from adaptlib.training import Plan
    from adaptlib.training.encode import Example
    from adaptlib.training.jobs import Layout

SHOWN = 2  # examples


def parts(tokenizer: Any, example: "Example") -> list[dict[str, Any]]:
    """An example's text as the model sees it, special tokens included, in pieces that are to be
    predicted (`answer`) and pieces that are given."""
    from adaptlib.training.encode import IGNORED

    ids, known = list(example.ids), [target == IGNORED for target in example.targets]
    bounds = [0, *(i for i in range(1, len(ids)) if known[i] != known[i - 1]), len(ids)]
    pieces, before = [], ""
    for start, end in pairwise(bounds):
        # decoded from the start, since some tokenizers write a token's space only between tokens
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        piece = text.removeprefix(before)
        if piece == text and before:  # a character that is parted between two pieces
            piece = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        pieces.append({"text": piece, "answer": not known[start]})
        before = text
    return pieces


def numbers(plan: "Plan", model: Any, tokenizer: Any, speed: float | None) -> dict[str, Any]:
    """The plan as plain data; `speed` in input tokens a second."""
    from adaptlib.training.space import disk_needed

    lengths = sorted(len(example.ids) for example in plan.train)
    total = plan.tokens * plan.options.epochs
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {
        "task": plan.name,
        "kind": plan.kind,
        "base": plan.pin["id"],
        "key": plan.key,
        "rows": {
            "train": len(plan.train),
            "valid": len(plan.valid),
            "test": sum(len(task.rows.get("test", ())) for task in plan.tasks),
        },
        "cut": plan.cut,
        "dropped": plan.dropped,
        "max_length": plan.max_length,
        "tokens": {
            "median": _share(lengths, 0.5),
            "p95": _share(lengths, 0.95),
            "max": plan.longest,
            "epoch": plan.tokens,
            "total": total,
        },
        "epochs": plan.options.epochs,
        "steps": plan.steps,
        "modules": plan.modules,
        "trainable": plan.trainable,
        "share": plan.trainable / weights,
        "memory": plan.memory,
        "disk": sum(disk_needed(plan)),
        "tokens_per_second": speed,
        "seconds": total / speed if speed else None,
        "examples": [{"parts": parts(tokenizer, e)} for e in plan.train[:SHOWN]],
    }


def _share(lengths: Sequence[int], share: float) -> int:
    return lengths[min(len(lengths) - 1, int(share * len(lengths)))]


def print_plan(seen: dict[str, Any]) -> None:
    """The numbers for people."""
    for number, example in enumerate(seen["examples"], 1):
        mark = "in bold" if out.colored() else "in [[ ]]"
        said = f", what it learns to answer {mark}" if number == 1 else ""
        out.line(f"Training row {number} as the model sees it{said}:")
        _print_example(example["parts"])
        out.line()
    rows, tokens = seen["rows"], seen["tokens"]
    split = ", ".join(f"{count:,} {name}" for name, count in rows.items() if count)
    lost = [f"{seen['cut']:,} inputs cut"] * bool(seen["cut"])
    lost += [f"{seen['dropped']:,} rows dropped"] * bool(seen["dropped"])
    about = "too few steps to say" if seen["seconds"] is None else f"about {clock(seen['seconds'])}"
    pace = f" at {amount(seen['tokens_per_second'])} tokens/s" if seen["tokens_per_second"] else ""
    lines = {
        "rows": split,
        "tokens": f"{tokens['median']} a row (median), {tokens['p95']} (95%), {tokens['max']} "
        f"(longest, of {seen['max_length']}" + "".join(f"; {text}" for text in lost) + ")",
        "": f"{tokens['epoch']:,} an epoch, {tokens['total']:,} in {seen['epochs']}",
        "steps": f"{seen['steps']:,}",
        "trained": f"{seen['trainable']:,} parameters in {seen['modules']} modules, "
        f"{seen['share']:.2%} of the model",
        "memory": f"about {out.size(seen['memory'])}, the model included",
        "disk": f"about {out.size(seen['disk'])} while it runs",
        "time": about + pace,
    }
    out.line(f"{seen['kind']} on {seen['task']}, base {seen['base']}")
    for name, text in lines.items():
        out.line(f"  {name:<8} {text}")


def _print_example(pieces: list[dict[str, Any]]) -> None:
    clean = [(out.plain(piece["text"]), piece["answer"]) for piece in pieces]
    if out.colored():
        from rich.padding import Padding
        from rich.text import Text

        text = Text.assemble(*((part, "bold" if answer else "") for part, answer in clean))
        out.console().print(Padding(text, (0, 0, 0, 2)))
        return
    text = "".join(f"[[{part}]]" if answer else part for part, answer in clean)
    for line in text.split("\n"):
        out.line(f"  {line}")


def layout_rows(layout: "Layout", speed: float | None) -> list[dict[str, Any]]:
    """A layout as plain data, a job each."""
    rows = []
    for one in layout.planned:
        total = one.plan.tokens * one.plan.options.epochs
        rows.append(
            {
                "name": one.job.name,
                "task": one.plan.name,
                "tasks": [task.name for task in one.job.tasks],
                "key": one.plan.key,
                "done": one.done is not None,
                "rows": one.rows,
                "cut": one.plan.cut,
                "dropped": one.plan.dropped,
                "tokens": total,
                "steps": one.plan.steps,
                "trainable": one.plan.trainable,
                "memory": one.plan.memory,
                "seconds": total / speed if speed else None,
            }
        )
    return rows


def print_layout(layout: "Layout", rows: list[dict[str, Any]]) -> None:
    """A table of the jobs, and the sums."""
    out.table(
        [
            ("NAME", "cut"),
            ("ROWS", "right"),
            ("CUT", "right"),
            ("TOKENS", "right"),
            ("STEPS", "right"),
            ("TIME", "right"),
            ("STATE", "left"),
        ],
        [
            [
                row["name"],
                f"{row['rows']:,}",
                f"{row['cut'] + row['dropped']:,}",
                amount(row["tokens"]),
                f"{row['steps']:,}",
                clock(row["seconds"]),
                "there" if row["done"] else "to train",
            ]
            for row in rows
        ],
    )
    left = [row for row in rows if not row["done"]]
    out.line()
    if not left:
        out.line("All of it is in the library.")
        return
    memory = max(row["memory"] for row in left) * min(layout.workers, len(left))
    seconds = [row["seconds"] for row in left if row["seconds"] is not None]
    time = f"about {clock(together(seconds, layout.workers))}" if seconds else "not known"
    out.line(
        f"{len(left)} of {out.count(len(rows), 'expert')} to train with "
        f"{out.count(layout.workers, 'worker')}: {time}, {out.size(memory)} of memory"
    )


def together(seconds: Sequence[float], workers: int) -> float:
    """How long these take with so many at work, each taking the next that waits."""
    ends = [0.0] * workers
    for some in seconds:
        ends[ends.index(min(ends))] += some
    return max(ends)
