"""Whatever a power cut leaves of index.db, the library answers as if there were none.

SQLite writes it in place, a page at a time, and keeps no journal on the disk: of the pages that one
write changes, any may be old, new or never written, and the file of any length between. What other
programs leave beside it, such as a journal of another time, is among the states as well.
"""

import itertools
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptlib.experts import Library, index
from library_store import _process
from tests.soak import FACTOR, report
from tests.tiny import make_expert

PAGE, SECTOR = 4096, 512
MIXTURES = 120 * FACTOR  # of one write, where there are more


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """One that keeps its list in the index too, whatever its size, and however young it is."""
    monkeypatch.setattr(index, "WORTH_KEEPING", 1)
    monkeypatch.setattr(_process, "clock", lambda: time.time() + 10)
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="index-", dir=fast) as home:
        yield Library.open(Path(home) / "library", create=True)


def test_no_state_of_the_index_changes_an_answer(library: Library) -> None:
    seen: set[tuple[bytes, bytes]] = set()
    versions = written(library)
    for number, (old, new) in enumerate(itertools.pairwise(versions)):
        assert wrong_answer(library, old, new, seen, seed=number) is None
    report("states of the index", states=len(seen), pages=len(versions[-1]) // PAGE)
    assert len(seen) >= 2000


def test_without_checksums_one_does(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_checksum", lambda key, body: 0)
    old, new = written(library)[-2:]
    assert wrong_answer(library, old, new, set(), seed=0) is not None


def index_of(library: Library) -> Path:
    assert library.path is not None
    return library.path / "index.db"


def written(library: Library) -> list[bytes]:
    """What the file was after each of a few writes, and then made again from nothing."""
    versions = [b""]
    for number in range(6):
        library.add(make_expert(number, description=f"{number} " * 600), f"e{number}")
        library.summaries()
        versions.append(index_of(library).read_bytes())
    return [*versions, rebuilt(library)]


def wrong_answer(
    library: Library, old: bytes, new: bytes, seen: set[tuple[bytes, bytes]], *, seed: int
) -> bytes | None:
    """The first state between two writes that the library answers wrongly from, if any."""
    answer = Library(library.store).summaries()
    path = index_of(library)
    for state in states(old, new, seed=seed):
        for journal in journals(old, new, number=len(seen)):
            if (state, journal) not in seen:
                seen.add((state, journal))
                put_back(path, state, journal)
                if library.summaries() != answer:
                    return state
    return None


def rebuilt(library: Library) -> bytes:
    """A file with the same rows in other places."""
    rows, path = dict(library.summaries().values()), index_of(library)
    path.unlink()
    for digest in sorted(rows):
        index.write(path, {digest: rows[digest]})
    return path.read_bytes()


def states(old: bytes, new: bytes, *, seed: int) -> Iterator[bytes]:
    """The file between two writes: cut anywhere, and with each page old, new or zero."""
    yield from (whole[:cut] for whole in (old, new) for cut in range(0, len(whole), SECTOR))
    generator = random.Random(seed)
    pages = parts(old, new, PAGE)
    if math.prod(map(len, pages)) <= MIXTURES:
        yield from map(b"".join, itertools.product(*pages))
    for size in (PAGE, SECTOR):
        options = parts(old, new, size)
        for _ in range(MIXTURES // 2):
            whole = b"".join(
                generator.choice(some[:2] if size == SECTOR else some) for some in options
            )
            yield whole
            yield whole[: PAGE * generator.randrange(len(pages) + 1)]


def parts(old: bytes, new: bytes, size: int) -> list[list[bytes]]:
    """What each part of the file may be: old, new or zero."""
    length = max(len(old), len(new))
    before, after = old.ljust(length, b"\0"), new.ljust(length, b"\0")
    return [
        list(dict.fromkeys((before[i : i + size], after[i : i + size], bytes(size))))
        for i in range(0, length, size)
    ]


def journals(old: bytes, new: bytes, *, number: int) -> Iterator[bytes]:
    """Mostly none; every eighth time one of another change of the file, whole, torn or zeros."""
    yield b""
    if number % 8 == 0:
        journal = _journal(old or new)
        yield from (journal, journal[: len(journal) // 2], bytes(len(journal)))


def _journal(pages: bytes) -> bytes:
    """As SQLite writes it before it changes these pages: a header, and each with a checksum."""
    count = len(pages) // PAGE
    nonce = 0
    header = bytes.fromhex("d9d505f920a163d7")
    header += b"".join(n.to_bytes(4, "big") for n in (count, nonce, count, SECTOR, PAGE))
    records = [
        (number + 1).to_bytes(4, "big") + page + _sum(page, nonce).to_bytes(4, "big")
        for number, page in enumerate(pages[i : i + PAGE] for i in range(0, len(pages), PAGE))
    ]
    return header.ljust(SECTOR, b"\0") + b"".join(records)


def _sum(page: bytes, nonce: int) -> int:
    return (nonce + sum(page[i] for i in range(len(page) - 200, 0, -200))) & 0xFFFFFFFF


def put_back(path: Path, state: bytes, journal: bytes) -> None:
    side = path.with_name(path.name + "-journal")
    if journal:
        side.write_bytes(journal)
    else:
        side.unlink(missing_ok=True)
    path.write_bytes(state)
