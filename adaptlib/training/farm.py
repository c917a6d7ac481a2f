"""Many experts at once: one process for each that fits, results straight into a library."""

import errno
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, final

import torch

from adaptlib.errors import AdaptlibError, UsageError
from adaptlib.experts.base import load
from adaptlib.experts.library import Library
from adaptlib.training.jobs import Job, Layout, Result, Score, lay_out, plan_job, train_into
from adaptlib.training.run import Progress
from adaptlib.training.tasks import Task
from library_store import StoreError

State = Literal["training", "done", "failed", "stopping"]

PATIENCE = 60.0  # seconds that workers have to end their step when all is to stop


@final
@dataclass(frozen=True)
class Report:
    """News of one job: a step that was made, or its end. Or of all: they are `stopping`."""

    name: str
    state: State
    progress: Progress | None = None
    result: Result | None = None


def train_library(
    library: Library,
    jobs: Sequence[Job],
    *,
    base: str,
    revision: str | None = None,
    workers: int | None = None,
    progress: Callable[[Report], None] | None = None,
    score: Score | None = None,
    checkpoint_every: float = 60.0,
) -> list[Result]:
    """Train an expert a job, side by side in processes, into `library`; a result a job, in order.

    Everything that can be refused is refused before the first step, for all jobs at once. What the
    library has already (a card with the same `key`) is left alone. A run that was stopped, by
    Ctrl-C or by a kill, goes on from its checkpoints, to the same bytes as without; each worker
    computes on one thread, so that they do not depend on how many there are. A job that fails does
    not stop the others. `score` is called with (model, tokenizer, tasks, expert, max_length) where
    the expert was trained, and gives metrics for its card; it must be a function that another
    process can import. `workers` is one a core where memory allows, and one on a GPU.

    Ctrl-C raises KeyboardInterrupt, after the checkpoints are written.
    """
    model, tokenizer = load(base, revision=revision)
    layout = lay_out(library, jobs, model, tokenizer, base=base, revision=revision, workers=workers)
    del model, tokenizer  # each worker loads its own
    return run(library, layout, progress=progress, score=score, checkpoint_every=checkpoint_every)


# -- the parent -----------------------------------------------------------------------------------


@final
@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: connection.Connection
    job: int | None = None  # the place of the job it is at


def run(
    library: Library,
    layout: Layout,
    *,
    progress: Callable[[Report], None] | None = None,
    score: Score | None = None,
    checkpoint_every: float = 60.0,
) -> list[Result]:
    """Do what a layout leaves to do; a result a job, in order. See `train_library`."""
    if library.path is None:
        raise UsageError("experts can be trained side by side into a library on disk only")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of the model that the plans were made with
    results: dict[int, Result] = {}
    waiting: list[int] = []
    for place, one in enumerate(layout.planned):
        if one.done is not None:
            results[place] = one.done
        else:
            waiting.append(place)
    told = progress or (lambda report: None)
    settings = _Settings(
        library.path.resolve(), layout.base, layout.revision, score, checkpoint_every
    )
    crew: list[_Worker] = []

    def end(worker: _Worker, result: Result) -> None:
        assert worker.job is not None
        name = layout.planned[worker.job].job.name
        results[worker.job] = result
        worker.job = None
        told(Report(name, "failed" if result.error else "done", result=result))

    try:
        while waiting or any(worker.job is not None for worker in crew):
            idle = [worker for worker in crew if worker.job is None]
            while waiting and (idle or len(crew) < layout.workers):
                if not idle:
                    idle.append(_start(settings))
                    crew.append(idle[0])
                worker = idle.pop()
                worker.job = waiting.pop(0)
                one = layout.planned[worker.job]
                with suppress(OSError):  # a worker that died is found below
                    worker.pipe.send(_sendable(one.job))
                told(Report(one.job.name, "training"))
            busy = {worker.pipe: worker for worker in crew if worker.job is not None}
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    news = worker.pipe.recv()
                except (EOFError, OSError):
                    crew.remove(worker)
                    assert worker.job is not None
                    end(worker, _died(layout.planned[worker.job].job.name, worker.process))
                    continue
                if isinstance(news, Progress):
                    assert worker.job is not None
                    told(Report(layout.planned[worker.job].job.name, "training", news))
                else:
                    end(worker, news)
    except KeyboardInterrupt:
        told(Report("", "stopping"))
        raise
    finally:
        _stop(crew)
    return [results[place] for place in range(len(layout.planned))]


