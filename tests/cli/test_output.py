"""How commands speak: to people, to pipes, to terminals that others try to steer."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from adaptlib.cli import commands, main

import adaptlib
from adaptlib.experts import Library
from adaptlib.experts.catalog import Catalog
from adaptlib.experts.codec import pack, write_directory
from tests.tiny import make_expert

COMMANDS = sorted(commands.COMMANDS)


def process(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from adaptlib.cli.main import run; run()"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env=os.environ | {"ADAPTLIB_LIBRARY": str(cwd / "library")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def examples() -> list[tuple[str, str]]:
    return [(name, line) for name in commands.COMMANDS for line in commands.examples(name)]


def test_version_and_help(run: Any) -> None:
    assert run("--version").out == f"adaptlib {adaptlib.__version__}\n"
    assert run("--help").code == 0
    listed = run("--help").out
    assert all(re.search(rf"^  {name} ", listed, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps(run: Any, name: str) -> None:
    result = run(name, "--help")
    assert (result.code, result.err) == (0, "")
    for option in ("--library", "--json", "--quiet", "Examples:"):
        assert option in result.out
    lines = commands.examples(name)
    assert len(lines) >= 2
    shown = re.sub(r" \\\n +", " ", result.out)  # long ones go on in a next line
    assert all(line in shown for line in lines)


RUN = {  # what an example's names stand for in the library of these tests
    "runs/*/adapter": "one",
    "hf://org/repo@main": "one",
    "./my-lora": "one",
    "./llama": "org/llama",
    "~/experts": "experts",
    "sql:v2": "sums",
}
# They need a model, a task or more experts, and have files of their own.
SKIP = ("route", "cluster", "merge", "train", "train-library", "train-router", "bench", "eval")


@pytest.mark.parametrize(("name", "line"), examples(), ids=lambda v: v)
def test_every_example_works(
    run: Any, library: Library, tmp_path: Path, name: str, line: str
) -> None:
    words = shlex.split(line)
    words = words[words.index("adaptlib") + 1 :]
    words = words[: words.index(">")] if ">" in words else words
    if "$(adaptlib" in words:  # one command's names for another
        words = [*words[: words.index("$(adaptlib")], "paper"]
    assert words[0] in (name, *(a for a, n in commands.ALIASES.items() if n == name))
    command = typer.main.get_command(main.application(name)).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, words[1:])  # it parses
    if name in SKIP or {"--demo", "--merged-base"} & {*words}:
        return
    library.tag("poems", "sql")
    library.tag("poems", "sql:v1")
    library.tag("sums", "stories")
    library.pin("poems", "paper")
    write_directory(pack(make_expert(9)), tmp_path / "one")
    extra = ["--replace"] if words[0] == "add" else []
    result = run(*[RUN.get(word, word) for word in words], *extra)
    assert result.code == 0, result.err


def test_nothing_is_coloured_where_nobody_looks(run: Any, library: Library) -> None:
    for words in (["list"], ["show", "poems"], ["log", "poems"], ["diff", "poems", "sums"]):
        result = run(*words)
        assert "\x1b" not in result.out + result.err


def test_no_color_and_plain_pipes(library: Library, tmp_path: Path) -> None:
    done = process("list", cwd=tmp_path, NO_COLOR="1", COLUMNS="nonsense")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[0].startswith("NAME")
    ascii_only = process("show", "poems", cwd=tmp_path, PYTHONIOENCODING="ascii:replace")
    assert ascii_only.returncode == 0


def test_a_card_does_not_steer_the_terminal(run: Any, tmp_path: Path) -> None:
    library = Library.open(tmp_path / "library", create=True)
    evil = "\x1b[2J\x1b]0;owned\x07\r"
    library.add(make_expert(0, task=evil, description=evil, other=evil), "evil")
    for words in (["list"], ["show", "evil"], ["diff", "evil", "evil"]):
        result = run(*words)
        assert result.code == 0
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.out + result.err)
    assert run("show", "evil", "--json").document["manifest"]["card"]["task"] == evil
    missing = run("show", evil)
    assert missing.code == 3
    assert "\x1b" not in missing.err


def test_a_traceback_is_for_who_asks(run: Any, library: Library, monkeypatch: Any) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("something unforeseen")

    monkeypatch.setattr(Catalog, "summarised", fail)
    result = run("list", "--json")
    assert result.code == 1
    assert result.error["message"] == "something unforeseen"
    assert "bug in adaptlib" in result.error["hint"]
    assert "Traceback" not in result.err
    monkeypatch.setenv("ADAPTLIB_DEBUG", "1")
    with pytest.raises(RuntimeError, match="unforeseen"):
        run("list")


def test_interruption_and_a_full_disk(run: Any, library: Library, monkeypatch: Any) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Catalog, "summarised", stop)
    assert run("list") == (130, "", "Interrupted\n")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Catalog, "summarised", full)
    result = run("list")
    assert result.code == 1
    assert "No space left on device" in result.err


@pytest.mark.parametrize("words", [["list", "-q"], ["list"], ["list", "--json"]])
def test_a_reader_that_leaves_is_no_error(tmp_path: Path, words: list[str]) -> None:
    library = Library.open(tmp_path / "library", create=True)
    library.add(make_expert(), "one")
    for i in range(3):
        library.tag("one", f"n{i}-" + "x" * 50)
    read, write = os.pipe()
    os.close(read)  # whoever reads is gone before the first line
    code = "from adaptlib.cli.main import run; run()"
    environment = os.environ | {"ADAPTLIB_LIBRARY": str(tmp_path / "library")}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        stdout=write,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.returncode == 141
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_ends_with_the_code(library: Library, tmp_path: Path) -> None:
    done = process("show", "poem", "--json", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert '"schema":"adaptlib.error/1"' in done.stderr
    assert process("list", "--json", cwd=tmp_path).returncode == 0


def test_other_warnings_are_left_as_they_were(run: Any, library: Library) -> None:
    import warnings

    before = warnings.showwarning, list(warnings.filters)
    run("list")
    assert (warnings.showwarning, list(warnings.filters)) == before
