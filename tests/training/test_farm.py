"""Many experts at once: the same bytes however they came about, and nothing half-done.

What only processes can show, such as a kill, is in tests/cli/test_train_library.py.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptlib.errors import AdaptlibError, ConflictError, NotFoundError, UsageError
from adaptlib.experts import Library
from adaptlib.experts.base import load
from adaptlib.training import TrainOptions, farm, space, train
from adaptlib.training.farm import Report, train_library
from adaptlib.training.jobs import Job, Result, lay_out
from adaptlib.training.pools import cluster_tasks
from adaptlib.training.tasks import Row, Task
from tests.tiny import state
from tests.workers import InThread, in_threads

from .conftest import llama

OPTIONS = TrainOptions(epochs=2, batch_size=8, rank=2, lr=1e-2)


def scored_zero(*_: Any) -> dict[str, float]:
    """A score that another process could import."""
    return {"test_exact_match": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("base") / "tiny-llama"
    llama().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library.open(tmp_path / "library", create=True)


def make_jobs(*names: str, **options: Any) -> list[Job]:
    chosen = dataclasses.replace(OPTIONS, **options)
    made = []
    for name in names:
        rows = tuple(Row(f"{name} {i}", name) for i in range(20))
        task = Task(name, "Say the word.", {"train": rows, "valid": rows[:5]})
        made.append(Job(name, (task,), options=chosen))
    return made


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[InThread]]:
    with in_threads(monkeypatch) as started:
        yield started


def trained_here(base: Path, job: Job, library: Library) -> str:
    """The digest that one call of `train` gives."""
    model, tokenizer = load(str(base))
    expert = train(model, tokenizer, job.tasks, options=job.options, name=job.label, base=str(base))
    return library.add(expert, job.name).digest


def test_processes_give_the_experts_that_train_gives(
    library: Library, base: Path, tmp_path: Path
) -> None:
    work = make_jobs("red", "blue")
    reports: list[Report] = []
    results = train_library(library, work, base=str(base), workers=2, progress=reports.append)
    other = Library.open(tmp_path / "other", create=True)
    for job, result in zip(work, results, strict=True):
        assert result == Result(
            job.name, library.digest(job.name), library[job.name].card["metrics"], True, 6
        )
        assert result.digest == trained_here(base, job, other)
        steps = [r.progress.step for r in reports if r.name == job.name and r.progress]
        assert steps == [1, 2, 3, 4, 5, 6]
        states = [r.state for r in reports if r.name == job.name and not r.progress]
        assert states == ["training", "done"]
    assert list((tmp_path / "library").glob("derived/training/*")) == []


def test_what_is_done_is_left_alone(
    library: Library, base: Path, threads: list[InThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_library(library, make_jobs("red"), base=str(base), score=scored_zero)
    assert library["red"].card["metrics"]["test_exact_match"] == 0.0
    both = train_library(library, make_jobs("red", "blue"), base=str(base))
    assert both[0] == dataclasses.replace(first[0], new=False)
    assert both[1].new
    assert len(threads) == 2
    before = state(library)
    monkeypatch.setattr(farm, "_start", None)
    again = train_library(library, make_jobs("blue", "red"), base=str(base))
    assert [result.name for result in again] == ["blue", "red"]
    assert not any(result.new for result in again)
    assert state(library) == before


def test_a_job_that_fails_does_not_stop_the_others(
    library: Library, base: Path, threads: list[InThread]
) -> None:
    work = [*make_jobs("wild", lr=1e30, clip=1e30), *make_jobs("red")]
    reports: list[Report] = []
    wild, red = train_library(library, work, base=str(base), workers=1, progress=reports.append)
    assert "diverged" in (wild.error or "")
    assert (wild.digest, wild.new) == (None, False)
    assert (red.error, red.new) == (None, True)
    assert list(library) == ["red"]
    assert [report.state for report in reports if report.result] == ["failed", "done"]


def test_a_worker_that_dies_is_replaced(
    library: Library, base: Path, threads: list[InThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = farm.train_into

    def fatal(library: Library, job: Job, *rest: Any, **more: Any) -> Result:
        if job.name == "red":
            raise SystemExit  # not an Exception, so the worker ends
        return real(library, job, *rest, **more)

    monkeypatch.setattr(farm, "train_into", fatal)
    monkeypatch.setattr(InThread, "exitcode", -9)
    red, blue = train_library(library, make_jobs("red", "blue"), base=str(base), workers=1)
    assert "killed" in (red.error or "")
    assert "fewer --workers" in (red.hint or "")
    assert blue.new
    assert len(threads) == 2


def test_ctrl_c_keeps_what_was_done_to_the_bit(
    library: Library, base: Path, threads: list[InThread], tmp_path: Path
) -> None:
    def stop(report: Report) -> None:
        if report.progress and report.progress.step == 3:
            raise KeyboardInterrupt

    work = make_jobs("red")
    with pytest.raises(KeyboardInterrupt):
        train_library(library, work, base=str(base), progress=stop, checkpoint_every=1e9)
    assert list(library) == []
    (kept,) = (tmp_path / "library" / "derived" / "training").glob("*/cpu-1.safetensors")
    steps: list[int] = []

    def count(report: Report) -> None:
        if report.progress:
            steps.append(report.progress.step)

    (result,) = train_library(library, work, base=str(base), progress=count)
    assert steps[0] > 3  # it may have made a step more before it heard
    assert steps[-1] == 6
    assert not kept.exists()
    other = Library.open(tmp_path / "other", create=True)
    assert result.digest == trained_here(base, work[0], other)


def test_a_parent_that_is_gone_stops_the_worker(
    library: Library, base: Path, threads: list[InThread], tmp_path: Path
) -> None:
    (job,) = make_jobs("red", epochs=1000)
    settings = farm._Settings(tmp_path / "library", str(base), None, None, 1e9)
    worker = farm._start(settings)
    worker.pipe.send(farm._sendable(job))
    worker.pipe.recv()  # the first step
    worker.pipe.close()
    threads[0].join(20)
    assert not threads[0].is_alive()
    assert len([*(tmp_path / "library" / "derived" / "training").glob("*/*.safetensors")]) == 1
    assert list(library) == []


def refuse(call: Callable[[], Any], error: type[AdaptlibError], library: Library) -> str:
    before = state(library)
    with pytest.raises(error) as caught:
        call()
    assert state(library) == before
    return f"{caught.value}; {caught.value.hint}"


def test_bad_tasks_are_named_all_at_once(
    library: Library, base: Path, threads: list[InThread]
) -> None:
    empty = [
        Job(name, (Task(name, "Say.", {"test": (Row("a", "b"),)}),), options=OPTIONS)
        for name in ("one", "two")
    ]
    work = [empty[0], *make_jobs("red"), empty[1]]
    words = refuse(lambda: train_library(library, work, base=str(base)), UsageError, library)
    assert "2 of 3 experts cannot be trained" in words
    assert "one: " in words
    assert "two: " in words
    assert threads == []


def test_names_are_checked_before_the_first_step(
    library: Library, base: Path, threads: list[InThread]
) -> None:
    def refused(error: type[AdaptlibError], work: list[Job]) -> str:
        return refuse(lambda: train_library(library, work, base=str(base)), error, library)

    (red,) = make_jobs("red")
    train_library(library, [red], base=str(base))
    other = dataclasses.replace(OPTIONS, seed=1)
    words = refused(ConflictError, [dataclasses.replace(red, options=other), *make_jobs("blue")])
    assert "taken" in words
    assert "red" in words
    assert "--replace" in words
    assert "two experts would be named red" in refused(UsageError, [red, red])
    refused(UsageError, [dataclasses.replace(red, name="Not A Name")])
    refused(UsageError, [])
    before = library.digest("red")
    (result,) = train_library(
        library, [dataclasses.replace(red, options=other, replace=True)], base=str(base)
    )
    assert result.new
    assert library.digest("red") != before


def test_a_full_disk_is_found_before_the_first_step(
    library: Library, base: Path, threads: list[InThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(base)._replace(free=1000)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: usage)
    work = make_jobs("red")
    words = refuse(lambda: train_library(library, work, base=str(base)), AdaptlibError, library)
    assert "0 MB free" in words
    assert threads == []


def test_memory_decides_how_many_go_side_by_side(
    library: Library, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(str(base))
    monkeypatch.setattr(space, "cores", lambda: 4)

    def workers(free: int | None, **more: Any) -> tuple[int, str | None]:
        monkeypatch.setattr(space, "free_memory", lambda: free)
        work = make_jobs("red", "blue", "green")
        layout = lay_out(library, work, model, tokenizer, base=str(base), **more)
        return layout.workers, layout.limited

    one = lay_out(library, make_jobs("red"), model, tokenizer, base=str(base)).planned[0]
    assert workers(None) == (3, None)
    assert workers(10 * one.plan.memory) == (3, None)
    number, why = workers(int(2.5 / space.SHARE * one.plan.memory))
    assert number == 2
    assert "memory allows 2 at a time of the 3" in (why or "")
    assert workers(1)[0] == 1
    assert workers(1, workers=2) == (2, None)
    with pytest.raises(UsageError, match="workers wants 1 or more"):
        workers(None, workers=0)


def test_what_a_checkpoint_takes_is_not_guessed_too_low(
    library: Library, base: Path, tmp_path: Path
) -> None:
    """The room that is asked for is that of two checkpoints, and not many times as much."""
    model, tokenizer = load(str(base))
    for kind in ("lora", "sparse"):
        (job,) = make_jobs("red", keep_ratio=0.2)
        job = dataclasses.replace(job, kind=kind)
        (one,) = lay_out(library, [job], model, tokenizer, base=str(base)).planned
        sizes: list[int] = []
        path = tmp_path / kind

        def look(_: Any, path: Path = path, sizes: list[int] = sizes) -> None:
            sizes.append(path.stat().st_size)

        train(
            model, tokenizer, job.tasks, kind=job.kind, options=job.options, checkpoint=path,
            checkpoint_every=0.0, progress=look,
        )  # fmt: skip
        need = space.disk_needed(one.plan)[0]
        assert 2 * (max(sizes) - 20_000) < need < 4 * max(sizes)  # names and the random state


def test_steps_are_timed_and_thrown_away(base: Path) -> None:
    model, tokenizer = load(str(base))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (job,) = make_jobs("red")
    speed = space.time_steps(model, tokenizer, job.tasks, options=OPTIONS)
    assert speed is not None
    assert speed > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    once = dataclasses.replace(OPTIONS, epochs=1, batch_size=64)
    assert space.time_steps(model, tokenizer, job.tasks, options=once) is None


def test_tasks_of_a_clustering(library: Library, base: Path, threads: list[InThread]) -> None:
    work = make_jobs("red", "blue", "green", epochs=1)
    tasks = {job.name: job.tasks[0] for job in work}
    train_library(library, work, base=str(base), workers=1)
    joint = Job("both", (tasks["red"], tasks["blue"]), options=OPTIONS, label="joint")
    train_library(library, [joint], base=str(base))
    assert library["both"].card["tasks"] == ["red", "blue"]
    assert library["both"].card["task"] == "joint"
    digests = {name: library.digest(name) for name in library}
    saved = {"clusters": {"0": ["both", "red"], "1": ["green"]}, "experts": digests}
    pools = cluster_tasks(library, saved, tasks)
    names = {label: [task.name for task in pool] for label, pool in pools.items()}
    assert names == {"0": ["blue", "red"], "1": ["green"]}
    library.remove("green")  # the digest is still there
    assert cluster_tasks(library, saved, tasks).keys() == {"0", "1"}
    del tasks["blue"], tasks["green"]
    with pytest.raises(NotFoundError, match=r"2 of .*both \(task blue\), green \(task green\)"):
        cluster_tasks(library, saved, tasks)
