"""Workers of the farm as threads: they start at once, where a process takes seconds."""

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from adaptlib.training import farm


class InThread(BaseProcess):
    """A worker that is no process."""

    exitcode = 0

    def __init__(self, pipe: Connection, settings: Any) -> None:
        def work() -> None:
            with pipe, suppress(SystemExit):  # a process that ends closes its pipe
                farm._work(pipe, settings)

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def __repr__(self) -> str:
        return "a worker in a thread"

    def join(self, timeout: float | None = None) -> None:
        self.thread.join(timeout)

    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def kill(self) -> None:
        raise AssertionError("this worker did not stop")


@contextmanager
def in_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[InThread]]:
    """Inside, the farm's workers are these; all have stopped after it. Only one at a time gives
    the same numbers again: they share torch's random state."""
    started: list[InThread] = []

    def start(settings: Any) -> Any:
        here, there = multiprocessing.Pipe()
        started.append(InThread(there, settings))
        return farm._Worker(started[-1], here)

    monkeypatch.setattr(farm, "_start", start)
    yield started
    assert not any(thread.is_alive() for thread in started)
