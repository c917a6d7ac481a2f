"""Schedules: actors take turns at the calls that touch the disk, as a list of switches says.

Each actor is a thread, and only one of them runs. Before each call by which it could see or change
what others do, it asks whether it is another's turn. So one schedule gives one course of events,
whatever the machine does, and a course that breaks a promise can be played again.

Left out are calls that no order can matter to: syncs, closing, reading a file that is open (nobody
writes to one that exists, but to a log), anything on a temporary file, whose name is its maker's
own, and directories that are made once and stay.
"""

import itertools
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest

from library_store import (
    LocalStore,
    _collect,
    _files,
    _lock,
    _objects,
    _process,
    local,
    records,
)

Schedule: TypeAlias = tuple[tuple[int, int], ...]
"""(step, actor): from that step on, that actor. The first is (0, the actor that begins)."""

Actor: TypeAlias = Callable[[LocalStore], Any]

_ON_PATHS = (
    *("open", "lstat", "scandir", "link", "rename", "replace", "unlink", "utime"),
    *("mkdir", "rmdir"),
)
_ON_DESCRIPTORS = ("write", "pread", "ftruncate")
_PERSON = 1000  # process ids of the actors; one that is dead has another
_PAUSE = 0.005  # seconds that a waiting actor waits
_TICK = 0.001  # seconds that a call takes
_BEGIN = 1_800_000_000.0  # seconds since 1970 at which each course begins


@dataclass(frozen=True)
class Outcome:
    """What an actor returned, or what it raised."""

    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True)
class Scenario:
    """What is there before, who acts on it, and what must hold.

    `always` looks at the store whenever another actor takes over, `check` at the end: both return
    what is wrong, or None. `lies`: the lock excludes nobody. `typed` are the errors an actor may
    raise; any other breaks a promise.
    """

    prepare: Callable[[LocalStore], Any]
    actors: Sequence[Actor]
    check: Callable[[LocalStore, list[Outcome]], str | None]
    always: Callable[[Path], str | None] | None = None
    typed: tuple[type[Exception], ...] = ()
    lies: bool = False
    switches: int = 2


@dataclass
class Course:
    """One schedule as it went: `others` are, for each step, those who could have taken over."""

    schedule: Schedule
    outcomes: list[Outcome]
    steps: list[str] = field(default_factory=list)
    others: list[tuple[int, ...]] = field(default_factory=list)
    wrong: str | None = None

    def __str__(self) -> str:
        steps = "\n".join(self.steps)
        results = "\n".join(f"actor {i}: {outcome}" for i, outcome in enumerate(self.outcomes))
        return f"{self.wrong}\nSCHEDULE = {self.schedule}\n{steps}\n{results}"


