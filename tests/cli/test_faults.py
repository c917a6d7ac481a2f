"""Whichever call to the disk fails, a command happens or does not, and says which."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli import broken
from tests.cli.trials import CASES, PAIRS, ROUNDS
from tests.soak import report
from tests.store.faulty import CODES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trials(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """What the trials of a case gave, from a process that goes through one case after another."""
    template = tmp_path_factory.mktemp("faults") / "template"
    words = [sys.executable, "-m", "tests.cli.trials", str(template), broken.make(template)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def ask(name: str) -> dict[str, Any]:
            asked.write(f"{name}\n")
            asked.flush()
            return json.loads(answers.readline())

        yield ask
        asked.close()


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
