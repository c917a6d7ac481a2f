"""Jobs: what experts to train into a library, checked and counted before the first step."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from transformers import PreTrainedModel

from adaptlib.errors import AdaptlibError, ConflictError, UsageError
from adaptlib.experts.base import base_id
from adaptlib.experts.derived import training_run
from adaptlib.experts.expert import Expert
from adaptlib.experts.library import Library
from adaptlib.experts.names import expert_ref
from adaptlib.training.loop import carry_out
from adaptlib.training.options import DEFAULTS, Kind, TrainOptions
from adaptlib.training.plan import Plan, plan
from adaptlib.training.run import Progress
from adaptlib.training.space import check_disk, shortening_known, side_by_side
from adaptlib.training.tasks import Task
from library_store import RefNotFound

Score = Callable[[Any, Any, Sequence[Task], Expert, int], Mapping[str, float]]


@final
@dataclass(frozen=True)
class Job:
    """One expert to train: its `name` in the library, and the tasks it learns. `label` is what its
    card says it was trained on, where that is no single task."""

    name: str
    tasks: tuple[Task, ...]
    kind: Kind = "lora"
    options: TrainOptions = DEFAULTS
    label: str | None = None
    replace: bool = False


@final
@dataclass(frozen=True)
class Planned:
    """A job, its plan (without the encoded rows, of which `rows` were counted), and its expert
    where the library has it already."""

    job: Job
    plan: Plan
    rows: int
    done: "Result | None" = None


@final
@dataclass(frozen=True)
class Result:
    """What became of a job. Without an `error` it is in the library as `digest` (None where it was
    not to be stored); `new` is False where it was there before."""

    name: str
    digest: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    new: bool = False
    steps: int | None = None
    error: str | None = None
    hint: str | None = None


@final
@dataclass(frozen=True)
class Layout:
    """All that is known before the first step: the jobs in order, how many go side by side, and
    why no more, where it is memory that does not allow it."""

    base: str
    revision: str | None
    planned: tuple[Planned, ...]
    workers: int
    limited: str | None = None

    @property
    def open(self) -> tuple[Planned, ...]:
        """What is left to do."""
        return tuple(one for one in self.planned if one.done is None)


def lay_out(
    library: Library,
    jobs: Sequence[Job],
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    base: str,
    revision: str | None = None,
    workers: int | None = None,
    room: bool = True,
) -> Layout:
    """Read, encode and check all jobs, and look up which are done; nothing is written.

    UsageError names all jobs whose data or options do not fit, ConflictError all names that other
    experts have. Without `room` the disk is not asked whether it has any.
    """
    if library.path is None:
        raise UsageError("experts can be trained side by side into a library on disk only")
    if not jobs:
        raise UsageError("there is nothing to train: no task was given")
    if workers is not None and workers < 1:
        raise UsageError(f"workers wants 1 or more; got {workers}", hint="--workers 1")
    _check_names(jobs)
    planned, bad = [], []
    for job in jobs:
        try:
            the_plan = plan_job(job, model, tokenizer, base=base)
        except AdaptlibError as error:
            bad.append((job, error))
            continue
        rows = len(the_plan.train)
        planned.append(Planned(job, replace(the_plan, train=(), valid=()), rows))
    if bad:
        raise _all_of(bad, len(jobs))
    layout = [replace(one, done=is_done(library, one.job.name, one.plan.key)) for one in planned]
    taken = [one.job.name for one in layout if one.done is None and not one.job.replace]
    taken = [name for name in taken if find(library, name) is not None]
    if taken:
        raise ConflictError(
            f"{'these names are' if len(taken) > 1 else 'the name is'} taken by other experts: "
            f"{_some(taken)}",
            hint="--replace, or other names: --prefix P",
        )
    left = [one.plan for one in layout if one.done is None]
    number, limited = 1, None
    if left:
        number, limited = side_by_side(left, cuda=model.device.type == "cuda")
    if workers is not None:
        number, limited = min(workers, max(1, len(left))), None
    if room:
        check_disk(library.path, left, workers=number)
    return Layout(base, revision, tuple(layout), number, limited)


def plan_job(job: Job, model: PreTrainedModel, tokenizer: Any, *, base: str) -> Plan:
    """The job's plan. It counts what was cut and left out; no warning says so, too."""
    with shortening_known():
        return plan(
            model,
            tokenizer,
            job.tasks,
            kind=job.kind,
            options=job.options,
            name=job.label,
            base=base_id(base),
        )


