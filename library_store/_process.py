"""This process, the others, and the time: what a lock has to know."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


def clock() -> float:
    """Seconds since 1970."""
    return time.time()


def pause(seconds: float) -> None:
    """Wait."""
    time.sleep(seconds)


def identity() -> tuple[str, int]:
    """(machine, pid) of this process. Processes of equal machines share a table of pids.

    A host name alone does not say so: containers share a kernel and not their pids, and cloned
    machines share a name. Where there is no /proc, the host name has to do.
    """
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    return " ".join(parts), os.getpid()


def is_running(pid: int) -> bool:
    """Whether a process of this machine is alive."""
    if pid <= 0:  # would ask about a group of processes
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
