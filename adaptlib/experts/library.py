"""Library: a mapping from names to experts, over a store."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, final

import msgspec

from adaptlib.errors import (
    ConflictError,
    NotFoundError,
    UsageError,
)
from adaptlib.experts import index, keeping, sketches
from adaptlib.experts.catalog import Catalog, is_digest
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
from adaptlib.experts.damage import forget, next_command, read_object, read_parent, view_object
from adaptlib.experts.index import Summary
from adaptlib.experts.names import (
    Move,
    expert_ref,
    move_ref,
    move_refs,
)
from adaptlib.experts.pinning import pinned
from adaptlib.experts.references import blob_sizes, children
from adaptlib.experts.sources import read_source
from library_store import (
    Digest,
    GcResult,
    LogEntry,
    ObjectCorrupt,
    ObjectNotFound,
    Problem,
    Ref,
    RefCorrupt,
    Repair,
    Report,
    Store,
)

if TYPE_CHECKING:
    import adaptlib.experts.expert  # the whole name is what beartype finds from anywhere
    from adaptlib.experts.expert import Expert


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
        self.catalog = Catalog(store, path)

    @classmethod
    def open(cls, path: str | Path | None = None, *, create: bool = False) -> "Library":
        """The library at `path`, or where `library_path` finds one. NotFoundError where there is
        none, unless `create`."""
        found = Catalog.open(path, create=create)
        return cls(found.store, found.path)

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
        return self.catalog.names()

    def tags(self) -> dict[str, str]:
        """Digest by `name:tag`, every tag of every name."""
        return self.catalog.tags()

    def pins(self) -> dict[str, str]:
        """Digest by label, of what is pinned."""
        return self.catalog.pins()

    def digest(self, name: str) -> str:
        """The digest (`sha256:...`) of a name, a `name:tag` or a prefix of a digest.

        NotFoundError suggests the nearest names; UsageError where the prefix fits several.
        """
        return self.catalog.digest(name)

    def manifest(self, name: str) -> Manifest:
        """What is kept about an expert, without its tensors."""
        return self._manifest(Digest.parse(self.digest(name)))

    def packed(self, name: str) -> Packed:
        """An expert as bytes, mapped and verified."""
        digest = Digest.parse(self.digest(name))
        manifest = self._manifest(digest)
        blob = view_object(self.store, Digest.parse(manifest.blob.digest))
        return assemble(name, manifest, blob)

    def stream(self, name: str) -> "Expert":
        """`library[name]`, with its tensors read from the store each time that they are looked at
        and not kept. It is verified once, now, and nothing of it stays in memory: for what goes
        through many experts a module at a time, such as merging."""
        from adaptlib.experts.streamed import streamed

        return streamed(name, self.manifest(name), self.store)

    def summaries(self) -> dict[str, tuple[str, Summary]]:
        """(digest, summary) by name, from the index, which is brought up to date."""
        return self.catalog.summaries()

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
        return self._keep([prepared])[0]

    def add_all(
        self,
        sources: Sequence[str | Path],
        *,
        base: str | None = None,
        task: str | None = None,
        description: str | None = None,
        replace: bool = False,
    ) -> list[Added]:
        """`add` for several sources: all of them get their names, or none."""
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
        return self._keep(prepared)

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
        before = self.catalog.at(ref)
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
            held = self._undamaged(before, str(ref), [new, _unpinned(new)])
            if held not in (new, _unpinned(new)):
                raise ConflictError(
                    f"the name {ref} is taken by {before.short}; this expert is "
                    f"{Digest.of(encode_manifest(str(ref), new)).short}",
                    hint=f"give another name, a tag ({ref.name}:v2), or --replace",
                )
            if held != new:
                notes.append(f"{ref}: the same expert as before, now pinned to its base model")
        return _Prepared(packed, ref, before, tuple(notes))

    def _keep(self, prepared: "Sequence[_Prepared]") -> list[Added]:
        """Bytes first, names after, and last what can be made again."""
        kept = [self._put(one) for one in prepared]
        pairs = list(zip(prepared, kept, strict=True))
        # Also where it is there: whoever moved it may have been killed before that was durable.
        moves = [Move(p.ref, p.before, Digest.parse(a.digest), "add") for p, a in pairs]
        move_refs(self.store, moves)
        for one, added in pairs:
            # What had no name yet may have gone to a collection with hardly any grace.
            if self._is_gone(Digest.parse(added.manifest.blob.digest)):
                self.store.put(one.packed.blob())
        if self.path:
            summaries = {added.digest: Summary.of(added.manifest) for added in kept}
            index.write(self.path / "index.db", summaries)
        return kept

    def _put(self, prepared: "_Prepared") -> Added:
        packed, ref, before = prepared.packed, prepared.ref, prepared.before
        with ThreadPoolExecutor(1) as beside:  # hashing and writing leave a core free
            sketch = beside.submit(sketches.sketch_expert, packed) if self.path else None
            manifest = packed.manifest(str(self.store.put(packed.blob())))
        digest = self.store.put(encode_manifest(str(ref), manifest))
        if self.path and sketch is not None and digest != before:
            sketches.keep_sketch(self.path, str(digest), packed.shapes, sketch.result())
        return Added(str(ref), str(digest), manifest, before != digest, prepared.notes)

    def remove(self, name: str) -> str:
        """Forget a name (`name` with all its tags, or one `name:tag`). The expert itself stays
        until `gc`. Returns the digest it had."""
        victims = self.removable(name)
        move_refs(self.store, [Move(ref, digest, None, "rm") for ref, digest in victims.items()])
        return str(victims.get(expert_ref(name)) or next(iter(victims.values())))

    def removable(self, name: str) -> dict[Ref, Digest]:
        """What `remove` would remove. Raises as it does, and changes nothing."""
        refs = self.catalog.refs()
        if is_digest(name) and all(r.name != name for r in refs):
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
            raise ConflictError(
                f"{name} was made by another process just now", hint="look again: adaptlib list"
            )
        return victims

    def rename(self, old: str, new: str) -> str:
        """Give an expert another name, with all its tags; its digest stays. ConflictError where
        the new name is taken. A renaming that was killed half way is gone on with."""
        source, target = expert_ref(old), expert_ref(new)
        refs = self.catalog.refs()
        moved = {r: d for r, d in refs.items() if r.name == source.name}
        if ":" in old or ":" in new:
            moved = {r: d for r, d in moved.items() if r == source}
        if not moved:
            self.digest(old)
            raise NotFoundError(f"{old} is a digest, not a name", hint=f"adaptlib tag {old} {new}")
        pairs = {
            r: (target if ":" in old or ":" in new else Ref(target.name, r.tag)) for r in moved
        }
        there = {r for r in moved if pairs[r] != r and refs.get(pairs[r]) == moved[r]}
        for taken in refs if there != moved.keys() else ():
            ours = taken in {pairs[r] for r in there}
            if not ours and (
                taken in pairs.values() or (len(pairs) > 1 and taken.name == target.name)
            ):
                raise ConflictError(f"the name {taken} is taken", hint=f"adaptlib rm {taken}")
        made = [
            Move(pairs[r], None, digest, f"mv from {r}")
            for r, digest in moved.items()
            if r not in there
        ]
        gone = [Move(r, digest, None, f"mv to {pairs[r]}") for r, digest in moved.items()]
        move_refs(self.store, [*made, *gone])
        return str(next(iter(moved.values())))

    def tag(self, name: str, new: str, *, replace: bool = False) -> str:
        """Give an expert one more name, `name:tag` or another name."""
        digest, ref = Digest.parse(self.digest(name)), expert_ref(new)
        before = self.catalog.at(ref)
        if before not in (None, digest) and not replace:
            raise ConflictError(
                f"{ref} is taken by {before.short if before else ''}",
                hint="add --replace to move it",
            )
        if before != digest:
            move_ref(self.store, ref, digest, expect=before, reason=f"tag of {name}")
        return str(digest)

    # -- upkeep -------------------------------------------------------------------------------

    def verify(self, *, deep: bool = False, quick: bool = False) -> Report:
        """Re-hash everything that is kept and follow every ref. `deep` also parses each expert and
        looks for NaN; `quick` hashes manifests alone, and of blobs only asks whether they are there
        and of the right size. The hint of a problem is the command to type. Changes nothing."""
        report = self.store.verify(children, sizes=blob_sizes if quick else None)
        return self._advised(report, deep=deep)

    def repair(self, *, deep: bool = False) -> Repair:
        """Verify, move what is damaged to quarantine/, and put back what the library has an intact
        copy of. The report is of what is left to be done, by which command; see `verify`."""
        done = self.store.repair(children)
        return dataclasses.replace(done, report=self._advised(done.report, deep=deep))

    def _advised(self, report: Report, *, deep: bool) -> Report:
        refs: set[Ref] | None = None
        with suppress(RefCorrupt, OSError):
            refs = set(self.store.refs())
        problems = [
            dataclasses.replace(problem, hint=next_command(self.store, self.path, problem, refs))
            for problem in report.problems
        ]
        broken = {ref for problem in problems for ref in problem.refs}
        for name, digest in self.tags().items() if deep and refs is not None else ():
            ref = Ref.parse(name)
            if ref in broken:
                continue
            try:
                check_content(name, self.packed(name))
            except Exception as error:  # whatever is wrong with it is the finding
                hint = forget([ref], refs)
                digest_ = Digest.parse(digest)
                problems.append(Problem("corrupt", digest_, (ref,), str(error), hint))
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
        history: timedelta = timedelta(days=14),
        dry_run: bool = False,
        allow_empty: bool = False,
    ) -> GcResult:
        """Move to the trash what no name or pin leads to, none did within `history`, and was not
        put within `grace`. Without `allow_empty`, a library that has lost all its names is left
        alone."""
        return self.store.gc(
            children,
            sizes=blob_sizes,
            grace=grace,
            history=history,
            dry_run=dry_run,
            allow_empty=allow_empty,
        )

    def pin(self, name: str, label: str | None = None) -> tuple[str, str]:
        """Keep the expert that `name` (or a digest) is now, whatever becomes of its names; returns
        (label, digest). The label is the digest's first 12 digits where none is given."""
        return keeping.pin(self.catalog, name, label)

    def unpin(self, label: str) -> str:
        """Take a pin away, by its label or the digest it holds; returns the digest."""
        return keeping.unpin(self.catalog, label)

    def freed_by(self, victims: Iterable[Ref]) -> int:
        """How many bytes gc could take if these refs were gone: what nothing else leads to."""
        return keeping.freed_by(self.catalog, victims)

    # -- inside -------------------------------------------------------------------------------

    def _undamaged(
        self, digest: Digest, name: str, candidates: Sequence[Manifest]
    ) -> Manifest | None:
        """The manifest with this digest; where it is damaged or gone, that of the candidates whose
        bytes it had, if any: adding an expert again repairs it."""
        try:
            return parse_manifest(digest.short, read_parent(self.store, digest))
        except (ObjectCorrupt, ObjectNotFound):
            same = (one for one in candidates if Digest.of(encode_manifest(name, one)) == digest)
            return next(same, None)

    def _is_gone(self, digest: Digest) -> bool:
        try:
            return digest not in self.store
        except OSError:  # nobody can look just now; it was put a moment ago
            return False

    def _manifest(self, digest: Digest) -> Manifest:
        return parse_manifest(digest.short, read_object(self.store, digest))


def _unpinned(manifest: Manifest) -> Manifest:
    """The manifest as it is where the base model is not on the machine."""
    pin = dict(manifest.card["base"]) | {"revision": None, "digest": None}
    return msgspec.structs.replace(manifest, card={**manifest.card, "base": pin})
