"""Whichever call to the disk fails, a command happens or does not, and says which."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import broken
from tests.cli.trials import CASES, PAIRS, ROUNDS
from tests.soak import report
from tests.store.faulty import CODES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[str]"]:
    """The process that runs the trials of one case after the other."""
    template = tmp_path_factory.mktemp("faults") / "template"
    gc_id = broken.make(template)
    words = [sys.executable, "-m", "tests.cli.trials", str(template), gc_id]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


@pytest.mark.parametrize("name", CASES)
def test_a_command_happens_or_does_not(name: str, trials: "subprocess.Popen[str]") -> None:
    """Every call of every command fails once with each of several errors, every write is cut short
    and every sync fails. See `trials.check` for what holds after each."""
    assert trials.stdin is not None
    assert trials.stdout is not None
    trials.stdin.write(f"{name}\n")
    trials.stdin.flush()
    figures = json.loads(trials.stdout.readline())
    broken = figures.pop("broken")
    assert broken == [], "\n".join(broken)
    assert set(figures.pop("used")) >= set(CODES)
    assert figures["calls"] > 0
    assert figures["trials"] >= ROUNDS * figures["calls"] + PAIRS
    report(f"faults: {name}", **figures)
