"""For all tests: types checked as written, no network, nobody's own library or cache."""

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

# Before anything imports huggingface_hub, which reads them once.
_HOME = tempfile.TemporaryDirectory(prefix="adaptlib-tests-")
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
_OURS = ("ADAPTLIB_LIBRARY", "ADAPTLIB_DEBUG", "ADAPTLIB_NO_CONFIG")
for _name in (*_OURS, "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS"):
    os.environ.pop(_name, None)

if all(importlib.util.find_spec(package) for package in ("jaxtyping", "beartype")):
    from jaxtyping import install_import_hook

    # Shapes in signatures hold in every call of every test. Modules that are imported before this
    # line would not be checked, so it is here and imports nothing of adaptlib. Not the command
    # line: typer reads those annotations, and calls with others.
    _PARTS = ("experts", "clustering", "merging", "routing", "training", "evaluation", "demo")
    install_import_hook([f"adaptlib.{part}" for part in _PARTS], "beartype.beartype")


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the library of whoever runs it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))