def _stop(crew: list[_Worker]) -> None:
    """End all workers: a closed pipe tells them to, at the end of their step. At once where that
    takes too long, or on a second Ctrl-C."""
    for worker in crew:
        worker.pipe.close()
    try:
        for worker in crew:
            worker.process.join(PATIENCE)
    finally:
        for worker in crew:
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()


def _died(name: str, process: BaseProcess) -> Result:
    process.join(PATIENCE)
    code = process.exitcode
    if code == -signal.SIGKILL:
        return Result(
            name,
            error="its process was killed, as Linux does where memory runs out",
            hint="the same command goes on from its checkpoint; with less memory: fewer --workers, "
            "or a smaller --batch-size with more --accumulate",
        )
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return Result(name, error=f"its process ended ({how})", hint="try again with --workers 1")


def _start(settings: "_Settings") -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_process, args=(there, settings), daemon=True)
    with _for_children():
        process.start()
    there.close()
    return _Worker(process, here)


@contextmanager
def _for_children() -> Iterator[None]:
    """Processes that are started inside compute on one thread, and leave Ctrl-C to this one: a
    terminal sends it to all of them, in the middle of a step."""
    resource_tracker.ensure_running()  # it unblocks the signal when it starts
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


# -- the workers ----------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Settings:
    library: Path
    base: str
    revision: str | None
    score: Score | None
    checkpoint_every: float


def _sendable(job: Job) -> tuple[Any, ...]:
    """A job as another process can have it: its tasks hold views of dicts, which do not travel."""
    tasks = [{f.name: getattr(task, f.name) for f in fields(task)} for task in job.tasks]
    plain = [values | {"rows": dict(values["rows"])} for values in tasks]
    return plain, job.name, job.kind, job.options, job.label, job.replace


def _received(sent: tuple[Any, ...]) -> Job:
    plain, name, kind, options, label, replace_ = sent
    return Job(name, tuple(Task(**values) for values in plain), kind, options, label, replace_)


def _process(pipe: connection.Connection, settings: _Settings) -> None:
    """The whole of a worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # the parent has told what there is to tell
    torch.set_num_threads(1)
    _work(pipe, settings)


def _work(pipe: connection.Connection, settings: _Settings) -> None:
    """What a worker does: a job at a time, until its pipe is closed."""
    loaded: tuple[Any, Any] | None = None
    library = Library.open(settings.library)
    with suppress(EOFError, OSError, KeyboardInterrupt):  # whoever wanted this is gone
        while True:
            job = _received(pipe.recv())
            try:
                if loaded is None:
                    loaded = load(settings.base, revision=settings.revision)
                result = train_into(
                    library,
                    job,
                    plan_job(job, *loaded, base=settings.base),
                    *loaded,
                    progress=_reporter(pipe),
                    score=settings.score,
                    checkpoint_every=settings.checkpoint_every,
                )
            except Exception as error:  # the job's; the others go on
                result = _failed(job.name, error)
            pipe.send(result)


def _reporter(pipe: connection.Connection) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        try:
            pipe.send(progress)
            gone = pipe.poll()  # nothing is ever sent to a worker at work, so this is the end
        except OSError:
            gone = True
        if gone:
            raise KeyboardInterrupt  # which train takes as the order to write its checkpoint

    return report


def _failed(name: str, error: Exception) -> Result:
    hint = getattr(error, "hint", None)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Result(name, error="the disk is full", hint="make room and run the command again")
    if isinstance(error, AdaptlibError | StoreError | OSError):
        return Result(name, error=str(error), hint=hint)
    if os.environ.get("ADAPTLIB_DEBUG"):
        import traceback

        traceback.print_exception(error)
    return Result(
        name,
        error=f"{type(error).__name__}: {error}",
        hint="this is a bug in adaptlib; ADAPTLIB_DEBUG=1 shows where",
    )
