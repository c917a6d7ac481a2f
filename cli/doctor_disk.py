"""What the file system below a library does: found out by trying it, with files in its tmp/.

Whatever is made there is removed again; were it not, gc would take it after a day.
"""

import contextlib
import errno
import fcntl
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from . import out

RACES: Final = 100  # files that two processes try to create at the same time
STEP: Final = 0.0005  # seconds from one file to the next
SKEW: Final = 5.0  # seconds between the clocks that are worth a word
FUTURE: Final = 300.0  # seconds of it from which gc refuses to work
LITTLE, NOTHING = 10**9, 10**7  # bytes that are free
FEW, NONE = 10_000, 100  # files that can still be made
NETWORK: Final = re.compile(
    r"nfs|cifs|smb|9p|afs|ceph|gluster|lustre|gpfs|beegfs|orangefs|davfs|"
    r"fuse\.(sshfs|s3fs|rclone|gcsfuse|goofys|mountpoint)"
)
MEMORY: Final = ("tmpfs", "ramfs")
ONE_WRITER: Final = "change the library from one machine at a time"

# Run by another process: it creates what it can of the same files, and says which.
_OTHER: Final = """
import os, sys, time
base, count, step = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
sys.stdout.write("ready\\n"); sys.stdout.flush()
start = float(sys.stdin.readline())
won = []
for i in range(count):
    while time.monotonic() < start + i * step:
        pass
    try:
        os.close(os.open(f"{base}{i}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        won.append(i)
    except FileExistsError:
        pass
print(*won)
"""


@dataclass(frozen=True)
class Check:
    """One look: `detail` says what was found, `hint` what to do where that is not well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    hint: str | None = None


def look_at_disk(root: Path) -> Iterator[Check]:
    """The file system below `root`, and how it behaves if the library can be written to."""
    yield _kind(root)
    yield from _room(root)
    folder = root / "tmp"
    base = folder / f"{os.getpid()}-{uuid.uuid4().hex}-"
    first, before = base.with_name(f"{base.name}first"), time.time()
    tries: dict[str, Callable[[], Check]] = {
        "clock": lambda: _clock(first, before),
        "lock": lambda: _excludes(base),
        "flock": lambda: _flock(first),
        "hard links": lambda: _links(first),
        "sync": lambda: _syncs(folder),
        "case": lambda: _cases(base),
    }
    try:
        first.write_bytes(b"x")
        yield Check("writable", "ok", "yes")
        for name, look in tries.items():
            try:
                yield look()
            except OSError as error:
                yield Check(name, "warn", str(error), f"look at rights and room: ls -ld {folder}")
    except OSError as error:
        detail = f"no: {error}; so locks, links and the clock were not tried"
        hint = f"to read is all that works; for more: ls -ld {folder}"
        yield Check("writable", "warn", detail, hint)
    finally:
        with contextlib.suppress(OSError):
            for left in folder.glob(f"{base.name}*"):
                left.unlink(missing_ok=True)


def _kind(root: Path) -> Check:
    """The type of file system, where the machine says."""
    kind = file_system(root, Path("/proc/self/mounts"))
    if kind is None:
        return Check("file system", "ok", "of a type that this machine does not tell")
    if NETWORK.match(kind):
        detail = f"{kind}, over the network: locks may not hold between machines"
        return Check("file system", "warn", detail, ONE_WRITER)
    if kind in MEMORY:
        detail = f"{kind}: in memory, gone when this machine restarts"
        return Check(
            "file system", "warn", detail, f"keep what matters elsewhere: cp -r {root} ..."
        )
    return Check("file system", "ok", kind)


def file_system(path: Path, mounts: Path) -> str | None:
    """The type of the file system that `path` is on, by a table such as /proc/mounts."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    path = path.resolve()
    found: tuple[int, str | None] = (-1, None)
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[1]))
        depth = len(point.parts)
        if depth >= found[0] and (path == point or point in path.parents):
            found = depth, fields[2]  # of two at one place the later hides the other
    return found[1]