class Machine:
    """The disk, the clock and the processes of the actors. Without actors it is the real one."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.lies = False
        self.now = _BEGIN
        self._names: Iterator[int] = itertools.count()
        self._course: Course | None = None
        self._public: set[int] = set()  # descriptors through which others see what is written
        self._prefix = ""

    def time(self) -> datetime:
        """Now, by the clock of this machine."""
        return datetime.fromtimestamp(self.now, UTC)

    def play(self, scenario: Scenario, schedule: Schedule) -> Course:
        """One course of events, on a new store."""
        root = self.home / "course"
        root.mkdir()
        self.now, self._names = _BEGIN, itertools.count()
        try:
            self.lies = scenario.lies
            self._prefix = f"{root}/library/"
            store = LocalStore.create(root / "library")
            scenario.prepare(store)
            self._always = scenario.always
            course = self._act(store, scenario.actors, schedule)
            for i, outcome in enumerate(course.outcomes):
                if outcome.error is not None and not isinstance(outcome.error, scenario.typed):
                    course.wrong = course.wrong or f"actor {i} raised {outcome.error!r}"
            course.wrong = course.wrong or scenario.check(store, course.outcomes)
            return course
        finally:
            shutil.rmtree(root)

    def _act(self, store: LocalStore, actors: Sequence[Actor], schedule: Schedule) -> Course:
        course = Course(schedule, [Outcome() for _ in actors])
        self._switches = dict(schedule[1:])
        self._running = schedule[0][1]
        self._alive = list(range(len(actors)))
        self._turns = [threading.Lock() for _ in actors]
        self._over = threading.Lock()
        for lock in (*self._turns, self._over):
            lock.acquire()

        def work(me: int) -> None:
            self._turns[me].acquire()
            try:
                course.outcomes[me] = Outcome(actors[me](LocalStore(store.root)))
            except Exception as error:
                course.outcomes[me] = Outcome(error=error)
            self._look()
            self._alive.remove(me)
            if self._alive:
                self._running = self._next(me)
                self._turns[self._running].release()
            else:
                self._over.release()

        threads = [
            threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(actors))
        ]
        for thread in threads:
            thread.start()
        self._course = course
        self._turns[self._running].release()
        ended = self._over.acquire(timeout=60)
        self._course = None
        if not ended:
            course.wrong = "it does not end"
            raise AssertionError(str(course))
        for thread in threads:
            thread.join()
        return course

    def _next(self, me: int) -> int:
        return min(self._alive, key=lambda i: (i <= me, i))

    def _look(self) -> None:
        course, self._course = self._course, None  # what looks takes no turn
        if course is not None and self._always is not None and course.wrong is None:
            course.wrong = self._always(Path(self._prefix))
        self._course = course

    def _hand_over(self, other: int) -> None:
        me = self._running
        self._look()
        self._running = other
        self._turns[other].release()
        self._turns[me].acquire()

    def _step(self, name: str, what: str) -> None:
        course = self._course
        if course is None:
            return
        self.now += _TICK
        me = self._running
        course.others.append(tuple(i for i in self._alive if i != me))
        number = len(course.others)
        other = self._switches.get(number)
        if other is not None and other in course.others[-1]:
            course.steps.append(f"{number:4} {me} stops before {name} {what}")
            self._hand_over(other)
        course.steps.append(f"{number:4} {'        ' * me}{me} {name} {what}")

    # --- what the store asks of a machine ---

    def uuid4(self) -> SimpleNamespace:
        """A name that nobody else has: the same ones in each course."""
        return SimpleNamespace(hex=f"{next(self._names):032x}")

    def clock(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        """Let another go on; time passes."""
        self.now += _PAUSE
        other = self._next(self._running)
        if self._course is not None and other != self._running:
            self._hand_over(other)

    def identity(self) -> tuple[str, int]:
        return "machine", _PERSON + (self._running if self._course is not None else 99)

    def is_running(self, pid: int) -> bool:
        return pid - _PERSON in self._alive

    def __getattr__(self, name: str) -> Any:
        """The module `os`, as `_files` sees it."""
        real = getattr(os, name)
        if name == "fsync":
            return lambda fd: None
        if name in _ON_DESCRIPTORS:
            call = self._on_descriptor(name, real)
        elif name in _ON_PATHS:
            call = self._on_path(name, real)
        else:
            return real
        setattr(self, name, call)
        return call

    def _on_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *args: Any) -> Any:
            if fd in self._public:
                self._step(name, "")
            found = real(fd, *args)
            if name == "write":
                os.utime(fd, ns=(self._ns(), self._ns()))
            return found

        return call

    def _on_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            paths = [self._relative(arg) for arg in args if isinstance(arg, str | Path)]
            flags = args[1] if name == "open" else 0
            if any(map(_matters, [name] * len(paths), [flags] * len(paths), paths)):
                self._step(name, " ".join(paths))
            if name == "utime":
                return real(*args, ns=(self._ns(), self._ns()), **options)
            found = real(*args, **options)
            if flags & os.O_CREAT:
                os.utime(found, ns=(self._ns(), self._ns()))
                if _matters(name, flags, paths[0]):
                    self._public.add(found)
                else:
                    self._public.discard(found)
            return found

        return call

    def _ns(self) -> int:
        return int(self.now * 1e9)

    def _relative(self, path: str | Path) -> str:
        return os.fspath(path).removeprefix(self._prefix)


def _matters(name: str, flags: int, path: str) -> bool:
    """Whether the order of this call and another actor's could make a difference."""
    top, _, rest = path.partition("/")
    if top == "tmp":  # all but the lock and the claims to it are their makers' own
        return rest.startswith("refs.lock")
    if top == "refs":
        return True
    if flags & os.O_DIRECTORY:  # to sync it
        return False
    if name in ("mkdir", "lstat"):
        if top == "objects":
            return rest.count("/") == 2
        if top == "log":
            return path.endswith(".jsonl")
    return True


