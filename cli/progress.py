"""Training as it goes on: speed, a bar for one run, a table for many. On stderr, and drawn only on
a terminal; elsewhere one line an epoch."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from . import out

if TYPE_CHECKING:
    from adaptlib.training import Progress
    from adaptlib.training.farm import Report

WINDOW = 50  # steps that the speed is taken over
ACTIVE = ("starting", "training", "scoring")
STOPPING = "Stopping: each worker ends its step and keeps it; Ctrl-C again to stop at once"
COLUMNS = ("NAME", "STATE", "STEP", "LOSS", "VALID", "TOK/S", "ETA")


@final
@dataclass(frozen=True)
class Speed:
    """`seconds` since the run began here; tokens a second and seconds left where known."""

    seconds: float
    tokens: float | None
    left: float | None


@final
class Meter:
    """Measures one run from the reports of its steps, as they come in."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def add(self, progress: "Progress") -> Speed:
        now = time.perf_counter()
        self.seen.append((now, progress.tokens))
        (start, before), (end, after) = self.seen[0], self.seen[-1]
        rate = (after - before) / (end - start) if end > start else None
        left = (progress.tokens_total - after) / rate if rate else None
        return Speed(now - self.began, rate, left)


def log_line(progress: "Progress", speed: Speed, *, before: float = 0.0) -> dict[str, Any]:
    """What --log keeps of a step; `before` is what the run took before it was stopped."""
    line: dict[str, Any] = {
        "step": progress.step,
        "epoch": progress.epoch,
        "loss": round(progress.loss, 6),
        "lr": progress.lr,
        "tokens": progress.tokens,
        "tokens_per_second": None if speed.tokens is None else round(speed.tokens, 1),
        "seconds": round(before + speed.seconds, 3),
    }
    if progress.valid_loss is not None:
        line["valid_loss"] = round(progress.valid_loss, 6)
    return line


