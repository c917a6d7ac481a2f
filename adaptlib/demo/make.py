"""Train and score everything that the bundle and docs/results-experts.md are made of.

    python -m adaptlib.demo.make --data DATA --base BASE --out OUT --workers 2

`DATA` holds `tasks.tar.xz` and `tasks.json`; `BASE` is the model that `adaptlib.demo.pretrain`
made. For each unit of `units.py`, in its order: an expert in `OUT/experts/<name>/` and a line of
`OUT/scores.jsonl`, with the exact match on the whole test and validation splits, row by row, and
what it took. A cluster's expert is trained on the tasks whose LoRA experts MBC, or one of its
controls, puts together, so those come when all of these are there.

Units that are done are left alone and one that was interrupted goes on from its checkpoint, so the
same command again goes on. One whose recipe is another than that of its line is done anew.
`--install` then puts what is worth it into a folder (see `install.py`).
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import tarfile
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

from adaptlib.demo.install import install
from adaptlib.demo.units import (
    CLUSTERS,
    EPOCHS,
    GROUPINGS,
    TASKS,
    Unit,
    all_units,
    base_name,
    cluster_units,
    friendly,
    next_unit,
    seconds_left,
    with_clusters,
)
from adaptlib.demo.work import begin, checkpoint_of, run


def unpack_tasks(data: Path, out: Path) -> Path:
    """The folder with the tasks' JSONL files; tasks.json lies above it."""
    folder = out / "data"
    if not (folder / "tasks.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(data / "tasks.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        shutil.copy(data / "tasks.json", folder / "tasks.json")
    return folder / "tasks"


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of scores.jsonl by name, the last of each; the half line of a killed run is cut
    off the file."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    return {line["name"]: line for line in lines}


def is_done(unit: Unit, lines: Mapping[str, Mapping[str, Any]], out: Path) -> bool:
    """Whether it was done with this very recipe, and what it wrote is there."""
    if unit.name not in lines or lines[unit.name]["spec"] != unit.spec():
        return False
    return not unit.kept or (out / "experts" / unit.name / "expert.json").is_file()


def check_base(base: Path, out: Path) -> None:
    """Experts of two base models are not mixed in one folder."""
    digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    note = out / "base.sha256"
    if not note.exists():
        note.write_text(digest + "\n")
    elif note.read_text().strip() != digest:
        raise SystemExit(f"{out} holds experts of another base model; give another --out")


def lock(out: Path) -> IO[str]:
    """The folder's lock, held while the file is open: two runs would do everything twice."""
    file = (out / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise SystemExit(f"another run works in {out}") from None
    return file


def clusters_of(
    out: Path, tasks: Sequence[str], epochs: int, groupings: Collection[str]
) -> tuple[Unit, ...]:
    """The experts to train on what each grouping puts together, given all LoRA experts: MBC, the
    tasks' categories, the words of their instructions and rows (TF-IDF and K-means), and chance."""
    from adaptlib.clustering import cluster
    from adaptlib.experts.codec import read_directory, unpack

    folder = out / "experts"
    loras = {friendly(task): unpack(read_directory(folder / friendly(task))) for task in tasks}
    k = min(CLUSTERS, len(loras))
    units: list[Unit] = []
    for grouping in (name for name in GROUPINGS if name in groupings):
        if grouping in ("mbc", "random"):
            groups = cluster(loras, method=grouping, k=k, seed=0).clusters
        else:
            groups = _by_task(grouping, out / "data" / "tasks", tasks, k)
        units += cluster_units(groups, tasks, grouping=grouping, epochs=epochs)
    return tuple(units)


def _by_task(grouping: str, folder: Path, tasks: Sequence[str], k: int) -> dict[str, list[str]]:
    """Groups of experts by what is known of their tasks: the category, or the words."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    from adaptlib.training import read_task
    from adaptlib.training.tasks import Row

    read = [read_task(folder / f"{name}.jsonl") for name in tasks]
    if grouping == "category":
        labels = [str(task.category) for task in read]
    else:
        texts = [
            " ".join(
                [
                    task.instruction,
                    *(r.input for r in task.rows["train"][:20] if isinstance(r, Row)),
                ]
            )
            for task in read
        ]
        rows = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
        means = KMeans(
            k,
            n_init=10,  # pyright: ignore[reportArgumentType]: its default is a string, it takes both
            random_state=0,
        )
        labels = [str(label) for label in means.fit_predict(rows)]
    named = zip(labels, map(friendly, tasks), strict=True)
    groups: dict[str, list[str]] = {}
    for label, name in named:
        groups.setdefault(label.replace("_", "-"), []).append(name)
    return groups


class Work:
    """All that `main` keeps track of: what is left, what runs, what is done."""

    def __init__(self, out: Path, tasks: Sequence[str], epochs: int, only: Sequence[str]) -> None:
        self.out = out
        self.tasks = tasks
        self.epochs = epochs
        self.only = only
        self.lines = read_lines(out / "scores.jsonl")
        self.failed: list[str] = []
        units = all_units(tasks, epochs=epochs)
        self.done = {unit.name for unit in units if is_done(unit, self.lines, out)}
        self.wanted = [unit for unit in units if self._wants(unit)]
        self.todo = [unit for unit in self.wanted if unit.name not in self.done]
        self.groupings = {
            name for name in GROUPINGS if not only or any(o.startswith(name) for o in only)
        }
        self.clustered = not self.groupings
        self.add_clusters()

    def _wants(self, unit: Unit) -> bool:
        if not self.only or unit.method == "base":
            return True
        return unit.name in self.only or unit.method in self.only

    def add_clusters(self) -> None:
        """As soon as all LoRA experts are there."""
        if self.clustered or not all(friendly(task) in self.done for task in self.tasks):
            return
        self.clustered = True
        units = clusters_of(self.out, self.tasks, self.epochs, self.groupings)
        units = tuple(unit for unit in units if self._wants(unit))
        for unit in units:
            print(f"{unit.name}: {', '.join(unit.tasks)}", flush=True)
        self.done |= {unit.name for unit in units if is_done(unit, self.lines, self.out)}
        self.wanted += units
        left = [unit for unit in units if unit.name not in self.done]
        self.todo = with_clusters(self.todo, left)

    def take(self) -> Unit | None:
        """The next unit to run, taken off the list."""
        unit = next_unit(self.todo, self.done)
        if unit is not None:
            self.todo.remove(unit)
        return unit

    def floors(self, unit: Unit) -> dict[str, float]:
        """The base's exact match on the test splits of the unit's tasks."""
        if unit.kind is None:
            return {}
        lines = {task: self.lines[base_name(task)] for task in unit.tasks}
        return {task: line["scores"][task]["test"]["value"] for task, line in lines.items()}

    def finish(self, unit: Unit, line: dict[str, Any]) -> None:
        """Keep a line, then drop the checkpoint: never the other way round."""
        with (self.out / "scores.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        checkpoint_of(self.out, unit).unlink(missing_ok=True)
        self.lines[unit.name] = line
        self.done.add(unit.name)
        self.add_clusters()


def main() -> None:
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers, which start from nothing
    (args.out / "experts").mkdir(parents=True, exist_ok=True)
    held = lock(args.out)
    check_base(args.base, args.out)
    folder = unpack_tasks(args.data, args.out)
    size = {task: (folder / f"{task}.jsonl").stat().st_size for task in args.tasks}
    work = Work(args.out, args.tasks, args.epochs, args.only)
    print(f"{len(work.todo)} of {len(work.wanted)} units are left to do", flush=True)
    parent = os.getpid()
    pool = ProcessPoolExecutor(
        args.workers, get_context("spawn"), initializer=begin, initargs=(parent,)
    )
    running: dict[Future[dict[str, Any]], Unit] = {}
    try:
        while True:
            while len(running) < args.workers and (unit := work.take()) is not None:
                floors = work.floors(unit)
                running[pool.submit(run, unit, args.base, folder, args.out, floors)] = unit
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                unit = running.pop(future)
                error = future.exception()
                if isinstance(error, KeyboardInterrupt):
                    raise error
                if isinstance(error, BrokenProcessPool):
                    raise SystemExit(f"a worker died in {unit.name}: {error}; run again to go on")
                if error is not None:
                    work.failed.append(unit.name)
                    print(f"failed: {unit.name}: {type(error).__name__}: {error}", flush=True)
                    continue
                work.finish(unit, future.result())
                left = seconds_left(
                    [*running.values(), *work.todo], size, list(work.lines.values()), args.workers
                )
                print(told(future.result(), len(running) + len(work.todo), left), flush=True)
    except KeyboardInterrupt:
        # without this process the workers write their checkpoints and end, told to stop or not
        print("interrupted; the same command goes on from here", flush=True)
        os._exit(130)
    pool.shutdown()
    held.close()
    if work.failed or work.todo:
        raise SystemExit(
            f"{len(work.failed)} units failed and {len(work.todo)} wait for them; the same command "
            "tries them once more"
        )
    if args.install:
        print(install(args.out, args.base, list(work.lines.values()), args.install))


def arguments() -> argparse.Namespace:
    """The command's arguments, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--only", nargs="*", default=[], help="names or methods of units; all without it"
    )
    parser.add_argument("--tasks", help="names of tasks, with commas; for trials")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="for trials")
    parser.add_argument("--install", type=Path, help="then put what is worth it into this folder")
    args = parser.parse_args()
    for path in (args.base / "tokenizer.json", args.data / "tasks.tar.xz"):
        if not path.is_file():
            parser.error(f"there is no {path}")
    chosen = args.tasks.split(",") if args.tasks else TASKS
    if unknown := sorted({*chosen} - {*TASKS}):
        parser.error(f"no held-in task is called {', '.join(unknown)}")
    args.tasks = tuple(task for task in TASKS if task in chosen)
    return args


def told(line: Mapping[str, Any], left: int, seconds: float | None) -> str:
    """A finished unit in a line of the log."""
    tests = [score["test"]["value"] for score in line["scores"].values()]
    rest = "" if seconds is None else f", about {seconds / 60:.0f} min"
    loss = line.get("valid_loss")
    return (
        f"{time.strftime('%H:%M:%S')} {line['name']:34} {sum(tests) / len(tests):.3f}  "
        f"{'' if loss is None else f'loss {loss:.3f}':10}  {line['seconds']:6.0f} s  "
        f"{left} left{rest}"
    )


if __name__ == "__main__":
    main()
