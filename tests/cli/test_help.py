"""Help as manual pages: sections, widths, every option, and exit codes that are true."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from adaptlib.cli import commands, help, main, pages  # noqa: A004

COMMANDS = [*commands.COMMANDS]
WIDTHS = (40, 80, 160)


def params(name: str) -> list[Any]:
    group: Any = typer.main.get_command(main.application(name))
    return group.commands[name].params


def sections(text: str) -> dict[str, str]:
    """The parts of a page by their headings."""
    found = re.split(r"^(\S[^\n]*):\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


def test_every_command_has_a_page_and_every_page_a_command() -> None:
    assert pages.PAGES.keys() == commands.COMMANDS.keys()
    assert {page.group for page in pages.PAGES.values()} == set(pages.GROUPS)
    assert all(other in commands.COMMANDS for page in pages.PAGES.values() for other in page.see)
    assert all(name not in page.see for name, page in pages.PAGES.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_has_its_sections_and_every_option(run: Any, name: str) -> None:
    result = run("help", name)
    assert (result.code, result.err) == (0, "")
    assert result == run(name, "--help")
    assert result == run(name, "-h")
    first = result.out.splitlines()
    assert first[0].startswith(f"Usage: adaptlib {name} ")
    assert re.fullmatch(r"  [A-Z].*", first[2])
    parts = sections(result.out)
    assert {"Options of every command", "Examples", "See also"} <= parts.keys()
    assert parts["Examples"].count("adaptlib") >= 2
    codes = parts["Exit codes (all: adaptlib --help)"]
    assert {int(code) for code in re.findall(r"^  (\d+) ", codes, re.MULTILINE)} == {
        0,
        2,
        *pages.PAGES[name].exits,
    }
    for param in params(name):
        assert param.help, param.name
        for option in (*param.opts, *param.secondary_opts):
            if option.startswith("-"):
                assert re.search(rf"^  (.*, )?(.* / )?{option}\b", result.out, re.MULTILINE)


@pytest.mark.parametrize("name", pages.PANELS)
def test_options_of_large_commands_are_in_groups(name: str) -> None:
    """Each option in one group, and no group names what is none."""
    options = {one.name for one in params(name) if one.param_type_name == "option"}
    grouped = [one for names in pages.PANELS[name].values() for one in names]
    assert options - set(help.COMMON) <= set(grouped)
    assert len(grouped) == len(set(grouped))
    everywhere = {one.name for other in pages.PANELS for one in params(other)}
    assert set(grouped) <= everywhere


@pytest.mark.parametrize("columns", WIDTHS)
def test_no_line_is_wider_than_the_terminal(
    run: Any, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    widest = 0
    for words in (["--help"], *(["help", name] for name in COMMANDS)):
        lines = run(*words).out.splitlines()
        longest = max(lines, key=len)
        # A path or a list of choices that is one word is not cut.
        assert len(longest) < min(columns, 81) or " " not in longest.strip(), longest
        widest = max(widest, len(longest))
    assert widest > columns * 0.8 or columns > 80


def test_examples_that_are_folded_are_the_same_commands(run: Any, monkeypatch: Any) -> None:
    for columns in (40, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        for name in COMMANDS:
            shown = sections(run("help", name).out)["Examples"]
            unfolded = re.sub(r" \\\n +", " ", shown)
            assert [line.strip() for line in unfolded.splitlines() if line] == [
                *commands.examples(name)
            ]


def test_the_overview_has_groups_codes_and_variables(run: Any) -> None:
    result = run("--help")
    assert (result.code, result.err) == (0, "")
    assert result == run("help")
    parts = sections(result.out)
    assert [*parts][: len(pages.GROUPS)] == [*pages.GROUPS]
    for name, page in pages.PAGES.items():
        assert f"  {name} " in parts[page.group]
        assert page.summary in parts[page.group]
        assert len(page.summary) < 62
    found = {int(code) for code in re.findall(r"^  (\d+) ", parts["Exit codes"], re.MULTILINE)}
    assert found == pages.CODES.keys()
    assert all(name in parts["Environment"] for name in pages.VARIABLES)
    assert "ADAPTLIB_" not in "".join(read_variables() - pages.VARIABLES.keys())


def read_variables() -> set[str]:
    """The variables of adaptlib's own that the code reads."""
    from pathlib import Path

    import adaptlib.cli

    import adaptlib

    folders = [Path(str(m.__file__)).parent for m in (adaptlib, adaptlib.cli)]
    texts = (file.read_text(encoding="utf-8") for f in folders for file in f.rglob("*.py"))
    return {name for text in texts for name in re.findall(r"\"(ADAPTLIB_[A-Z_]+)\"", text)}


def test_no_arguments_are_help_on_stderr_and_no_success(run: Any) -> None:
    result = run()
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Usage: adaptlib")
    assert "Exit codes:" in result.err


def test_help_of_what_is_no_command_says_what_is_there(run: Any) -> None:
    for words in (["help", "rout"], ["rout", "--help"]):
        result = run(*words)
        assert (result.code, result.out) == (2, "")
        assert "did you mean route?" in result.err


def documented() -> Iterator[tuple[str, int]]:
    for name, page in pages.PAGES.items():
        for code in page.exits:
            yield name, code


def test_exit_codes_of_pages_are_codes() -> None:
    assert {code for _, code in documented()} <= pages.CODES.keys()
    assert set(pages.ANY) <= pages.CODES.keys()
