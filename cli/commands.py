"""The commands by name, imported when they are asked for: `--version` must not wait for them."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

COMMANDS = {
    "init": "init:init",
    "add": "add:add",
    "list": "listing:list_experts",
    "show": "show:show",
    "rm": "rm:rm",
    "mv": "mv:mv",
    "tag": "tag:tag",
    "pin": "pin:pin",
    "unpin": "pin:unpin",
    "log": "log:log",
    "diff": "diff:diff",
    "export": "export:export",
    "verify": "verify:verify",
    "gc": "gc:gc",
    "cluster": "cluster:cluster",
    "merge": "merge:merge",
    "route": "route:route",
    "train": "train:train",
    "train-library": "train_library:train_library",
    "train-router": "train_router:train_router",
    "eval": "eval:evaluate",
    "bench": "bench:bench",
    "doctor": "doctor:doctor",
    "config": "config:config",
    "schema": "schema:schema",
    "completion": "completion:completion",
}
ALIASES = {"ls": "list", "remove": "rm"}


def load(name: str) -> Callable[..., Any]:
    """The function of a command."""
    module, _, function = COMMANDS[name].partition(":")
    return getattr(import_module(f".{module}", __package__), function)


def examples(name: str) -> tuple[str, ...]:
    """The examples of a command's help. A module of several commands has them by name."""
    found = sys.modules[load(name).__module__].EXAMPLES
    return found[name] if isinstance(found, dict) else found


def asked(arguments: list[str]) -> str | None:
    """The command that these arguments run, where that is clear; else None, for all of them."""
    before = ["", *arguments]  # of each word the one before: --color takes one
    words = [
        word
        for word, last in zip(arguments, before, strict=False)
        if not word.startswith("-") and last != "--color"
    ]
    name = ALIASES.get(words[0], words[0]) if words else None
    return name if name in COMMANDS else None
