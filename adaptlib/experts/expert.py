"""Expert: the value that everything else is written in terms of."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.lora import LoRADelta


class Deltas(Mapping[str, Delta]):
    """The updates of one expert, at least one, by module in the order of the names, for an expert
    that is not in memory: each is made when it is looked at, and this is what is known of them
    without that."""

    @property
    @abstractmethod
    def kind(self) -> str: ...

    @property
    @abstractmethod
    def rank(self) -> int | None: ...

    @property
    @abstractmethod
    def params(self) -> int: ...

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, int]]: ...


@final
@dataclass(frozen=True, eq=False)
class Expert:
    """What was learned on top of one base model: a delta for each adapted module, and a card.

    `base` is the id of the base model. `deltas` is keyed by the model's own module names
    (`model.layers.0.self_attn.q_proj`), sorted, all of one kind. `card` is plain JSON data: task,
    description, licence, training recipe, metrics, parents, and under `base` the pin
    `{"id", "revision", "digest"}` by which a wrong base model is noticed.

    `gates` are for routers that were trained to know when an expert fits (PHATGOOSE,
    arXiv:2402.05859, section 3.2): a vector (d_in,), float32, at some of its modules, or none.
    They are no part of the update: merging, clustering and `fingerprint` leave them out.

    `deltas` is copied, but for `Deltas`, which stay what they are.
    """

    base: str
    deltas: Mapping[str, Delta]
    card: Mapping[str, Any] = field(default_factory=dict)
    gates: Mapping[str, Float[Tensor, " _"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "card", MappingProxyType(dict(self.card)))
        object.__setattr__(self, "gates", MappingProxyType(dict(sorted(self.gates.items()))))
        if self.gates:
            self._check_gates()
        if isinstance(self.deltas, Deltas):
            return
        deltas = dict(sorted(self.deltas.items()))
        kinds = sorted({delta.kind for delta in deltas.values()})
        if not deltas:
            raise UsageError("an expert without deltas changes nothing; give it one at least")
        if len(kinds) > 1:
            raise UsageError(f"the deltas of one expert are of one kind; got {', '.join(kinds)}")
        object.__setattr__(self, "deltas", MappingProxyType(deltas))

    def _check_gates(self) -> None:
        shapes = self.shapes
        for module, gate in self.gates.items():
            if module not in shapes:
                raise UsageError(f"a gate is for a module that the expert adapts; got {module!r}")
            if gate.dtype != torch.float32 or tuple(gate.shape) != (shapes[module][1],):
                raise UsageError(
                    f"the gate of {module} wants ({shapes[module][1]},) float32; got "
                    f"{tuple(gate.shape)} {str(gate.dtype).removeprefix('torch.')}"
                )

    @property
    def kind(self) -> str:
        """`lora` or `sparse`."""
        if isinstance(self.deltas, Deltas):
            return self.deltas.kind
        return next(iter(self.deltas.values())).kind

    @property
    def rank(self) -> int | None:
        """The largest rank of its deltas; None for a sparse expert."""
        if isinstance(self.deltas, Deltas):
            return self.deltas.rank
        ranks = [delta.rank for delta in self.deltas.values() if isinstance(delta, LoRADelta)]
        return max(ranks, default=None)

    @property
    def params(self) -> int:
        """How many numbers its updates keep."""
        if isinstance(self.deltas, Deltas):
            return self.deltas.params
        return sum(delta.params for delta in self.deltas.values())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) by module."""
        if isinstance(self.deltas, Deltas):
            return self.deltas.shapes
        return {name: delta.shape for name, delta in self.deltas.items()}

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over the updates, to tell whether two experts are one: of shapes, scales and
        every number, whatever the card, the gates, the names of files or the device."""
        from adaptlib.experts.codec import pack

        packed = pack(replace(self, gates={}))
        found = hashlib.sha256()
        for module, about in packed.modules.items():
            found.update(f"{module} {about}\n".encode())
        for name, raw in packed.tensors.items():
            found.update(f"{name} {raw.dtype} {raw.shape}\n".encode())
            found.update(raw.data)
        return found.hexdigest()

    def __repr__(self) -> str:
        return (
            f"Expert(base={self.base!r}, kind={self.kind!r}, modules={len(self.deltas)}, "
            f"rank={self.rank}, params={self.params:,})"
        )
