"""adaptlib train: a task in, an expert in the library, and what is said on the way."""

import dataclasses
import json
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from adaptlib.cli import main, progress, run_log
from adaptlib.cli import train as command
from adaptlib.cli.progress import Speed
from adaptlib.cli.run_log import RunLog, read_log

from adaptlib.errors import ConflictError
from adaptlib.experts import Library
from adaptlib.experts.base import load
from adaptlib.training import Progress, TrainOptions, read_task, train
from tests.tiny import make_expert, state

QUICK = ("--epochs", "2", "--batch-size", "8", "--rank", "2", "--lr", "0.01")
OPTIONS = TrainOptions(epochs=2, batch_size=8, rank=2, lr=0.01)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_task(path: Path, *, rows: int = 24, valid: int = 4, test: int = 4) -> Path:
    """`say` the first of two letters."""
    letters = "abcdefghijklmnop"
    splits = ["train"] * rows + ["valid"] * valid + ["test"] * test
    lines = []
    for i, split in enumerate(splits):
        first, second = letters[i % 16], letters[(i * 7 + 3) % 16]
        lines.append({"split": split, "input": f"{first} {second}", "output": first})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path.parent / "tasks.json").write_text(json.dumps([{"name": path.stem, "instruction": "s t"}]))
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "first.jsonl")


@pytest.fixture
def empty(tmp_path: Path) -> Library:
    return Library.open(tmp_path / "library", create=True)


def refused(run: Any, library: Library, *words: Any, code: int) -> str:
    """What a command says that must change nothing."""
    before = state(library)
    result = run(*words, "--json")
    assert result.code == code, result
    assert state(library) == before
    return f"{result.error['message']}; {result.error['hint']}"


