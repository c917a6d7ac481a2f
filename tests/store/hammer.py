"""Many processes on one library at once, and one more that collects: a program.

    python -m tests.store.hammer DIRECTORY --seed 0 --operations 200 [--lies]

Prints figures as JSON. Ends with 1 and says what broke a promise if something did.
"""

import argparse
import collections
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from adaptlib.experts import Library
from library_store import Digest, LocalStore, Ref, _lock
from tests.store.actors import NAMES, SHARED, TYPED, Actor, contents, lying

ACTORS = 16
DEADLINE = 240.0  # seconds for a process
NONE = timedelta(0)


def collect(library: Library, seed: int, stop: Path) -> dict[str, int]:
    """Collect without any grace, and put some of it back, until there is a file `stop`."""
    store, counts = library.store, collections.Counter[str]()
    assert isinstance(store, LocalStore)
    choose = random.Random(seed)
    end = time.monotonic() + 2 * DEADLINE  # nobody may be left to say so
    while not stop.exists() and time.monotonic() < end:
        try:
            result = library.gc(grace=NONE, history=NONE, allow_empty=True)
            counts["collections"] += 1
            counts["removed"] += len(result.removed)
            trash = sorted(path.name for path in (store.root / "trash").iterdir())
            if trash and choose.random() < 0.4:
                counts["restored"] += store.restore(choose.choice(trash))
        except TYPED as error:
            counts[type(error).__name__] += 1
        time.sleep(0.002)
    return counts


def start(report: Path, act: Callable[[], Any]) -> int:
    """A process that does this and leaves what it returns, or the traceback, in a file."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        report.write_text(json.dumps(act()))
        code = 0
    except BaseException:
        report.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def wait(processes: dict[int, Path]) -> list[str]:
    """Until they have all ended; what those say that did not end well."""
    end, wrong = time.monotonic() + DEADLINE, []
    waiting = dict(processes)
    while waiting:
        for process in list(waiting):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                report = waiting.pop(process)
                if status:
                    said = report.read_text() if report.exists() else "nothing"
                    wrong.append(f"{report.name} ended with {status}: {said}")
            elif time.monotonic() > end:
                os.kill(process, 9)
                os.waitpid(process, 0)
                wrong.append(f"{waiting.pop(process).name} has not ended in {DEADLINE:.0f} s")
        time.sleep(0.005)
    return wrong


def act(
    library: Library, number: int, seed: int, known: dict[Digest, bytes], operations: int
) -> Any:
    os.nice(10)  # so that the one that collects comes to do it often
    actor = Actor(library, number, seed, known)
    actor.run(operations)
    return {
        "own": {str(ref): str(digest) for ref, digest in actor.refs.items()},
        "moves": [(str(ref), digest and str(digest)) for ref, digest in actor.moves],
        "counts": actor.counts,
    }


def judge(library: Library, reports: list[dict[str, Any]], *, lies: bool) -> list[str]:
    """What does not hold, now that all have ended."""
    store = library.store
    assert isinstance(store, LocalStore)
    wrong = [str(problem) for problem in library.verify(deep=True).problems]
    refs = {str(ref): str(digest) for ref, digest in store.refs().items()}
    owned = {ref: at for report in reports for ref, at in report["own"].items()}
    there = {ref: at for ref, at in refs.items() if ref.removeprefix("routers/").startswith("own")}
    if owned != there:
        wrong.append(f"own refs: {sorted(set(owned.items()) ^ set(there.items()))}")
    logged: dict[str, set[str | None]] = collections.defaultdict(lambda: {None})
    last: dict[Ref, Digest | None] = {}
    for name in sorted({ref.name for ref in SHARED} | set(NAMES)):
        for entry in store.log(name):
            if not lies and last.get(entry.ref) != entry.old:
                wrong.append(f"{entry} follows {last.get(entry.ref)}")
            last[entry.ref] = entry.new
            logged[str(entry.ref)].add(entry.new and str(entry.new))
    for ref, digest in last.items():
        at = refs.get(str(ref))
        if not lies and at != (digest and str(digest)):
            wrong.append(f"{ref} is at {at}; its log ends at {digest}")
        if at not in logged[str(ref)]:
            wrong.append(f"{ref} is at {at}, where nobody put it")
    for report in reports:
        lost = [(ref, at) for ref, at in report["moves"] if at not in logged[ref]]
        wrong += [f"{ref} was moved to {at}, and its log does not say so" for ref, at in lost]
    left = [path.name for path in (store.root / "tmp").iterdir()]
    if [name for name in left if not name.startswith("refs.lock.")]:
        wrong.append(f"left in tmp/: {left}")
    if aside := list((store.root / "quarantine").iterdir()):
        wrong.append(f"in quarantine/: {aside}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--operations", type=int, required=True)
    parser.add_argument("--lies", action="store_true")
    options = parser.parse_args()
    os.fsync = lambda fd: None  # the page cache outlives a process
    if options.lies:
        _lock.held = lying
    known = contents(options.directory / "scratch")
    library = Library.open(options.directory / "library", create=True)
    stop = options.directory / "stop"

    began = time.monotonic()
    collector = options.directory / "collector"
    collecting = start(collector, lambda: collect(library, options.seed, stop))
    actors = {}
    for number in range(ACTORS):
        report = options.directory / f"actor-{number}"

        def one(number: int = number) -> Any:
            return act(library, number, options.seed, known, options.operations)

        actors[start(report, one)] = report
    wrong = wait(actors)
    stop.touch()
    wrong += wait({collecting: collector})
    if not wrong:
        reports = [json.loads(report.read_text()) for report in actors.values()]
        wrong = judge(library, reports, lies=options.lies)
        counts = sum(
            (collections.Counter(report["counts"]) for report in reports), collections.Counter()
        )
        figures = {"seconds": round(time.monotonic() - began, 2), "operations": counts.total()}
        print(json.dumps({**figures, **json.loads(collector.read_text()), "counts": counts}))
    for message in wrong:
        print(message, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
