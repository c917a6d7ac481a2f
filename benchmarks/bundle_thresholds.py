"""Thresholds over the bundled experts: what they keep and what they refuse, and what asking costs."""

import random
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bundle_routers import bench, routers

THRESHOLDS = ("arrow", "spectr", "logo", "cm", "tp", "loraretriever")
PER_TASK = 20  # prompts of each task
LINES = 200  # lines of plain text
CUT = 300  # characters of a line


def measure_threshold(
    folder: Path, label: str, rows: int, before: dict[str, Any], *, data: Path
) -> dict[str, Any]:
    """The threshold that keeps 95% of the experts' valid prompts, on test prompts and on foreign
    ones; and the milliseconds of one decision, a prompt at a time, with the base's pass in it."""
    if before:
        return before
    from adaptlib.routing import calibrate
    from adaptlib.routing.attach import asking
    from adaptlib.routing.calibrate import confidences

    at, asked = bench(folder), prompts(folder, data)
    router = routers(folder)[label]
    done = calibrate(router, at.model, at.tokenizer, asked["valid"])
    threshold = done.router.threshold
    assert threshold is not None
    test = confidences(router, at.model, at.tokenizer, asked["test"])
    found: dict[str, Any] = {
        "threshold": threshold,
        "kept_valid": done.kept,
        "kept": (test >= threshold).float().mean().item(),
        "prompts": {name: len(texts) for name, texts in asked.items()},
    }
    for name in ("tasks", "text"):
        other = confidences(router, at.model, at.tokenizer, asked[name])
        above = (test[:, None] > other).float() + 0.5 * (test[:, None] == other).float()
        found[name] = {
            "refused": (other < threshold).float().mean().item(),
            "separation": above.mean().item(),
        }
    with asking(at.model, done.router, tokenizer=at.tokenizer) as session:
        found["ms"] = _median(
            at.tokenizer, asked["test"][::5], lambda ids: session.begin(at.model, (), ids)
        )
    found["ms_base"] = _median(
        at.tokenizer,
        asked["test"][::5],
        lambda ids: at.model(**ids, use_cache=False, logits_to_keep=1),
    )
    return found


def _median(tokenizer: Any, texts: Sequence[str], run: Callable[[Any], Any]) -> float:
    import torch

    times = []
    with torch.inference_mode():
        for text in texts:
            ids = dict(tokenizer(text, return_tensors="pt"))
            started = time.perf_counter()
            run(ids)
            times.append(time.perf_counter() - started)
    return 1000 * sorted(times)[len(times) // 2]


@cache
def prompts(folder: Path, data: Path) -> dict[str, list[str]]:
    """Prompts of the experts' tasks (`valid`, `test`), of tasks without an expert that were held
    out (`tasks`), and lines of encyclopedia and novels (`text`)."""
    import json

    from adaptlib.training import read_task

    def some(name: str, split: str) -> list[str]:
        task = read_task(folder / f"{name}.jsonl")
        return [task.prompt(row) for row in task.split(split)[:PER_TASK]]

    own = sorted({expert.card["task"] for expert in bench(folder).loras.values()})
    listing = json.loads((data / "tasks.json").read_text())
    unseen = sorted(task["name"] for task in listing if task["role"] == "held_out")
    return {
        "valid": [text for name in own for text in some(name, "valid")],
        "test": [text for name in own for text in some(name, "test")],
        "tasks": [text for name in unseen for text in some(name, "test")],
        "text": lines(data),
    }


def lines(data: Path) -> list[str]:
    """Beginnings of lines from all over the plain text, as many of each file."""
    import zstandard

    found = []
    paths = sorted((data / "text").glob("*.txt.zst"))
    for path in paths:
        with path.open("rb") as file:
            text = zstandard.ZstdDecompressor().stream_reader(file).read().decode("utf-8")
        long = [line for line in text.split("\n") if len(line) >= 80]
        found += [line[:CUT] for line in random.Random(0).sample(long, LINES // len(paths))]
    return found