def test_train_tells_what_it_kept(run: Any, task: Path, base_model: Path, empty: Library) -> None:
    result = run("train", task, "--base", base_model, *QUICK, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert document.keys() == {
        "schema", "name", "digest", "new", "kind", "base", "task", "params", "bytes", "steps",
        "seconds", "metrics", "notes",
    }  # fmt: skip
    assert document["schema"] == "adaptlib.train/1"
    assert document["name"] == "first"
    assert document["digest"] == empty.digest("first")
    assert (document["new"], document["kind"], document["steps"]) == (True, "lora", 6)
    assert document["base"] == str(base_model)
    assert document["metrics"] == empty["first"].card["metrics"]
    assert document["metrics"]["test_rows"] == 4
    assert document["metrics"]["test_exact_match"] in (0, 0.25, 0.5, 0.75, 1)
    again = run("train", task, "--base", base_model, *QUICK, "--json").document
    assert (again["new"], again["digest"]) == (False, document["digest"])
    text = run("train", task, *QUICK)  # the base is that of the library's experts
    assert text.out.startswith("Already there  first  sha256:")
    assert run("train", task, *QUICK, "--name", "two", "-q") == (0, "two\n", "")
    told = run("train", task, *QUICK, "--name", "team/three:v1", "--no-eval", "--replace")
    assert told.out.startswith("Trained  team/three:v1  sha256:")
    assert "exact match" not in told.out
    assert told.err.splitlines()[-1] == "  Next: adaptlib show team/three:v1"
    assert [line.split("  ")[1] for line in told.err.splitlines()[:2]] == ["epoch 1/2", "epoch 2/2"]


def test_it_is_the_expert_that_the_library_function_gives(
    run: Any, task: Path, base_model: Path, empty: Library
) -> None:
    options = ["--schedule", "cosine", "--target", "q_proj,o_proj", "--target", "re:.*[,u]p_proj"]
    run("train", task, "--base", base_model, *QUICK, *options, "--no-eval", "--rslora")
    chosen = dataclasses.replace(
        OPTIONS, schedule="cosine", target=("q_proj", "o_proj", "re:.*[,u]p_proj"), rslora=True
    )
    model, tokenizer = load(str(base_model))
    expert = train(model, tokenizer, read_task(task), options=chosen, base=str(base_model))
    assert empty.add(expert, "by-hand").digest == empty.digest("first")


def test_every_option_of_training_is_a_flag() -> None:
    """And what --help says is its default is its default."""
    group = typer.main.get_command(main.application("train", "train-library"))
    for name in ("train", "train-library"):
        shown = {p.name: p for p in group.commands[name].params}  # type: ignore[attr-defined]
        for field in dataclasses.fields(TrainOptions):
            option = shown[field.name]
            assert option.default is None
            said = re.search(r"\[default: (.*)\]", option.help)  # type: ignore[attr-defined]
            default = getattr(TrainOptions(), field.name)
            if field.name in ("max_length", "best_epoch"):
                continue  # said in words
            if default is None or default is False:
                assert said is None
            else:
                assert said is not None, field.name
                assert said[1] == str(default).removeprefix("torch.")


def test_full_training_is_kept_on_request_only(
    run: Any, task: Path, base_model: Path, empty: Library, tmp_path: Path
) -> None:
    words = ("train", task, "--base", base_model, "--kind", "full", *QUICK[:4], "--lr", "0.001")
    before = state(empty)
    result = run(*words)
    assert result.out.startswith("Trained  full on first, not kept (--keep stores it)\n  loss ")
    assert state(empty) == before
    document = run(*words, "--json").document
    assert (document["name"], document["digest"]) == (None, None)
    assert "valid_loss" in document["metrics"]
    assert run(*words, "--keep", "-q").out == "first\n"
    assert empty["first"].kind == "sparse"
    assert empty["first"].card["training"]["kind"] == "full"
    assert not list((tmp_path / "library").glob("derived/training/*"))


def test_a_dry_run_shows_what_the_model_sees(
    run: Any, task: Path, base_model: Path, empty: Library
) -> None:
    before = state(empty)
    words = ("train", task, "--base", base_model, *QUICK, "--dry-run")
    result = run(*words)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("Training row 1 as the model sees it")
    assert lines[1].endswith("a d ?[[ a </s>]]")
    shown = {line[2:10].strip(): line[11:] for line in lines if line.startswith("  ")}
    assert shown["rows"] == "24 train, 4 valid, 4 test"
    assert shown["steps"] == "6"
    assert "modules" in shown["trained"]
    document = run(*words, "--json").document
    assert document["schema"] == "adaptlib.train-plan/1"
    assert document["tokens"]["total"] == 2 * document["tokens"]["epoch"] == 48 * 8
    assert document["tokens"]["median"] == document["tokens"]["max"] == 8
    assert document["rows"] == {"train": 24, "valid": 4, "test": 4}
    assert document["seconds"] > 0
    assert 0 < document["share"] < 1
    parts = document["examples"][1]["parts"]
    assert [part["answer"] for part in parts] == [False, True]
    assert parts[1]["text"].split() == ["b", "</s>"]
    assert state(empty) == before
    short = run(*words, "--max-length", "7", "--json").document
    assert (short["cut"], short["tokens"]["max"]) == (28, 7)


def test_an_example_in_several_parts_is_shown_whole() -> None:
    from adaptlib.cli.preview import parts

    from adaptlib.training.encode import IGNORED, Example
    from tests.tiny import make_tokenizer

    ids = (2, 3, 4, 5, 1)
    example = Example(ids, (IGNORED, 3, IGNORED, 5, 1))
    pieces = parts(make_tokenizer(), example)
    assert "".join(piece["text"] for piece in pieces) == "a b c d </s>"
    assert [piece["answer"] for piece in pieces] == [False, True, False, True]


def test_the_log_and_the_curve(run: Any, task: Path, base_model: Path, empty: Library) -> None:
    words = ("train", task, "--base", base_model, *QUICK, "--no-eval")
    result = run(*words, "--log", "run.jsonl", "--plot", "run.svg")
    assert result.code == 0
    assert "Drew run.svg" in result.err
    steps = [json.loads(line) for line in Path("run.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    keys = {"run", "step", "epoch", "loss", "lr", "tokens", "tokens_per_second", "seconds"}
    assert all(keys <= step.keys() <= keys | {"valid_loss"} for step in steps)
    assert [step["step"] for step in steps if "valid_loss" in step] == [3, 6]
    assert steps[-1]["tokens"] == 48 * 8
    drawn = Path("run.svg").read_text()
    assert "train, smoothed" in drawn
    assert "valid, each epoch" in drawn
    run(*words, "--name", "again", "--log", "run.jsonl", "--plot", "again.png")
    assert len(Path("run.jsonl").read_text().splitlines()) == 6
    assert Path("again.png").read_bytes().startswith(b"\x89PNG")
    assert empty.digest("again") == empty.digest("first")


def step_of(number: int) -> Progress:
    return Progress(number, 9, 1, 1, 1.0, 0.1, number * 10, 90)


def test_a_log_is_whole_over_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def write(key: str, numbers: list[int]) -> RunLog:
        log = RunLog(path, key)
        for number in numbers:
            log.add(step_of(number), Speed(number * 1.0, 10.0, 1.0))
        log.close()
        return log

    write("k1", [1, 2, 3, 4])
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # a kill
    went_on = write("k1", [3, 4, 5])
    assert [step["step"] for step in read_log(path)] == [1, 2, 3, 4, 5]
    assert went_on.steps == read_log(path)
    assert read_log(path)[2]["seconds"] == 5.0  # 2 before, and 3 of its own
    write("k2", [4, 5])
    assert [step["run"] for step in read_log(path)] == ["k2", "k2"]


def test_ctrl_c_keeps_the_run_and_the_next_one_goes_on(
    run: Any, task: Path, base_model: Path, empty: Library, monkeypatch: Any, tmp_path: Path
) -> None:
    words = ("train", task, "--base", base_model, *QUICK, "--no-eval", "--log", "run.jsonl")
    meter = progress.Meter.add

    def press(self: Any, now: Progress) -> Speed:
        if now.step == 4:
            signal.raise_signal(signal.SIGINT)
        return meter(self, now)

    monkeypatch.setattr(progress.Meter, "add", press)
    stopped = run(*words)
    assert stopped.code == 130
    assert "Stopped after step 4 of 6, which is kept" in stopped.err
    assert list(empty) == []
    assert len(list((tmp_path / "library").glob("derived/training/*/cpu-1.safetensors"))) == 1
    monkeypatch.setattr(progress.Meter, "add", meter)
    assert run(*words).code == 0
    assert [step["step"] for step in read_log(Path("run.jsonl"))] == [1, 2, 3, 4, 5, 6]
    assert run(*words[:-2], "--name", "undisturbed").code == 0
    assert empty.digest("undisturbed") == empty.digest("first")
    assert not list((tmp_path / "library").glob("derived/training/*"))


def test_what_is_wrong_is_said_before_time_is_spent(
    run: Any, task: Path, base_model: Path, empty: Library, monkeypatch: Any
) -> None:
    base = ("--base", base_model)
    assert "--base adaptlib/demo-base" in refused(run, empty, "train", task, code=2)
    empty.add(make_expert(0), "other")

    def no(*words: Any, code: int = 2) -> str:
        return refused(run, empty, "train", *words, code=code)

    monkeypatch.setattr(command, "_run", None)  # nothing below is trained
    assert "--base DIRECTORY" in no(task, "--base", "./absent", code=3)
    assert "there is no" in no("absent.jsonl", *base, code=3)
    assert "--kind is one of full, lora, sparse" in no(task, *base, "--kind", "dora")
    assert "rank wants more than 0" in no(task, *base, "--rank", "0")
    assert "--dtype" in no(task, *base, "--dtype", "int8")
    assert "--selection is one of" in no(task, *base, "--selection", "best")
    assert "matches no linear module" in no(task, *base, "--target", "qkv")
    assert "context is 32" in no(task, *base, "--max-length", "64")
    assert "'../x'" in no(task, *base, "--name", "../x")
    assert "kept for saved results" in no(task, *base, "--name", "clusterings/x")
    assert "a figure is" in no(task, *base, "--plot", "x.pdf")
    assert "is not there" in no(task, *base, "--log", "absent/x.jsonl", code=3)
    assert "no log of a training run" in no(task, *base, "--log", task, code=5)
    taken = no(task, *base, "--name", "other", code=5)
    assert "taken" in taken
    assert "--replace, or --name OTHER" in taken
    Path("broken.jsonl").write_text('{"input": "a"}\n')
    assert "broken.jsonl, line 1" in no("broken.jsonl", *base, "--instruction", "s", code=4)
    Path("long.jsonl").write_text(json.dumps({"input": "a", "output": "b " * 99}) + "\n")
    assert "does not fit" in no("long.jsonl", *base, "--instruction", "s")
    assert run("train", task, *base, "-L", "absent").code == 3


def test_a_full_disk_while_training(
    run: Any, task: Path, base_model: Path, empty: Library, monkeypatch: Any
) -> None:
    from adaptlib.training import checkpoint

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    words = ("train", task, "--base", base_model, *QUICK, "--checkpoint-every", "0")
    assert "the disk is full" in refused(run, empty, *words, code=1)


def test_flags_of_the_other_kind_are_not_used_in_silence(
    run: Any, task: Path, base_model: Path, empty: Library
) -> None:
    words = ("train", task, "--base", base_model, "--kind", "sparse", *QUICK, "--no-eval")
    assert "Note: --rank is not used by --kind sparse" in run(*words).err
    notes = run(*words, "--keep", "--max-length", "7", "--name", "x", "--json").document["notes"]
    assert notes == [
        "--rank is not used by --kind sparse",
        "--keep is for --kind full; other kinds are always kept",
        "28 of 28 inputs were cut to 7 tokens",
    ]


@pytest.mark.parametrize("line", command.EXAMPLES)
def test_the_examples_of_help(
    run: Any, task: Path, base_model: Path, empty: Library, line: str
) -> None:
    run("train", task, "--base", base_model, *QUICK, "--name", "one", "--no-eval")
    rows = [json.loads(text) for text in task.read_text().splitlines()]
    Path("task.jsonl").write_text(task.read_text())
    table = "".join(f"{row['split']},{row['input']},{row['output']}\n" for row in rows)
    Path("task.csv").write_text("split,input,output\n" + table)
    Path("tasks.json").write_text('[{"name": "task", "instruction": "s t"}]')
    words = [word.replace("Write a poem on this.", "s t") for word in shlex.split(line)[1:]]
    result = run(*words)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.2, "0:00"), (59.6, "1:00"), (754, "12:34"), (12000, "3:20:00")],
)
def test_clock(seconds: float | None, shown: str) -> None:
    assert progress.clock(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(None, "-"), (0, "0"), (999.4, "999"), (999.6, "1.0k"), (12_345, "12.3k"), (123_456, "123k"),
     (4_100_000, "4.1M")],
)  # fmt: skip
def test_amount(number: float | None, shown: str) -> None:
    assert progress.amount(number) == shown


def test_a_log_is_not_written_over_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match="is a directory"):
        run_log.check_log(tmp_path)
    run_log.check_log(tmp_path / "new.jsonl")
