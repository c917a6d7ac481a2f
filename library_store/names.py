"""A ref: the name people give to a digest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, final

from library_store.errors import InvalidName

GRAMMAR: Final = (
    "name[:tag]; a name is 1 to 8 parts joined by '/', and each part and the tag is 1 to 64 "
    "characters of a-z 0-9 . _ - that starts with a letter or digit; 200 characters in all"
)
MAX_PARTS: Final = 8
MAX_LENGTH: Final = 200

_PART: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

# A part is a file name on every system the library may be copied to. These would open a device
# on Windows, with or without an extension.
_DEVICES: Final = frozenset(
    ["con", "prn", "aux", "nul", *(f"{dev}{n}" for dev in ("com", "lpt") for n in range(10))]
)

# .lock and .tmp are what stores call their own files; log/<name>.jsonl is the log of <name>, so a
# name `a.jsonl/b` would want a directory where the log of `a` is a file.
_SUFFIXES: Final = (".lock", ".tmp", ".jsonl")


@final
@dataclass(frozen=True, slots=True, order=True)
class Ref:
    """A mutable name, `name[:tag]`, such as `sql`, `sql:v2` or `team/sql:v2`.

    Lower case only, so that two refs never collide on a file system that ignores case. Safe as a
    path by construction. Raises InvalidName, which names the part that is wrong.
    """

    name: str
    tag: str = "latest"

    def __post_init__(self) -> None:
        for text, noun in ((self.name, "name"), (self.tag, "tag")):
            if not isinstance(text, str):
                raise InvalidName(f"a ref's {noun} is text, got {type(text).__name__}")
        length = len(self.name) + 1 + len(self.tag)
        if length > MAX_LENGTH:  # before any of it is repeated in an error
            shown = f"{self.name}:{self.tag}"[:60]
            raise _invalid(f"{shown!r}... is {length} long, wanted {MAX_LENGTH} at most")
        if self.name == "sha256":
            raise _invalid("name 'sha256' is how a digest starts")
        parts = self.name.split("/")
        for part in parts:
            _check(part, "name", whole=self.name)
        _check(self.tag, "tag", whole=self.tag)
        if len(parts) > MAX_PARTS:
            raise _invalid(f"name {self.name!r} has {len(parts)} parts, wanted {MAX_PARTS} at most")

    @classmethod
    def parse(cls, text: str) -> Ref:
        """Read `name` or `name:tag`. Raises InvalidName."""
        name, colon, tag = text.partition(":")
        return cls(name, tag) if colon else cls(name)

    @property
    def parts(self) -> tuple[str, ...]:
        """The name's parts and then the tag: the ref's path below `refs/`."""
        return (*self.name.split("/"), self.tag)

    def __str__(self) -> str:
        return self.name if self.tag == "latest" else f"{self.name}:{self.tag}"


def _check(part: str, noun: str, *, whole: str) -> None:
    where = f"{noun} {whole!r}" if part == whole else f"part {part!r} of {noun} {whole!r}"
    if not part:
        raise _invalid(f"{where} is empty" if whole == part else f"{noun} {whole!r}: empty part")
    if not _PART.fullmatch(part):
        raise _invalid(f"{where} is not made of a-z 0-9 . _ - (1 to 64, letter or digit first)")
    if ".." in part or part.endswith("."):
        raise _invalid(f"{where} has '..' or ends in a dot")
    if part.split(".")[0] in _DEVICES:
        raise _invalid(f"{where} is the name of a Windows device")
    if part.endswith(_SUFFIXES):
        raise _invalid(
            f"{where} ends in {' or '.join(_SUFFIXES)}, which the store keeps for itself"
        )


def _invalid(message: str) -> InvalidName:
    return InvalidName(f"not a ref: {message}", hint=f"a ref is {GRAMMAR}")
