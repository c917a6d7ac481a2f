"""Stores to test, and the only kind of manifest these tests know."""

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from library_store import Digest, LocalStore, MemoryStore, Store


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync takes no time. No test can see the difference: the page cache outlives a process.

    That syncs happen, and in which order, test_local.py sees by counting the calls.
    """
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else LocalStore.create(tmp_path / "library")


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore.create(tmp_path / "library")


@pytest.fixture
def parent() -> Callable[..., bytes]:
    """The bytes of an object that refers to others."""

    def make(*digests: Digest, salt: str = "") -> bytes:
        return "\n".join([f"parent {salt}", *map(str, digests)]).encode()

    return make


@pytest.fixture
def children() -> Callable[[Digest, bytes], Iterable[Digest]]:
    """What such an object refers to."""

    def read(digest: Digest, data: bytes) -> Iterator[Digest]:
        if data.startswith(b"parent"):
            for line in data.decode().split("\n")[1:]:
                yield Digest.parse(line)

    return read


@pytest.fixture
def later() -> datetime:
    """A time at which all that a test did is past every grace period."""
    return datetime.now(UTC) + timedelta(days=2)
