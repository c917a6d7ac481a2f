"""Every command by the same conventions: streams, pipes, encodings, colours, widths, signals."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from adaptlib.cli import commands, streams
from adaptlib.cli.main import invoke

from adaptlib.experts import Library
from adaptlib.experts.codec import pack, write_directory
from tests.tiny import make_expert

WORDS = "Rübe 漢字 — “quoted” ✓"  # more than ASCII, and more than Windows' western code page

# A line for each command that needs no model, and what is done before it.
LINES: dict[str, str] = {
    "init": "init fresh",
    "add": "add one --name new",
    "list": "list",
    "show": "show poems",
    "rm": "rm sums",
    "mv": "mv sums other",
    "tag": "tag sums sums:v2",
    "pin": "pin poems",
    "unpin": "unpin paper",
    "log": "log poems",
    "diff": "diff poems team/sql:v1",
    "export": "export poems out",
    "verify": "verify",
    "gc": "gc --dry-run",
    "cluster": "cluster --k 2",
    "merge": "merge poems team/sql:v1 --name both",
    "doctor": "doctor",
    "config": "config",
    "schema": "schema",
    "completion": "completion bash",
}
HEAVY = ("route", "train", "train-library", "train-router", "eval", "bench")  # they need a model
SILENT = ("gc", "verify", "doctor", "unpin", "mv", "tag", "export")  # with -q where all is well
FREE = ("diff", "completion", "config")  # what they print with -q is no name


@pytest.fixture(autouse=True)
def kept(library: Library, tmp_path: Path) -> Library:
    """The library of commands, with a pin, and an expert whose card says more than ASCII."""
    write_directory(pack(make_expert(9, task=WORDS, description=WORDS)), tmp_path / "one")
    library.add(make_expert(7, task=WORDS, description=WORDS), "words")
    library.pin("words", "paper")
    return library


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def test_every_command_is_held_to_them() -> None:
    assert {*LINES, *HEAVY} == commands.COMMANDS.keys()


@pytest.mark.parametrize("line", LINES.values())
def test_a_document_is_all_that_json_prints(run: Any, line: str) -> None:
    """One document on stdout, nothing on stderr; `run` holds it to its schema."""
    result = run(*line.split(), "--json")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("{\n")
    assert result.out.endswith("\n}\n")


@pytest.mark.parametrize(("name", "line"), LINES.items(), ids=LINES)
def test_quiet_is_names_for_other_commands(run: Any, name: str, line: str) -> None:
    result = run(*line.split(), "-q")
    assert result.code == 0
    assert all(text.startswith("Note: ") for text in result.err.splitlines())
    lines = result.out.splitlines()
    if name in SILENT:
        assert not lines
    elif name not in FREE:
        assert lines
        one_word = re.compile(r"\S+( \S+)*" if name == "cluster" else r"\S+")
        assert all(one_word.fullmatch(text) for text in lines)


def test_names_go_from_one_command_into_another(run: Any, library: Library) -> None:
    names = run("list", "-q").out.split()
    assert names == [*library.names()]
    assert run("rm", *names, "-q").out.split() == names
    assert run("list", "-q").out == ""


def test_lists_are_parted_by_commas_spaces_or_repetition(run: Any) -> None:
    ways = (
        ["--experts", "poems,team/sql:v1,words"],
        ["--experts", "poems, team/sql:v1 words"],
        ["--experts", "poems", "--experts", "team/sql:v1", "--experts", "words"],
    )
    found = [run("cluster", "--k", "2", *way, "--json").document for way in ways]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("line", LINES.values())
def test_nothing_is_asked_and_stdin_is_left_alone(run: Any, monkeypatch: Any, line: str) -> None:
    class Stdin(io.StringIO):
        def read(self, *_: Any) -> NoReturn:
            pytest.fail("stdin was read")

        readline = __next__ = read

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Stdin())
    assert run(*line.split()).code == 0


# -- encodings, colours, widths ---------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("line", LINES.values())
def test_any_encoding_takes_what_is_printed(
    monkeypatch: Any, tmp_path: Path, line: str, encoding: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTLIB_LIBRARY", str(tmp_path / "library"))
    written = [io.BytesIO(), io.BytesIO()]
    for name, raw in zip(("stdout", "stderr"), written, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    assert invoke(line.split()) == 0
    assert invoke(["show", "words"]) == 0
    assert invoke(["show", "Rübe✓"]) == 3
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    out, err = (raw.getvalue().decode(encoding) for raw in written)
    assert "bug in adaptlib" not in err
    assert "Traceback" not in err
    assert ("漢字" in out) == (encoding == "utf-8")


@pytest.mark.parametrize("line", LINES.values())
def test_colours_are_for_who_wants_them(run: Any, monkeypatch: Any, line: str) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    result = run(*line.split())
    assert result.code == 0
    assert "\x1b" not in result.out + result.err
    assert "\x1b" not in run(*line.split(), "--json").out


def test_colours_are_forced_into_a_pipe_and_dumb_terminals_get_none(
    run: Any, monkeypatch: Any
) -> None:
    assert "\x1b" not in run("list").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1m" in run("list").out
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in run("list").out


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_lines_fit(run: Any, monkeypatch: Any, columns: int) -> None:
    """At 40 columns a name is still shown whole, and a digest at any."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("list", "show", "log", "diff", "schema", "cluster"):
        text = re.sub(r"[0-9a-f]{64}", "", run(*LINES[name].split()).out)
        lines = text.splitlines()
        assert lines
        if columns > 40:
            assert max(map(len, lines)) <= columns, name


