"""Whichever call to the disk fails, a command happens or does not, and says which."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cli import broken
from tests.cli.trials import CASES, PAIRS, ROUNDS
from tests.soak import report
from tests.store.faulty import CODES

ROOT = Path(__file__).parents[2]
WORKERS = 2  # processes, which run the cases that are asked for side by side


@pytest.fixture(scope="module")
def trials(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """What the trials of a case gave. They begin with the first question."""
    template = tmp_path_factory.mktemp("faults") / "template"
    words = [sys.executable, "-m", "tests.cli.trials", str(template), broken.make(template)]
    asked = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
    ]
    pipe = subprocess.PIPE
    with ExitStack() as stack:
        answers: dict[str, Any] = {}
        for first in range(WORKERS):
            process = subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
            stack.enter_context(process)
            assert process.stdin is not None
            names = asked[first::WORKERS]
            process.stdin.write("".join(f"{name}\n" for name in names))
            process.stdin.close()
            answers |= dict.fromkeys(names, process.stdout)
        yield lambda name: json.loads(answers[name].readline())


@pytest.mark.parametrize("name", CASES)
def test_a_command_happens_or_does_not(name: str, trials: Callable[[str], dict[str, Any]]) -> None:
    """Every call of every command fails once with each of several errors, every write is cut short
    and every sync fails. See `trials.check` for what holds after each."""
    figures = trials(name)
    assert figures.pop("name") == name
    broken = figures.pop("broken")
    assert broken == [], "\n".join(broken)
    assert set(figures.pop("used")) >= set(CODES)
    assert figures["calls"] > 0
    assert figures["trials"] >= ROUNDS * figures["calls"] + PAIRS
    report(f"faults: {name}", **figures)