def _room(root: Path) -> Iterator[Check]:
    found = os.statvfs(root)
    free = found.f_bavail * found.f_frsize
    status = "fail" if free < NOTHING else "warn" if free < LITTLE else "ok"
    hint = None if status == "ok" else "see what could go: adaptlib gc --dry-run"
    yield Check("disk", status, f"{out.size(free)} free", hint)
    if found.f_files:  # some file systems do not count them
        left = found.f_favail
        status = "fail" if left < NONE else "warn" if left < FEW else "ok"
        hint = None if status == "ok" else "an expert takes two files; see what could go: df -i"
        yield Check("inodes", status, f"{left:,} more files fit", hint)


def _clock(file: Path, before: float) -> Check:
    """Whether files get the time that this machine has."""
    when, after = file.stat().st_mtime, time.time()
    skew = when - after if when > after else min(0.0, when - before)
    if abs(skew) <= SKEW:
        return Check("clock", "ok", "files get this machine's time")
    detail = f"files are {abs(skew):,.0f} s {'ahead of' if skew > 0 else 'behind'} this machine"
    hint = "set the clock of this machine, or of the file server"
    return Check("clock", "fail" if skew > FUTURE else "warn", detail, hint)


def _excludes(base: Path) -> Check:
    """Whether of two processes one alone can create a file, on which the lock of names rests."""
    mine, theirs = _race(f"{base}race-")
    both, neither = mine & theirs, set(range(RACES)) - mine - theirs
    if not both and not neither:
        detail = f"of two processes one alone created each of {RACES} files"
        return Check("lock", "ok", detail)
    detail = f"two processes created the same file, {len(both)} times of {RACES}"
    if neither:
        detail = f"{len(neither)} of {RACES} files could be created by neither of two processes"
    hint = "names could be lost: use this library from one process at a time, or move it"
    return Check("lock", "fail", detail, hint)


def _race(base: str) -> tuple[set[int], set[int]]:
    """Which files this process created, and which another one, each at the same moment."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _OTHER, base, str(RACES), str(STEP)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        start = time.monotonic() + 20 * STEP
        other.stdin.write(f"{start}\n")
        other.stdin.flush()
        mine = set()
        for i in range(RACES):
            while time.monotonic() < start + i * STEP:
                pass
            mine |= {i} if _create(f"{base}{i}") else set()
        theirs = {int(word) for word in other.stdout.readline().split()}
    return mine, theirs


def _create(path: str) -> bool:
    """Create a file that must not be there; whether it was this call that did."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    return True


def _flock(file: Path) -> Check:
    """Whether a second `flock` of a file is refused. adaptlib does without; others do not."""
    with file.open("rb") as one, file.open("rb") as two:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Check("flock", "ok", "refused while another holds it; adaptlib does without it")
        except OSError as error:
            detail = f"not there ({error.strerror}); adaptlib does without it"
            return Check("flock", "ok", detail)
    return Check(
        "flock", "warn", "granted to two at a time, though adaptlib does without it", ONE_WRITER
    )


def _links(file: Path) -> Check:
    try:
        os.link(file, file.with_name(f"{file.name}-link"))
    except OSError as error:
        detail = f"none ({error.strerror}): what is finished is renamed instead"
        return Check("hard links", "ok", detail)
    return Check("hard links", "ok", "yes")


def _syncs(directory: Path) -> Check:
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF):
            raise
        detail = f"directories cannot be ({error.strerror}): a power cut may take the last names"
        return Check("sync", "warn", detail, "keep a copy, or keep the library on a local disk")
    finally:
        os.close(number)
    return Check("sync", "ok", "directories can be written through to the disk")


def _cases(base: Path) -> Check:
    lower = base.with_name(f"{base.name}case")
    lower.write_bytes(b"")
    if base.with_name(f"{base.name}CASE").exists():
        return Check("case", "ok", "A and a are one name here; names in a library are lower-case")
    return Check("case", "ok", "A and a are two names")
