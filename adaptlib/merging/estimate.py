"""What a merge will come to, from a few of its modules."""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Deltas, Expert
from adaptlib.experts.library import Library
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.recipe import Recipe, pin
from adaptlib.experts.sparse import SparseDelta
from adaptlib.merging import MERGES
from adaptlib.merging.make import checked, find_merge, one_thread
from adaptlib.merging.merge import Progress

MOST = 8  # modules that are tried, beside those for experts that have none of them


@final
@dataclass(frozen=True)
class Estimate:
    """`params` and `bytes` of the result, about; `error` is that of the modules `tried`, None for
    merges with data. `memory` is the peak of this process in bytes, None where the system does not
    say; a base model that is loaded for its data comes on top."""

    kind: str
    rank: int | None
    modules: int
    params: int
    bytes: int
    memory: int | None
    error: float | None
    tried: tuple[str, ...]


def estimate(library: Library, recipe: Recipe, *, progress: Progress | None = None) -> Estimate:
    """Merge one module of each type, spread over the depth of the model, and tell from these what
    the whole will be. Nothing is kept.

    Of each type the result's size is taken to be the same share of the experts' in all layers. A
    merge with data is tried as the mean, which has the same size; its error is not known before.
    """
    pinned = checked(pin(library, recipe))
    merge, options = find_merge(pinned.method), dict[str, Any](pinned.options)
    if merge.measure is not None:
        merge, options = MERGES["linear"], {}
    experts = {name: library.stream(digest) for name, digest in pinned.parents.items()}
    sizes = _sizes(experts)
    chosen = _chosen(experts, sizes)
    some = {
        name: replace(expert, deltas=_Some(expert.deltas, chosen), gates={})
        for name, expert in experts.items()
    }
    with one_thread():
        tried = merge(
            some,
            weights=pinned.weights,
            kind=pinned.kind,
            rank=pinned.rank,
            keep_ratio=pinned.keep_ratio,
            on=pinned.on,
            progress=progress,
            **options,
        )
    params, stored = _scaled(tried, sizes)
    seen = sum(_bytes(delta) for delta in tried.deltas.values())
    peak = peak_memory()
    known = find_merge(pinned.method).measure is None
    return Estimate(
        kind=tried.kind,
        rank=tried.rank,
        modules=len(sizes),
        params=params,
        bytes=stored,
        memory=None if peak is None else peak + max(0, stored - seen),
        error=tried.card["merge"]["error"] if known else None,
        tried=chosen,
    )


def peak_memory() -> int | None:
    """The most memory that this process has had, in bytes; None where nobody says."""
    with suppress(OSError, ValueError):  # Linux; there ru_maxrss begins with the parent's peak
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@final
@dataclass(frozen=True, eq=False)
class _Some(Deltas):
    """Of an expert's updates those of some modules, each still read when it is looked at."""

    whole: Mapping[str, Delta]
    chosen: tuple[str, ...]

    def __getitem__(self, module: str) -> Delta:
        if module not in self.chosen:
            raise KeyError(module)
        return self.whole[module]

    def __iter__(self) -> Iterator[str]:
        return (module for module in self.chosen if module in self.whole)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def kind(self) -> str:
        return next(iter(self.values())).kind

    @property
    def rank(self) -> int | None:
        ranks = [delta.rank for delta in self.values() if isinstance(delta, LoRADelta)]
        return max(ranks, default=None)

    @property
    def params(self) -> int:
        return sum(delta.params for delta in self.values())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {module: delta.shape for module, delta in self.items()}


def _sizes(experts: Mapping[str, Expert]) -> dict[str, int]:
    """For each module the entries that its matrix has."""
    found: dict[str, int] = {}
    for expert in experts.values():
        for module, (d_out, d_in) in expert.shapes.items():
            found[module] = d_out * d_in
    return found


def _types(modules: Mapping[str, int]) -> dict[str, list[str]]:
    """Modules that differ by numbers only, in the order of these."""
    types: dict[str, list[str]] = {}
    for module in sorted(modules, key=_in_depth):
        types.setdefault(re.sub(r"\d+", "*", module), []).append(module)
    return types


def _in_depth(module: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]


def _chosen(experts: Mapping[str, Expert], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """One module of each type, the largest types first, each from another depth; and one of each
    expert that has none of these."""
    types = sorted(_types(sizes).values(), key=lambda held: -sizes[held[0]])[:MOST]
    chosen = [held[(2 * i + 1) * len(held) // (2 * len(types))] for i, held in enumerate(types)]
    for expert in experts.values():
        if not any(module in expert.deltas for module in chosen):
            own = list(expert.deltas)
            chosen.append(own[len(own) // 2])
    return tuple(sorted(chosen))


def _scaled(tried: Expert, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Parameters and bytes of the whole, from those of the modules that were tried."""
    params = stored = 0.0
    shares = {m: (d.params / sizes[m], _bytes(d) / sizes[m]) for m, d in tried.deltas.items()}
    mean = [sum(share[i] for share in shares.values()) / len(shares) for i in (0, 1)]
    for held in _types(sizes).values():
        known = [shares[module] for module in held if module in shares]
        share = [sum(one[i] for one in known) / len(known) for i in (0, 1)] if known else mean
        size = sum(sizes[module] for module in held)
        params, stored = params + share[0] * size, stored + share[1] * size
    return round(params), round(stored)


def _bytes(delta: Delta) -> int:
    if isinstance(delta, LoRADelta):
        return delta.a.nbytes + delta.b.nbytes
    assert isinstance(delta, SparseDelta)
    return delta.index.numel() * 4 + delta.values.nbytes  # positions are kept as 32 bits
