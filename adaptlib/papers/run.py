"""All units of `bench papers`, side by side; what is done is never done again."""

import fcntl
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptlib.errors import ConflictError, NotFoundError, UsageError
from adaptlib.papers.units import CONTROLS, Budget, Unit, needs, units
from adaptlib.papers.work import Bench, run


def bench(
    out: Path,
    data: Path,
    *,
    library: Path | None = None,
    base: str,
    held_in: Sequence[str],
    held_out: Sequence[str],
    seeds: int = 3,
    workers: int = 1,
    budget: Budget | None = None,
    only: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Do what is not done yet of every unit, and give what all units found, by name.

    `data` is a folder with one file a task. A unit that fails is said and left for the next call,
    and so are those that need it; Ctrl-C keeps what is done. ConflictError where `out` was begun
    with other tasks or another budget, or where another process works in it.
    """
    budget = budget or Budget()
    missing = [name for name in (*held_in, *held_out) if not (data / f"{name}.jsonl").is_file()]
    if missing:
        raise NotFoundError(
            f"no file for {len(missing)} tasks in {data}, such as {missing[0]}.jsonl",
            hint="--data, the folder with the task files",
        )
    if seeds < 1 or workers < 1:
        raise UsageError(f"seeds and workers are 1 or more; got {seeds} and {workers}")
    at = Bench(out, data, base, tuple(held_in), tuple(held_out), budget, library)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _check_same(at)
        _ = at.kept  # made before anybody opens it
        todo = list(units(seeds, only))
        found = {unit.name: line for unit in todo if (line := _read(out, unit)) is not None}
        left = [unit for unit in todo if unit.name not in found]
        say(f"{len(found)} of {len(todo)} units are done")
        _work(at, left, found, workers, say)
    return found


def _work(
    at: Bench,
    left: list[Unit],
    found: dict[str, dict[str, Any]],
    workers: int,
    say: Callable[[str], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    running: dict[Future[dict[str, Any]], Unit] = {}
    failed: set[str] = set()
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(os.getpid(),)
    ) as pool:
        while left or running:
            for unit in list(left):
                wanted = [need.name for need in needs(unit)]
                if any(name in failed for name in wanted):
                    failed.add(unit.name)
                    left.remove(unit)
                elif len(running) < workers and all(name in found for name in wanted):
                    running[pool.submit(run, at, unit)] = unit
                    left.remove(unit)
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                unit = running.pop(future)
                try:
                    line = future.result()
                except Exception as error:  # said, and the others go on
                    failed.add(unit.name)
                    say(f"{unit.name} failed: {type(error).__name__}: {error}")
                    continue
                _write(at.out, unit, line)
                found[unit.name] = line
                say(f"{time.strftime('%H:%M:%S')} {unit.name}  {line['seconds']:.0f} s")


def _begin(parent: int) -> None:
    """Called once in each worker: it ends where its parent was killed."""
    import torch

    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _read(out: Path, unit: Unit) -> dict[str, Any] | None:
    path = out / "units" / f"{unit.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _write(out: Path, unit: Unit, line: dict[str, Any]) -> None:
    path = out / "units" / f"{unit.name}.json"
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(line, indent=1) + "\n")
    part.replace(path)


def _check_same(at: Bench) -> None:
    """What the folder was begun with is what it goes on with."""
    now = {
        "base": str(at.base),
        "held_in": list(at.held_in),
        "held_out": list(at.held_out),
        "controls": [name for name in CONTROLS if name in (*at.held_in, *at.held_out)],
        **asdict(at.budget),
    }
    path = at.out / "bench.json"
    if not path.exists():
        path.write_text(json.dumps(now, indent=1) + "\n")
    before = json.loads(path.read_text())
    if before != now:
        changed = sorted(key for key in now if before.get(key) != now[key])
        raise ConflictError(
            f"{at.out} was begun with other {', '.join(changed)}",
            hint="the same again, or another --out",
        )


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    with (out / "lock").open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConflictError(
                f"another process works in {out}", hint="wait for it, or give another --out"
            ) from None
        yield