def clock(seconds: float | None) -> str:
    """`0:41`, `12:05`, `3:20:00`."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def amount(number: float | None) -> str:
    """A number in at most five characters: 812, 12.3k, 4.1M."""
    if number is None:
        return "-"
    for unit in ("", "k", "M", "G"):
        if number < 999.5 or unit == "G":
            return f"{number:.0f}{unit}" if not unit or number >= 99.95 else f"{number:.1f}{unit}"
        number /= 1000
    return ""


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@contextmanager
def one_run(name: str, *, quiet: bool) -> Iterator[Callable[["Progress", Speed], None]]:
    """Yields what to call after each step."""
    if quiet:
        yield lambda progress, speed: None
        return
    if not sys.stderr.isatty():
        yield _epoch_lines(name)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    with Live(console=console, transient=True, auto_refresh=False, redirect_stdout=False) as live:
        valid: list[float] = []
        drawn = [0.0]

        def step(progress: "Progress", speed: Speed) -> None:
            if progress.valid_loss is not None:
                valid.append(progress.valid_loss)
            now = time.perf_counter()
            if now - drawn[0] < 0.1 and progress.step < progress.steps:
                return
            drawn[0] = now
            latest = f"  valid {valid[-1]:.3f}" if valid else ""
            text = (
                f"epoch {progress.epoch}/{progress.epochs}  step {progress.step}/{progress.steps}"
                f"  loss {progress.loss:.3f}{latest}  {amount(speed.tokens)} tok/s"
                f"  {clock(speed.left)} left"
            )
            width = console.width - 1
            bar = out.bar(progress.step / progress.steps, width)
            live.update(Text(f"{bar}\n{text[:width]}", no_wrap=True), refresh=True)

        yield step


def _epoch_lines(name: str) -> Callable[["Progress", Speed], None]:
    """A line an epoch, for the logs of machines."""

    def step(progress: "Progress", speed: Speed) -> None:
        if progress.step % max(1, progress.steps // progress.epochs):
            return
        valid = "" if progress.valid_loss is None else f"  valid {progress.valid_loss:.3f}"
        out.note(
            f"{name}  epoch {progress.epoch}/{progress.epochs}  step {progress.step}"
            f"/{progress.steps}  loss {progress.loss:.3f}{valid}  {amount(speed.tokens)} tok/s"
            f"  {clock(speed.left)} left"
        )

    return step


@final
@dataclass(slots=True)
class _Row:
    state: str = "waiting"
    step: str = "-"
    loss: str = "-"
    valid: str = "-"
    speed: str = "-"
    left: str = "-"
    tokens: int = 0  # still to be read
    rate: float | None = None

    def cells(self, name: str) -> list[str]:
        return [name, self.state, self.step, self.loss, self.valid, self.speed, self.left]


@contextmanager
def many_runs(
    tokens: dict[str, int], *, done: list[str], workers: int, quiet: bool
) -> Iterator[Callable[["Report", Speed | None], None]]:
    """Yields what to call with each report. `tokens` are those of the whole run by its name,
    `done` the names that were there before."""
    if quiet:
        yield lambda report, speed: None
        return
    rows = {name: _Row("waiting", tokens=total) for name, total in tokens.items()}
    for name in done:
        rows[name] = _Row("there")
    lines = {name: _epoch_lines(name) for name in rows}

    def update(report: "Report", speed: Speed | None) -> None:
        if report.state == "stopping":
            return
        row = rows[report.name]
        row.state = report.state if report.progress or report.result else "starting"
        if (progress := report.progress) is not None and speed is not None:
            row.step, row.loss = f"{progress.step}/{progress.steps}", _loss(progress.loss)
            row.valid = _loss(progress.valid_loss) if progress.valid_loss else row.valid
            row.speed, row.left = amount(speed.tokens), clock(speed.left)
            row.tokens, row.rate = progress.tokens_total - progress.tokens, speed.tokens
            if progress.step == progress.steps:
                row.state, row.left = "scoring", "-"
        if (result := report.result) is not None:
            row.left, row.speed, row.tokens, row.rate = "-", "-", 0, None
            row.valid = _loss(result.metrics.get("valid_loss"))

    if not sys.stderr.isatty():

        def tell(report: "Report", speed: Speed | None) -> None:
            update(report, speed)
            if report.state == "stopping":
                out.note(STOPPING)
            elif report.progress is not None and speed is not None:
                lines[report.name](report.progress, speed)
            elif report.result is not None and report.result.error:
                out.note(f"{report.name}  failed: {report.result.error}")
            elif report.result is not None:
                out.note(f"{report.name}  done")

        yield tell
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    with Live(console=console, transient=True, auto_refresh=False, redirect_stdout=False) as live:
        drawn = [0.0]

        def draw(report: "Report", speed: Speed | None) -> None:
            update(report, speed)
            if report.state == "stopping":
                live.console.print(STOPPING)
            now = time.perf_counter()
            if now - drawn[0] >= 0.1 or report.progress is None:
                drawn[0] = now
                room = max(4, console.height - 4)
                live.update(_table(rows, workers=workers, room=room), refresh=True)

        yield draw


def _table(rows: dict[str, _Row], *, workers: int, room: int) -> Any:
    """Those that are trained, the last that ended and the next to come, as many as there is room
    for, and how many there are of each."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    running = [name for name, row in rows.items() if row.state in ACTIVE]
    ended = [name for name, row in rows.items() if row.state in ("done", "failed")]
    next_ = [name for name, row in rows.items() if row.state == "waiting"]
    ended.sort(key=lambda name: rows[name].state == "failed")  # failures last, so they stay
    free = max(0, room - len(running))
    shown = ended[max(0, len(ended) - free + min(len(next_), 2)) :]
    shown += running
    shown += next_[: max(0, room - len(shown))]
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), expand=True)
    for heading in COLUMNS:
        left = heading in ("NAME", "STATE")
        grid.add_column(
            heading,
            justify="left" if left else "right",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if heading == "NAME" else None,
        )
    style = {"failed": "red", "done": "dim", "waiting": "dim"}
    for name in shown:
        row = rows[name]
        grid.add_row(*map(Text, map(out.plain, row.cells(name))), style=style.get(row.state))
    counts = [
        (len(ended) - _count(rows, "failed"), "done"),
        (_count(rows, "there"), "there before"),
        (len(running), "in training"),
        (len(next_), "waiting"),
        (_count(rows, "failed"), "failed"),
    ]
    said = ", ".join(f"{number} {what}" for number, what in counts if number)
    rates = [row.rate for row in rows.values() if row.rate]
    if rates:  # as if all workers were as fast as those that are known
        together = sum(rates) / len(rates) * workers
        said += f"; about {clock(sum(row.tokens for row in rows.values()) / together)} left"
    return Group(grid, Text(said))


def _count(rows: dict[str, _Row], state: str) -> int:
    return sum(row.state == state for row in rows.values())