# -- pipes and closed streams -----------------------------------------------------------------


@pytest.mark.parametrize("line", [*LINES.values(), "--help", "help route", "--version"])
def test_a_reader_that_leaves_ends_any_command_quietly(
    monkeypatch: Any, capsys: Any, tmp_path: Path, line: str
) -> None:
    """141, with nothing said, and the changes made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTLIB_LIBRARY", str(tmp_path / "library"))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert streams_guarded(lambda: invoke(line.split())) == streams.BROKEN
        assert "Error" not in capsys.readouterr().err


def streams_guarded(command: Callable[[], int]) -> int:
    """`guarded`, which leaves the signals of the tests as they are."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        return streams.guarded(command)
    finally:
        for number, handler in before:
            signal.signal(number, handler)


CODE = "from adaptlib.cli.main import run; run()"


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a test began; none of them outlives it."""
    begun: list[subprocess.Popen[str]] = []
    yield begun
    for one in begun:
        if one.poll() is None:
            one.kill()
        one.communicate()


def closed(line: str, redirection: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A command with a stream closed by the shell."""
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {line} {redirection}', sys.executable, CODE],
        cwd=tmp_path,
        env=os.environ | {"ADAPTLIB_LIBRARY": str(tmp_path / "library")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "redirection", "code", "out", "err"),
    [
        ("list -q", ">&-", 0, "", ""),
        ("list -q", "2>&-", 0, "poems", ""),
        ("list -q", "<&- >&- 2>&-", 0, "", ""),
        ("show nothing", ">&-", 3, "", "no expert named"),
        ("show nothing", "2>&-", 3, "", ""),
        ("show nothing --json", "<&- >&-", 3, "", '"code":3'),
        ("add one --name new", ">&- 2>&-", 0, "", ""),
        ("route --prompt -", "<&-", 2, "", "the prompt is empty"),
        ("--version", ">&-", 0, "", ""),
    ],
)
def test_closed_streams_are_no_harm(
    kept: Library, tmp_path: Path, line: str, redirection: str, code: int, out: str, err: str
) -> None:
    done = closed(line, redirection, tmp_path)
    assert done.returncode == code, done.stderr
    assert out in done.stdout
    assert bool(out) == bool(done.stdout)
    assert err in done.stderr
    assert bool(err) == bool(done.stderr)
    if line.startswith("add"):  # and what was to be done was done, with no byte beside it
        assert "new" in kept.names()
        assert not kept.verify(deep=True).problems


def test_a_reader_of_errors_that_leaves_is_no_harm(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", CODE, "show", "nothing"],
        cwd=tmp_path,
        env=os.environ | {"ADAPTLIB_LIBRARY": str(tmp_path / "library")},
        stdout=subprocess.PIPE,
        stderr=write,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stdout) == (141, b"")


# -- signals ----------------------------------------------------------------------------------

# A command that is in the middle of something, and takes its time to clean up.
SLOW = """
import sys, time
from adaptlib.cli.streams import guarded
def command():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(CLEANING)
sys.exit(guarded(command))
"""


def begin(
    processes: list[subprocess.Popen[str]], tmp_path: Path, code: str, *words: str
) -> subprocess.Popen[str]:
    one = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env=os.environ | {"ADAPTLIB_LIBRARY": str(tmp_path / "library")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes.append(one)
    return one


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "Interrupted\n"), (signal.SIGTERM, 143, "Terminated\n")],
)
def test_a_signal_ends_a_command_with_one_word(
    processes: Any, tmp_path: Path, number: int, code: int, said: str
) -> None:
    one = begin(processes, tmp_path, CODE, "route", "--prompt", "-")
    wait_until_it_reads(one)
    one.send_signal(number)
    out, err = one.communicate(timeout=30)
    assert (one.returncode, out, err) == (code, "", said)


def wait_until_it_reads(one: subprocess.Popen[str]) -> None:
    """Until the process sleeps in a read of its stdin."""
    for _ in range(3000):
        if Path(f"/proc/{one.pid}/syscall").exists():
            words = Path(f"/proc/{one.pid}/syscall").read_text().split()
            if words[:2] in (["0", "0x0"], ["63", "0x0"]):  # read(0, ...) on x86 and on ARM
                return
        time.sleep(0.01)
    pytest.skip("this system does not say what a process waits for")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(processes: Any, tmp_path: Path, number: int) -> None:
    one = begin(processes, tmp_path, SLOW.replace("CLEANING", "60"))
    assert one.stdout is not None
    assert one.stdout.readline() == "begun\n"
    one.send_signal(signal.SIGINT)
    assert one.stdout.readline() == "cleaning\n"
    one.send_signal(number)
    _, err = one.communicate(timeout=30)
    assert one.returncode == -number
    assert err == ""


def test_one_signal_lets_it_clean_up(processes: Any, tmp_path: Path) -> None:
    one = begin(processes, tmp_path, SLOW.replace("CLEANING", "0"))
    assert one.stdout is not None
    assert one.stdout.readline() == "begun\n"
    one.send_signal(signal.SIGTERM)
    out, err = one.communicate(timeout=30)
    assert (one.returncode, out, err) == (143, "cleaning\n", "Terminated\n")
