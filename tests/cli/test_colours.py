"""Colours by who says so, and output that any encoding of stdout takes."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from adaptlib.cli import out
from adaptlib.cli.main import invoke

from adaptlib.experts import Library
from adaptlib.experts.settings import user_file
from tests import tiny


def user_says(text: str) -> None:
    user_file().parent.mkdir(parents=True, exist_ok=True)
    user_file().write_text(text)


class Screen(io.TextIOWrapper):
    """A terminal, or a pipe, of some encoding that takes nothing else."""

    def __init__(self, encoding: str, *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def bytes(self) -> bytes:
        return self.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("environment", "words", "setting", "terminal", "expected"),
    [
        ({}, [], None, True, True),
        ({}, [], None, False, False),
        ({"NO_COLOR": "1"}, [], None, True, False),
        ({"NO_COLOR": ""}, [], None, True, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, ["--color", "always"], "always", True, False),
        ({"FORCE_COLOR": "1"}, [], None, False, True),
        ({"CLICOLOR_FORCE": "1"}, [], None, False, True),
        ({"FORCE_COLOR": "0"}, [], None, False, False),
        ({"FORCE_COLOR": "1"}, ["--color", "never"], None, True, False),
        ({"FORCE_COLOR": "1"}, [], "never", True, False),
        ({}, ["--color=always"], "never", False, True),
        ({}, [], "always", False, True),
        ({"TERM": "dumb"}, [], None, True, False),
        ({"TERM": "dumb"}, ["--color=always"], None, True, True),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, [], None, True, True),
    ],
)
def test_colours_by_their_order(
    library: Library,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    words: list[str],
    setting: str | None,
    terminal: bool,
    expected: bool,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm", "COLUMNS": "80"} | environment).items():
        monkeypatch.setenv(name, value)
    if setting:
        user_says(f"color = '{setting}'\n")
    screen = Screen("utf-8", terminal=terminal)
    monkeypatch.setattr(sys, "stdout", screen)
    assert invoke([*words, "list"]) == 0
    assert (b"\x1b[" in screen.bytes) == expected
    console = out.console()
    if not words and not setting:
        assert bool(console.color_system) == expected


@pytest.fixture
def worldly(tmp_path: Path) -> Library:
    """Experts whose cards are in other alphabets."""
    library = Library.open(tmp_path / "library", create=True)
    for i in range(4):
        task = "Gedichte über das Meer: 海の詩 🌊"
        library.add(tiny.make_expert(i, task=task, description=task * 3, author="Łukasz"), f"e{i}")
    return library


READ_ONLY = [
    "list",
    "list --fields name,task,description,added",
    "list --fields name,task --plain",
    "list --fields name,task --json",
    "show e0",
    "show e0 --json",
    "log e0",
    "diff e0 e1",
    "verify",
    "gc --dry-run",
    "doctor",
    "config",
    "config env",
    "pin",
    "schema",
    "cluster --k 2",
    "cluster --k 2 --measure",
    "cluster --duplicates",
    "merge --methods",
    "merge e0 e1 --name x --dry-run",
    "list --help",
    "show missing",
]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-16"])
def test_commands_print_in_any_encoding(
    run: Any, worldly: Library, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    for line in READ_ONLY:
        screen = Screen(encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            code = invoke(line.split())
        assert code == (3 if "missing" in line else 0), line
        text = screen.bytes.decode(encoding)
        assert text or "missing" in line or "pin" in line, line
        if "--json" in line:
            assert "海の詩 🌊" in json.dumps(json.loads(text), ensure_ascii=False)
        elif encoding == "ascii" and "--fields" in line:
            assert "\\xfc" in text


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_a_routing_is_explained_in_any_encoding(
    run: Any, routed_library: Library, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    screen = Screen(encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        assert invoke(["route", "--prompt", "das Meer, 海 🌊", "--explain", "--top-k", "2"]) == 0
    text = screen.bytes.decode(encoding)
    assert "Entropy" in text
    assert "#" in text


def test_bars_and_dots_are_ascii_where_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, bar, dots in (("utf-8", "█▌", "…"), ("cp1252", "##", "…"), ("ascii", "##", "..")):
        monkeypatch.setattr(sys, "stdout", Screen(encoding))
        assert (out.bar(0.375, 4), out.ellipsis()) == (bar, dots)
