"""Libraries and base models to test with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaptlib.experts import Library
from library_store import LocalStore, MemoryStore
from tests import tiny


@pytest.fixture(params=["memory", "local"])
def library(request: pytest.FixtureRequest, tmp_path: Path) -> Library:
    if request.param == "memory":
        return Library(MemoryStore())
    return Library(LocalStore.create(tmp_path / "library"), tmp_path / "library")


@pytest.fixture
def local(tmp_path: Path) -> Library:
    return Library.open(tmp_path / "library", create=True)


@pytest.fixture
def save_llama() -> Callable[..., Any]:
    return tiny.save_llama


@pytest.fixture
def tiny_tokenizer() -> Any:
    return tiny.make_tokenizer()