def _check_names(jobs: Sequence[Job]) -> None:
    refs: dict[str, Job] = {}
    for job in jobs:
        ref = str(expert_ref(job.name))
        if ref in refs:
            tasks = [one.name for other in (refs[ref], job) for one in other.tasks[:1]]
            raise UsageError(
                f"two experts would be named {ref}: those of tasks {tasks[0]} and {tasks[1]}",
                hint="rename one of the task files",
            )
        refs[ref] = job


def _all_of(bad: list[tuple[Job, AdaptlibError]], jobs: int) -> AdaptlibError:
    """One error for all the jobs that cannot be trained; it is of the kind of the first."""
    first = bad[0][1]
    if jobs == 1:
        return first
    lines = [f"  {job.name}: {error}" for job, error in bad[:20]]
    if len(bad) > 20:
        lines.append(f"  and {len(bad) - 20} more")
    return type(first)(
        f"{len(bad)} of {jobs} experts cannot be trained, so none was:\n" + "\n".join(lines),
        hint=first.hint,
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def find(library: Library, name: str) -> Result | None:
    """The expert that goes by exactly this name and tag, as a result, or None."""
    found = _at(library, name)
    return _result(name, *found) if found else None


def is_done(library: Library, name: str, key: str) -> Result | None:
    """The expert of this name, where it is the one that a plan with this `key` would give."""
    found = _at(library, name)
    return _result(name, *found) if found and _training(found[1]).get("key") == key else None


def _result(name: str, digest: str, card: Mapping[str, Any]) -> Result:
    return Result(name, digest, dict(card.get("metrics") or {}), steps=_training(card).get("steps"))


def _training(card: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the card says of the training; a card that came from elsewhere may say anything."""
    training = card.get("training")
    return training if isinstance(training, Mapping) else {}


def _at(library: Library, name: str) -> tuple[str, Mapping[str, Any]] | None:
    """The digest and the card. Asks for this one ref: all of them, for each job, would be slow."""
    try:
        digest = str(library.store.ref(expert_ref(name)))
    except RefNotFound:
        return None
    return digest, library.manifest(digest).card


def checkpoint_path(library: Library, key: str, model: PreTrainedModel) -> Path:
    """Where the run with this `key` keeps its checkpoint. Device and threads are in the name,
    since they decide the last bits of what it holds."""
    where = model.device.type
    how = where if where != "cpu" else f"{where}-{torch.get_num_threads()}"
    path = library.path if library.path is not None else Path()
    return training_run(path, key) / f"{how}.safetensors"


def train_into(
    library: Library,
    job: Job,
    the_plan: Plan,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    progress: Callable[[Progress], None] | None = None,
    score: Score | None = None,
    checkpoint_every: float = 60.0,
    stored: bool = True,
) -> Result:
    """Train one job here and now, and keep its expert, if it is to be `stored`. Its checkpoint is
    removed after that."""
    checkpoint = checkpoint_path(library, the_plan.key, model)
    expert = carry_out(
        the_plan,
        model,
        tokenizer,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )
    if score is not None:
        longest = expert.card["training"]["max_length"]
        expert = scored(expert, score(model, tokenizer, job.tasks, expert, longest))
    added = library.add(expert, job.name, replace=job.replace) if stored else None
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    return Result(
        added.name if added else job.name,
        added.digest if added else None,
        dict(expert.card["metrics"]),
        added.new if added else False,
        expert.card["training"]["steps"],
    )


def scored(expert: Expert, metrics: Mapping[str, float]) -> Expert:
    """The expert with more metrics in its card."""
    card = dict(expert.card)
    return replace(expert, card=card | {"metrics": {**card["metrics"], **metrics}})
