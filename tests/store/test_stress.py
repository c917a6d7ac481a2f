"""Sixteen processes on one library, and one that collects: nothing that was kept is lost."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.soak import FACTOR, report

ROOT = Path(__file__).parents[2]
SEEDS, PROCESSES, OPERATIONS = 5 * FACTOR, 16, 200


def hammer(directory: Path, seed: int, *, lies: bool) -> dict[str, Any]:
    """One run of tests/store/hammer.py, which see; its figures."""
    command = [
        *(sys.executable, "-m", "tests.store.hammer", str(directory)),
        *("--seed", str(seed), "--operations", str(OPERATIONS)),
        *(["--lies"] if lies else []),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"seed {seed}, lies={lies}: {done.stderr[-8000:]}"
    return json.loads(done.stdout)


@pytest.mark.parametrize("lies", [False, True], ids=["lock", "lock-that-lies"])
def test_whatever_others_do_at_once_nothing_kept_is_lost(tmp_path, lies):
    figures: Counter[str] = Counter()
    met: Counter[str] = Counter()
    for seed in range(SEEDS):
        directory = tmp_path / str(seed)
        directory.mkdir()
        found = hammer(directory, seed, lies=lies)
        met.update(found.pop("counts"))
        figures.update(found)
    report(f"stress, lies={lies}", seeds=SEEDS, processes=SEEDS * PROCESSES, **figures)
    assert figures["operations"] == SEEDS * PROCESSES * OPERATIONS
    assert figures["removed"] > 50 * SEEDS
    assert figures["restored"] > 10 * SEEDS
    for act in ("add", "tag", "rename", "remove", "open_expert", "move_own", "move_shared"):
        assert met[act] > SEEDS
