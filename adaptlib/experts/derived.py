"""`derived/`: what can be made again. Nothing in it changes an answer."""

import shutil
import time
from datetime import timedelta
from pathlib import Path

ABANDONED = timedelta(days=7)


def training_run(library: Path, key: str) -> Path:
    """The folder for the checkpoints of the training run with this key (see `training.plan`)."""
    return library / "derived" / "training" / key


def forget_runs(
    library: Path, *, older: timedelta = ABANDONED, dry_run: bool = False
) -> tuple[int, int]:
    """Delete the checkpoints of runs that nobody has gone on with for `older`; (runs, bytes)."""
    runs = size = 0
    for folder in sorted(training_run(library, "").glob("*")):
        try:
            states = [path.stat() for path in (folder, *folder.rglob("*"))]
        except FileNotFoundError:  # that run has just ended
            continue
        if time.time() - max(state.st_mtime for state in states) < older.total_seconds():
            continue
        runs += 1
        size += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if not dry_run:
            shutil.rmtree(folder, ignore_errors=True)
    return runs, size
