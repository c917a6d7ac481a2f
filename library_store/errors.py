"""Every error a store raises on purpose.

StoreError                  .hint: what to do next, or None
├── NotAStore               no FORMAT file there, or a directory full of something else
├── StoreExists             `create` where a store already is
├── UnknownFormat           FORMAT is newer than this code, or not readable
├── StoreLocked             another process held the ref lock too long
├── InvalidDigest           text that is not a digest, or too short a prefix
├── InvalidName             text that is not a ref
├── AmbiguousDigest         a prefix of several digests; .candidates lists them
├── ObjectNotFound          no such object
├── ObjectCorrupt           the bytes there do not have the digest they are kept under
├── RefNotFound             no such ref
├── RefConflict             the ref moved meanwhile, or another name holds its place
├── RefCorrupt              a ref file or a log line that cannot be read as one
└── GcAborted               something could not be read, so nothing was removed

What the disk itself says (`OSError`: full, not permitted, failing) is passed on unchanged.
"""
# ruff: noqa: N818  -- the names say what happened; "Error" in each would say nothing more

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library_store.digest import Digest


class StoreError(Exception):
    """The root of the tree. `hint` says what to do next, where something can be done."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class NotAStore(StoreError):
    """There is no store at this path."""


class StoreExists(StoreError):
    """There is a store at this path already."""


class UnknownFormat(StoreError):
    """The store's FORMAT file is newer than this code understands, or is damaged."""


class StoreLocked(StoreError):
    """Another process holds the lock that a ref moves under."""


class InvalidDigest(StoreError):
    """The text is not `sha256:` and 64 hex digits, or a prefix of 7 of them or more."""


class InvalidName(StoreError):
    """The text is not a ref: `name[:tag]` in lower case."""


class AmbiguousDigest(StoreError):
    """Several objects start with this prefix."""

    def __init__(
        self, message: str, *, candidates: tuple[Digest, ...] = (), hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.candidates = candidates


class ObjectNotFound(StoreError):
    """The store does not hold this object."""


class ObjectCorrupt(StoreError):
    """The bytes kept under a digest do not hash to it."""


class RefNotFound(StoreError):
    """The store has no ref of this name."""


class RefConflict(StoreError):
    """The ref is not where the caller expected, or its name collides with another."""


class RefCorrupt(StoreError):
    """A ref or its log is there and cannot be read as one."""


class GcAborted(StoreError):
    """Garbage collection met something it could not read, and removed nothing."""
