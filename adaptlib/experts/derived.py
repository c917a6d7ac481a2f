"""`derived/`: what can be made again. Nothing in it changes an answer."""

import os
import shutil
import stat
import time
from datetime import timedelta
from pathlib import Path

from adaptlib.errors import RefusedError

ABANDONED = timedelta(days=7)


def refuse_links(library: Path) -> None:
    """RefusedError where `derived/`, or a folder in it, is a link: what is made and deleted there
    would be made and deleted somewhere else."""
    level = [library / "derived"]
    for depth in range(3):
        for path in level:
            if path.is_symlink():
                raise RefusedError(
                    f"{path} is a link; what a library makes again is its own", hint=f"rm {path}"
                )
        if depth < 2:
            level = [path for folder in level for path in _folders(folder)]


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, and the links."""
    try:
        with os.scandir(folder) as entries:
            return [
                folder / entry.name
                for entry in entries
                if entry.is_symlink() or entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []


def training_run(library: Path, key: str) -> Path:
    """The folder for the checkpoints of the training run with this key (see `training.plan`)."""
    return library / "derived" / "training" / key


def forget_runs(
    library: Path, *, older: timedelta = ABANDONED, dry_run: bool = False
) -> tuple[int, int]:
    """Delete the checkpoints of runs that nobody has gone on with for `older`; (runs, bytes)."""
    runs = size = 0
    for folder in look(training_run(library, ""), "*"):
        try:
            states = [path.stat() for path in (folder, *folder.rglob("*"))]
        except OSError:  # that run has just ended; or the next gc may be able to look
            continue
        if time.time() - max(state.st_mtime for state in states) < older.total_seconds():
            continue
        runs += 1
        size += sum(state.st_size for state in states if stat.S_ISREG(state.st_mode))
        if not dry_run:
            shutil.rmtree(folder, ignore_errors=True)
    return runs, size


def look(folder: Path, pattern: str) -> list[Path]:
    """What matches in a folder of `derived/`, sorted; nothing where one cannot look."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []
