"""The score that a new expert's card gets: exact match on the rows of split `test`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptlib.experts import Expert
    from adaptlib.training import Task


def scores_on_test(
    model: Any, tokenizer: Any, tasks: "Sequence[Task]", expert: "Expert", max_length: int
) -> dict[str, float]:
    """`test_exact_match` over `test_rows`, all tasks together; nothing where no task has any."""
    from adaptlib.evaluation import exact_match
    from adaptlib.training.modules import applied

    hits, rows = 0.0, 0
    with applied(model, expert):
        for task in tasks:
            if "test" not in task.rows or task.form == "text":
                continue
            score = exact_match(model, tokenizer, task, max_length=max_length)
            hits, rows = hits + score.value * score.n, rows + score.n
    return {"test_exact_match": round(hits / rows, 4), "test_rows": rows} if rows else {}
