"""A digest: the identity of bytes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final, final

from library_store.errors import InvalidDigest

# A digest becomes a path. One strict pattern, matched whole, is what keeps `..` out of it
# (CVE-2024-37032 and CVE-2026-7020 are what happens without one).
_TEXT: Final = re.compile(r"sha256:([0-9a-f]{64})")
_HEX: Final = re.compile(r"[0-9a-f]{64}")


@final
@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The SHA-256 of exact bytes, written `sha256:<64 hex>` everywhere.

    `hex` is the 64 lower-case digits alone. Raises InvalidDigest for anything else.
    """

    hex: str

    def __post_init__(self) -> None:
        if not isinstance(self.hex, str) or not _HEX.fullmatch(self.hex):
            raise InvalidDigest(f"not a SHA-256: {self.hex!r} is not 64 lower-case hex digits")

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Digest:
        """Hash `data`."""
        return cls(hashlib.sha256(data).hexdigest())

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read `sha256:<64 hex>` and nothing else. Raises InvalidDigest."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise InvalidDigest(f"not a digest: {text!r}, wanted sha256:<64 lower-case hex digits>")
        return cls(match[1])

    @property
    def short(self) -> str:
        """The first 12 hex digits: for people, and accepted wherever a prefix is."""
        return self.hex[:12]

    def __str__(self) -> str:
        return f"sha256:{self.hex}"
