"""adaptlib train-library: many tasks, one command that can be stopped, killed and given again."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adaptlib.cli import progress, train_library
from rich.console import Console

from adaptlib.experts import Library
from adaptlib.experts.base import load
from adaptlib.experts.records import save_record
from adaptlib.training import TrainOptions, read_tasks, train
from adaptlib.training.farm import Report
from adaptlib.training.jobs import Result
from tests.tiny import state
from tests.workers import InThread, in_threads

QUICK = ("--epochs", "2", "--batch-size", "8", "--rank", "2", "--lr", "0.01")
LETTERS = "abcdefghijklmnop"


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[InThread]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with in_threads(monkeypatch) as started:
        yield started
    torch.set_num_threads(before)


def write_tasks(folder: Path, *names: str, rows: int = 16) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        lines = []
        for i in range(rows + 4):
            first, second = LETTERS[i % 16], LETTERS[(i * 7 + number) % 16]
            split = "train" if i < rows else "valid" if i < rows + 2 else "test"
            lines.append({"split": split, "input": f"{first} {second}", "output": second})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    listing = [{"name": name, "instruction": "s t"} for name in names]
    (folder / "tasks.json").write_text(json.dumps(listing))
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks", "first", "second", "third")


@pytest.fixture
def empty(tmp_path: Path) -> Library:
    return Library.open(tmp_path / "library", create=True)


def test_an_expert_for_each_task(
    run: Any, tasks: Path, base_model: Path, empty: Library, threads: list[InThread]
) -> None:
    words = ("train-library", tasks, "--base", base_model, *QUICK, "--workers", "1")
    result = run(*words, "--log", "logs", "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert document["schema"] == "adaptlib.train-library/1"
    assert document["failed"] == []
    assert [one.keys() for one in document["trained"]] == [{"name", "digest", "metrics", "new"}] * 3
    assert [one["name"] for one in document["trained"]] == ["first", "second", "third"]
    assert all(one["new"] for one in document["trained"])
    assert {one["name"]: one["digest"] for one in document["trained"]} == empty.names()
    assert document["trained"][0]["metrics"] == empty["first"].card["metrics"]
    assert {"train_loss", "valid_loss", "test_exact_match", "test_rows"} == {
        *empty["first"].card["metrics"]
    }
    assert sorted(path.name for path in Path("logs").iterdir()) == [
        "first.jsonl", "second.jsonl", "third.jsonl"
    ]  # fmt: skip
    assert len(Path("logs/second.jsonl").read_text().splitlines()) == 4
    again = run(*words)
    assert len(threads) == 1
    assert again.out.splitlines()[0].split() == [
        "NAME", "DIGEST", "LOSS", "VALID", "EXACT", "STATE"
    ]  # fmt: skip
    assert again.out.splitlines()[1].split()[-1] == "there"
    assert "0 experts trained" in again.out
    assert run(*words, "-q").out.split() == ["first", "second", "third"]
    more = run(*words, "--prefix", "team/", "--no-eval")
    assert "3 experts trained" in more.out
    assert "EXACT" not in more.out
    assert "team/first  epoch 1/2  step 2/4  loss " in more.err
    assert "team/third  done" in more.err
    assert len(empty) == 6


def test_files_instead_of_a_folder(
    run: Any, tasks: Path, base_model: Path, empty: Library, threads: list[InThread]
) -> None:
    words = ("train-library", "--base", base_model, *QUICK, "-q")
    assert run(*words, tasks / "third.jsonl", tasks / "first.jsonl").out == "third\nfirst\n"
    twice = run(*words, tasks, tasks / "first.jsonl", "--json")
    assert (twice.code, twice.error["code"]) == (2, 2)
    assert "two of the tasks are called first" in twice.error["message"]


def test_one_expert_over_all_tasks(
    run: Any, tasks: Path, base_model: Path, empty: Library, threads: list[InThread]
) -> None:
    words = ("train-library", tasks, "--base", base_model, *QUICK)
    assert run(*words, "--joint", "shared").code == 0
    assert list(empty) == ["shared"]
    card = empty["shared"].card
    assert (card["task"], card["tasks"]) == ("shared", ["first", "second", "third"])
    assert card["training"]["examples"] == 48
    assert card["metrics"]["test_rows"] == 6


def test_one_expert_a_cluster(
    run: Any, tasks: Path, base_model: Path, empty: Library, threads: list[InThread]
) -> None:
    words = ("train-library", tasks, "--base", base_model, *QUICK, "--no-eval")
    run(*words, "--workers", "1")
    digests = empty.names()
    saved = {"clusters": {"0": ["first", "third"], "1": ["second"]}, "experts": digests}
    save_record(empty.store, "clusterings", "two", saved)
    result = run(*words, "--clusters", "two", "--json")
    assert [one["name"] for one in result.document["trained"]] == ["two/0", "two/1"]
    assert empty["two/0"].card["tasks"] == ["first", "third"]
    assert empty["two/0"].card["task"] == "two/0"
    assert empty["two/0"].card["training"]["examples"] == 32
    (tasks / "third.jsonl").unlink()
    missing = run(*words, "--clusters", "two", "--json")
    assert missing.code == 3
    assert "third (task third)" in missing.error["message"]
    assert run(*words, "--clusters", "three", "--json").code == 3
    assert run(*words, "--clusters", "two", "--joint", "x", "--json").code == 2


def test_a_dry_run_counts_and_writes_nothing(
    run: Any, tasks: Path, base_model: Path, empty: Library, threads: list[InThread]
) -> None:
    words = ("train-library", tasks, "--base", base_model, *QUICK)
    run(*words[:1], tasks / "second.jsonl", *words[2:], "--no-eval")
    before = state(empty)
    document = run(*words, "--dry-run", "--json").document
    assert document["schema"] == "adaptlib.train-library-plan/1"
    assert [one["done"] for one in document["experts"]] == [False, True, False]
    first = document["experts"][0]
    assert (first["name"], first["rows"], first["steps"], first["tokens"]) == ("first", 16, 4, 256)
    assert first["seconds"] > 0
    table = run(*words, "--dry-run").out.splitlines()
    assert table[0].split() == ["NAME", "ROWS", "CUT", "TOKENS", "STEPS", "TIME", "STATE"]
    assert table[2].split()[-1] == "there"
    assert "2 of 3 experts to train" in table[-1]
    assert state(empty) == before


def test_what_fails_is_told_and_does_not_stop_the_rest(
    run: Any,
    tasks: Path,
    base_model: Path,
    empty: Library,
    threads: list[InThread],
    monkeypatch: Any,
) -> None:
    from adaptlib.errors import AdaptlibError
    from adaptlib.training import farm

    real = farm.train_into

    def broken(library: Library, job: Any, *rest: Any, **more: Any) -> Result:
        if job.name == "second":
            raise AdaptlibError("it diverged", hint="a smaller lr")
        return real(library, job, *rest, **more)

    monkeypatch.setattr(farm, "train_into", broken)
    words = ("train-library", tasks, "--base", base_model, *QUICK, "--no-eval", "--workers", "1")
    result = run(*words)
    assert result.code == 1
    assert list(empty) == ["first", "third"]
    assert "Failed: second: it diverged\n  Next: a smaller lr\n1 of 3 failed" in result.err
    document = run(*words, "--json")
    assert document.code == 1
    assert document.document["failed"] == [
        {"name": "second", "error": "it diverged", "hint": "a smaller lr"}
    ]
    monkeypatch.setattr(farm, "train_into", real)
    assert run(*words).code == 0
    assert len(empty) == 3


def test_ctrl_c_says_how_to_go_on(
    run: Any,
    tasks: Path,
    base_model: Path,
    empty: Library,
    threads: list[InThread],
    monkeypatch: Any,
) -> None:
    real = progress.Meter.add

    def press(self: Any, now: Any) -> Any:
        if now.step == 2:
            raise KeyboardInterrupt
        return real(self, now)

    monkeypatch.setattr(progress.Meter, "add", press)
    words = ("train-library", tasks, "--base", base_model, *QUICK, "--no-eval", "--workers", "1")
    stopped = run(*words)
    assert stopped.code == 130
    assert "Stopping: " in stopped.err
    assert "Next: the same command" in stopped.err
    assert list(empty) == []
    monkeypatch.setattr(progress.Meter, "add", real)
    assert run(*words).code == 0


def test_what_is_wrong_is_said_before_time_is_spent(
    run: Any, tasks: Path, base_model: Path, empty: Library, threads: list[InThread]
) -> None:
    def no(*words: Any, code: int = 2) -> str:
        before = state(empty)
        result = run("train-library", *words, "--json")
        assert result.code == code
        assert state(empty) == before
        return f"{result.error['message']}; {result.error['hint']}"

    base = ("--base", base_model, *QUICK)
    assert "--base adaptlib/demo-base" in no(tasks)
    assert "adaptlib train TASK --kind full" in no(tasks, *base, "--kind", "full")
    assert "workers wants 1 or more" in no(tasks, *base, "--workers", "0")
    assert "absent.jsonl" in no("absent.jsonl", *base, code=3)
    for name in ("first", "third"):
        rows = (tasks / f"{name}.jsonl").read_text().replace('"train"', '"test"')
        (tasks / f"{name}.jsonl").write_text(rows)
    words = no(tasks, *base)
    assert "2 of 3 experts cannot be trained" in words
    assert "first: " in words
    assert "third: " in words
    (tasks / "second.jsonl").write_text("nonsense\n")
    assert "second.jsonl, line 1" in no(tasks, *base, code=4)
    assert threads == []


@pytest.mark.parametrize("line", train_library.EXAMPLES)
def test_the_examples_of_help(
    run: Any, tasks: Path, base_model: Path, empty: Library, threads: list[InThread], line: str
) -> None:
    run("train-library", tasks / "first.jsonl", "--base", base_model, *QUICK, "--no-eval")
    saved = {"clusters": {"0": ["first"]}, "experts": empty.names()}
    save_record(empty.store, "clusterings", "ten", saved)
    result = run(*shlex.split(line)[1:], *QUICK, "--no-eval", "--workers", "1")
    assert result.code == 0, result.err


def shown(rows: dict[str, progress._Row], room: int) -> list[str]:
    console = Console(width=80, height=24)
    with console.capture() as capture:
        console.print(progress._table(rows, workers=2, room=room))
    return capture.get().splitlines()


def test_a_table_of_many_runs_stays_on_the_screen() -> None:
    """Forty tasks, whatever their state: what runs is there, and the counts are right."""
    states = {"done": 20, "failed": 1, "training": 2, "waiting": 17}
    rows = {
        f"a-task-with-a-rather-long-name-{state_}-{i}": progress._Row(state_, "1200/1400", "1.234")
        for state_, count in states.items()
        for i in range(count)
    }
    lines = shown(rows, 20)
    assert len(lines) == 22
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert text.count("training") >= 2
    assert "failed" in lines[18 - 2]
    assert lines[-1].startswith("20 done, 2 in training, 17 waiting, 1 failed")
    assert len(shown(rows, 4)) == 6
    del rows["a-task-with-a-rather-long-name-failed-0"]
    assert len(shown(rows, 100)) == 39 + 2


def test_the_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from adaptlib.training import Progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.many_runs({"a": 100, "b": 100}, done=["b"], workers=1, quiet=False) as show:
        show(Report("a", "training"), None)
        now = Progress(3, 9, 1, 3, 0.5, 0.1, 30, 100, 0.75)
        show(Report("a", "training", now), progress.Speed(3.0, 10.0, 7.0))
        show(Report("a", "done", result=Result("a", "sha256:0", {"valid_loss": 0.7})), None)
        show(Report("", "stopping"), None)
    err = capsys.readouterr().err
    assert "NAME" in err
    assert "1 there before" in err
    assert "Stopping" in err


# -- processes ------------------------------------------------------------------------------------

PROCFS = Path("/proc/self/task").is_dir()


def children(pid: int) -> set[int]:
    """All processes below this one."""
    below: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            below |= {int(child)} | children(int(child))
    return below


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(what: Any, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


@pytest.mark.skipif(not PROCFS, reason="looks for processes in /proc")
def test_a_kill_changes_nothing_but_the_time(tmp_path: Path, base_model: Path) -> None:
    """Ctrl-C, a kill of the command alone, and a kill of all its processes: what comes out in the
    end is what training undisturbed gives, to the byte."""
    tasks = write_tasks(tmp_path / "tasks", "one", "two", rows=64)
    library = Library.open(tmp_path / "library", create=True)
    words = ["train-library", tasks, "--base", base_model, "--no-eval"]
    words += ["--epochs", "16", "--batch-size", "4", "--checkpoint-every", "0"]
    # A process that is started in the background by a shell ignores Ctrl-C, and so do its children.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from adaptlib.cli.main import run; run()"
    held: set[int] = set()

    def start(workers: int) -> subprocess.Popen[bytes]:
        with (tmp_path / "err").open("ab") as err:
            return subprocess.Popen(
                [sys.executable, "-c", code, *map(str, words), "--workers", str(workers)],
                env=os.environ | {"ADAPTLIB_LIBRARY": str(tmp_path / "library")},
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
            )

    def checkpoints() -> dict[Path, int]:
        found = (tmp_path / "library").glob("derived/training/*/*.safetensors")
        return {path: path.stat().st_mtime_ns for path in found if path.exists()}

    def stopped_by(number: int, *, group: bool, workers: int) -> int:
        before = checkpoints()
        process = start(workers)
        try:
            wait_for(lambda: any(t != before.get(path) for path, t in checkpoints().items()))
            below = children(process.pid)
            held.update(below)
            assert len(below) >= workers
            (os.killpg if group else os.kill)(process.pid, number)
            returned = process.wait(60)
            wait_for(lambda: not any(map(alive, below)), 60)  # nobody trains on
        finally:
            process.kill()
        assert list(library) == []
        return returned

    try:
        assert stopped_by(signal.SIGINT, group=True, workers=1) == 130
        assert b"Next: the same command" in (tmp_path / "err").read_bytes()
        assert stopped_by(signal.SIGKILL, group=False, workers=1) == -signal.SIGKILL
        assert stopped_by(signal.SIGKILL, group=True, workers=2) == -signal.SIGKILL
        assert not library.verify().problems
        assert start(2).wait(300) == 0
    finally:
        for pid in held:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
    assert checkpoints() == {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = load(str(base_model))
    other = Library.open(tmp_path / "other", create=True)
    options = TrainOptions(epochs=16, batch_size=4)
    for name, task in read_tasks(tasks).items():
        expert = train(model, tokenizer, task, options=options, base=str(base_model))
        assert other.add(expert, name).digest == library.digest(name)
    torch.set_num_threads(threads)
