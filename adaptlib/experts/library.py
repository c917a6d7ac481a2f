"""Library: a mapping from names to experts, over a store."""

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, final

import msgspec

from adaptlib.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from adaptlib.experts import index, sketches
from adaptlib.experts.codec import (
    Manifest,
    Packed,
    assemble,
    changes_nothing,
    check_content,
    check_structure,
    encode_manifest,
    parse_manifest,
    unpack,
)
from adaptlib.experts.index import Summary
from adaptlib.experts.location import library_path
from adaptlib.experts.names import RECORDS, children, expert_ref, move_ref
from adaptlib.experts.pinning import pinned
from adaptlib.experts.sources import read_source
from library_store import (
    AmbiguousDigest,
    Digest,
    GcResult,
    InvalidName,
    LocalStore,
    LogEntry,
    NotAStore,
    ObjectNotFound,
    Problem,
    Ref,
    RefNotFound,
    Report,
    Store,
)

if TYPE_CHECKING:
    import adaptlib.experts.expert  # the whole name is what beartype finds from anywhere
    from adaptlib.experts.expert import Expert

_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{7,64}")


@dataclass(frozen=True)
class Added:
    """What `add` did. `new` is False where the same expert had this name already; `notes` are
    sentences for the reader: migrations made, checks that could not be made."""

    name: str
    digest: str
    manifest: Manifest
    new: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Prepared:
    """A source that was read and checked: what to keep, under which name, and what has it now."""

    packed: Packed
    ref: Ref
    before: Digest | None
    notes: tuple[str, ...]


