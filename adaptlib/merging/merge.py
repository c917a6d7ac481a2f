"""Merge: several experts in, one expert out, a module at a time.

A merge is a formula for one module, `(part, *, options) -> update`, and a line in MERGES. All that
is not the formula is here: lining the experts up, weights, factor space, the form of the result,
the card.
"""

import difflib
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts.delta import Delta
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.sparse import SparseDelta
from adaptlib.merging.kept import Form, Kept, Kind, Update, keep, squared

On = Literal["updates", "factors"]
Progress = Callable[[int, int, str], None]  # modules done, of how many, the last one


@final
@dataclass(frozen=True, eq=False)
class Part:
    """What a formula sees of one module: the updates of the experts that have it, in their order.

    `count` is the number of experts merged, those that lack the module included: they count as
    ΔW = 0 there. `places` are the places of the experts in their order, and `facts` what was
    measured of each on data, for merges that need that.
    """

    module: str
    deltas: tuple[Delta, ...]
    weights: tuple[float, ...]
    count: int
    places: tuple[int, ...]
    facts: tuple[Any, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.deltas[0].shape

    def generator(self, seed: int, which: int) -> torch.Generator:
        """Random numbers for the `which`th update here, the same whatever else is merged."""
        salt = f"{seed}/{self.module}/{self.places[which]}".encode()
        number = int.from_bytes(hashlib.sha256(salt).digest()[:7], "big")
        return torch.Generator().manual_seed(number)


@final
@dataclass(frozen=True, eq=False)
class Data:
    """What merges with data are given: the base model, and for each expert (or for the new task,
    under any name) batches as a transformers causal model takes them: `input_ids`,
    `attention_mask` and `labels`, each (sequence, tok)."""

    model: Any
    batches: Mapping[str, Sequence[Mapping[str, Tensor]]]


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """What a merge found out on data: new weights, or for each expert and module a tensor, and
    what its card is to say of it."""

    weights: Mapping[str, float] | None = None
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Merge:
    """One way to merge. `formula` makes the update of one module; `weight` is an expert's weight
    where none is given: `mean` is 1 over their number. `rank` is that of a LoRA result where none
    is given: the `sum` of the experts' ranks or the `largest`. `measure` looks at data first."""

    formula: Callable[..., Update]
    weight: Literal["mean", "one"] = "one"
    rank: Literal["sum", "largest"] = "sum"
    measure: Callable[..., Measured] | None = None

    @property
    def name(self) -> str:
        return self.formula.__name__

    @property
    def summary(self) -> str:
        """The first sentence of the formula's docstring."""
        return " ".join((inspect.getdoc(self.formula) or "").split("\n\n")[0].split())

    @property
    def options(self) -> dict[str, Any]:
        """The formula's own options and their defaults."""
        found: dict[str, Any] = {}
        for function in (self.measure, self.formula):
            for name, parameter in _parameters(function).items():
                found[name] = parameter.default
        found.pop("on", None)  # see `__call__`
        return found

    def __call__(
        self,
        experts: Mapping[str, Expert],
        *,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        kind: Kind | None = None,
        rank: int | None = None,
        keep_ratio: float | None = None,
        on: On = "updates",
        data: Data | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Expert:
        """One expert of several.

        `weights` are by name, or in the order of `experts`. `kind`, `rank` and `keep_ratio` say how
        the result is kept; left out, it is of the experts' kind and as large as all of them
        together, cut where a matrix can hold no more. What is lost by it is in the card as
        `merge.error`, the relative Frobenius norm over all modules.

        `on="factors"` applies the formula to the A's and to the B's apart, each times √(|w| scale),
        as PEFT's `add_weighted_adapter` does. That is another expert: (Σ B_i)(Σ A_i) has cross
        terms B_i A_j. It is for LoRA of one rank. A formula that takes `on` has its own way
        (`lorahub`); other merges with data have none.

        `options` are the formula's own (see `options`), and nothing else is taken. One module at a
        time is made: no merge holds more than a few matrices of the model.

        An expert that lacks a module counts as zero there. Raises UsageError for no experts, for
        weights or options that do not fit, for a rank above what any module can hold;
        BaseMismatchError for several base models or shapes; RefusedError for NaN, and with
        `factors` for what has none.
        """
        taken = _lined_up(experts)
        card = _card(taken)
        self._check(options, data, on)
        form = Form(kind, rank, keep_ratio)
        if form == Form() and len({expert.kind for expert in taken.values()}) > 1:
            form = Form("lora")  # an expert is of one kind, whoever has which module
        _check_rank(taken, rank)
        given = _weights(taken, weights, 1 / len(taken) if self.weight == "mean" else 1.0)
        measured = Measured()
        if self.measure is not None and data is not None:
            for name, expert in taken.items():  # before they are run, not module by module
                for module, delta in expert.deltas.items():
                    _check_finite(name, module, delta)
            measured = self.measure(taken, given, data, **_own(self.measure, options, on))
            given = dict(measured.weights or given)
        own = _own(self.formula, options, on)
        modules = sorted({module for expert in taken.values() for module in expert.deltas})
        deltas: dict[str, Delta] = {}
        whole = lost = 0.0
        exact: list[str] = []
        for done, module in enumerate(modules, start=1):
            part = _part(taken, given, module, measured)
            kept = self._module(part, own, form, on)
            deltas[module] = kept.delta
            if kept.whole is None:
                exact.append(module)
            else:
                whole, lost = whole + kept.whole, lost + kept.lost
            if progress is not None:
                progress(done, len(modules), module)
        if lost:  # else the error is 0, whatever the norms of what was kept whole
            whole += sum(squared(deltas[module]) for module in exact)
        error = math.sqrt(lost / whole) if whole else 0.0
        said = {k: v for k, v in self.options.items() if isinstance(v, bool | int | float | str)}
        card |= {
            "merge": {
                "method": self.name,
                "weights": [given[name] for name in taken],
                "options": said | options,
                "kept": {"kind": kind, "rank": rank, "keep_ratio": keep_ratio, "on": on},
                "error": float(f"{error:.4g}"),
            }
            | dict(measured.card)
        }
        return Expert(next(iter(taken.values())).base, deltas, card)

    def _module(self, part: Part, options: Mapping[str, Any], form: Form, on: On) -> Kept:
        if on == "factors" and "on" not in _parameters(self.formula):
            return _on_factors(self.formula, part, options, form)
        update = self.formula(part, **options)
        if self.rank == "largest" and form.rank is None and form.kind_for(part.deltas) == "lora":
            ranks = [delta.rank for delta in part.deltas if isinstance(delta, LoRADelta)]
            form = Form("lora", max(ranks, default=None))
        return keep(update, part.deltas, form)

    def _check(self, options: Mapping[str, Any], data: Data | None, on: str) -> None:
        known = self.options
        for name in options.keys() - known.keys():
            close = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"{self.name} takes no {name!r}"
                + (f"; did you mean {close[0]}?" if close else "")
                + f" Its options: {', '.join(known) or 'none'}"
            )
        if on not in get_args(On):
            raise UsageError(f"on is one of {', '.join(get_args(On))}; got {on!r}")
        if on == "factors" and self.measure and "on" not in _parameters(self.formula):
            raise RefusedError(
                f"{self.name} weighs whole updates; it has no way with factors",
                hint='on="updates"',
            )
        if self.measure is not None and data is None:
            raise UsageError(
                f"{self.name} is learnt from data; give data=Data(model, batches)",
                hint="a merge that needs none: linear, ties, ...",
            )


def _parameters(function: Callable[..., Any] | None) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a formula, which are its options."""
    if function is None:
        return {}
    found = inspect.signature(function).parameters
    return {n: p for n, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _own(function: Callable[..., Any], options: Mapping[str, Any], on: On) -> dict[str, Any]:
    """Those of the options that a formula, or a measure, takes."""
    known = _parameters(function)
    return {k: v for k, v in (dict(options) | {"on": on}).items() if k in known}


def _lined_up(experts: Mapping[str, Expert]) -> dict[str, Expert]:
    """The experts, each read once; an error unless they are of one base model and its shapes."""
    taken = dict(experts.items())
    if not taken:
        raise UsageError("there are no experts to merge", hint="adaptlib list")
    first = next(iter(taken))
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, expert in taken.items():
        if expert.base != taken[first].base:
            raise BaseMismatchError(
                f"experts of two base models cannot be merged: {first!r} is for "
                f"{taken[first].base!r}, {name!r} for {expert.base!r}"
            )
        for module, shape in expert.shapes.items():
            other, wanted = shapes.setdefault(module, (name, shape))
            if shape != wanted:
                raise BaseMismatchError(
                    f"{other!r} and {name!r} disagree on {module}: {wanted} and {shape}",
                    hint="merge experts of one base model",
                )
    return taken


def _check_rank(experts: Mapping[str, Expert], rank: int | None) -> None:
    most = max(min(shape) for expert in experts.values() for shape in expert.shapes.values())
    if rank is not None and rank > most:
        raise UsageError(
            f"rank {rank} is above what any module can hold, {most}", hint=f"rank={most}, or less"
        )


def _weights(
    experts: Mapping[str, Expert],
    given: Mapping[str, float] | Sequence[float] | None,
    default: float,
) -> dict[str, float]:
    if given is None:
        return dict.fromkeys(experts, default)
    if not isinstance(given, Mapping):
        if len(given) != len(experts):
            raise UsageError(f"{len(experts)} experts want as many weights; got {len(given)}")
        given = dict(zip(experts, given, strict=True))
    if unknown := sorted(given.keys() - experts.keys()):
        raise UsageError(
            f"a weight for {unknown[0]!r}, which is not merged here; there are: "
            f"{', '.join(experts)}"
        )
    found = {name: float(given.get(name, default)) for name in experts}
    for name, weight in found.items():
        if not math.isfinite(weight):
            raise UsageError(f"the weight of {name!r} is {weight}; want a number")
    return found


def _part(
    experts: Mapping[str, Expert], weights: Mapping[str, float], module: str, measured: Measured
) -> Part:
    here = [(i, n) for i, (n, e) in enumerate(experts.items()) if module in e.deltas]
    deltas = tuple(experts[name].deltas[module] for _, name in here)
    for (_, name), delta in zip(here, deltas, strict=True):
        _check_finite(name, module, delta)
    facts = tuple(measured.facts[name][module] for _, name in here) if measured.facts else ()
    return Part(
        module,
        deltas,
        tuple(weights[name] for _, name in here),
        len(experts),
        tuple(i for i, _ in here),
        facts,
    )


def _check_finite(name: str, module: str, delta: Delta) -> None:
    if not all(_finite(tensor) for tensor in _numbers(delta)):
        raise RefusedError(
            f"expert {name!r} holds NaN or infinity in {module}",
            hint="leave it out, or train it again",
        )


def _finite(x: Tensor) -> bool:
    """A sum with NaN or infinity in it is not finite; only where a sum is not is each number looked
    at, which takes several times as long."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _numbers(delta: Delta) -> Iterable[Tensor]:
    if isinstance(delta, LoRADelta):
        return (delta.a, delta.b)
    assert isinstance(delta, SparseDelta)
    return (delta.values,)


def _on_factors(
    formula: Callable[..., Update], part: Part, options: Mapping[str, Any], form: Form
) -> Kept:
    """The formula on the A's and on the B's, as PEFT has it."""
    loras = [delta for delta in part.deltas if isinstance(delta, LoRADelta)]
    ranks = sorted({delta.rank for delta in loras})
    if len(loras) < len(part.deltas) or len(ranks) > 1:
        sparse = "sparse updates" if len(loras) < len(part.deltas) else ""
        what = sparse or f"ranks {', '.join(map(str, ranks))}"
        raise RefusedError(
            f"{part.module} has {what}: factors are merged where all are LoRA of one rank",
            hint='on="updates"',
        )
    pairs = list(zip(part.weights, loras, strict=True))
    shares = [math.sqrt(abs(w * d.scale)) for w, d in pairs]
    signed = [math.copysign(s, w * d.scale) for s, (w, d) in zip(shares, pairs, strict=True)]
    eye = torch.eye(ranks[0], device=loras[0].a.device)
    sides = []
    for side, deltas, weights in (  # the sign is with A, as in PEFT: cross terms depend on it
        ("A", [LoRADelta(d.a.float(), eye) for d in loras], signed),
        ("B", [LoRADelta(eye, d.b.float()) for d in loras], shares),
    ):
        # Its own name, so that what is random is drawn for each.
        of_side = replace(
            part, module=f"{part.module}.{side}", deltas=tuple(deltas), weights=tuple(weights)
        )
        update = formula(of_side, **options)
        sides.append(update if isinstance(update, Tensor) else update.dense())
    a, b = sides
    return keep(LoRADelta(a, b), part.deltas, form)


def _card(experts: Mapping[str, Expert]) -> dict[str, Any]:
    """What is true of the merged expert whatever the method. No metrics: they were others'."""
    cards = [expert.card for expert in experts.values()]
    pins = [dict(card["base"]) for card in cards if isinstance(card.get("base"), Mapping)]
    card: dict[str, Any] = {"parents": list(experts)}
    pin: dict[str, Any] = {}
    for key in ("id", "revision", "digest"):
        said = {p[key] for p in pins if p.get(key) is not None}
        if len(said) > 1 and key != "id":
            raise BaseMismatchError(
                f"the experts were trained on several versions of the base model: its {key} is "
                f"{', '.join(sorted(map(str, said)))}"
            )
        if said:
            pin[key] = said.pop()
    if pin:
        card["base"] = pin
    tasks = [t for c in cards for t in c.get("tasks") or [c.get("task")] if isinstance(t, str)]
    if tasks:
        card["tasks"] = sorted(set(tasks))
    licences = {card.get("licence") or card.get("license") for card in cards} - {None}
    if len(licences) == 1:
        card["licence"] = licences.pop()
    return card
