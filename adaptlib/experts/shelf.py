"""Shelf: a library whose experts stay loaded while there is room for them."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import final

import torch

from adaptlib.errors import UsageError
from adaptlib.experts.codec import Packed, assemble, parse_manifest, unpack
from adaptlib.experts.damage import read_object, view_object
from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Expert
from adaptlib.experts.library import Library
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from library_store import Digest


@final
class Shelf(Mapping[str, Expert]):
    """The experts of a library by name; those looked up last stay loaded, within `budget` bytes.

        shelf = Shelf(library, budget=2 * 1024**3, device="cuda")
        experts = {name: shelf[name] for name in shortlist(...)}

    An expert is loaded by mapping its file. On the CPU its tensors are the mapping, so nothing is
    copied, and what is not used need not even be read again once it was checked; another device
    gets a copy. Before one is loaded, as many of the least recently used are let go as its bytes
    need, so that a shelf alone never takes more than `budget`; an expert that somebody else still
    holds stays in memory for them.

    They are kept by digest and each look-up asks the library what the name means: an expert that
    was replaced is never given for the new one, and two names of one expert are one.

    A lookup takes what the library's does. UsageError where an expert alone is larger than
    `budget`.
    """

    def __init__(
        self, library: Library, *, budget: int, device: str | torch.device = "cpu"
    ) -> None:
        if budget < 1:
            raise UsageError(f"a shelf's budget is 1 byte or more; got {budget}")
        self.library = library
        self.budget = budget
        self.device = torch.device(device)
        self._held: OrderedDict[str, tuple[Expert, int]] = OrderedDict()

    def __getitem__(self, name: str) -> Expert:
        digest = self.library.digest(name)
        if digest in self._held:
            self._held.move_to_end(digest)
            return self._held[digest][0]
        packed = read_packed(self.library, digest, name)
        size = sum(raw.data.nbytes for raw in packed.tensors.values())
        if size > self.budget:
            raise UsageError(
                f"{name} takes {size:,} bytes on {self.device}; the shelf's budget is "
                f"{self.budget:,}",
                hint=f"Shelf(library, budget={size}), or more for more than one expert",
            )
        while self.bytes + size > self.budget:
            self._held.popitem(last=False)
        expert = unpack(packed)
        if self.device.type != "cpu":
            expert = _moved(expert, self.device)
        self._held[digest] = (expert, size)
        return expert

    def __iter__(self) -> Iterator[str]:
        return iter(self.library)

    def __len__(self) -> int:
        return len(self.library)

    def __contains__(self, name: object) -> bool:
        return name in self.library  # without loading it

    @property
    def bytes(self) -> int:
        """What the loaded experts take."""
        return sum(size for _, size in self._held.values())

    @property
    def loaded(self) -> tuple[str, ...]:
        """The digests of the loaded experts; the first is the next to go."""
        return tuple(self._held)


def read_packed(library: Library, digest: str, name: str) -> Packed:
    """The expert with this digest, mapped and verified; `name` is what errors call it. A library's
    own lookup would first ask whether the digest is a name, which reads every ref."""
    manifest = parse_manifest(name, read_object(library.store, Digest.parse(digest)))
    blob = view_object(library.store, Digest.parse(manifest.blob.digest))
    return assemble(name, manifest, blob)


def _moved(expert: Expert, device: torch.device) -> Expert:
    """The expert with its tensors on `device`."""
    deltas: dict[str, Delta] = {}
    for module, delta in expert.deltas.items():
        if isinstance(delta, LoRADelta):
            deltas[module] = LoRADelta(delta.a.to(device), delta.b.to(device), delta.scale)
        elif isinstance(delta, SparseDelta):
            index, values = delta.index.to(device), delta.values.to(device)
            deltas[module] = SparseDelta(index, values, delta.shape, delta.block)
    gates = {module: gate.to(device) for module, gate in expert.gates.items()}
    return Expert(expert.base, deltas, expert.card, gates)