@final
class Library(Mapping[str, "adaptlib.experts.expert.Expert"]):
    """Experts by name. Iterating gives each name once; a lookup takes `name`, `name:tag`,
    or the first seven or more characters of a digest."""

    def __init__(self, store: Store, path: Path | None = None) -> None:
        self.store = store
        self.path = path

    @classmethod
    def open(cls, path: str | Path | None = None, *, create: bool = False) -> "Library":
        """The library at `path`, or where `library_path` finds one. NotFoundError where there is
        none, unless `create`."""
        where, why = library_path(path)
        try:
            return cls(LocalStore.open(where), where)
        except NotAStore:
            if not create:
                raise NotFoundError(
                    f"no library at {where} ({why})", hint=f"make one: adaptlib init {where}"
                ) from None
        try:
            return cls(LocalStore.create(where), where)
        except NotAStore as error:
            raise ConflictError(str(error), hint=error.hint) from None
        except (FileExistsError, NotADirectoryError):
            raise ConflictError(
                f"a library is a directory; {where} is a file, or below one"
            ) from None

    # -- reading ------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> "Expert":
        return unpack(self.packed(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        try:
            self.digest(str(name))
        except (NotFoundError, UsageError):
            return False
        return True

    def names(self) -> dict[str, str]:
        """Digest by name: the tag `latest` of each name, or its last tag where it has no latest."""
        chosen: dict[str, tuple[Ref, Digest]] = {}
        for ref, digest in self._expert_refs().items():
            if ref.name not in chosen or chosen[ref.name][0].tag != "latest":
                chosen[ref.name] = (ref, digest)
        return {str(ref): str(digest) for ref, digest in chosen.values()}

    def tags(self) -> dict[str, str]:
        """Digest by `name:tag`, every tag of every name."""
        return {str(ref): str(digest) for ref, digest in self._expert_refs().items()}

    def digest(self, name: str) -> str:
        """The digest (`sha256:...`) of a name, a `name:tag` or a prefix of a digest.

        NotFoundError suggests the nearest names; UsageError where the prefix fits several.
        """
        with suppress(InvalidName):
            if found := self._at(Ref.parse(name)):
                return str(found)
            tagged = [str(d) for r, d in self._expert_refs().items() if r.name == name]
            if tagged:
                return tagged[-1]
        if _DIGEST.fullmatch(name):
            try:
                digest = self.store.resolve(name)
                self._manifest(digest)
                return str(digest)
            except AmbiguousDigest as error:
                raise UsageError(str(error), hint=error.hint) from None
            except (ObjectNotFound, CorruptError, RefusedError):
                pass  # nothing starts so, or it is a blob and no expert
        known = list(self.tags())
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise NotFoundError(
            f"no expert named {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""),
            hint="see all: adaptlib list" if known else "the library is empty: adaptlib add SOURCE",
        )

    def manifest(self, name: str) -> Manifest:
        """What is kept about an expert, without its tensors."""
        return self._manifest(Digest.parse(self.digest(name)))

    def packed(self, name: str) -> Packed:
        """An expert as bytes, mapped and verified."""
        digest = Digest.parse(self.digest(name))
        manifest = self._manifest(digest)
        blob = self.store.view(Digest.parse(manifest.blob.digest))
        return assemble(name, manifest, blob)

    def stream(self, name: str) -> "Expert":
        """`library[name]`, with its tensors read from the store each time that they are looked at
        and not kept. It is verified once, now, and nothing of it stays in memory: for what goes
        through many experts a module at a time, such as merging."""
        from adaptlib.experts.streamed import streamed

        return streamed(name, self.manifest(name), self.store)

    def summaries(self) -> dict[str, tuple[str, Summary]]:
        """(digest, summary) by name, from the index, which is brought up to date."""
        names = self.names()
        known = index.read(self.path / "index.db", names.values()) if self.path else {}
        fresh = {
            digest: Summary.of(self._manifest(Digest.parse(digest)))
            for digest in set(names.values()) - known.keys()
        }
        if fresh and self.path:
            index.write(self.path / "index.db", fresh)
        known |= fresh
        return {name: (digest, known[digest]) for name, digest in names.items()}

    def log(self, name: str) -> list[LogEntry]:
        """Every move of a name's tags, oldest first."""
        return self.store.log(expert_ref(name).name)

    # -- writing ------------------------------------------------------------------------------

    def add(
        self,
        source: "str | Path | Expert | Packed",
        name: str | None = None,
        *,
        base: str | None = None,
        task: str | None = None,
        description: str | None = None,
        replace: bool = False,
    ) -> Added:
        """Keep an expert: a directory (PEFT or adaptlib), `hf://org/repo[@rev][/subfolder]`, or a
        value. Nothing changes in the library unless all of it succeeds.

        The name is taken from the source where none is given. A name that points to another expert
        is a ConflictError unless `replace`, or unless it is this one, added before its base model
        was here to be pinned. The expert is checked against its base model where
        that is on this machine.
        """
        prepared = self._prepare(
            source, name, base=base, task=task, description=description, replace=replace
        )
        return self._keep(prepared)

    def add_all(
        self,
        sources: Sequence[str | Path],
        *,
        base: str | None = None,
        task: str | None = None,
        description: str | None = None,
        replace: bool = False,
    ) -> list[Added]:
        """`add` for several sources: all of them are read and checked before any is kept."""
        options = {"base": base, "task": task, "description": description, "replace": replace}
        prepared = [self._prepare(source, None, **options) for source in sources]
        seen: dict[Ref, str | Path] = {}
        for source, one in zip(sources, prepared, strict=True):
            if one.ref in seen:
                raise ConflictError(
                    f"{seen[one.ref]} and {source} would both be named {one.ref}",
                    hint=f"adaptlib add {source} --name OTHER",
                )
            seen[one.ref] = source
        return [self._keep(one) for one in prepared]

    def _prepare(
        self,
        source: "str | Path | Expert | Packed",
        name: str | None,
        *,
        base: str | None,
        task: str | None,
        description: str | None,
        replace: bool,
    ) -> "_Prepared":
        """Everything of `add` that can fail for what the source is; keeps nothing."""
        packed, default_name, notes = read_source(source, base)
        ref = expert_ref(name if name is not None else default_name)
        before = self._at(ref)
        packed, checked = pinned(
            packed, str(ref), base, cache=self.path / "derived" / "bases" if self.path else None
        )
        notes += checked
        said = {"task": task, "description": description}
        card = dict(packed.card) | {key: text for key, text in said.items() if text is not None}
        packed = dataclasses.replace(packed, card=card)
        check_structure(str(ref), packed)
        check_content(str(ref), packed)
        if changes_nothing(packed):
            notes.append(f"{ref}: every update in it is zero, so it changes nothing")
        # What can be refused is refused before anything is put, so a taken name costs a hash.
        encode_manifest(str(ref), packed.manifest(str(Digest.of(b""))))
        if before is not None and not replace:
            hashed = hashlib.sha256()
            for piece in packed.blob():
                hashed.update(piece)
            new = packed.manifest(f"sha256:{hashed.hexdigest()}")
            if self._manifest(before) not in (new, _unpinned(new)):
                raise ConflictError(
                    f"the name {ref} is taken by {before.short}; this expert is "
                    f"{Digest.of(encode_manifest(str(ref), new)).short}",
                    hint=f"give another name, a tag ({ref.name}:v2), or --replace",
                )
            if self._manifest(before) != new:
                notes.append(f"{ref}: the same expert as before, now pinned to its base model")
        return _Prepared(packed, ref, before, tuple(notes))

    def _keep(self, prepared: "_Prepared") -> Added:
        packed, ref, before = prepared.packed, prepared.ref, prepared.before
        with ThreadPoolExecutor(1) as beside:  # hashing and writing leave a core free
            sketch = beside.submit(sketches.sketch_expert, packed) if self.path else None
            manifest = packed.manifest(str(self.store.put(packed.blob())))
        digest = self.store.put(encode_manifest(str(ref), manifest))
        if digest != before:
            move_ref(self.store, ref, digest, expect=before, reason="add")
        if self.path:
            index.write(self.path / "index.db", {str(digest): Summary.of(manifest)})
            if sketch is not None and digest != before:
                sketches.keep_sketch(self.path, str(digest), packed.shapes, sketch.result())
        return Added(str(ref), str(digest), manifest, before != digest, prepared.notes)

    def remove(self, name: str) -> str:
        """Forget a name (`name` with all its tags, or one `name:tag`). The expert itself stays
        until `gc`. Returns the digest it had."""
        victims = self.removable(name)
        for victim, digest in victims.items():
            move_ref(self.store, victim, None, expect=digest, reason="rm")
        return str(victims.get(expert_ref(name)) or next(iter(victims.values())))

    def removable(self, name: str) -> dict[Ref, Digest]:
        """What `remove` would remove. Raises as it does, and changes nothing."""
        refs = self._expert_refs()
        if _DIGEST.fullmatch(name) and all(r.name != name for r in refs):
            self.digest(name)
            raise UsageError(
                f"{name} is a digest, not a name; only names are removed",
                hint=f"its names: adaptlib show {name}",
            )
        ref = expert_ref(name)
        victims = {
            r: d for r, d in refs.items() if r == ref or (r.name == ref.name and ":" not in name)
        }
        if not victims:
            self.digest(name)  # raises, with the nearest names
        return victims

    def rename(self, old: str, new: str) -> str:
        """Give an expert another name, with all its tags; its digest stays. ConflictError where
        the new name is taken."""
        source, target = expert_ref(old), expert_ref(new)
        refs = self._expert_refs()
        moved = {r: d for r, d in refs.items() if r.name == source.name}
        if ":" in old or ":" in new:
            moved = {r: d for r, d in moved.items() if r == source}
        if not moved:
            self.digest(old)
            raise NotFoundError(f"{old} is a digest, not a name", hint=f"adaptlib tag {old} {new}")
        pairs = {
            r: (target if ":" in old or ":" in new else Ref(target.name, r.tag)) for r in moved
        }
        for taken in refs:
            if taken in pairs.values() or (len(pairs) > 1 and taken.name == target.name):
                raise ConflictError(f"the name {taken} is taken", hint=f"adaptlib rm {taken}")
        for r, digest in moved.items():
            move_ref(self.store, pairs[r], digest, expect=None, reason=f"mv from {r}")
        for r, digest in moved.items():
            move_ref(self.store, r, None, expect=digest, reason=f"mv to {pairs[r]}")
        return str(next(iter(moved.values())))

    def tag(self, name: str, new: str, *, replace: bool = False) -> str:
        """Give an expert one more name, `name:tag` or another name."""
        digest, ref = Digest.parse(self.digest(name)), expert_ref(new)
        before = self._at(ref)
        if before not in (None, digest) and not replace:
            raise ConflictError(
                f"{ref} is taken by {before.short if before else ''}",
                hint="add --replace to move it",
            )
        if before != digest:
            move_ref(self.store, ref, digest, expect=before, reason=f"tag of {name}")
        return str(digest)

    # -- upkeep -------------------------------------------------------------------------------

    def verify(self, *, deep: bool = False) -> Report:
        """Re-hash everything that is kept and follow every ref. `deep` also parses each expert and
        looks for NaN."""
        report = self.store.verify(children)
        if not deep:
            return report
        broken = {ref for problem in report.problems for ref in problem.refs}
        problems = list(report.problems)
        for name, digest in self.tags().items():
            if Ref.parse(name) in broken:
                continue
            try:
                check_content(name, self.packed(name))
            except Exception as error:  # whatever is wrong with it is the finding
                problems.append(
                    Problem(
                        kind="corrupt",
                        digest=Digest.parse(digest),
                        refs=(Ref.parse(name),),
                        detail=str(error),
                        hint=f"adaptlib rm {name}",
                    )
                )
        return dataclasses.replace(report, problems=tuple(problems))

    def restore(self, gc_id: str) -> int:
        """Put back what the gc of that id moved to the trash; returns how many objects."""
        try:
            return self.store.restore(gc_id)
        except ObjectNotFound as error:
            raise NotFoundError(str(error), hint=error.hint) from None

    def gc(
        self,
        *,
        grace: timedelta = timedelta(days=1),
        dry_run: bool = False,
        allow_empty: bool = False,
    ) -> GcResult:
        """Move what no name leads to, and none did within `grace`, to the trash. Without
        `allow_empty`, a library that has lost all its names is left alone."""
        return self.store.gc(children, grace=grace, dry_run=dry_run, allow_empty=allow_empty)

    # -- inside -------------------------------------------------------------------------------

    def _at(self, ref: Ref) -> Digest | None:
        """What one name points to. Reads that ref alone: all of them, for each of a thousand
        experts, would be a million files."""
        if ref.name.split("/")[0] in RECORDS:
            return None
        try:
            return self.store.ref(ref)
        except RefNotFound:
            return None

    def _expert_refs(self) -> dict[Ref, Digest]:
        refs = self.store.refs()
        return {r: d for r, d in refs.items() if r.name.split("/")[0] not in RECORDS}

    def _manifest(self, digest: Digest) -> Manifest:
        return parse_manifest(digest.short, self.store.get(digest))


def _unpinned(manifest: Manifest) -> Manifest:
    """The manifest as it is where the base model is not on the machine."""
    pin = dict(manifest.card["base"]) | {"revision": None, "digest": None}
    return msgspec.structs.replace(manifest, card={**manifest.card, "base": pin})
