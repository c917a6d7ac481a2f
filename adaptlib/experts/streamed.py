"""Streamed: an expert whose tensors stay in the store until they are looked at."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from adaptlib.errors import CorruptError
from adaptlib.experts.codec import Manifest, Module, assemble, parts_of, to_delta
from adaptlib.experts.damage import REPAIR, view_object
from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Deltas, Expert
from adaptlib.experts.tensors import Span, layout
from library_store import Digest, Store


@final
@dataclass(frozen=True, eq=False)
class Streamed(Deltas):
    """The updates of an expert in a store, each read when it is looked at.

    A look-up maps the file anew and gives a delta over that mapping, which ends with the delta: so
    what is in memory is what somebody holds, and no file stays open. A mapping that were kept would
    keep every page that was ever touched. A store without files (MemoryStore) gives copies.

    A look-up does not verify again; a file that has gone or has another size by then is an error.
    """

    source: str  # what errors call it
    store: Store
    blob: Digest
    size: int  # bytes of the blob
    modules: Mapping[str, Module]
    spans: Mapping[str, tuple[Span, Span]]  # by module

    def __getitem__(self, module: str) -> Delta:
        first, second = self.spans[module]
        view = self.store.view(self.blob, verify=False)
        if len(view) != self.size:
            raise CorruptError(
                f"{self.source}: its file has {len(view):,} bytes now; it had {self.size:,}",
                hint=REPAIR,
            )
        return to_delta(self.modules[module], first.cut(view), second.cut(view))

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __contains__(self, module: object) -> bool:
        return module in self.modules  # without reading it

    @property
    def kind(self) -> str:
        return "sparse" if self.rank is None else "lora"

    @property
    def rank(self) -> int | None:
        return max((m.rank for m in self.modules.values() if m.rank is not None), default=None)

    @property
    def params(self) -> int:
        counted = slice(1, 2) if self.kind == "sparse" else slice(2)  # positions do not count
        return sum(span.params for pair in self.spans.values() for span in pair[counted])

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: module.shape for name, module in self.modules.items()}


def streamed(source: str, manifest: Manifest, store: Store) -> Expert:
    """The expert of `manifest`, to be read from `store` bit by bit, without gates, which are no
    part of its updates. Its blob is verified here, in pieces, and checked against the manifest.
    `source` is what errors call it."""
    blob = Digest.parse(manifest.blob.digest)
    view = view_object(store, blob)  # verified by reading, not through the mapping
    assemble(source, manifest, view)
    where = layout(source, view)
    first, second = parts_of(manifest.kind)
    modules = dict(sorted(manifest.modules.items()))
    spans = {
        module: (where[f"{module}.{first}"], where[f"{module}.{second}"]) for module in modules
    }
    return Expert(
        manifest.base,
        Streamed(source, store, blob, len(view), modules, spans),
        manifest.card,
    )
