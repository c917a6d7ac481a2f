"""Which tasks the experts of a clustering were trained on: the data of MBC's second stage."""

from collections.abc import Mapping
from typing import Any

from adaptlib.errors import CorruptError, NotFoundError, UsageError
from adaptlib.experts.library import Library
from adaptlib.training.tasks import Task


def cluster_tasks(
    library: Library, clustering: Mapping[str, Any], tasks: Mapping[str, Task]
) -> dict[str, tuple[Task, ...]]:
    """For each cluster of a saved clustering, the tasks of its members, each once, by name
    (arXiv:2405.11157, section 3.2: one expert is then trained on the rows of all of them).

    `clustering` is what `load_record` gives, with `clusters` (label -> names) and `experts` (name
    -> digest). A member's tasks are those its card names under `tasks` or `task`. NotFoundError
    lists the members whose task is not in `tasks`, or is nowhere said.
    """
    clusters, digests = clustering.get("clusters"), clustering.get("experts")
    if not isinstance(clusters, Mapping) or not isinstance(digests, Mapping) or not clusters:
        raise CorruptError("the clustering names no clusters or no experts; save it again")
    pools: dict[str, tuple[Task, ...]] = {}
    absent: list[str] = []
    for label, members in clusters.items():
        pool: dict[str, Task] = {}
        for member in members:
            said = _tasks_of(library, str(digests.get(member, member)))
            absent += [f"{member} (its card names no task)"] * (not said)
            absent += [f"{member} (task {name})" for name in said if name not in tasks]
            pool |= {name: tasks[name] for name in said if name in tasks}
        pools[label] = tuple(pool[name] for name in sorted(pool))
    if absent:
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        raise NotFoundError(
            f"no task file for {len(absent)} of the clustering's experts: "
            f"{', '.join(absent[:10])}{more}; there are tasks: {', '.join(sorted(tasks)[:10])}",
            hint="give the folder with the tasks that these experts were trained on",
        )
    return pools


def _tasks_of(library: Library, expert: str) -> list[str]:
    try:
        card = library.manifest(expert).card
    except (NotFoundError, UsageError) as error:
        raise NotFoundError(
            f"the clustering names an expert that is gone: {error}",
            hint="cluster again: adaptlib cluster --save NAME",
        ) from None
    several = card.get("tasks")
    if isinstance(several, list) and all(isinstance(name, str) for name in several):
        return several
    return [card["task"]] if isinstance(card.get("task"), str) else []
