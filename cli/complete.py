"""Completion: what can come next on a command line that is being typed.

`adaptlib __complete SHELL ...` is what the scripts of `adaptlib completion` call. It answers in
lines: first `values`, or `files` or `directories` where the shell is to complete those itself; then
a value each, with words on it after a tab where the shell shows them. Whatever goes wrong, it says
nothing: a shell is no place for errors.
"""

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .commands import ALIASES, COMMANDS
from .values import FREE, Library, taken

ASK: Final = "__complete"
LISTS: Final = (
    "experts",
    "compare",
    "router",
    "tasks",
    "metric",
    "fields",
    "sort",
    "target",
    "only",
)
SHELLS: Final = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Answer:
    """Values with words on each, or the kind of paths that the shell completes."""

    values: list[tuple[str, str]] = field(default_factory=list)
    paths: str = ""


def respond(arguments: Sequence[str]) -> int:
    """Answer `SHELL ...`: of bash the line up to the cursor and where it breaks words, of others
    the words up to the cursor. Always 0."""
    try:
        shell, *given = arguments
        if shell == "bash":
            line, breaks = given
            typed, whole = split(line)
            lines = _lines(
                complete(typed[1:]), strip=_broken(typed[-1], whole, breaks), words=False
            )
        else:
            lines = _lines(complete(given[1:]), strip=0, words=True)
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except Exception:
        if os.environ.get("ADAPTLIB_DEBUG"):
            raise
    return 0


def _lines(answer: Answer, *, strip: int, words: bool) -> Iterable[str]:
    yield answer.paths or "values"
    for value, said in answer.values:
        yield value[strip:] + (f"\t{said}" if words and said else "")


def split(line: str) -> tuple[list[str], bool]:
    """The words of a line, of which the last is the one that is being typed, and whether it is
    bare, without a quote."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    bare = True
    try:
        for word in lexer:
            words.append(word)
    except ValueError:  # a quote that is still open
        words.append(lexer.token)
        bare = False
    if line[-1:].isspace() and bare:
        words.append("")
    return words, bare


def _broken(word: str, bare: bool, breaks: str) -> int:
    """How much of a word bash takes for words before it: up to the last character that breaks one.
    It replaces the rest alone."""
    return 1 + max((word.rfind(c) for c in breaks if not c.isspace()), default=-1) if bare else 0


def complete(words: Sequence[str]) -> Answer:
    """What fits in the place of the last word, after the words before it."""
    *before, last = words
    at = next((i for i, word in enumerate(before) if word in _known()), None)
    if before[:1] == ["help"]:
        return Answer(_beginning(last, _commands())) if len(before) == 1 else Answer()
    command = ALIASES.get(before[at], before[at]) if at is not None else None
    group = _group(command)
    if at is None or command is None:
        state = _walk(group.params, before)
        if state.arguments:  # no command that is known
            return Answer()
        if state.waiting is None and not last.startswith("-"):
            return Answer(_beginning(last, _commands()))
        return _answer("", group.params, state, last)
    params = group.commands[command].params
    return _answer(command, params, _walk(params, before[at + 1 :]), last)


def _known() -> set[str]:
    return {*COMMANDS, *ALIASES}


def _commands() -> list[tuple[str, str]]:
    from .pages import PAGES

    return [*((name, PAGES[name].summary) for name in COMMANDS), ("help", "Say what one does.")]


def _group(command: str | None) -> Any:
    import typer

    from .main import application

    return typer.main.get_command(application(*([command] if command else [])))


@dataclass
class _State:
    """What the words before the last one left open: an option that waits for its value, how many
    arguments there were, which options, whether none can come any more, and the library."""

    waiting: Any = None
    arguments: int = 0
    given: set[str] = field(default_factory=set)
    only_arguments: bool = False
    library: str | None = None


def _walk(params: Sequence[Any], words: Sequence[str]) -> _State:
    options = _options(params)
    state = _State()
    waiting = 0
    for word in words:
        if waiting:
            waiting -= 1
            if state.waiting.name == "library":
                state.library = word
        elif state.only_arguments or not word.startswith("-") or word == "-":
            state.arguments += 1
        elif word == "--":
            state.only_arguments = True
        else:
            option, value = _option(options, word)
            if option is None:
                continue
            state.given.add(option.name)
            if option.is_flag:
                continue
            state.waiting, waiting = option, option.nargs - (value is not None)
            if option.name == "library" and value is not None:
                state.library = value
    if not waiting:
        state.waiting = None
    if state.library is not None:
        state.library = os.path.expandvars(state.library)
    return state


def _options(params: Sequence[Any]) -> dict[str, Any]:
    return {
        name: one
        for one in params
        if one.param_type_name == "option"
        for name in (*one.opts, *one.secondary_opts)
    }


def _option(options: dict[str, Any], word: str) -> tuple[Any, str | None]:
    """The option that a word is, and the value that is in the same word: `--k=3`, `-L/path`."""
    name, equals, value = word.partition("=")
    if name in options:
        return options[name], value if equals else None
    if not word.startswith("--") and word[:2] in options:
        return options[word[:2]], word[2:] or None
    return None, None


def _answer(command: str, params: Sequence[Any], state: _State, last: str) -> Answer:
    library = Library(state.library)
    if state.waiting is not None:
        return _values(command, state.waiting, library, last)
    options = _options(params)
    if last.startswith("-") and not state.only_arguments:
        name, equals, value = last.partition("=")
        if equals:
            if name not in options or options[name].is_flag:
                return Answer()
            return _values(command, options[name], library, value, before=f"{name}=")
        left = [
            (name, " ".join(str(one.help).split()))
            for name, one in options.items()
            if not one.hidden and (one.name not in state.given or one.multiple)
        ]
        return Answer(_beginning(last, [*left, ("--help", "Show this message and exit.")]))
    arguments = [one for one in params if one.param_type_name == "argument"]
    if not arguments or (state.arguments >= len(arguments) and arguments[-1].nargs != -1):
        return Answer()
    return _values(command, arguments[min(state.arguments, len(arguments) - 1)], library, last)


def _values(command: str, param: Any, library: Library, last: str, *, before: str = "") -> Answer:
    """What a parameter takes; of one that takes a list, for the last of it."""
    source = taken(command, param.name)
    if isinstance(source, str):
        return Answer(paths="" if source == FREE else source)
    already: set[str] = set()
    if param.name in LISTS and getattr(param, "multiple", False):
        head, comma, last = last.rpartition(",")
        before += head + comma
        already = {*head.split(",")}
    values = [pair for pair in source(library) if pair[0] not in already]
    return Answer([(before + value, said) for value, said in _beginning(last, values)])


def _beginning(start: str, values: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The values that begin so. A digest only for who has begun to type one: there are as many as
    experts, and nobody chooses by them."""
    found = [(value, said) for value, said in values if value.startswith(start)]
    named = [pair for pair in found if not _is_digest(pair[0])]
    return found if start.startswith("sha256:") or not named else named


def _is_digest(value: str) -> bool:
    bare = value.removeprefix("sha256:")
    return len(bare) == 12 and set(bare) <= set("0123456789abcdef")
