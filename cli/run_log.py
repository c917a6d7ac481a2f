"""--log: a JSON object a step, whole over interruptions."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, final

if TYPE_CHECKING:
    from adaptlib.training import Progress

    from .progress import Speed


def check_log(path: Path) -> None:
    """Before training: the log's folder is there, and the file, if there is one, is a log.
    NotFoundError and ConflictError."""
    from adaptlib.errors import ConflictError, NotFoundError

    if not path.parent.is_dir():
        raise NotFoundError(
            f"the directory {str(path.parent)!r} of the log is not there",
            hint=f"mkdir -p {path.parent}",
        )
    if path.is_dir():
        raise ConflictError(f"{path} is a directory", hint=f"--log {path / 'run.jsonl'}")
    if path.is_file() and path.stat().st_size and not read_log(path):
        raise ConflictError(
            f"{path} is there and is no log of a training run", hint="--log OTHER.jsonl"
        )


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps of a log, up to a line that is none (the last one, where a run was killed)."""
    steps: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                step = json.loads(line)
                if not isinstance(step, dict) or not {"step", "loss", "seconds"} <= step.keys():
                    break
                steps.append(step)
    except (FileNotFoundError, ValueError):
        pass
    return steps


@final
class RunLog:
    """The steps of the run that has this `key`: those in `path` before the first one that is
    reported, and what is reported, which is written to `path` at once. Without a path they are
    kept in memory only."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path = path
        self.run = key[:12]
        self.steps: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        self._before = 0.0

    def add(self, progress: "Progress", speed: "Speed") -> None:
        from .progress import log_line

        if self.path is not None and self._file is None:
            self._open(self.path, progress.step)
        line = {"run": self.run, **log_line(progress, speed, before=self._before)}
        self.steps.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def _open(self, path: Path, step: int) -> None:
        """Keep what the run wrote before this step. A kill leaves the log as it was, or this."""
        if path.is_file():
            self.steps = [s for s in read_log(path) if s.get("run") == self.run]
            self.steps = [s for s in self.steps if s["step"] < step]
            self._before = self.steps[-1]["seconds"] if self.steps else 0.0
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            partial.write_text("".join(json.dumps(s) + "\n" for s in self.steps))
            partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
