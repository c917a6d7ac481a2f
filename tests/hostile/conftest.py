"""The server that runs commands in watched children, and libraries for them."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Outcome(NamedTuple):
    """What a command did; see `server.py`."""

    code: int
    out: str
    err: str
    seconds: float
    peak: float
    deeds: list[str]
    opened: list[str]


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    home = tmp_path_factory.mktemp("home")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("ADAPTLIB")},
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "XDG_DATA_HOME": str(home / "xdg"),
    }
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == '"ready"\n'
        yield process
        process.stdin.close()
        process.wait(timeout=60)


@pytest.fixture
def watched(server: subprocess.Popen[str], tmp_path: Path) -> Run:
    """Runs one command in a child, from `tmp_path/here`, which may write in `write` alone."""

    def run(*words: str | Path, write: Sequence[Path] = (), deed: str | None = None) -> Outcome:
        here = tmp_path / "here"
        here.mkdir(exist_ok=True)
        request = {
            "words": [str(word) for word in words],
            "cwd": str(here),
            "write": [str(path) for path in write],
            "deed": deed,
        }
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return Outcome(**json.loads(server.stdout.readline()))

    return run


def tree(root: Path) -> dict[str, str]:
    """Everything below a directory: what it is, its rights, and its content or where it leads."""
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        state = path.lstat()
        if path.is_symlink():
            what = os.readlink(path)  # noqa: PTH115 -- the text as it is
        elif path.is_file():
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = ""
        found[str(path.relative_to(root))] = f"{state.st_mode:o} {what}"
    return found
