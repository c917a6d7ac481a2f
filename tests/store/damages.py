"""What can happen to a file of a store behind its back, by name; and how to take it back."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from library_store import Digest

Damage = Callable[[Path, random.Random], Any]


def _write(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def flip(path: Path, rng: random.Random) -> None:
    """One to three bits, at different places."""
    data = bytearray(path.read_bytes())
    for place in rng.sample(range(8 * len(data)), min(rng.randint(1, 3), 8 * len(data))):
        data[place // 8] ^= 1 << place % 8
    _write(path, bytes(data))


def truncate(path: Path, rng: random.Random) -> None:
    """Cut off anywhere, also to nothing."""
    data = path.read_bytes()
    _write(path, data[: rng.randrange(len(data))])


def extend(path: Path, rng: random.Random) -> None:
    """Random bytes after its end, or what is there once more."""
    data = path.read_bytes()
    _write(path, data + rng.choice([rng.randbytes(rng.randint(1, 40)), data, b"\0", b"\n"]))


def zero_page(path: Path, rng: random.Random) -> None:
    """Zeros in a stretch that held something else, as of a page that was never written."""
    data = bytearray(path.read_bytes())
    written = [i for i, byte in enumerate(data) if byte]
    begin = rng.choice(written)
    end = min(len(data), begin + rng.choice([16, 512, 4096]))
    data[begin:end] = bytes(end - begin)
    _write(path, bytes(data))


def scramble(path: Path, rng: random.Random) -> None:
    """Other bytes, as many."""
    data = path.read_bytes()
    other = rng.randbytes(len(data))
    _write(path, other if other != data else data[::-1] + b"?")


def delete(path: Path, _: random.Random) -> None:
    path.unlink()


def directory(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "x").write_bytes(b"x")


def symlink(path: Path, rng: random.Random) -> None:
    """To nothing, or to a file with the very bytes, which somebody else may change."""
    aside = path.parent.parent.parent.parent / f"aside-{path.name}"
    if rng.random() < 0.5:
        aside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(aside)


def fifo(path: Path, _: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


BYTES: Final[dict[str, Damage]] = {
    "flip": flip,
    "truncate": truncate,
    "extend": extend,
    "zero page": zero_page,
    "scramble": scramble,
}
"""Damages after which there is a file still."""

ALL: Final[dict[str, Damage]] = BYTES | {
    "delete": delete,
    "directory": directory,
    "symlink": symlink,
    "fifo": fifo,
}


def swap(one: Path, other: Path) -> None:
    """Each gets what the other held."""
    data = one.read_bytes(), other.read_bytes()
    _write(one, data[1])
    _write(other, data[0])


def object_path(root: Path, digest: Digest | str) -> Path:
    """Where an object is in the library at `root`."""
    hexadecimal = str(digest).removeprefix("sha256:")
    return root / "objects" / "sha256" / hexadecimal[:2] / hexadecimal


@final
@dataclass(frozen=True)
class Done:
    """A damage: what was done, and to which files."""

    kind: str
    paths: tuple[Path, ...]


@contextmanager
def damaged(paths: list[Path], rng: random.Random) -> Iterator[Done]:
    """Inside, one of these files is damaged, or two of them are swapped; afterwards they are as
    they were."""
    kind = rng.choice([*ALL, "swap"])
    victims = tuple(rng.sample(paths, 2 if kind == "swap" else 1))
    before = [path.read_bytes() for path in victims]
    try:
        if kind == "swap":
            swap(*victims)
        else:
            ALL[kind](victims[0], rng)
        yield Done(kind, victims)
    finally:
        for path, data in zip(victims, before, strict=True):
            remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def remove(path: Path) -> None:
    """Whatever is there."""
    if path.is_dir() and not path.is_symlink():
        for below in path.iterdir():
            below.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
