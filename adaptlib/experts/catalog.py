"""Catalog: the names in a library and what is known of them, without opening an expert.

Imports no NumPy, so that listing and completing names wait for nothing.
"""

import difflib
import errno
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from adaptlib.errors import ConflictError, CorruptError, NotFoundError, RefusedError, UsageError
from adaptlib.experts import index
from adaptlib.experts.derived import refuse_links
from adaptlib.experts.index import Summary
from adaptlib.experts.location import library_path
from adaptlib.experts.names import PINS, RESERVED
from library_store import (
    AmbiguousDigest,
    Digest,
    InvalidName,
    LocalStore,
    NotAStore,
    ObjectNotFound,
    Ref,
    RefNotFound,
    Store,
)

_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{7,64}")


@final
@dataclass(frozen=True)
class Catalog:
    """The names of the library over `store`; `path` is its directory, None where it has none."""

    store: Store
    path: Path | None = None

    @classmethod
    def open(cls, path: str | Path | None = None, *, create: bool = False) -> "Catalog":
        """The library at `path`, or where `library_path` finds one. NotFoundError where there is
        none, unless `create`."""
        where, why = library_path(path)
        try:
            refuse_links(where)
            return cls(LocalStore.open(where), where)
        except NotAStore:
            if not create:
                raise NotFoundError(
                    f"no library at {where} ({why})", hint=f"make one: adaptlib init {where}"
                ) from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise NotFoundError(
                f"no library at {str(where)[:60]}...: the name is too long"
            ) from None
        try:
            return cls(LocalStore.create(where), where)
        except NotAStore as error:
            raise ConflictError(str(error), hint=error.hint) from None
        except (FileExistsError, NotADirectoryError):
            raise ConflictError(
                f"a library is a directory; {where} is a file, or below one"
            ) from None

    def listed(self) -> dict[tuple[str, str], str]:
        """Digest by (name, tag), sorted, of experts alone. Of thousands, what did not change since
        it was last listed is taken from the index."""
        where = self.path / "index.db" if self.path else None
        seen = index.read_listing(where) if where else None
        found, now = self.store.listing(seen)
        if where and now is not None and now is not seen:
            index.write_listing(where, now)
        return {
            pair: f"sha256:{hexadecimal}"
            for pair, hexadecimal in found.items()
            if pair[0].split("/", 1)[0] not in RESERVED
        }

    def names(self) -> dict[str, str]:
        """Digest by name: the tag `latest` of each name, or its last tag where it has no latest."""
        chosen: dict[str, tuple[str, str]] = {}
        for (name, tag), digest in self.listed().items():
            if name not in chosen or chosen[name][0] != "latest":
                chosen[name] = (tag, digest)
        return {_text(name, tag): digest for name, (tag, digest) in chosen.items()}

    def tags(self) -> dict[str, str]:
        """Digest by `name:tag`, every tag of every name."""
        return {_text(name, tag): digest for (name, tag), digest in self.listed().items()}

    def pins(self) -> dict[str, str]:
        """Digest by label, of what is pinned; see `Library.pin`."""
        found, _ = self.store.listing()
        first = f"{PINS}/"
        return {
            name.removeprefix(first): f"sha256:{digest}"
            for (name, _), digest in found.items()
            if name.startswith(first)
        }

    def digest(self, name: str) -> str:
        """The digest (`sha256:...`) of a name, a `name:tag` or a prefix of a digest.

        NotFoundError suggests the nearest names; UsageError where the prefix fits several.
        """
        with suppress(InvalidName):
            if found := self.at(Ref.parse(name)):
                return str(found)
            tagged = [digest for (held, _), digest in self.listed().items() if held == name]
            if tagged:
                return tagged[-1]
        if is_digest(name):
            from adaptlib.experts.codec import parse_manifest
            from adaptlib.experts.damage import read_object, refuse_lost

            try:
                digest = self.store.resolve(name)
            except AmbiguousDigest as error:
                raise UsageError(str(error), hint=error.hint) from None
            except ObjectNotFound:
                refuse_lost(self.store, name)
            else:
                data = read_object(self.store, digest)
                with suppress(CorruptError, RefusedError):  # a blob, and no expert
                    parse_manifest(digest.short, data)
                    return str(digest)
        known = list(self.tags())
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise NotFoundError(
            f"no expert named {name[:200]!r}"
            + (f"; did you mean {', '.join(close)}?" if close else ""),
            hint="see all: adaptlib list" if known else "the library is empty: adaptlib add SOURCE",
        )

    def at(self, ref: Ref) -> Digest | None:
        """What one name points to. Reads that ref alone: all of them, for each of a thousand
        experts, would be a million files."""
        if ref.name.split("/")[0] in RESERVED:
            return None
        try:
            return self.store.ref(ref)
        except RefNotFound:
            return None

    def refs(self) -> dict[Ref, Digest]:
        """Where every name points, read anew: for what is about to move one."""
        refs = self.store.refs()
        return {r: d for r, d in refs.items() if r.name.split("/")[0] not in RESERVED}

    def summaries(self) -> dict[str, tuple[str, Summary]]:
        """(digest, summary) by name, from the index, which is brought up to date."""
        return self.summarised(self.names())

    def summarised(self, names: dict[str, str]) -> dict[str, tuple[str, Summary]]:
        """`summaries`, of these names alone."""
        where = self.path / "index.db" if self.path else None
        known = index.read(where, names.values()) if where else {}
        missing = set(names.values()) - known.keys()
        if missing:
            from adaptlib.experts.codec import parse_manifest
            from adaptlib.experts.damage import read_object

            fresh: dict[str, Summary] = {}
            for text in missing:
                digest = Digest.parse(text)
                data = read_object(self.store, digest)
                fresh[text] = Summary.of(parse_manifest(digest.short, data))
            if where:
                index.write(where, fresh)
            known |= fresh
        return {name: (digest, known[digest]) for name, digest in names.items()}


def is_digest(text: str) -> bool:
    """Whether this could be a digest, or the start of one."""
    return _DIGEST.fullmatch(text) is not None


def _text(name: str, tag: str) -> str:
    return name if tag == "latest" else f"{name}:{tag}"
