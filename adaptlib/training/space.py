"""What a training run takes of this machine, and what there is: memory, cores, disk, time."""

import os
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from adaptlib.errors import AdaptlibError
from adaptlib.training.loop import train
from adaptlib.training.options import Kind, TrainOptions
from adaptlib.training.plan import Plan
from adaptlib.training.run import Progress
from adaptlib.training.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE = 0.85  # of the free memory that training may plan with
SMALL = 20_000_000  # parameters, up to which a model is trained on one thread
_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that programs can still have, within a container's limit; None where nobody says."""
    free = _meminfo()
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        inside = max(0, limit - used)
        return inside if free is None else min(free, inside)
    return free


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or `max`
        return None


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_for(model: PreTrainedModel) -> int:
    """Threads to train this model with on the CPU: one where it is small, else all.

    Of 4 M parameters, two threads made 1.1 to 1.6 times the tokens a second of one on two idle
    cores, and a fortieth where another program had them busy: hundreds of waits a step, each for a
    thread that is not running. With one, experts are the same bytes as in `farm.train_library`.
    """
    return 1 if model.num_parameters() <= SMALL else torch.get_num_threads()


def side_by_side(plans: Iterable[Plan], *, cuda: bool) -> tuple[int, str | None]:
    """How many of these runs go side by side: one a core where memory allows, one on a GPU. And,
    where it is memory that does not allow more, a sentence that says so."""
    plans = list(plans)
    wanted = 1 if cuda else min(cores(), len(plans))
    free = None if cuda else free_memory()
    if free is None or wanted <= 1:
        return max(1, wanted), None
    largest = max(plan.memory for plan in plans)
    fit = max(1, int(free * SHARE) // largest)
    if fit >= wanted:
        return wanted, None
    return fit, (
        f"memory allows {fit} at a time of the {wanted} that the cores do: about "
        f"{largest / 1e9:.1f} GB each, {free / 1e9:.1f} GB free"
    )


def memory_warning(plan: Plan) -> str | None:
    """A sentence, where a run on the CPU will hardly fit into the memory that is free. `plan`
    counts the model's weights, which are loaded already."""
    free = free_memory()
    if free is None or plan.memory <= free:
        return None
    return (
        f"{plan.name} takes about {plan.memory / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are "
        "free; a smaller --batch-size, --max-length or --target takes less"
    )


def disk_needed(plan: Plan) -> tuple[int, int]:
    """Bytes on disk, at most: (a checkpoint while it replaces the one before, the expert with its
    positions)."""
    return 2 * plan.state, (plan.options.dtype.itemsize + 4) * plan.trainable


def check_disk(where: Path, plans: Iterable[Plan], *, workers: int = 1) -> None:
    """AdaptlibError where the disk of `where` has no room for what these runs will write."""
    needs = [disk_needed(plan) for plan in plans]
    checkpoints = sorted((checkpoint for checkpoint, _ in needs), reverse=True)
    need = sum(checkpoints[:workers]) + sum(expert for _, expert in needs)
    free = shutil.disk_usage(where).free
    if free < need:
        raise AdaptlibError(
            f"the disk of {where} has {free / 1e6:,.0f} MB free; training would write about "
            f"{need / 1e6:,.0f} MB of checkpoints and experts",
            hint="make room, or keep the library on another disk with --library",
        )


@contextmanager
def shortening_known() -> Iterator[None]:
    """Inside, what was cut and left out is not warned of: whoever calls tells it from the plan."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="task .*(were cut to fit|were left out)")
        yield


class _EnoughError(Exception):
    """Enough steps were timed."""


def time_steps(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task | tuple[Task, ...],
    *,
    kind: Kind = "lora",
    options: TrainOptions,
    steps: int = 3,
) -> float | None:
    """Input tokens a second, from `steps` real steps after a first one; None where the whole run
    has fewer than two. What was trained is thrown away, and the model is left as it was."""
    seen: list[tuple[float, int]] = []

    def note(progress: Progress) -> None:
        seen.append((time.perf_counter(), progress.tokens))
        if len(seen) > steps:
            raise _EnoughError

    with suppress(_EnoughError), shortening_known():
        train(model, tokenizer, task, kind=kind, options=options, name="timed", progress=note)
    if len(seen) < 2:
        return None
    (start, before), (end, after) = seen[0], seen[-1]
    return (after - before) / max(end - start, 1e-9)
