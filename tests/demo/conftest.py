"""Lines of scores.jsonl, made up."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from adaptlib.demo.units import Unit

Scored = Callable[..., dict[str, Any]]


@pytest.fixture
def scored() -> Scored:
    """Makes the line of a unit: `valid` and `rate` are its exact match on all of its tasks."""
    source = random.Random(0)

    def make(unit: Unit, *, valid: float = 0.5, rate: float = 0.5, size: int = 100) -> dict:
        hits = "".join("01"[source.random() < rate] for _ in range(20))
        test = {"value": hits.count("1") / 20, "n": 20, "hits": hits}
        line: dict[str, Any] = {
            "name": unit.name,
            "method": unit.method,
            "spec": unit.spec(),
            "scores": {task: {"valid": {"value": valid}, "test": test} for task in unit.tasks},
            "seconds": 2.0 * len(unit.tasks),
        }
        if unit.kind is None:
            known = {"valid": 0.25, "test": 0.25}
            return line | {"category": f"kind {unit.tasks[0][:2]}", "label": {}, "majority": known}
        cost = {"steps": 10, "tokens": 100, "examples": 16, "best_epoch": 1, "params": 7}
        line |= cost | {"train_seconds": 1.5, "resumed": False}
        return line | {"bytes": size} if unit.kept else line

    return make