@contextmanager
def machine() -> Iterator[Machine]:
    """A machine that `library_store` is on while this lasts."""
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="schedules-", dir=fast) as home:
        made = Machine(Path(home))
        with pytest.MonkeyPatch.context() as patch:
            install(made, patch)
            yield made


def install(made: Machine, patch: pytest.MonkeyPatch) -> None:
    held = _lock.held

    @contextmanager
    def maybe_held(path: Path, **options: Any) -> Iterator[Any]:
        if made.lies:
            yield SimpleNamespace(confirm=lambda: None)
        else:
            with held(path, **options) as lock:
                yield lock

    def timestamp(moment: datetime | None = None) -> str:
        return records.timestamp(made.time() if moment is None else moment)

    patch.setattr(_files, "os", made)
    patch.setattr(_lock, "held", maybe_held)
    patch.setattr(_lock, "time", SimpleNamespace(monotonic=made.clock))
    for name in ("clock", "pause", "identity", "is_running"):
        patch.setattr(_process, name, getattr(made, name))
    for module in (_collect, _files, _lock):
        patch.setattr(module, "uuid", made)
    for module in (_objects, local):
        patch.setattr(module, "timestamp", timestamp)


# --- which schedules ---


def begin(actors: int) -> list[Schedule]:
    """Without a switch that is not needed: each actor once as the first."""
    return [((0, actor),) for actor in range(actors)]


def one_more(course: Course) -> list[Schedule]:
    """Each schedule that goes as this one and then has one switch more."""
    last = course.schedule[-1][0]
    return [
        (*course.schedule, (step, other))
        for step, others in enumerate(course.others, start=1)
        if step > last
        for other in others
    ]


def explore(
    machine: Machine, scenario: Scenario, *, limit: int, seed: int
) -> tuple[int, bool, Course | None]:
    """Play every schedule with one switch at most; of those with two, and then of those that have
    one more, `limit` chosen at random if there are more; and for three actors half as many with up
    to five switches.

    Returns how many were played, whether none was left out, and the first that broke a promise.
    """
    generator = random.Random(seed)
    played, actors, switches = 0, len(scenario.actors), scenario.switches
    level, longest = begin(actors), 0
    complete = True
    for depth in range(switches + 1):
        if depth >= 2 and len(level) > limit:
            level, complete = generator.sample(level, limit), False
        deeper: list[Schedule] = []
        for schedule in level:
            course = machine.play(scenario, schedule)
            played += 1
            if course.wrong is not None:
                return played, complete, course
            longest = max(longest, len(course.others))
            if depth < switches:
                deeper += one_more(course)
        level = deeper
    for _ in range(limit // 2 if actors > 2 else 0):
        steps = sorted(generator.sample(range(1, longest + 1), generator.randint(3, 5)))
        schedule = tuple((step, generator.randrange(actors)) for step in (0, *steps))
        course = machine.play(scenario, schedule)
        played += 1
        if course.wrong is not None:
            return played, complete, course
    return played, complete, None
